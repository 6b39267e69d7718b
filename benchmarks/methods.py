"""Cost of each hypergradient method, in time and memory, on one problem.

An MLP 784-256-256-10 (gelu, minibatches of 128, T = 20 steps of SGD with momentum), one penalty per array of parameters
(m = 6). Time is counted on the traced program in units of one plain training, loops that end at a tolerance at their
maximum; memory is what the compiled program allocates beyond its arguments and results, in copies of the parameters.
Neither is noisy. `Direct` forms a P × P matrix, so it is measured on a network 64-16-10, in that network's units.

    python benchmarks/methods.py [--out DIR] [--page docs/choose.md]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import optax
from _methods import METHODS, markdown

import jaxhpo
from jaxhpo._core.cost import count_arithmetic

NUM_STEPS = 20
BATCH = 128
REPEATS = 7
ITERATIONS = 10  # what a loop that ends at a tolerance is counted as, and may take at most


class Problem(NamedTuple):
    """A network, its hyperparameters and the inner problem."""

    params: Any
    hparams: jax.Array
    solver: jaxhpo.Solver
    batches: Any
    val_batch: Any
    names: dict[str, Any]


def make_problem(sizes: tuple[int, ...]) -> Problem:
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        (jax.random.normal(key, (a, b)) / a**0.5, jnp.zeros(b))
        for key, a, b in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
    ]

    def predict(params, hparams, batch):
        hidden = batch[0]
        for weights, bias in params[:-1]:
            hidden = jax.nn.gelu(hidden @ weights + bias)
        return hidden @ params[-1][0] + params[-1][1]

    def output_loss(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def regulariser(params, hparams):
        return sum(jnp.exp(h) * jnp.sum(p**2) for h, p in zip(hparams, jax.tree.leaves(params), strict=True))

    def loss(params, hparams, batch):
        return output_loss(predict(params, hparams, batch), batch) + regulariser(params, hparams)

    def example_loss(params, hparams, batch):
        logits = predict(params, hparams, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    def data(key, *shape):
        return jax.random.normal(key, (*shape, sizes[0])), jax.random.randint(key, shape, 0, sizes[-1])

    names = {name: getattr(jaxhpo, name) for name in dir(jaxhpo)} | {"optax": optax, "lineax": lineax}
    names |= {"predict": predict, "output_loss": output_loss, "regulariser": regulariser, "example_loss": example_loss}
    return Problem(
        params,
        jnp.full(len(jax.tree.leaves(params)), -6.0),
        jaxhpo.momentum_sgd(loss, 0.1, 0.9),
        data(keys[0], NUM_STEPS, BATCH),
        data(jax.random.fold_in(keys[0], 1), BATCH),
        names,
    )


def val_loss(problem, params):
    return optax.softmax_cross_entropy_with_integer_labels(
        problem.names["predict"](params, None, problem.val_batch), problem.val_batch[1]
    ).mean()


def training(problem):
    """Run one plain training, the unit of time."""

    def run(hparams, params, batches):
        return jaxhpo.solve(problem.solver, problem.solver.init(params, hparams), hparams, batches).params

    return run


def program(call: str, problem: Problem):
    """Return the function of hyperparameters, initial parameters and batches that a method's row measures."""
    key = jax.random.key(2)
    if not call.startswith("hypergradient("):
        adjoint = eval(call, problem.names)

        def loss(hparams, params, batches):
            start = problem.solver.init(params, hparams)
            solution = jaxhpo.solve(problem.solver, start, hparams, batches, adjoint=adjoint, key=key)
            return val_loss(problem, solution.params)

        return jax.value_and_grad(loss)

    def outer_loss(solution, hparams, batch):
        return val_loss(problem, solution.params)

    steps = 1 if "num_steps=1" in call else NUM_STEPS
    method = eval(re.sub(r"^hypergradient\((.*), \.\.\..*\)$", r"\1", call), problem.names)
    pair = jaxhpo.hypergradient(method, problem.solver, outer_loss, num_steps=steps)

    def update(hparams, params, batches):
        batches = jax.tree.map(lambda x: x[:steps], batches)
        return pair.update(hparams, pair.init(params, hparams), batches, None, key)

    return update


def measure(function, problem, unit=None, iterations=ITERATIONS) -> dict[str, float]:
    """Return counted operations, allocated bytes, and the median of interleaved time ratios to the unit."""
    args = (problem.hparams, problem.params, problem.batches)  # all that is data: constants would be folded
    compiled = jax.jit(function).lower(*args).compile()
    measured = {
        "operations": count_arithmetic(function, *args, unknown_length=iterations),
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    if unit is None:
        return measured | {"run": lambda: jax.block_until_ready(compiled(*args))}
    ratios = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        middle = time.perf_counter()
        unit["run"]()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return measured | {"seconds_ratio": statistics.median(ratios[1:])}  # the first one warms up


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--page", type=pathlib.Path, help="a page whose table of methods is written anew")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)

    problems = {"small": make_problem((64, 16, 10)), "large": make_problem((784, 256, 256, 10))}
    units = {name: measure(training(problem), problem) for name, problem in problems.items()}
    rows = {}
    print(f"{'method':70} {'trainings':>10} {'by the clock':>13} {'copies of θ':>12}")
    for method in METHODS:
        size = "small" if "Direct" in method.call else "large"
        problem, unit = problems[size], units[size]
        # The only such loop of a reversible run has one pass: it keeps the compiler from merging what is inside.
        iterations = 1 if "Reversible" in method.call else ITERATIONS
        measured = measure(program(method.call, problem), problem, unit, iterations)
        copies = measured["bytes"] / sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
        rows[method.call] = {
            "time": measured["operations"] / unit["operations"],
            "seconds_ratio": measured["seconds_ratio"],
            "memory": copies,
            "network": size,
        }
        row = rows[method.call]
        print(f"{method.call:70} {row['time']:10.3g} {row['seconds_ratio']:13.3g} {copies:12.3g}", flush=True)

    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "num_steps": NUM_STEPS,
        "batch": BATCH,
        "iterations": ITERATIONS,
        "training_memory": units["large"]["bytes"] / sum(x.nbytes for x in jax.tree.leaves(problems["large"].params)),
        "rows": rows,
    }
    (parsed.out / "methods.json").write_text(json.dumps(report, indent=1) + "\n")
    if parsed.page:
        text, table = parsed.page.read_text(), f"<!-- methods: begin -->\n{markdown(rows)}\n<!-- methods: end -->"
        text, found = re.subn("<!-- methods: begin -->.*<!-- methods: end -->", lambda _: table, text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{parsed.page} has no line `<!-- methods: begin -->` with its end")
        parsed.page.write_text(text)


if __name__ == "__main__":
    main()
