"""Does compiling an unrolled hypergradient take as long for ten thousand inner steps as for ten?

The MLP of `unroll.py` (784-256-256-10, gelu, minibatches of 128; penalties of all weights, rates of all steps and
weights of all examples are tuned), trained by SGD with momentum; `Reversible` runs the same training by `momentum_sgd`.
The library's schedules are compared with `jax.grad` through a hand-written scan of the step, the same with
`jax.checkpoint` around the step, and, for few steps, through a Python loop.

Measured for each T: seconds to trace and lower, and to compile, with JAX's caches cleared before; by the processor's
clock, which other work on the machine disturbs less (it counts all compiling threads), and by the wall clock. The
programs are interleaved, every other turn in reverse. Without noise: the number of equations of the traced program, and
of lines of the lowered and the compiled one. Results of other programs in DIR are kept.

    python benchmarks/compile_time.py [--steps 10 100 1000 10000] [--repeats 3] [--only NAME ...] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import unroll

import jaxhpo
from jaxhpo import plot

RULES = {
    "checkpoint=None": jaxhpo.Unroll(checkpoint=None),
    "checkpoint=1": jaxhpo.Unroll(checkpoint=1),
    "checkpoint='sqrt'": jaxhpo.Unroll(checkpoint="sqrt"),
    "checkpoint='binomial'": jaxhpo.Unroll(checkpoint="binomial"),
}
PLAIN, LOOP, REVERSIBLE = "plain JAX", "a Python loop", "Reversible()"
NAMES = (PLAIN, "jax.checkpoint a step", LOOP, *RULES, REVERSIBLE)
LONGEST_LOOP = 50  # steps: beyond, a Python loop takes minutes
PARTS = ("trace", "compile")
MODEL = unroll.mlp()


def hypergradient(name: str, num_steps: int) -> tuple[Callable, tuple]:
    """Return a new function, so that nothing is cached, and its arguments."""
    rules, optimiser = (RULES, "sgd") if name != REVERSIBLE else ({REVERSIBLE: jaxhpo.Reversible()}, "momentum")
    case = unroll.make_case(MODEL, optimiser, num_steps, "all", rules)
    return jax.value_and_grad(case.losses[name]), case.args


def measure(name: str, num_steps: int) -> dict[str, Any]:
    """Return the (processor, wall) seconds of each part, and the program's size."""
    function, args = hypergradient(name, num_steps)
    jax.clear_caches()
    clocks = [now()]
    lowered = jax.jit(function).lower(*args)
    clocks.append(now())
    compiled = lowered.compile()
    clocks.append(now())
    seconds = {
        part: [b - a for a, b in zip(before, after, strict=True)]
        for part, before, after in zip(PARTS, clocks[:-1], clocks[1:], strict=True)
    }
    sizes = {
        "equations": equations(jax.make_jaxpr(function)(*args).jaxpr),
        "lowered_lines": lowered.as_text().count("\n"),
        "compiled_lines": compiled.as_text().count("\n"),
    }
    return {"seconds": seconds, "sizes": sizes}


def now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def equations(jaxpr) -> int:
    """Count the equations of a traced program and of all that it calls, once per call, however often that loops."""
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    total += equations(getattr(inner, "jaxpr", inner))
    return total


def summary(name: str, num_steps: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return [minimum, median, maximum] seconds of the runs: of both parts by either clock, and of each part."""
    row = {"name": name, "num_steps": num_steps, "runs": len(runs), **runs[0]["sizes"]}
    for i, clock in enumerate(("processor", "wall")):
        parts = {part: [run["seconds"][part][i] for run in runs] for part in PARTS}
        parts["total"] = [sum(x) for x in zip(*parts.values(), strict=True)]
        row[clock] = {part: [min(x), statistics.median(x), max(x)] for part, x in parts.items()}
    return row


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return for each program its longest median over its shortest, and its largest ratio to plain JAX at equal T."""
    medians = {(row["name"], row["num_steps"]): row["processor"]["total"][1] for row in rows}
    found = {}
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != LOOP):
        mine = {t: seconds for (other, t), seconds in medians.items() if other == name}
        found[name] = {"longest_over_shortest": max(mine.values()) / min(mine.values())}
        ratios = [seconds / medians[PLAIN, t] for t, seconds in mine.items() if (PLAIN, t) in medians]
        if ratios:
            found[name] |= {"to_plain_median": statistics.median(ratios), "to_plain_most": max(ratios)}
    return found


def show(rows: list[dict[str, Any]]) -> None:
    head = f"{'program':24} {'T':>6} {'processor s':>20} {'wall s':>20} {'trace s':>8}"
    print(f"{head} {'equations':>9} {'lowered':>8} {'compiled':>8}")
    for row in rows:
        processor, wall = ("{1:.2f} ({0:.2f}, {2:.2f})".format(*row[c]["total"]) for c in ("processor", "wall"))
        print(
            f"{row['name']:24} {row['num_steps']:6} {processor:>20} {wall:>20} {row['processor']['trace'][1]:8.2f} "
            f"{row['equations']:9} {row['lowered_lines']:8} {row['compiled_lines']:8}"
        )
    print()
    for name, found in verdicts(rows).items():
        print(f"{name:24} " + ", ".join(f"{what.replace('_', ' ')} {x:.2f}" for what, x in found.items()))


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure, ((left, right),) = plot.figure(1, 2, width=12, height=4.8)
    for i, name in enumerate(NAMES):
        mine = [row for row in rows if row["name"] == name]
        steps = [row["num_steps"] for row in mine]
        by_hand = name in (PLAIN, "jax.checkpoint a step", LOOP)
        style = {"color": f"C{i}", "label": name, "lw": 1.2, "ls": "--" if by_hand else "-"}
        low, middle, high = zip(*(row["processor"]["total"] for row in mine), strict=True) if mine else ((), (), ())
        left.plot(steps, middle, marker="s" if by_hand else "o", ms=4, **style)
        left.fill_between(steps, low, high, color=f"C{i}", alpha=0.12, lw=0)
        right.plot(steps, [row["lowered_lines"] for row in mine], marker="s" if by_hand else "o", ms=4, **style)
    left.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="processor seconds, median and range")
    left.set_title("To trace, lower and compile")
    right.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="lines of the lowered program")
    right.set_title("The program's size")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="minor", labelsize=7)
    figure.suptitle("Compiling the hypergradient of an MLP 784-256-256-10")
    plot.save(figure, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 100, 1000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    file = parsed.out / "compile_time.json"
    programs = [(n, t) for n in parsed.only for t in parsed.steps if n != LOOP or t <= LONGEST_LOOP]
    others = json.loads(file.read_text())["rows"] if file.exists() else []
    others = [row for row in others if (row["name"], row["num_steps"]) not in programs]
    runs = {program: [] for program in programs}
    measure(PLAIN, min(parsed.steps))  # the first one warms up
    for turn in range(parsed.repeats):
        for program in programs[:: 1 if turn % 2 == 0 else -1]:
            runs[program].append(measure(*program))
        rows = [*others, *(summary(*program, mine) for program, mine in runs.items())]
        rows.sort(key=lambda row: (NAMES.index(row["name"]), row["num_steps"]))
        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "verdicts": verdicts(rows)}
        file.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    show(rows)
    draw(rows, parsed.out / "compile_time.png")


if __name__ == "__main__":
    main()
