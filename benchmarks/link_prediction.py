"""Does a penalty weight for every embedding, tuned by its hypergradient, beat what a grid finds for one weight?

A model of a knowledge graph is trained by a few steps of Adagrad (.1) from small random embeddings; its penalty's
weights are chosen by the validation loss, in which other answers known to be true are masked. Each seed has other
initial embeddings and its own halves of the validation part: one is tuned by, the other reported (`--whole-validation`
tunes by all). Methods:

    grid        one weight for all, on a logarithmic grid from 1e-5 to 1e-1
    random      all weights drawn log-uniformly from there
    unroll      Adam (from .05 to .005) on the logarithms, by reverse mode through the last half of the training
    implicit    likewise, as if the training had converged (20 iterations of damped CG), which it has not
    evolution   likewise, from pairs of trainings at perturbed weights

All take the same number of inner steps; a hypergradient's way back is not counted (the table has seconds, without
compilation). What is kept of a search is the point of lowest loss on the tuned half. The last three start at 5e-3.

    python benchmarks/link_prediction.py --dataset nations --model distmult --regulariser f2 --batch-size 0 \\
        --inner-steps 20 --method all --hyperparameters scalar embedding --seeds 10
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import jaxhpo
from jaxhpo import plot
from jaxhpo._progress import Progress
from jaxhpo.data import knowledge_graph
from jaxhpo.models import link_prediction as lp

MODELS = {"distmult": lp.DistMult, "complex": lp.ComplEx, "cp": lp.CP, "transe": lp.TransE}
METHODS = ("grid", "random", "unroll", "implicit", "evolution")
KINDS = ("scalar", "relation", "entity", "embedding")
LOW, HIGH, START = 1e-5, 1e-1, 5e-3
OUTER_RATE, CLIP = 0.05, 0.5
PAIRS, SIGMA = 2, 0.2  # of evolution strategies: 2 PAIRS + 1 trainings an outer step
ADAGRAD = optax.adagrad(0.1, initial_accumulator_value=1e-10, eps=0.0)  # from zero its derivatives are infinite


class Part(NamedTuple):
    """Triples to be judged by, and the other answers known to be true, for each side. Leading axis: seeds."""

    triples: Any
    masks: dict


class Task:
    """A data set with a model, and everything that is done to it for all seeds, one after the other."""

    def __init__(self, args: argparse.Namespace):
        self.graph, self.seeds, self.num_steps = knowledge_graph(args.dataset), args.seeds, args.inner_steps
        self.model = MODELS[args.model](rank=args.rank, reciprocal=args.reciprocal)
        self.truncate = None if args.truncate == 0 else args.truncate or -(-args.inner_steps // 2)
        self.power, self.batch_size = {"f2": 2, "n3": 3}[args.regulariser], args.batch_size
        if self.batch_size is None:
            self.batch_size = min(-(-len(self.graph.train) // 10), 1000)
        self.full = None if self.batch_size else lp.group(self.graph.train, *self.graph.sizes)
        self.solver = jaxhpo.from_optax(self.train_loss, ADAGRAD)
        keys = jax.random.split(jax.random.key(0), self.seeds)
        self.starts = jax.vmap(lambda key: self.model.init(key, *self.graph.sizes))(keys)
        parts = [self._parts(seed, args.whole_validation) for seed in range(self.seeds)]
        self.tuned, self.reported = (jax.tree.map(lambda *x: jnp.stack(x), *part) for part in zip(*parts, strict=True))

    def _parts(self, seed, whole):
        validation, train = self.graph.validation, self.graph.train
        tuned, reported = (validation, validation) if whole else self.graph.halves(seed)
        # What is reported is not known while tuning.
        known = np.concatenate([train, tuned]), self.graph.known
        return [Part(t, lp.masks(t, k, *self.graph.sizes)) for t, k in zip((tuned, reported), known, strict=True)]

    def train_loss(self, params, weights, batch):
        batch = self.full if batch is None else batch
        return lp.cross_entropy(self.model, params, batch) + lp.penalty(self.model, params, weights, batch, self.power)

    def batches(self, seed):
        if self.full is not None:
            return None
        return lp.minibatches(
            jax.random.fold_in(jax.random.key(1), seed), self.graph.train, self.batch_size, self.num_steps
        )

    def judge(self, params, part: Part):
        return lp.cross_entropy(self.model, params, part.triples, masks=part.masks)

    def losses(self, params, seed):
        """Tuned and reported loss of a trained model."""
        tuned, reported = (jax.tree.map(lambda x: x[seed], part) for part in (self.tuned, self.reported))
        return self.judge(params, tuned), self.judge(params, reported)

    def start(self, seed):
        return jax.tree.map(lambda table: table[seed], self.starts)

    def train(self, weights, seed, adjoint):
        state = self.solver.init(self.start(seed), weights)
        batches = self.batches(seed)
        return jaxhpo.solve(self.solver, state, weights, batches, num_steps=self.num_steps, adjoint=adjoint).params

    def over_seeds(self, function, *trees):
        """`function(seed, *trees of that seed)` for one seed after the other: faster here than all at once."""
        return jax.lax.map(lambda x: function(*x), (jnp.arange(self.seeds), *trees))

    @functools.cached_property
    def evaluate(self):
        """`weights, a leading axis of seeds -> (tuned and reported losses, params)`."""

        def one(seed, weights):
            params = self.train(weights, seed, jaxhpo.Unroll())
            return self.losses(params, seed), params

        return jax.jit(lambda weights: self.over_seeds(one, weights))

    def by_adjoint(self, adjoint):
        """`(seed, weights, key) -> ((tuned, reported), hypergradient)`."""

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

    def weights(self, kind: str) -> Any:
        """Penalty weights of 1, for each seed."""
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
    """What a search of all seeds found."""

    losses: np.ndarray  # (tuned or reported, outer steps, seeds)
    weights: Any  # those of lowest tuned loss, a leading axis of seeds
    inner_steps: int  # of one seed
    seconds: float  # of one seed


def sample(task: Task, method: str, kind: str, trials: int) -> Found:
    """Grid or random search: each seed has the same points."""
    ones, rng, tried, losses, begun = task.weights(kind), np.random.default_rng(0), [], [], 0.0
    points = rng.permutation(np.geomspace(LOW, HIGH, trials))  # so that it can be judged before its end

    def draw(leaf):
        return leaf * np.exp(rng.uniform(np.log(LOW), np.log(HIGH), leaf.shape[1:])).astype(leaf.dtype)

    with Progress(trials, f"{method}, {kind}") as progress:
        for point in points:
            tried.append(jax.tree.map(lambda leaf, p=point: leaf * p if method == "grid" else draw(leaf), ones))
            found = np.asarray(task.evaluate(tried[-1])[0])
            begun = begun or time.perf_counter()  # after compilation
            losses.append(found)
            progress.update(f"lowest tuned loss {np.mean(np.min(losses, 0)[0]):.4f}")
    seconds = (time.perf_counter() - begun) / max(trials - 1, 1) * trials
    losses = np.moveaxis(np.array(losses), 0, 1)
    best = losses[0].argmin(0)
    weights = jax.tree.map(lambda *x: jnp.stack(x)[best, np.arange(task.seeds)], *tried)
    return Found(losses, weights, trials * task.num_steps, seconds / task.seeds)


def descend(task: Task, method: str, kind: str, steps: int, run_dir) -> Found:
    """Adam on the logarithms; the carry is the least tuned loss of each seed, and its weights."""
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

    start = jax.tree.map(lambda leaf: START * leaf, task.weights(kind))
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
    elapsed = result.history["seconds"]
    seconds = np.median(np.diff(elapsed)) * outer_steps if outer_steps > 1 else elapsed[0]
    losses = np.moveaxis(result.history["info"], 0, 1)
    steps_taken = outer_steps * trainings * task.num_steps
    return Found(losses, result.carry["weights"], steps_taken, seconds / task.seeds)


# --- the report -------------------------------------------------------------------------------------------------------


def report(task: Task, method: str, kind: str, found: Found) -> list[dict[str, Any]]:
    """A row a seed: the model trained with the weights that were kept."""
    (tuned, reported), trained = jax.block_until_ready(task.evaluate(found.weights))
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
    """Mean, and half of the 95 % interval by Student's t."""
    x = np.asarray(x)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), float(scipy.stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


COLUMNS = ("tune_loss", "report_loss", "valid_mrr", "test_mrr", "hits1", "hits3", "hits10")


def differences(rows: dict[str, list]) -> list[dict[str, Any]]:
    """Paired differences between each two searches: mean, half interval; none of a single seed."""
    pairs = []
    if len(next(iter(rows.values()))) < 2:
        return pairs
    for i, (b, second) in enumerate(rows.items()):
        for a, first in list(rows.items())[:i]:
            changes = {c: [x[c] - y[c] for x, y in zip(second, first, strict=True)] for c in COLUMNS[1:4]}
            pairs.append({"search": b, "minus": a} | {c: interval(x) for c, x in changes.items()})
    return pairs


def print_report(rows: dict[str, list], pairs) -> None:
    print(f"\n{'search':22}" + "".join(f"{c:>17}" for c in COLUMNS) + f"{'inner steps':>13}{'seconds':>9}")
    for name, found in rows.items():
        cells = ["{:.4f} ± {:.4f}".format(*interval([row[c] for row in found])) for c in COLUMNS]
        print(f"{name:22}" + "".join(f"{cell:>17}" for cell in cells), end="")
        print(f"{found[0]['inner_steps']:13}{found[0]['seconds']:9.2f}")
    print(
        "means ± half of the 95 % interval; inner steps and seconds are one seed's\n"
        + "\npaired differences" * bool(pairs)
    )
    for pair in pairs:
        cells = ["{} {:+.4f} ± {:.4f}".format(c, *pair[c]) for c in COLUMNS[1:4]]
        print(f"{pair['search']:22} minus {pair['minus']:22}" + "".join(f"{cell:>32}" for cell in cells))


def draw(task: Task, rows, searches: dict[str, Found], path) -> None:
    figure, axes = plot.figure(1, 3, width=17, height=6)
    for name, found in searches.items():
        # The reported loss of the point that has the least tuned loss so far.
        best = np.minimum.accumulate(found.losses[0], axis=0)
        place = np.maximum.accumulate(np.where(found.losses[0] <= best, np.arange(len(best))[:, None], 0), axis=0)
        shown = np.take_along_axis(found.losses[1], place, axis=0)
        x = (1 + np.arange(len(best))) * found.inner_steps / len(best)
        error = shown.std(1, ddof=1) / task.seeds**0.5 if task.seeds > 1 else np.zeros(len(x))
        style = {"color": f"C{METHODS.index(name.split(',')[0])}", "ls": "--" if "scalar" in name else "-"}
        plot.band(axes[0, 0], x, shown.mean(1), error, label=name, **style)
    axes[0, 0].set(xlabel="inner steps of a seed", ylabel="reported validation loss of the best so far")
    last = [np.mean([row["report_loss"] for row in found]) for found in rows.values()]
    axes[0, 0].set_ylim(min(last) - 0.05, max(last) + 0.35)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2)
    name = max(searches, key=lambda name: len(jax.tree.leaves(searches[name].weights)) * ("unroll" in name))
    draw_weights(axes[0, 1], task, name, searches[name].weights, searches)
    labels = {"valid_mrr": "the reported validation triples", "test_mrr": "the test part"}
    series = {
        label: tuple(zip(*(interval([row[c] for row in found]) for found in rows.values()), strict=True))
        for c, label in labels.items()
    }
    plot.bars(axes[0, 2], list(rows), series)
    axes[0, 2].set(xlabel="mean reciprocal rank, 95 % intervals (the axis does not start at 0)")
    axes[0, 2].legend(frameon=False, fontsize=8)
    plot.save(figure, path)


def draw_weights(axis, task, name, weights, searches) -> None:
    """A point for each entity and relation, at the geometric mean over the seeds."""
    weights = weights if isinstance(weights, dict) else {"entities": weights, "relations": weights}
    train = task.graph.train
    counts = {
        "entities": np.bincount(train[:, [0, 2]].ravel(), minlength=task.graph.sizes[0]),
        "relations": np.bincount(train[:, 1], minlength=task.graph.sizes[1]),
    }
    for part, count in counts.items():
        middle = np.exp(np.mean(np.log(weights[part]), axis=0)) * np.ones(len(count))
        axis.scatter(count, middle * count, s=14, label=part, alpha=0.8)
    every = np.unique(np.concatenate(list(counts.values())))
    every = every[every > 0]
    if "grid, scalar" in searches:
        middle = np.exp(np.mean(np.log(searches["grid, scalar"].weights)))
        axis.plot(every, middle * every, color="0.4", lw=1, label="the grid's one weight")
    axis.set(xscale="log", yscale="log", xlabel="count in the training part", ylabel="weight × count", title=name)
    axis.legend(frameon=False, fontsize=8)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="nations", help="a name, or a folder of train, valid and test.txt")
    parser.add_argument("--model", choices=MODELS, default="complex")
    parser.add_argument("--regulariser", choices=("f2", "n3"), default="n3")
    parser.add_argument("--hyperparameters", choices=KINDS, nargs="+", default=["embedding"])
    parser.add_argument("--method", choices=(*METHODS, "all"), nargs="+", default=["unroll"])
    parser.add_argument("--reciprocal", action=argparse.BooleanOptionalAction, help="else as suits the model")
    parser.add_argument("--rank", type=int, default=200)
    parser.add_argument("--inner-steps", type=int, default=200)
    parser.add_argument("--truncate", type=int, help="inner steps of the way back: half of them unless given, 0 is all")
    parser.add_argument("--batch-size", type=int, help="a tenth of the triples, at most 1000, unless given; 0 is all")
    parser.add_argument("--outer-steps", type=int, default=60, help="and as many trainings of grid and random")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--whole-validation", action="store_true", help="tune by all of the validation part")
    parser.add_argument("--resume", action="store_true", help="keep searches in OUT/runs, and go on from there")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/link_prediction")
    args = parser.parse_args(arguments)
    if args.reciprocal is None:  # DistMult is symmetric, and TransE knows its inverses
        args.reciprocal = args.model in ("complex", "cp")
    return args


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    task, begun, rows, searches = Task(args), time.perf_counter(), {}, {}
    settings = {k: v for k, v in vars(args).items() if k not in ("method", "hyperparameters", "resume", "out")}
    for method in METHODS if "all" in args.method else args.method:
        for kind in ["scalar"] if method == "grid" else args.hyperparameters:
            name = f"{method}, {kind}"
            if method in ("grid", "random"):
                found = sample(task, method, kind, args.outer_steps)
            else:
                mark = "-".join(str(v).replace("/", "_") for v in settings.values())
                run_dir = args.out / "runs" / f"{mark}-{method}-{kind}" if args.resume else None
                found = descend(task, method, kind, args.outer_steps, run_dir)
            searches[name], rows[name] = found, report(task, method, kind, found)
            means = {c: np.mean([row[c] for row in rows[name]]) for c in COLUMNS}
            print(name, " ".join(f"{c} {x:.4f}" for c, x in means.items()), flush=True)
            # After each search, so that one that is cut short leaves its report.
            text = {"settings": settings, "seconds": time.perf_counter() - begun, "differences": differences(rows)}
            text["rows"] = [row for found in rows.values() for row in found]
            (args.out / "report.json").write_text(json.dumps(text, indent=1) + "\n")
            draw(task, rows, searches, args.out / "link_prediction.png")
    print_report(rows, differences(rows))
    print(f"{time.perf_counter() - begun:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
