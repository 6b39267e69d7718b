"""Does a penalty weight for every embedding, tuned by its hypergradient, beat what a grid finds for one weight?

A model of a knowledge graph is trained by a few steps of Adagrad (.1) from small random embeddings; its penalty's
weights are chosen by the validation loss, in which other answers known to be true are masked. Each seed has other
initial embeddings and its own halves of the validation part: one to tune by, one to report (`--whole-validation` tunes
by all). Methods:

    grid        one weight for all, on a logarithmic grid from 1e-5 to 1e-1
    random      all weights drawn log-uniformly from there
    unroll      Adam (from .05 to .005) on the logarithms, by reverse mode through the last half of the training
    implicit    likewise, by the implicit theorem, although the training has not converged (20 iterations of damped CG)
    evolution   likewise, from pairs of trainings at perturbed weights
    online      likewise, but one training continues from outer step to outer step (a single loop), with new
                minibatches; the only method for graphs of more than 10 000 entities, and their default
    fixed       the same training, with all weights at their start

All take the same number of inner steps (evolution, with five trainings an outer step, as many as fill its last one); a
hypergradient's backward pass is not counted (the table has seconds, without compilation, over all pieces of a resumed
search). A search keeps its point of lowest loss on the tuned half; the last two methods keep the final model. All but
the first two start at `--start`. "all" is the first five.

    python benchmarks/link_prediction.py --dataset nations --model distmult --regulariser f2 --batch-size 0 \\
        --inner-steps 20 --method all --hyperparameters scalar embedding --seeds 10
    python benchmarks/link_prediction.py --dataset wn18rr --method fixed online --outer-steps 20 --resume
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.progress import Progress
from jaxhpo.data import knowledge_graph
from jaxhpo.models import link_prediction as lp

MODELS = {"distmult": lp.DistMult, "complex": lp.ComplEx, "cp": lp.CP, "transe": lp.TransE}
RETRAINED = ("grid", "random", "unroll", "implicit", "evolution")  # what "all" is
METHODS = (*RETRAINED, "fixed", "online")
LINES = {"scalar": "--", "relation": "-.", "entity": ":", "embedding": "-"}
KINDS = tuple(LINES)
LOW, HIGH, START = 1e-5, 1e-1, 5e-3
OUTER_RATE, CLIP = 0.05, 0.5
PAIRS, SIGMA = 2, 0.2  # of evolution strategies: 2 PAIRS + 1 trainings an outer step
LARGE = 10_000  # entities: such a graph is trained once
MOST_SCORES = 2**24  # at a time
RESULTS = pathlib.Path(__file__).parent / "results"
ADAGRAD = optax.adagrad(0.1, initial_accumulator_value=1e-10, eps=0.0)  # from zero its derivatives are infinite


class Part(NamedTuple):
    """Triples to evaluate, and for each side a bit mask of the other true answers. Leading axis: seeds."""

    triples: Any
    masks: dict


def unpack(bits, count):
    return jnp.unpackbits(bits, axis=1, count=count).astype(bool)


class Task:
    """A data set with a model, and the operations on it, for all seeds in sequence."""

    def __init__(self, args: argparse.Namespace, graph):
        self.graph, self.seeds, self.num_steps = graph, args.seeds, args.inner_steps
        self.weight, self.whole = args.start, args.whole_validation
        self.model = MODELS[args.model](rank=args.rank, reciprocal=args.reciprocal, scale=args.scale)
        self.truncate = args.truncate or None
        self.power, self.batch_size = {"f2": 2, "n3": 3}[args.regulariser], args.batch_size
        self.sides = args.sides
        self.full = None if self.batch_size else lp.group(self.graph.train, *self.graph.sizes)
        self.solver = jaxhpo.from_optax(self.train_loss, ADAGRAD)
        keys = jax.random.split(jax.random.key(0), self.seeds)
        self.starts = jax.vmap(lambda key: self.model.init(key, *self.graph.sizes))(keys)
        parts = zip(*(self._parts(seed, args.whole_validation) for seed in range(self.seeds)), strict=True)
        self.tuned, self.reported, self.ranked = (jax.tree.map(lambda *x: jnp.stack(x), *part) for part in parts)

    def _parts(self, seed, whole):
        """Return the part to tune by, the part to report, which tuning never sees, and its ranks' part."""
        validation, train = self.graph.validation, self.graph.train
        tuned, reported = (validation, validation) if whole else self.graph.halves(seed)
        known = (tuned, np.concatenate([train, tuned])), (reported, self.graph.known), (reported, self.graph.triples)
        masks = [lp.masks(*part, *self.graph.sizes) for part in known]
        bits = jax.tree.map(lambda mask: np.packbits(mask, axis=1), masks)
        return [Part(triples, mask) for (triples, _), mask in zip(known, bits, strict=True)]

    def train_loss(self, params, weights, batch):
        batch = self.full if batch is None else batch
        fit = lp.cross_entropy(self.model, params, batch, sides=self.sides)
        return fit + lp.penalty(self.model, params, weights, batch, self.power)

    def batches(self, seed):
        if self.full is not None:
            return None
        return lp.minibatches(
            jax.random.fold_in(jax.random.key(1), seed), self.graph.train, self.batch_size, self.num_steps
        )

    def judge(self, params, part: Part):
        """Return the masked loss; for a large graph in pieces, each recomputed in the backward pass."""
        return jnp.mean(self._in_pieces(lambda *piece: lp.cross_entropy(self.model, params, *piece), part))

    def reciprocal_rank(self, params, part: Part):
        """Return the mean over subjects and objects, ties ranked before the answer; masked answers do not count."""

        def one(triples, sides, masks):
            found = []
            for side, mask in masks.items():
                scores = self.model.scores(params, triples, side)
                truth = jnp.take_along_axis(scores, triples[:, "spo".index(side), None], axis=1)
                found.append(1 / jnp.sum(~mask & ~(scores < truth), axis=1))
            return jnp.mean(jnp.stack(found))

        return jnp.mean(self._in_pieces(one, part))

    def _in_pieces(self, function, part):
        """Map `function(triples, "so", masks)` over all triples, in pieces where their scores need too much memory."""
        entities = self.graph.sizes[0]

        def unpacked(part):
            return function(part.triples, "so", jax.tree.map(lambda m: unpack(m, entities), part.masks))

        size = MOST_SCORES // entities
        if len(part.triples) <= size:
            return unpacked(part)
        one = jax.checkpoint(lambda part: unpacked(jax.tree.map(lambda x: x[None], part)))
        return jax.lax.map(one, part, batch_size=size)

    def losses(self, params, seed):
        """Return the tuned and reported loss of a trained model."""
        tuned, reported, _ = self.parts(seed)
        return self.judge(params, tuned), self.judge(params, reported)

    def parts(self, seed):
        """Return the parts to tune by, to report, and to rank."""
        return [jax.tree.map(lambda x: x[seed], part) for part in (self.tuned, self.reported, self.ranked)]

    def start(self, seed):
        return jax.tree.map(lambda table: table[seed], self.starts)

    def train(self, weights, seed, adjoint):
        state = self.solver.init(self.start(seed), weights)
        batches = self.batches(seed)
        return jaxhpo.solve(self.solver, state, weights, batches, num_steps=self.num_steps, adjoint=adjoint).params

    def over_seeds(self, function, *trees):
        """Map `function(seed, *trees of that seed)` over the seeds in sequence, which is faster here than `vmap`."""
        return jax.lax.map(lambda x: function(*x), (jnp.arange(self.seeds), *trees))

    @functools.cached_property
    def evaluate(self):
        """Map weights, with a leading axis of seeds, to tuned and reported losses, and params."""

        def one(seed, weights):
            params = self.train(weights, seed, jaxhpo.Unroll())
            return self.losses(params, seed), params

        return jax.jit(lambda weights: self.over_seeds(one, weights))

    def by_adjoint(self, adjoint):
        """Map `(seed, weights, key)` to `((tuned, reported), hypergradient)`."""

        def loss(weights, seed):
            tuned, reported = self.losses(self.train(weights, seed, adjoint), seed)
            return tuned, (tuned, reported)

        def one(seed, weights, key):
            (_, losses), grad = jax.value_and_grad(loss, has_aux=True)(weights, seed)
            return losses, grad

        return one

    def by_evolution(self, seed, weights, key):
        def outer_loss(solution, weights, seed):
            return self.losses(solution.params, seed)

        method = jaxhpo.EvolutionStrategies(PAIRS, SIGMA, transforms=jaxhpo.positive, chunk_size=1)
        pair = jaxhpo.hypergradient(method, self.solver, outer_loss, num_steps=self.num_steps, warm_start=False)
        state = pair.init(self.start(seed), weights)
        grad, _, info = pair.update(weights, state, self.batches(seed), seed, key)
        return (info.value, info.metrics), grad

    def by_going_on(self, seed, weights, state, key, tuned=True):
        """Train one piece further, and return `(info, state after it, hypergradient)`."""
        batches = lp.minibatches(key, self.graph.train, self.batch_size or len(self.graph.train), self.num_steps)
        part, reported, ranked = self.parts(seed)

        def loss(weights):
            adjoint = jaxhpo.Unroll(truncate=self.truncate)
            sol = jaxhpo.solve(self.solver, state, weights, batches, num_steps=self.num_steps, adjoint=adjoint)
            return self.judge(sol.params, part), sol.state

        if tuned:
            (value, after), grad = jax.value_and_grad(loss, has_aux=True)(weights)
        else:
            (value, after), grad = loss(weights), jax.tree.map(jnp.ones_like, weights)
        rank = self.reciprocal_rank(after.params, ranked)
        return jnp.stack([value, self.judge(after.params, reported), rank]), after, grad

    def weights(self, kind: str) -> Any:
        """Return penalty weights of 1, for each seed."""
        entities, relations = self.graph.sizes
        ones = lambda *shape: jnp.ones((self.seeds, *shape))  # noqa: E731
        if kind == "scalar":
            return ones()
        return {
            "entities": ones(entities) if kind in ("entity", "embedding") else ones(),
            "relations": ones(relations) if kind in ("relation", "embedding") else ones(),
        }


# --- the searches -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Results of a search, for all seeds."""

    losses: np.ndarray  # (tuned or reported, outer steps, seeds)
    weights: Any  # those of lowest tuned loss, a leading axis of seeds
    inner_steps: int  # of one seed
    seconds: float  # of one seed, without compilation
    params: Any = None  # of a training that went on, a leading axis of seeds
    whole: float = 0.0  # seconds of all seeds, with compilation and what was spent before a resumption


def comparable(losses):
    """Replace NaN losses by infinity, as NumPy's argmin would select NaN."""
    return np.where(np.isnan(losses), np.inf, losses)


def sample(task: Task, method: str, kind: str, trials: int) -> Found:
    """Grid or random search; each seed has the same points."""
    ones, rng, tried, losses, begun = task.weights(kind), np.random.default_rng(0), [], [], 0.0
    points = rng.permutation(np.geomspace(LOW, HIGH, trials))  # so that it can be judged before its end

    def draw(leaf):
        return leaf * np.exp(rng.uniform(np.log(LOW), np.log(HIGH), (1, *leaf.shape[1:]))).astype(leaf.dtype)

    with Progress(trials, f"{method}, {kind}") as progress:
        for point in points:
            tried.append(jax.tree.map(lambda leaf, p=point: leaf * p if method == "grid" else draw(leaf), ones))
            found = np.asarray(task.evaluate(tried[-1])[0])
            begun = begun or time.perf_counter()  # after compilation
            losses.append(found)
            progress.update(f"lowest tuned loss {np.mean(np.min(comparable(losses), 0)[0]):.4f}")
    seconds = (time.perf_counter() - begun) / max(trials - 1, 1) * trials
    losses = np.moveaxis(np.array(losses), 0, 1)
    best = comparable(losses[0]).argmin(0)
    weights = jax.tree.map(lambda *x: jnp.stack(x)[best, np.arange(task.seeds)], *tried)
    return Found(losses, weights, trials * task.num_steps, seconds / task.seeds)


def descend(task: Task, method: str, kind: str, steps: int, run_dir) -> Found:
    """Adam on the logarithms; the carry is each seed's lowest tuned loss and its weights."""
    one = {
        "unroll": task.by_adjoint(jaxhpo.Unroll(truncate=task.truncate)),
        "implicit": task.by_adjoint(jaxhpo.Implicit(jaxhpo.CG(maxiter=20, damping=0.1))),
        "evolution": task.by_evolution,
    }[method]

    def gradient(weights, carry, key):
        losses, grads = task.over_seeds(one, weights, jax.random.split(key, task.seeds))
        better = losses[0] < carry["loss"]

        def choose(new, old):
            return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        best = {"loss": choose(losses[0], carry["loss"]), "weights": jax.tree.map(choose, weights, carry["weights"])}
        return jnp.mean(losses[0]), grads, best, jnp.stack(losses)

    start = jax.tree.map(lambda leaf: task.weight * leaf, task.weights(kind))
    trainings = 2 * PAIRS + 1 if method == "evolution" else 1
    outer_steps = -(-steps // trainings)
    rate = OUTER_RATE * steps / outer_steps  # the same way can be gone by all
    result = jaxhpo.tune(
        None,
        start,
        optax.adam(optax.cosine_decay_schedule(rate, outer_steps, alpha=0.1)),
        num_steps=outer_steps,
        transforms=jaxhpo.positive,
        remedies=jaxhpo.Remedies(clip=CLIP),
        gradient=gradient,
        carry={"loss": jnp.full(task.seeds, jnp.inf, float), "weights": start},
        run_dir=run_dir,
        on_not_finite="skip",
    )
    if result.exit_code:  # cut off, or given up: no search to be reported
        sys.exit(result.exit_code)
    elapsed = result.history["seconds"]
    seconds = np.median(np.diff(elapsed)) * outer_steps if outer_steps > 1 else elapsed[0]
    losses = np.moveaxis(result.history["info"], 0, 1)
    steps_taken = outer_steps * trainings * task.num_steps
    return Found(losses, result.carry["weights"], steps_taken, seconds / task.seeds, whole=elapsed[-1])


def go_on(task: Task, method: str, kind: str, steps: int, run_dir) -> Found:
    """One training of each seed, with Adam on the logarithms of its weights between its pieces; the carry is its state.

    With "fixed" the same, but the weights stay where they are.
    """

    def gradient(weights, states, key):
        keys = jax.random.split(key, task.seeds)
        train = functools.partial(task.by_going_on, tuned=method == "online")
        info, states, grads = task.over_seeds(train, weights, states, keys)
        return jnp.mean(info[:, 0]), grads, states, jnp.moveaxis(info, 1, 0)

    start = jax.tree.map(lambda leaf: task.weight * leaf, task.weights(kind))
    rate = 0.0 if method == "fixed" else optax.cosine_decay_schedule(OUTER_RATE, steps, alpha=0.1)

    def note(step):
        rank = np.mean(step.info[2])
        of = "validation" if task.whole else "reported"
        print(f"{method}, {kind}: step {step.step + 1} of {steps}, {of} MRR {rank:.4f}", file=sys.stderr)

    result = jaxhpo.tune(
        None,
        start,
        optax.adam(rate),
        num_steps=steps,
        transforms=jaxhpo.positive,
        remedies=jaxhpo.Remedies(clip=CLIP),
        gradient=gradient,
        carry=jax.lax.map(lambda x: task.solver.init(*x), (task.starts, start)),
        run_dir=run_dir,
        resume="continue",  # of a search that had ended the result is read
        save_every=1,
        callbacks=[note],
        on_not_finite="skip",
    )
    if result.exit_code:  # cut off, or given up: no search to be reported
        sys.exit(result.exit_code)
    elapsed = result.history["seconds"]
    seconds = np.median(np.diff(elapsed)) * steps if steps > 1 else elapsed[0]
    losses = np.moveaxis(result.history["info"], 0, 1)
    return Found(losses, result.hparams, steps * task.num_steps, seconds / task.seeds, result.carry.params, elapsed[-1])


# --- the report -------------------------------------------------------------------------------------------------------


def report(task: Task, method: str, kind: str, found: Found) -> list[dict[str, Any]]:
    """Return a row per seed, for the model trained with the weights kept, or the one trained to the end."""
    if found.params is None:
        (tuned, reported), trained = jax.block_until_ready(task.evaluate(found.weights))
    else:
        (tuned, reported), trained = found.losses[:2, -1], found.params
    rows = []
    for seed in range(task.seeds):
        params = jax.tree.map(lambda x, seed=seed: x[seed], trained)
        valid = lp.ranks(task.model, params, np.asarray(task.reported.triples[seed]), task.graph.triples).metrics()
        test = lp.ranks(task.model, params, task.graph.test, task.graph.triples).metrics()
        row = {"method": method, "hyperparameters": kind, "seed": seed}
        row |= {"tune_loss": float(tuned[seed]), "report_loss": float(reported[seed]), "valid_mrr": valid.mrr}
        row |= {"test_mrr": test.mrr, "hits1": test.hits1, "hits3": test.hits3, "hits10": test.hits10}
        rows.append(row | {"inner_steps": found.inner_steps, "seconds": found.seconds})
    return rows


def interval(x) -> tuple[float, float]:
    """Return the mean, and half the width of the 95 % interval by Student's t."""
    x = np.asarray(x)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


COLUMNS = ("tune_loss", "report_loss", "valid_mrr", "test_mrr", "hits1", "hits3", "hits10")


def differences(rows: dict[str, list]) -> list[dict[str, Any]]:
    """Return paired differences between each two searches, as mean and half interval; none for a single seed."""
    pairs = []
    if len(next(iter(rows.values()))) < 2:
        return pairs
    for i, (b, second) in enumerate(rows.items()):
        for a, first in list(rows.items())[:i]:
            changes = {c: [x[c] - y[c] for x, y in zip(second, first, strict=True)] for c in COLUMNS[1:4]}
            pairs.append({"search": b, "minus": a} | {c: interval(x) for c, x in changes.items()})
    return pairs


def heads_of(whole: bool) -> dict[str, str]:
    """Return the columns' headings; with --whole-validation no part is held back."""
    return {c: c.replace("report", "valid") if whole else c for c in COLUMNS}


def print_report(rows: dict[str, list], pairs, whole: bool) -> None:
    heads = heads_of(whole)
    if whole:
        print(
            "\nTuned by all of the validation part: its losses and ranks are not those of triples that were held back."
        )
    print(f"\n{'search':22}" + "".join(f"{c:>17}" for c in heads.values()) + f"{'inner steps':>13}{'seconds':>9}")
    for name, found in rows.items():
        show = "{:.4f} ± {:.4f}" if len(found) > 1 else "{:.4f}"
        cells = [show.format(*interval([row[c] for row in found])) for c in COLUMNS]
        print(f"{name:22}" + "".join(f"{cell:>17}" for cell in cells), end="")
        print(f"{found[0]['inner_steps']:13}{found[0]['seconds']:9.2f}")
    several = len(next(iter(rows.values()))) > 1
    print("means ± half of the 95 % interval; " * several + "inner steps and seconds are one seed's")
    print("\npaired differences" * bool(pairs))
    for pair in pairs:
        cells = ["{} {:+.4f} ± {:.4f}".format(heads[c], *pair[c]) for c in COLUMNS[1:4]]
        print(f"{pair['search']:22} minus {pair['minus']:22}" + "".join(f"{cell:>32}" for cell in cells))


def draw(task: Task, rows, searches: dict[str, Found], path) -> None:
    figure, axes = plot.figure(1, 3, width=18, height=7)
    draw_losses(axes[0, 0], task, searches)
    by_gradient = lambda name: name.startswith(("unroll", "online"))  # noqa: E731
    name = max(searches, key=lambda name: len(jax.tree.leaves(searches[name].weights)) * by_gradient(name))
    draw_weights(axes[0, 1], task, name, searches)
    draw_ranks(axes[0, 2], task, rows)
    plot.save(figure, path)


def best_so_far(found: Found) -> np.ndarray:
    """Return the reported loss at the point of lowest tuned loss so far, (outer steps, seeds)."""
    tuned, steps = comparable(found.losses[0]), np.arange(len(found.losses[0]))[:, None]
    lowest = np.minimum.accumulate(tuned, axis=0)
    place = np.maximum.accumulate(np.where(tuned <= lowest, steps, 0), axis=0)
    return np.take_along_axis(found.losses[1], place, axis=0)


def draw_losses(axis, task: Task, searches: dict[str, Found]) -> None:
    """Draw a line per search, with standard errors at steps that differ from line to line."""
    seen = []
    for i, (name, found) in enumerate(searches.items()):
        shown = best_so_far(found) if found.params is None else found.losses[1]
        method, kind = name.split(", ")
        x = (1 + np.arange(len(shown))) * found.inner_steps / len(shown)
        every = max(len(x) // 4, 1)
        error = {"yerr": shown.std(1, ddof=1) / task.seeds**0.5, "elinewidth": 0.8} if task.seeds > 1 else {}
        axis.errorbar(
            x,
            shown.mean(1),
            errorevery=(every * (i + 1) // (len(searches) + 1), every),
            color=f"C{METHODS.index(method)}",
            ls=LINES[kind],
            lw=1.2 if kind == "scalar" else 2,
            label=name,
            **error,
        )
        seen.append(shown.mean(1)[0 if found.params is not None else len(x) // 10 :])
    limits = np.concatenate(seen)
    limits = limits[np.isfinite(limits)]
    if limits.size:  # the first points of a search are far off
        room = 0.1 * np.ptp(limits) + 0.01
        axis.set_ylim(limits.min() - room, limits.max() + room)
    goes_on = all(found.params is not None for found in searches.values())
    loss = ("" if task.whole else "reported ") + "validation loss" + " of the best so far" * (not goes_on)
    title = f"means of {task.seeds} seeds, with standard errors" if task.seeds > 1 else "one seed"
    axis.set(xlabel="inner steps of a seed", ylabel=loss)
    axis.set_title(title, fontsize=10)
    legend_below(axis)


def draw_weights(axis, task: Task, name: str, searches: dict[str, Found]) -> None:
    """Draw a point per entity and relation, the geometric mean over seeds, and a fitted power law."""
    weights, train = searches[name].weights, task.graph.train
    weights = weights if isinstance(weights, dict) else {"entities": weights, "relations": weights}
    counts = {
        "entities": np.bincount(train[:, [0, 2]].ravel(), minlength=task.graph.sizes[0]),
        "relations": np.bincount(train[:, 1], minlength=task.graph.sizes[1]),
    }
    for (part, count), color in zip(counts.items(), ("C0", "C1"), strict=True):
        middle = np.exp(np.mean(np.log(weights[part]), axis=0))
        x, y = count[count > 0], (middle * count)[count > 0]
        few = {"s": 16, "alpha": 0.8} if len(x) < 1000 else {"s": 3, "alpha": 0.3}
        axis.scatter(x, y, color=color, linewidths=0, label=part, **few)
        if middle.ndim and len(np.unique(x)) > 1 and np.all(np.isfinite(np.log(y))):
            power, offset = np.polyfit(np.log(x), np.log(y), 1)
            ends = np.array([x.min(), x.max()])
            label = f"{part}: weight $\\propto$ count$^{{{power - 1:+.2f}}}$"
            axis.plot(ends, np.exp(offset) * ends**power, color=color, lw=1.5, ls="--", label=label)
    ends = np.array([max(min(x.min() for x in counts.values()), 1), max(x.max() for x in counts.values())])
    grid = searches.get("grid, scalar")
    one = task.weight if grid is None else np.exp(np.mean(np.log(grid.weights)))
    label = "one weight for all, " + ("where the search began" if grid is None else "the grid's best")
    axis.plot(ends, one * ends, color="0.4", lw=1, label=label)
    seeds = f"geometric means of {task.seeds} seeds" if task.seeds > 1 else "one seed"
    axis.set(xscale="log", yscale="log", xlabel="count in the training part", ylabel="weight × count")
    axis.set_title(f"the weights of {name}: {seeds}", fontsize=10)
    legend_below(axis, ncols=2)


def draw_ranks(axis, task: Task, rows: dict[str, list]) -> None:
    validation = "the validation part, tuned by" if task.whole else "the reported half of validation"
    series = {}
    for column, label in {"valid_mrr": validation, "test_mrr": "the test part"}.items():
        series[label] = tuple(zip(*(interval([row[column] for row in found]) for found in rows.values()), strict=True))
    plot.dots(axis, list(rows), series)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, 0.0), min(high, 1.0))
    intervals = f"means of {task.seeds} seeds, with 95 % intervals" if task.seeds > 1 else "one seed"
    axis.set(xlabel="mean reciprocal rank" + " (the axis does not start at 0)" * bool(low > 0))
    axis.set_title(intervals, fontsize=10)
    legend_below(axis)


def legend_below(axis, ncols=3) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize=8, ncols=ncols)


def stop(message: str) -> NoReturn:
    print(f"link_prediction.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given, adaptive = "(default: %(default)s)", "(default: {}; of more than 10 000 entities {})".format
    parser.add_argument(
        "--dataset", default="nations", help=f"a name, or a folder of train, valid and test.txt {given}"
    )
    parser.add_argument("--model", choices=MODELS, default="complex", help=given)
    parser.add_argument("--regulariser", choices=("f2", "n3"), default="n3", help=given)
    what = "what has a weight of its own; grid and fixed have one for all (default: embedding)"
    parser.add_argument("--hyperparameters", choices=KINDS, nargs="+", default=["embedding"], help=what)
    what = adaptive("unroll", "online")
    parser.add_argument("--method", choices=(*METHODS, "all"), nargs="+", help=what)
    what = "inverse relations (default: with complex and cp)"
    parser.add_argument("--reciprocal", action=argparse.BooleanOptionalAction, help=what)
    parser.add_argument(
        "--sides", choices=("so", "spo"), default="so", help=f"trained on; judged are always s and o {given}"
    )
    parser.add_argument("--rank", type=int, help=adaptive(200, 50))
    parser.add_argument("--inner-steps", type=int, help="of an outer step " + adaptive(200, 40))
    parser.add_argument(
        "--truncate", type=int, help="steps of the way back, 0 is all " + adaptive("half of the inner steps", 4)
    )
    what = "0 is all " + adaptive("a tenth of the triples, at most 1000", 500)
    parser.add_argument("--batch-size", type=int, help=what)
    parser.add_argument("--scale", type=float, help="of the first embeddings " + adaptive(0.001, 0.1))
    what = "the weights at which the searches that descend, and fixed, begin (default: %(default)s)"
    parser.add_argument("--start", type=float, default=START, help=what)
    parser.add_argument("--outer-steps", type=int, default=60, help=f"and as many trainings of grid and random {given}")
    parser.add_argument("--seeds", type=int, help=adaptive(3, 1))
    parser.add_argument("--whole-validation", action="store_true", help="tune by all of the validation part")
    parser.add_argument("--resume", action="store_true", help="keep searches in OUT/runs, and go on from there")
    what = "(default: results/link_prediction beside this script for nations, else results/link_prediction_NAME)"
    parser.add_argument("--out", type=pathlib.Path, help=what)
    what = "replace a report of other settings in OUT"
    parser.add_argument("--overwrite", action="store_true", help=what)
    args = parser.parse_args(arguments)
    if args.reciprocal is None:  # DistMult is symmetric, and TransE knows its inverses
        args.reciprocal = args.model in ("complex", "cp")
    if args.out is None:
        name = "" if args.dataset == "nations" else f"_{pathlib.Path(args.dataset).resolve().name}"
        args.out = RESULTS / f"link_prediction{name}"
    return args


def with_defaults(args: argparse.Namespace, graph) -> argparse.Namespace:
    """Fill in the options left open, by the size of the graph; refuse invalid ones."""
    large = graph.sizes[0] > LARGE
    defaults = {
        "method": ["online" if large else "unroll"],
        "rank": 50 if large else 200,
        "inner_steps": 40 if large else 200,
        "batch_size": min(500, len(graph.train)) if large else min(-(-len(graph.train) // 10), 1000),
        "seeds": 1 if large else 3,
        # From smaller ones the gradients of one entity among many hardly leave Adagrad's start.
        "scale": 0.1 if large else 1e-3,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.truncate is None:
        args.truncate = min(4, args.inner_steps) if large else -(-args.inner_steps // 2)
    methods = [*RETRAINED, *args.method] if "all" in args.method else args.method
    args.method = list(dict.fromkeys(method for method in methods if method != "all"))
    args.hyperparameters = list(dict.fromkeys(args.hyperparameters))
    check(args, graph)
    if large and set(args.method) - {"online", "fixed"}:
        stop(
            f"--method {' '.join(args.method)}: {graph.sizes[0]} entities are too many to be trained anew for every "
            "outer step; write --method online, or fixed."
        )
    return args


def check(args: argparse.Namespace, graph) -> None:
    triples = len(graph.train)
    counts = {name: (1, math.inf) for name in ("seeds", "outer_steps", "inner_steps", "rank")}
    for name, (low, high) in (counts | {"truncate": (0, args.inner_steps), "batch_size": (0, triples)}).items():
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if not low <= value <= high:
            most = {"truncate": f" to {high}, the inner steps", "batch_size": f" to {high}, the training triples"}
            stop(f"{option} got {value}, but it is a whole number from {low}{most.get(name, ' on')}.")
    for name in ("scale", "start"):
        if not 0 < getattr(args, name) < math.inf:
            stop(f"--{name} got {getattr(args, name)}, but it is finite and above 0: write {START} for instance.")
    if len(graph.validation) < 2 and not args.whole_validation:
        stop("The validation part has one triple, which cannot be halved: write --whole-validation.")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the numbers of a search depend on, besides the search."""
    others = ("method", "hyperparameters", "resume", "out", "overwrite")
    return {name: value for name, value in vars(args).items() if name not in others}


def run_name(args: argparse.Namespace, graph, method: str, kind: str) -> str:
    """Return a folder name that is unique to the settings and the triples, wherever these were read from."""
    settings = {name: value for name, value in settings_of(args).items() if name != "dataset"}
    parts = [part.tolist() for part in (graph.train, graph.validation, graph.test)]
    text = json.dumps([settings, parts, graph.entities, graph.relations], sort_keys=True)
    return f"{method}-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def open_out(args: argparse.Namespace) -> None:
    """Make the folder, unless it holds a report of other settings."""
    path = args.out / "report.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        found = {} if args.overwrite or not path.exists() else json.loads(path.read_text())["settings"]
    except OSError as error:
        stop(f"--out {args.out} cannot be a folder of reports ({error}): write the path of a new folder.")
    except (ValueError, KeyError, TypeError):
        stop(f"{path} is no report of this script: write another --out, or --overwrite to replace it.")
    found = {"start": START} | found if found else {}  # which reports before --start left unsaid
    settings = settings_of(args)
    names = sorted(name for name in found | settings if found and found.get(name) != settings.get(name))
    if names:
        differ = ", ".join(f"{name} is {found.get(name)} there and {settings.get(name)} here" for name in names)
        stop(f"{path} reports other settings ({differ}): write another --out, or --overwrite to replace it.")


def main() -> None:
    args = parse()
    try:
        graph = knowledge_graph(args.dataset)
    except jaxhpo.JaxhpoError as error:
        stop(f"--dataset {args.dataset}: {error}")
    args = with_defaults(args, graph)
    open_out(args)
    task, begun, rows, searches = Task(args, graph), time.perf_counter(), {}, {}
    before = 0.0  # seconds of resumed searches, spent by runs that did not reach their end
    for method in args.method:
        for kind in ["scalar"] if method in ("grid", "fixed") else args.hyperparameters:
            name, entered = f"{method}, {kind}", time.perf_counter()
            print(f"{name}: compiling ...", file=sys.stderr)
            if method in ("grid", "random"):
                found = sample(task, method, kind, args.outer_steps)
            else:
                run_dir = args.out / "runs" / run_name(args, graph, method, kind) if args.resume else None
                search = go_on if method in ("fixed", "online") else descend
                found = search(task, method, kind, args.outer_steps, run_dir)
            before += max(0.0, found.whole - (time.perf_counter() - entered))
            searches[name], rows[name] = found, report(task, method, kind, found)
            means = {head: np.mean([row[c] for row in rows[name]]) for c, head in heads_of(task.whole).items()}
            print(name, " ".join(f"{c} {x:.4f}" for c, x in means.items()), flush=True)
            # After each search, so that one that is cut short leaves its report.
            seconds = before + time.perf_counter() - begun
            text = {"settings": settings_of(args), "seconds": seconds, "differences": differences(rows)}
            text["rows"] = [row for found in rows.values() for row in found]
            (args.out / "report.json").write_text(json.dumps(text, indent=1) + "\n")
            draw(task, rows, searches, args.out / "link_prediction.png")
    print_report(rows, differences(rows), args.whole_validation)
    print(f"{before + time.perf_counter() - begun:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
