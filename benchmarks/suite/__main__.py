"""Sizes, convergence and cost of the suite's problems; what sixty outer steps gain.

Convergence is the norm of the train loss's gradient after training over that before, at the initial hyperparameters.
Seconds are those of a compiled plain training and of a compiled `Unroll()` hypergradient, the least of three. The
validation loss, and the test loss where there is one, are those before and after 60 steps of Adam (not with `--quick`).

    cd benchmarks && python -m suite [--quick] [--problems NAME ...] [--out DIR]
"""

import argparse
import json
import pathlib
import time

import jax
import numpy as np
import optax

import jaxhpo
from suite import NAMES, Problem, make

OUTER_STEPS = 60


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def convergence(problem: Problem) -> float:
    """The norm of the train loss's gradient after training over that before."""

    @jax.jit
    def norm(params, hparams):
        return optax.tree.norm(jax.grad(problem.train_loss)(params, hparams))

    h = problem.hparams
    return float(norm(jax.jit(problem.train)(h), h) / norm(problem.params, h))


def seconds(function, argument, repeats: int = 3) -> float:
    """The least of the seconds of some calls, after one that compiles."""
    program, times = jax.jit(function), []
    for _ in range(1 + repeats):
        begun = time.perf_counter()
        jax.block_until_ready(program(argument))
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def tuned(problem: Problem) -> dict[str, list[float]]:
    """Losses before and after the outer steps."""
    outer_loss, tx = problem.make_outer_loss(jaxhpo.Unroll()), optax.adam(problem.outer_rate)
    result = jaxhpo.tune(outer_loss, problem.hparams, tx, num_steps=OUTER_STEPS, progress=False)
    losses = {"validation": outer_loss, "test": problem.test_loss}
    points = problem.hparams, result.hparams
    return {name: [float(jax.jit(f)(h)) for h in points] for name, f in losses.items() if f is not None}


def measure(name: str, quick: bool) -> dict:
    problem = make(name)
    row = {
        "problem": name,
        "title": problem.title,
        "params": size(problem.params),
        "hparams": size(problem.hparams),
        "T": problem.num_steps,
        "convex": problem.convex,
        "condition": problem.condition,
        "convergence": convergence(problem),
        "training": seconds(problem.train, problem.hparams),
        "hypergradient": seconds(jax.grad(problem.make_outer_loss(jaxhpo.Unroll())), problem.hparams),
    }
    return row if quick else row | tuned(problem)


def line(row: dict) -> str:
    times = f"{row['convergence']:11.0e} {row['training']:9.4f} {row['hypergradient']:13.4f}"
    before_after = (" -> ".join(f"{x:.3g}" for x in row.get(part, ())) for part in ("validation", "test"))
    sizes = f"{row['problem']:22} {row['params']:6} {row['hparams']:7} {row['T']:5} {'yes' if row['convex'] else '':6}"
    return f"{sizes} {times}  " + " ".join(f"{cell:18}" for cell in before_after).rstrip()


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="without outer steps; nothing is written")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results")
    parsed = parser.parse_args(arguments)
    head = f"{'problem':22} {'params':>6} {'hparams':>7} {'T':>5} {'convex':6} {'convergence':>11} {'training':>9}"
    print(f"{head} {'hypergradient':>13}  {'validation loss':18} test loss")
    rows = []
    for name in parsed.problems:
        rows.append(measure(name, parsed.quick))
        print(line(rows[-1]), flush=True)
        jax.clear_caches()
    costs = np.array([[row["training"], row["hypergradient"]] for row in rows])
    print(f"a training takes at most {costs.max(0)[0]:.3f} s, a hypergradient {costs.max(0)[1]:.3f} s")
    if not parsed.quick:
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "suite.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
