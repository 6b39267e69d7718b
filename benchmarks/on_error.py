"""Runs that fail in silence under approximate rules, and how they end with `on_error="tighten"`.

Problems of the suite are tuned for 40 outer steps by Adam at the problem's rate, in float32, with rules that are far
off: few terms or products, a step of the series that is too long, one or two last steps, a wide difference, one random
direction. A run has failed in silence where no warning was issued, and it ends above its start or less than a fifth of
the way that `Unroll()` goes. It is run again for twice as many steps, without and with `on_error="tighten"`. It "ends
well" where it comes 80 % of the way. Otherwise it "says why" where its message tells that rules were tightened (each is
kept for twelve steps at least), or where its status is "misled" or "not_finite". A run that was not tightened was found
to lead down.

    python benchmarks/on_error.py [--out DIR] [--quick] [--problems NAME ...]
"""

import numpy as np
import suite
from auto import STEPS, rough, tuned
from matplotlib.figure import Figure

from jaxhpo import CG, FiniteDifference, ForwardGradient, Identity, Implicit, Neumann, Smoothing, Unroll, plot
from jaxhpo._core.validate import short_name

STALLED = 0.2  # of the way that `Unroll()` goes, below which a run has stalled
WELL = 0.8  # of that way, from which a run has ended well


def poor(problem):
    rate = problem.step_size
    more = [
        Unroll(truncate=2),
        Implicit(Neumann(3, 10 * rate)),
        Implicit(CG(maxiter=1)),
        Implicit(Identity(rate)),
        FiniteDifference(0.3),
        FiniteDifference(3.0),
        ForwardGradient(1),
        Smoothing(1, 1.0),
    ]
    return list(dict.fromkeys([*rough(problem), *more]))


def silent(name):
    """A row of each run that fails in silence."""
    problem = suite.make(name)
    best, _ = tuned(problem, Unroll())
    first = float(best.history["value"][0])
    way = first - float(np.nanmin(best.history["value"]))
    for rule in poor(problem):
        found = tuned(problem, rule)
        if found is None:
            continue
        run, warned = found
        last = float(run.history["value"][-1])
        if warned or run.status != "finished" or (np.isfinite(last) and first - last >= STALLED * way):
            continue
        again, _ = tuned(problem, rule, 2 * STEPS, on_error="tighten")
        longer, _ = tuned(problem, rule, 2 * STEPS)
        gained, alone = ((first - float(np.nanmin(run.history["value"][-5:]))) / way for run in (again, longer))
        row = {
            "problem": name,
            "rule": short_name(rule),
            "silent": (first - last) / way,
            "longer": alone,
            "with on_error": gained,
            "status": again.status,
            "message": again.message,
            "ends well": bool(gained >= WELL),
            "tightened": "becomes" in again.message,
        }
        print(
            f"{name}, {row['rule']}: {row['silent']:.2f} of the way, then {gained:.2f}: {again.message[:160]}",
            flush=True,
        )
        yield row


def summary(rows):
    tightened = [row for row in rows if row["tightened"]]
    others = [row for row in tightened if not row["ends well"]]
    ended = sum(row["status"] in ("misled", "not_finite") for row in others)
    return {
        "silent": len(rows),
        "above the start": sum(row["silent"] < 0 for row in rows),
        "not tightened": len(rows) - len(tightened),
        "not tightened, end well": sum(row["ends well"] and not row["tightened"] for row in rows),
        "tightened": len(tightened),
        "end well": len(tightened) - len(others),
        "end well without, in as many steps": sum(row["longer"] >= WELL for row in tightened),
        "end with a reason": ended,
        "end with the rule that misled": len(others) - ended,
        "further than without": sum(row["with on_error"] > row["longer"] for row in tightened),
    }


def draw(rows, path):
    figure = Figure((7, 1.5 + 0.2 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(rows):
        ends = [np.clip(row[name], -1, 1.1) for name in ("silent", "with on_error")]
        axis.plot(ends, [i, i], color="0.8", lw=1, zorder=1)
        for end, color, label in zip(ends, plot.PALETTE, ("as it was", 'on_error="tighten"'), strict=False):
            axis.plot(end, i, "o", color=color, ms=5, label=None if i else label)
    axis.axvline(WELL, color="0.4", ls="--", lw=1)
    axis.axvline(0, color="0.4", lw=1)
    axis.set(yticks=range(len(rows)), yticklabels=[f"{row['problem']}, {row['rule']}" for row in rows])
    axis.tick_params("y", labelsize=7)
    axis.set(xlabel="part of the way that Unroll() goes (below −1: at −1)", ylim=(len(rows) - 0.4, -0.6))
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments=None) -> None:
    suite.run(__doc__, arguments, "on_error", silent, summary, draw)


if __name__ == "__main__":
    main()
