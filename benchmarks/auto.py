"""`Auto` against the best fixed rule, error bars of runs, and what agreement tells; on the suite.

Every problem is tuned for 40 outer steps by Adam at the problem's rate, in float32: with each rule of `compare`'s
default list, with rough ones, and with `Auto()`. "auto" is the cost (counted operations and memory) at which a run
reaches the validation loss that is 99 % of the way from the start to the lowest one of `Unroll()`, over that of the
default rule that reaches it at least cost; with and without the cost of trying rules. "agreement" is the rank
correlation, over the runs of problems with 20 hyperparameters or more, of the mean agreement (between −1 and 1) with
the part of steps that lower the loss; runs in which all do are ties, so that no measure could reach 1. "error bars" are
those of the rough rules' runs, against the exact hypergradient of every step.

    python benchmarks/auto.py [--out DIR] [--quick] [--problems NAME ...]
"""

import unittest.mock as mock
import warnings

import jax
import numpy as np
import optax
import scipy.stats
import suite
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import jaxhpo
from jaxhpo import SAMA, Auto, Implicit, Neumann, Unroll, plot
from jaxhpo._core.cost import count_and_peak, count_arithmetic, with_memory
from jaxhpo._core.errors import ZeroHypergradientWarning
from jaxhpo._core.validate import short_name
from jaxhpo._diagnostics import auto
from jaxhpo._diagnostics.tangents import Tangents
from jaxhpo._tune import rules as rules_of_runs
from jaxhpo._tune.error_bar import EVERY

STEPS = 40
PART = 0.99  # of the way to the lowest loss, that is to be reached


def rough(problem):
    total, rate = problem.num_steps, problem.step_size
    return [
        Unroll(truncate=1),
        Unroll(truncate=max(2, total // 20)),
        Implicit(Neumann(3, rate)),
        SAMA(),
    ]


def tuned(problem, rule, steps=STEPS, **settings):
    """A run, and whether a warning was issued; None where the rule is refused, or blind to a leaf."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            run = jaxhpo.tune(
                problem.make_outer_loss(rule), problem.hparams, optax.adam(problem.outer_rate), num_steps=steps,
                progress=False, **settings,
            )  # fmt: skip
        except jaxhpo.JaxhpoError:
            return None
    if any(issubclass(w.category, ZeroHypergradientWarning) for w in caught):
        return None
    return run, any("not finite" in str(w.message) or "tolerance" in str(w.message) for w in caught)


def cost(problem, rule):
    """Of a hypergradient at the start, with as many products as its linear solve takes there."""
    h, unravel = ravel_pytree(problem.hparams)

    def outer_loss(flat):
        return problem.make_outer_loss(rule)(unravel(flat))

    measured = auto.measure(lambda _: outer_loss, rule, h)
    products = max((solve.num_iterations for solve in measured.linear_solves), default=1)
    return with_memory(*count_and_peak(jax.value_and_grad(outer_loss), h, unknown_length=max(1, products)))


def reached(values, goal):
    """Hypergradients until a loss is reached: that of step i is known after i of them; inf where it never is."""
    below = np.flatnonzero(np.asarray(values) <= goal)
    return float(below[0]) if len(below) else float("inf")


def tune_all(name):
    """The record of one problem, a row."""
    problem = suite.make(name)
    h, unravel = ravel_pytree(problem.hparams)
    default = auto.listed(lambda flat: problem.make_outer_loss(Auto())(unravel(flat)), h)
    runs, costs = {}, {}
    for rule in dict.fromkeys([*default, *rough(problem)]):
        measured = rule in rough(problem)[1:3] and rule not in default
        extra = ("error", "hypergradient", "hparams") if measured else ()
        found = tuned(problem, rule, record=("agreement", *extra))
        if found is not None:
            runs[rule], costs[rule] = found, cost(problem, rule) if rule in default else None
    first = float(runs[Unroll()][0].history["value"][0])
    lowest = float(np.nanmin(runs[Unroll()][0].history["value"]))
    goal = first - PART * (first - lowest)
    fixed = {
        rule: reached(run.history["value"], goal) * costs[rule] for rule, (run, _) in runs.items() if rule in default
    }

    choices = []  # the outer step before which each was made, and the choice

    def choose(*args):
        choices.append(auto.choose(*args))
        return choices[-1]

    def choose_at(self, state, rows):
        text = choose_plainly(self, state, rows)
        choices[-1] = rows, choices[-1]
        return text

    choose_plainly = rules_of_runs.Rules.choose
    with (
        mock.patch.object(rules_of_runs, "choose", choose),
        mock.patch.object(rules_of_runs.Rules, "choose", choose_at),
    ):
        run, _ = tuned(problem, Auto())
    steps = reached(run.history["value"], goal)
    ends = [*(begin for begin, _ in choices[1:]), np.inf]
    spent = sum(
        max(0.0, min(end, steps) - begin) * costs[Unroll() if choice.rule == Auto() else choice.rule]
        for (begin, choice), end in zip(choices, ends, strict=True)
    )
    probing = sum(row.cost for begin, choice in choices if begin <= steps for row in choice.tried)
    best = min(fixed, key=fixed.get)
    record = {
        "problem": name,
        "best": short_name(best),
        "chosen": [[begin, short_name(choice.rule)] for begin, choice in choices],
        "values": {short_name(rule): run.history["value"].tolist() for rule, (run, _) in runs.items()},
        "costs": {short_name(rule): costs[rule] for rule in fixed},
        "Auto": {"values": run.history["value"].tolist(), "tried": probing},
        "ratio": spent / fixed[best],
        "with probing": (spent + probing) / fixed[best],
        "fixed": {short_name(rule): fixed[rule] / fixed[best] for rule in fixed},
        "agreement": agreement(runs) if h.size >= 20 else [],
        "error bars": list(error_bars(problem, runs)),
    }
    print(f"{name}: best {record['best']}; Auto {record['chosen']}, ratio {record['ratio']:.2f}, ", end="")
    print(f"with probing {record['with probing']:.2f}", flush=True)
    record["cost of error bars"] = cost_of_bars(problem)
    return [record]


def agreement(runs):
    rows = []
    for rule, (run, _) in runs.items():
        values, ratios = run.history["value"], run.history["agreement"]
        if len(values) > 5 and np.isfinite(values).all():
            rows.append(
                [short_name(rule), float(np.nanmean(np.clip(ratios, -1, 1))), float(np.mean(np.diff(values) < 0))]
            )
    return rows


def error_bars(problem, runs):
    """For each run with error bars: of its steps, the parts within factors of two and three of the true error."""
    exact = jax.jit(jax.grad(problem.make_outer_loss(Unroll())))
    flat = lambda tree, i: ravel_pytree(jax.tree.map(lambda x: np.asarray(x)[i], tree))[0]  # noqa: E731
    for rule, (run, _) in runs.items():
        if "error" not in run.history:
            continue
        ratios = []
        for i in range(len(run.history["value"])):
            point = jax.tree.map(lambda x, i=i: x[i], run.history["hparams"])
            wanted = ravel_pytree(exact(point))[0]
            true = float(np.linalg.norm(flat(run.history["hypergradient"], i) - wanted))
            if true > 1e-4 * float(run.history["hypergradient_norm"][i]):  # above the rounding of float32
                ratios.append(float(run.history["error"][i]) / true)
        if ratios:
            found = {str(f): float(np.mean((np.array(ratios) > 1 / f) & (np.array(ratios) < f))) for f in (2, 3)}
            yield {"rule": short_name(rule), "steps": len(ratios), "within": found}


def cost_of_bars(problem):
    """Of the exact derivatives of a run, per step, of the cost of `Unroll()`, counted."""
    h, unravel = ravel_pytree(problem.hparams)
    loss = lambda flat: problem.make_outer_loss(Unroll())(unravel(flat))  # noqa: E731
    exact = Tangents(loss, h, rule=Unroll())
    one = count_arithmetic(exact._pull, exact._consts, h, unknown_length=1)
    return one / EVERY / count_arithmetic(jax.value_and_grad(loss), h, unknown_length=1)


def spearman(rows):
    return float(scipy.stats.spearmanr(*rows.T).statistic) if len(rows) > 2 else None


def summary(records):
    found = {}
    for what in ("ratio", "with probing"):
        values = [record[what] for record in records]
        found[what] = {"median": float(np.median(values)), "worst": float(np.max(values))}
        found[what]["above 1.25"] = [record["problem"] for record in records if record[what] > 1.25]
    rows = np.array([row[1:] for record in records for row in record["agreement"]]).reshape(-1, 2)
    if len(rows) > 2:
        mixed = rows[rows[:, 1] < 1]
        found["agreement"] = {
            "runs": len(rows),
            "rank correlation": spearman(rows),
            "largest that ties allow": spearman(np.sort(rows, axis=0)),
            "runs in which not every step lowers the loss": len(mixed),
            "rank correlation of these": spearman(mixed),
        }
    bars = [row["within"] for record in records for row in record["error bars"]]
    if bars:
        found["error bars"] = {
            "runs": len(bars),
            "within 2, mean": float(np.mean([row["2"] for row in bars])),
            "within 2, worst run": float(np.min([row["2"] for row in bars])),
            "runs below 0.8": int(np.sum([row["2"] < 0.8 for row in bars])),
            "within 3, mean": float(np.mean([row["3"] for row in bars])),
            "of the cost of `Unroll()`, median": float(np.median([record["cost of error bars"] for record in records])),
        }
    return found


def draw(records, path):
    figure = Figure((7, 6), layout="constrained")
    axis = figure.subplots()
    names = [record["problem"] for record in records]
    for i, record in enumerate(records):
        others = [x for x in record["fixed"].values() if np.isfinite(x)]
        axis.plot(others, [i] * len(others), "|", color="0.6", ms=8, label="fixed rules" if not i else None)
        axis.plot(record["ratio"], i, "o", color=plot.PALETTE[0], label="Auto" if not i else None)
        axis.plot(record["with probing"], i, "x", color=plot.PALETTE[1], label="Auto, with trying" if not i else None)
    axis.set(
        xscale="log", yticks=range(len(names)), yticklabels=names, xlabel="cost to reach the loss, of the best rule's"
    )
    middle = np.median([record["ratio"] for record in records])
    axis.set(title=f"Auto takes {middle:.2f} times the cost of the best fixed rule (median)")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments=None) -> None:
    suite.run(__doc__, arguments, "auto", tune_all, summary, draw)


if __name__ == "__main__":
    main()
