"""Hypergradient searches that diverge or stall without the remedies of `tune`, and improve with them.

Nations, DistMult of rank 200, F2 with one weight for all embeddings, Adagrad (.1), the masked validation loss. Ten
seeds are ten initial embeddings (and orders of the minibatches), the same for each remedy. They are trained one after
the other in one `tune`, whose hyperparameters have a leaf for each seed of each search, so that every remedy acts on
each search alone.

Full batches, 20 steps: searches from a weight of .015, where trainings are about to collapse to embeddings of zero, and
from .05, where all have; without a remedy, with hypergradients clipped to .5, with weights shrunk by .8 where the
hypergradient vanishes, that is falls below 1e-4, and both; the collapsed ones also with 1e-10, the default.
The first of these searches also with trainings of 5, 10, 15 and 30 steps, for the share that ends below its first loss.
Minibatches of 100, 60 steps, from .008: with one hypergradient a step, the mean of four, and one at four times the
steps.

A search has improved if its last validation loss is below its first by more than .01, diverged if it is above by more
than that or not finite, and stalled otherwise. (With minibatches: means of three outer steps.)

    python benchmarks/remedies.py [--out DIR] [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import Remedies, plot
from jaxhpo.data import knowledge_graph
from jaxhpo.models import link_prediction

FULL_STEPS, MINIBATCH_STEPS, SWEEP = 20, 60, (5, 10, 15, 30)
BATCH = 100
MARGIN = 0.01
CLIP, SHRINK, BELOW = 0.5, 0.8, 1e-4
COLLAPSED = {"Adam .05 from .05": (0.05, optax.adam(0.05))}  # name: start, outer optimiser
SWEPT = {"Adam .05 from .015": (0.015, optax.adam(0.05))}
FULL = {
    **SWEPT,
    "Adam .2 from .015": (0.015, optax.adam(0.2)),
    "SGD .1 from .015": (0.015, optax.sgd(0.1)),
    **COLLAPSED,
}
SMALL = {"Adam .1 from .008": (0.008, optax.adam(0.1))}
REMEDIES = {
    "none": Remedies(),
    "clip": Remedies(clip=CLIP),
    "shrink": Remedies(shrink=SHRINK, shrink_below=BELOW),
    "clip and shrink": Remedies(clip=CLIP, shrink=SHRINK, shrink_below=BELOW),
}
PLANS = (  # inner steps, searches, remedy, outer steps
    *((FULL_STEPS, FULL, name, remedies, 20) for name, remedies in REMEDIES.items()),
    (FULL_STEPS, COLLAPSED, "shrink below 1e-10", Remedies(shrink=SHRINK), 20),
    *((steps, SWEPT, name, remedies, 20) for steps in SWEEP for name, remedies in REMEDIES.items()),
    (MINIBATCH_STEPS, SMALL, "one a step", Remedies(), 12),
    (MINIBATCH_STEPS, SMALL, "mean of four", Remedies(accumulate=4), 12),
    (MINIBATCH_STEPS, SMALL, "one, 4 times the steps", Remedies(), 48),
)


class Nations:
    """The problem: `(weight, start, key) -> validation loss`."""

    def __init__(self, seeds: int):
        self.graph, self.model = knowledge_graph("nations"), link_prediction.DistMult(rank=200)
        self.masks = link_prediction.masks(self.graph.validation, self.graph.known, *self.graph.sizes)
        self.train = link_prediction.group(self.graph.train, *self.graph.sizes)
        keys = jax.random.split(jax.random.key(0), seeds)
        self.starts = jax.vmap(lambda key: self.model.init(key, *self.graph.sizes))(keys)
        # A start of Adagrad at 1e-10 keeps its derivatives finite where a gradient is zero.
        adagrad = optax.adagrad(0.1, initial_accumulator_value=1e-10, eps=0.0)
        self.solver = jaxhpo.from_optax(self.train_loss, adagrad)

    def train_loss(self, params, weight, batch):
        batch = self.train if batch is None else batch
        fit = link_prediction.cross_entropy(self.model, params, batch)
        return fit + link_prediction.penalty(self.model, params, weight, batch)

    def validation_loss(self, weight, start, batches, num_steps):
        state = self.solver.init(start, weight)
        params = jaxhpo.solve(self.solver, state, weight, batches, num_steps=num_steps).params
        return link_prediction.cross_entropy(self.model, params, self.graph.validation, masks=self.masks)

    def gradient(self, num_steps: int):
        """The `gradient` of `tune` for {search: [a weight per seed]}; the info holds each leaf's validation loss."""
        seeds = len(self.starts["entities"])

        def one(weight, seed, key):
            start = jax.tree.map(lambda table: table[seed], self.starts)
            key, given = jax.random.fold_in(key, seed), None
            if num_steps == MINIBATCH_STEPS:
                given = link_prediction.minibatches(key, self.graph.train, BATCH, num_steps)
            return jax.value_and_grad(self.validation_loss)(weight, start, given, num_steps)

        def gradient(weights, carry, key):
            leaves, structure = jax.tree.flatten(weights)
            each = jnp.stack(leaves), jnp.arange(len(leaves)) % seeds
            values, grads = jax.lax.map(lambda x: one(x[0], x[1], key), each)
            return jnp.mean(values), jax.tree.unflatten(structure, list(grads)), carry, values

        return gradient


def search(problem: Nations, inner_steps: int, searches: dict, remedies: Remedies, num_steps: int) -> dict[str, Any]:
    """Return each search's losses and weights, (outer steps, seeds), the remedies' counts over all, and seconds."""
    seeds, begun = len(problem.starts["entities"]), time.perf_counter()
    result = jaxhpo.tune(
        None,
        {name: [jnp.asarray(start)] * seeds for name, (start, _) in searches.items()},
        optax.partition({name: tx for name, (_, tx) in searches.items()}, {name: name for name in searches}),
        num_steps=num_steps,
        transforms=jaxhpo.positive,
        gradient=problem.gradient(inner_steps),
        remedies=remedies,
    )
    losses = result.history["info"]
    losses = losses.mean(1) if remedies.accumulate > 1 else losses
    names = sorted(searches)  # as JAX orders leaves
    return {
        "losses": {name: losses[:, i * seeds : (i + 1) * seeds] for i, name in enumerate(names)},
        "weights": {name: np.stack(result.history["hparams"][name], 1) for name in names},
        "counts": {name: int(column.sum()) for name, column in result.history["remedies"].items()},
        "seconds": time.perf_counter() - begun,
    }


def judge(losses: np.ndarray, mean_of: int = 1) -> dict[str, Any]:
    """Classify each seed's search by its losses (outer steps, seeds)."""
    first, last = losses[:mean_of].mean(0), losses[-mean_of:].mean(0)
    return {
        "lower": int(np.sum(last < first)),
        "improved": int(np.sum(last < first - MARGIN)),
        "diverged": int(np.sum((last > first + MARGIN) | ~np.isfinite(last))),
        "stalled": int(np.sum(np.abs(last - first) <= MARGIN)),
        "mean_change": float(np.mean(last - first)),
        "median_last": float(np.median(last)),
        "spread_of_last": float(np.std(last, ddof=1)) if len(last) > 1 else 0.0,
    }


def draw(runs: dict[tuple[str, str], np.ndarray], path) -> None:
    """Draw a panel per search: a thin line per seed, a thick one for their median."""
    figure, axes = plot.figure(2, 2, width=12, height=8.5)
    names = ("Adam .2 from .015", "SGD .1 from .015", *COLLAPSED, *SMALL)
    for axis, name in zip(axes.flat, names, strict=True):
        shown = [(remedy, losses) for (search, remedy), losses in runs.items() if search == name]
        for (remedy, losses), color in zip(shown, ("0.6", "C0", "C1", "C3", "C2"), strict=False):
            fraction = np.arange(len(losses)) / (len(losses) - 1)
            axis.plot(fraction, losses, color=color, lw=0.6, alpha=0.6)
            axis.plot(fraction, np.median(losses, axis=1), color=color, lw=2.2, label=remedy)
        axis.set(title=name + (", minibatches" if name in SMALL else ""), xlabel="share of the outer steps")
        axis.set_ylabel("validation loss")
        axis.legend(frameon=False, fontsize=8)
    plot.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds got {args.seeds}, but at least one search is needed: write 1 or more.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made a folder ({error}): write another path.")
    problem, rows, runs = Nations(args.seeds), [], {}
    heads = ("lower", "improved", "diverged", "stalled", "mean_change", "median_last", "spread_of_last")
    print(
        f"{'search':20} {'steps':>5} {'remedy':23}"
        + "".join(f"{head:>15}" for head in heads)
        + "  in all searches of the run"
    )
    for inner_steps, searches, remedy, remedies, num_steps in PLANS:
        run = search(problem, inner_steps, searches, remedies, num_steps)
        for name, losses in run["losses"].items():
            row = judge(losses, 3 if inner_steps == MINIBATCH_STEPS else 1)
            cells = "".join(f"{x:15.3f}" if isinstance(x, float) else f"{x:15}" for x in row.values())
            counts = ", ".join(f"{count} {what}" for what, count in run["counts"].items() if count)
            print(f"{name:20} {inner_steps:5} {remedy:23}{cells}  {counts or '-'}, {run['seconds']:.0f} s", flush=True)
            if inner_steps not in SWEEP:
                runs[name, remedy] = losses
            row |= {"last_weights": run["weights"][name][-1].tolist(), "counts": run["counts"]}
            plan = {"inner_steps": inner_steps, "search": name, "remedy": remedy, "outer_steps": num_steps}
            rows.append(plan | row)
    swept = [row for row in rows if row["search"] in SWEPT]
    for remedy in REMEDIES:
        lower = [row["lower"] for row in swept if row["remedy"] == remedy]
        print(f"{remedy}: {sum(lower)} of {len(lower) * args.seeds} over all numbers of inner steps end lower")
    draw(runs, args.out / "remedies.png")
    (args.out / "remedies.json").write_text(json.dumps({"seeds": args.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
