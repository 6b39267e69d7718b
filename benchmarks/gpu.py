"""Cost of the hypergradient of a transformer of 110 million bfloat16 parameters on an accelerator.

The causal language model of `unroll.py`, larger: 12 layers, width 768, 12 heads, vocabulary 16 384, 8 sequences of 512;
weights, activations and optimiser state in bfloat16, losses in float32. Penalties of all weights, rates of all steps
and weights of all examples are tuned. `--size small` (0.14 million parameters) is for a CPU, to check that the
script runs; it does not measure an accelerator.

For each schedule: matrix products of the traced program, in units of T plain steps; the median of interleaved ratios of
its time to the plain training's, with the quartiles, and that over the count; the compiled program's allocation; and
the device's peak. The peak never falls within a process, so the programs with the least memory come first, and the peak
is marked where an earlier program set it. A program that runs out of memory has a row that says so.

Last, reversed momentum (`Reversible`, MLP 784-256-256-10, float32): how many of the integers are not
recovered, whether the hypergradient is finite (it is NaN if the reversal does not end at the start of the run), and its
distance from that of the float run. XLA_FLAGS=--xla_gpu_deterministic_ops=true asks a GPU for sums in a fixed order.

    python benchmarks/gpu.py [--size small|large] [--optimisers adam] [--steps 4 32] [--schedules default]
        [--repeats 5] [--out DIR]

Writes gpu-NAME.json, with the device's name, after each row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unroll

import jaxhpo
from jaxhpo._adjoint import exact_arithmetic as arithmetic
from jaxhpo._adjoint import reversible
from jaxhpo._core.cost import count_arithmetic, temporary_bytes
from jaxhpo._inner.problem import make_problem

SIZES = {
    "small": {"layers": 2, "width": 64, "heads": 2, "vocabulary": 256, "length": 64, "batch": 4},
    "large": {"layers": 12, "width": 768, "heads": 12, "vocabulary": 16_384, "length": 512, "batch": 8},
}
STEPS = {"small": [4], "large": [4, 32]}
REVERSED_STEPS = {"small": 20, "large": 1000}
RULES = {  # the least memory first
    "checkpoint='binomial'": jaxhpo.Unroll(checkpoint="binomial"),
    "default": jaxhpo.Unroll(),
    "checkpoint=1": jaxhpo.Unroll(checkpoint=1),
}
PROGRAMS = (*RULES, "jax.checkpoint a step", "plain JAX")
DEVICE = jax.devices()[0]


def peak_bytes() -> int | None:
    return (DEVICE.memory_stats() or {}).get("peak_bytes_in_use")


def timed(program: Callable, args: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - start


def measure(case: unroll.Case, name: str, unit: dict[str, Any], repeats: int) -> dict[str, Any]:
    function = jax.value_and_grad(case.losses[name])
    row = {"arithmetic": count_arithmetic(function, *case.args, elementwise=False) / unit["operations"]}
    start = time.perf_counter()
    program = jax.jit(function).lower(*case.args).compile()
    row |= {"compile_seconds": time.perf_counter() - start, "compiled_bytes": temporary_bytes(program)}
    before = peak_bytes()
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(program(*case.args)))  # which warms it up, too
    row |= {"finite": finite, "peak_bytes": peak_bytes(), "peak_is_its_own": peak_bytes() != before}
    ratios = [timed(program, case.args) / timed(unit["program"], case.args) for _ in range(repeats)]
    row["time"] = statistics.quantiles(ratios, n=4) if repeats > 1 else ratios * 3
    return row | {"time_over_arithmetic": row["time"][1] / row["arithmetic"]}


def attempt(*args) -> dict[str, Any]:
    """Return `measure`'s row, or one that says that memory ran out."""
    try:
        return measure(*args)
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
            raise
        return {"out_of_memory": str(error).splitlines()[0]}


def transformer(
    size: str, optimisers: list[str], steps: list[int], schedules: list[str], repeats: int
) -> Iterator[dict[str, Any]]:
    model = unroll.language_model(**SIZES[size], dtype=jnp.bfloat16)
    number = sum(x.size for x in jax.tree.leaves(model.params))
    print(f"{number:.3g} parameters in bfloat16, {sum(x.nbytes for x in jax.tree.leaves(model.params)):.3g} bytes")
    head = f"{'by':5} {'T':>3} {'schedule':22} {'arithmetic':>10} {'time':>18} {'time / it':>9} {'compiled':>11}"
    print(f"{head} {'device peak':>12}")
    for optimiser, num_steps in itertools.product(optimisers, steps):
        case = unroll.make_case(model, optimiser, num_steps, "all", RULES)
        program = jax.jit(case.training).lower(*case.args).compile()
        unit = {"operations": count_arithmetic(case.training, *case.args, elementwise=False), "program": program}
        timed(program, case.args)
        unit_row = {"seconds": timed(program, case.args), "teraflops": unit["operations"] / 1e12}
        for name in schedules:
            row = {"optimiser": optimiser, "num_steps": num_steps, "schedule": name, "parameters": number}
            row |= {"training": unit_row} | attempt(case, name, unit, repeats)
            print(told(row), flush=True)
            yield row


def told(row: dict[str, Any]) -> str:
    head = f"{row['optimiser']:5} {row['num_steps']:3} {row['schedule']:22}"
    if "out_of_memory" in row:
        return f"{head} out of memory"
    clock = "{1:.2f} ({0:.2f}, {2:.2f})".format(*row["time"])
    sizes = ["" if x is None else f"{x / 2**30:.3g} GiB" for x in (row["compiled_bytes"], row["peak_bytes"])]
    peak = sizes[1] + ("" if row["peak_is_its_own"] or not sizes[1] else " (before)")
    figures = f"{row['arithmetic']:10.2f} {clock:>18} {row['time_over_arithmetic']:9.2f} {sizes[0]:>11} {peak:>12}"
    return f"{head} {figures}" + ("" if row["finite"] else " not finite")


def reversal(num_steps: int) -> dict[str, Any]:
    """Count the integers that a forward and reversed run does not recover; compare with the float hypergradient."""
    model = unroll.mlp()
    rules = {"reversible": jaxhpo.Reversible(), "unrolled": jaxhpo.Unroll(checkpoint="sqrt")}
    case = unroll.make_case(model, "momentum", num_steps, "all", rules)
    got, want = (
        {name: flat(x) for name, x in jax.jit(jax.grad(case.losses[rule]))(*case.args).items()} for rule in rules
    )
    wrong, empty = jax.jit(lambda params, batches: mismatches(model, num_steps, params, batches))(*case.args[1:3])
    return {
        "num_steps": num_steps,
        "mismatched": int(wrong),
        "numbers": 2 * sum(x.size for x in jax.tree.leaves(model.params)),
        "buffer_empty": bool(empty),
        "finite": all(bool(np.isfinite(x).all()) for x in got.values()),
        "relative_error": {name: relative_error(got[name], want[name]) for name in got},
    }


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def mismatches(model: unroll.Model, num_steps: int, params, batches) -> tuple[jax.Array, jax.Array]:
    """Count the integers of weights and velocity that differ after reversing all steps; check the buffer is empty."""

    def loss(params, h, batch):
        return model.losses(params, *batch).mean()

    solver = jaxhpo.momentum_sgd(loss, unroll.RATE["momentum"], unroll.MOMENTUM)
    by_step = lambda t: jax.tree.map(lambda x: x[t % unroll.BATCHES], batches)  # noqa: E731
    state, h = solver.init(params, jnp.zeros(())), jnp.zeros(())
    problem = make_problem(solver, state, h, by_step, num_steps=num_steps)
    plan, problem, consts = reversible.make_plan(problem, None)
    inputs = reversible.Inputs(problem.state, problem.inputs, problem.xs, consts)
    undo = lambda now, x: (reversible.undo_step(plan, now, inputs, *x)[0], None)  # noqa: E731
    back = jax.lax.scan(undo, reversible.run_exact(plan, inputs), plan.steps(inputs), reverse=True)[0]
    start = reversible.exact_start(plan, state)
    pairs = zip(jax.tree.leaves(back[:2]), jax.tree.leaves(start[:2]), strict=True)
    return sum(jnp.sum(a != b) for a, b in pairs), arithmetic.is_empty(back.buffer)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small" if DEVICE.platform == "cpu" else "large")
    parser.add_argument("--optimisers", nargs="+", choices=["sgd", "adam"], default=["adam"])
    parser.add_argument("--steps", nargs="+", type=int, help="default: 4, and 32 at the large size")
    parser.add_argument("--schedules", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    report = {"device": DEVICE.device_kind, "jax": jax.__version__, "size": parsed.size}
    report |= {"model": SIZES[parsed.size], "xla_flags": os.environ.get("XLA_FLAGS", "")}
    report["reversible"] = reversal(REVERSED_STEPS[parsed.size])
    print("Reversible(): " + ", ".join(f"{name} {value}" for name, value in report["reversible"].items()), flush=True)
    steps = parsed.steps or STEPS[parsed.size]
    report["rows"] = []
    name = re.sub(r"\W+", "-", DEVICE.device_kind.lower()).strip("-")
    for row in transformer(parsed.size, parsed.optimisers, steps, parsed.schedules, parsed.repeats):
        report["rows"].append(row)
        (parsed.out / f"gpu-{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
