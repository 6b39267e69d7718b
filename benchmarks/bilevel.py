"""Stochastic bilevel methods on two problems of the field's benchmark, at equal oracle calls.

benchmark_bilevel (Dagréou, Ablin, Vaiter, Moreau 2022; github.com/benchopt/benchmark_bilevel):

    quadratic   4096 and 1024 samples whose Hessians have rank one, spectra from .1 to 1; 100 inner and 10 outer
                variables, whose value function is known in closed form
    ijcnn1      logistic regression on 49 990 rows with a log penalty for each of 22 features, validated on 91 701 rows

All take minibatches of 64, drawn with replacement. A call is a gradient or a product on one sample, as the benchmark
counts: SOBA makes 5 · 64 of them an update, what takes means over all samples counts those. What is measured is h(x),
the outer loss at the exact inner solution for the hyperparameters x of the moment, computed in float64 (by Newton's
method on ijcnn1), less the lowest known, and on the quadratic |∇h|². (The benchmark's own curves are of |∇h|², which
on ijcnn1 rises while h falls, and of one sample's loss on the quadratic.)

The two steps of each method, of (θ, v) and of h, are those of lowest h at the end on two other seeds (100 and 101),
among 12 pairs; SOBA's, F2SA's and MRBO's then fall with the updates t as published (t^-1/2; t^-5/7, t^-4/7; t^-1/3).
AmIGO, StocBiO and F2SA take ten inner steps an update, StocBiO and MRBO ten terms of a series.

    python benchmarks/bilevel.py [--out DIR] [--quick] [--seeds 5]
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from _arguments import parse

import jaxhpo
import jaxhpo.data
from jaxhpo import plot
from jaxhpo.single_loop import (
    F2SA,
    MASOBA,
    SABA,
    SARAH,
    SOBA,
    SPABA,
    STORM,
    AmIGO,
    FiniteSum,
    SingleLoop,
    StocBiO,
    series_sums,
)

BATCH, INNER, TERMS, POINTS = 64, 10, 10, 24
THETA = (0.03, 0.1, 0.3, 1.0)  # steps of θ and v
RATIOS = (0.1, 0.5, 2.0)  # of the step of h to that
TUNED_ON = (100, 101)
PUBLISHED = {  # h on ijcnn1 after 9e6, 1.8e7 and 3e7 calls of the benchmark's own solvers with its steps, one seed
    "SRBA": (0.2554, 0.2403, 0.2395),
    "SABA": (0.2720, 0.2698, 0.2657),
    "AmIGO": (0.2735, 0.2704, 0.2693),
    "SOBA": (0.4369, 0.3785, 0.3666),
    "StocBiO": (0.4072, 0.3908, 0.3825),
}


class Problem(NamedTuple):
    """A bilevel problem with an exact value function.

    Attributes:
      train: arrays of the inner sum.
      validation: arrays of the outer sum.
      train_loss: `(z, x, batch)`.
      outer_loss: `(z, x, batch)`.
      start: `key -> (z, x)`.
      value: `x -> (h, |∇h|²)` in float64.
      lowest: the lowest h known.
      calls: the budget.
    """

    train: tuple
    validation: tuple
    train_loss: Callable
    outer_loss: Callable
    start: Callable
    value: Callable
    lowest: float
    calls: float


# --- problems ---------------------------------------------------------------------------------------------------------


def spread(rng, size, low, high, null=0):
    """The symmetric root of a matrix with eigenvalues from low to high, and some of zero."""
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    roots = np.r_[np.zeros(null), np.logspace(math.log10(low) / 2, math.log10(high) / 2, size - null)]
    return basis * roots @ basis.T


def samples(rng, num, inner, outer):
    """Vectors a, b, c, d, p, q of samples ½ (a·z)² + ½ (b·x)² + (c·x)(d·z) + p·z + q·x."""
    a = rng.normal(size=(num, inner)) @ spread(rng, inner, 0.1, 1.0)
    b = rng.normal(size=(num, outer)) @ spread(rng, outer, 0.1, 1.0, null=1)
    left, _, right = np.linalg.svd(rng.normal(size=(outer, inner)))
    scales = np.zeros((outer, inner))
    np.fill_diagonal(scales, np.logspace(-1, -1, min(outer, inner)))
    noise = rng.normal(size=(num, inner))
    return (
        a,
        b,
        noise @ (left @ scales).T,
        noise @ right.T,
        rng.normal(size=(num, inner)),
        rng.normal(size=(num, outer)),
    )


def matrices(rows):
    """The means of Hessians, mixed derivatives and linear terms over all samples."""
    a, b, c, d, p, q = (np.asarray(x, float) for x in rows)
    n = len(a)
    return a.T @ a / n, b.T @ b / n, c.T @ d / n, p.mean(0), q.mean(0)


def quadratic(quick: bool) -> Problem:
    rng = np.random.default_rng(2442)
    while True:  # until the value function is convex
        train, validation = samples(rng, 1024 if quick else 4096, 100, 10), samples(rng, 1024, 100, 10)
        (zz, _, xz, p, _), (f_zz, f_xx, f_xz, f_p, f_q) = matrices(train), matrices(validation)
        slope = -np.linalg.solve(zz, xz.T)  # z* = slope x + offset
        offset = -np.linalg.solve(zz, p)
        hessian = slope.T @ f_zz @ slope + f_xx + f_xz @ slope + (f_xz @ slope).T
        if np.linalg.eigvalsh(hessian)[0] > 1e-3:
            break

    def value(x):
        x = np.asarray(x, float)
        z = slope @ x + offset
        by_z = f_zz @ z + f_xz.T @ x + f_p
        h = 0.5 * z @ f_zz @ z + 0.5 * x @ f_xx @ x + x @ f_xz @ z + f_p @ z + f_q @ x
        return h, float(np.sum((slope.T @ by_z + f_xx @ x + f_xz @ z + f_q) ** 2))

    def loss(z, x, batch):
        a, b, c, d, p, q = batch
        return jnp.mean(0.5 * (a @ z) ** 2 + 0.5 * (b @ x) ** 2 + (c @ x) * (d @ z) + p @ z + q @ x)

    gradient = slope.T @ (f_zz @ offset + f_p) + f_xz @ offset + f_q  # of h at x = 0
    lowest, _ = value(-np.linalg.solve(hessian, gradient))
    start = lambda key: (jnp.zeros(100), jnp.full(10, -2.0))  # noqa: E731
    as_arrays = lambda rows: tuple(np.asarray(x, np.float32) for x in rows)  # noqa: E731
    return Problem(as_arrays(train), as_arrays(validation), loss, loss, start, value, lowest, 2e5 if quick else 1.1e6)


def ijcnn1(quick: bool) -> Problem:
    rows = jaxhpo.data.ijcnn1()
    if quick:
        rows = type(rows)(*(jaxhpo.data.Examples(part.inputs[:6400], part.targets[:6400]) for part in rows))
    (x_in, y_in), (x_out, y_out) = (tuple(np.asarray(a, float) for a in part) for part in rows)

    def logistic(z, x, y):
        """Loss, gradient and the weights of the Hessian, in float64."""
        margin = -y * (x @ z)
        weight = 1 / (1 + np.exp(-margin))
        return np.mean(np.logaddexp(0, margin)), -(x.T @ (y * weight)) / len(y), weight * (1 - weight) / len(y)

    warm = {"z": np.zeros(22)}

    def value(x, full=False):
        penalty, z = np.exp(np.asarray(x, float)), warm["z"]
        for _ in range(50):  # Newton's method, from the last solution
            _, grad, weight = logistic(z, x_in, y_in)
            hessian = (x_in.T * weight) @ x_in + np.diag(penalty)
            step = np.linalg.solve(hessian, grad + penalty * z)
            z = z - step
            if np.linalg.norm(step) < 1e-10 * (1 + np.linalg.norm(z)):
                break
        else:
            warm["z"] = np.zeros(22)
            return (math.nan, np.full(22, math.nan)) if full else (math.nan, math.nan)
        warm["z"] = z
        h, by_z, _ = logistic(z, x_out, y_out)
        grad = -penalty * z * np.linalg.solve(hessian, by_z)
        return (h, grad) if full else (h, float(grad @ grad))

    def loss(z, batch):
        return jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ z)))

    def start(key):
        first, second = jax.random.split(key)
        return jax.random.normal(first, (22,)), jnp.log(jax.random.uniform(second, (22,), minval=1e-3))

    # h is not convex: of L-BFGS from several constant starts, -6 ends lowest.
    start_of_search, limits = np.full(22, -6.0), [(-30, 30)] * 22
    found = scipy.optimize.minimize(lambda x: value(x, full=True), start_of_search, jac=True, bounds=limits)
    cut = lambda part: tuple(a[: len(a) - len(a) % BATCH] for a in part)  # noqa: E731
    train_loss = lambda z, x, batch: loss(z, batch) + 0.5 * jnp.sum(jnp.exp(x) * z**2)  # noqa: E731
    outer = lambda z, x, batch: loss(z, batch)  # noqa: E731
    return Problem(
        cut(rows.train), cut(rows.test), train_loss, outer, start, value, float(found.fun), 3e5 if quick else 3e7
    )


PROBLEMS = {"quadratic": quadratic, "ijcnn1": ijcnn1}


# --- methods ----------------------------------------------------------------------------------------------------------


def power(first, exponent, every=1):
    return lambda count: first * (count // every + 1.0) ** -exponent


class Method(NamedTuple):
    """A method of the comparison.

    Attributes:
      make: `(train, validation, step of θ) -> method`.
      calls: `period -> calls` of one update, per sample of a minibatch; the period is that of restarts, n + m over 2 b.
      num_steps: inner steps an update.
      exponents: of the steps of θ and of h.
      full: whether it takes means over all samples now and then.
    """

    make: Callable
    calls: int
    num_steps: int | None = None
    exponents: tuple[float, float] = (0.0, 0.0)
    full: bool = False


def period(train, validation):
    return max((train.num_batches + validation.num_batches) // 2, 1)


METHODS = {
    "SOBA": Method(lambda a, b, step: SOBA(a, b), 5, None, (1 / 2, 1 / 2)),
    "SOBA, constant steps": Method(lambda a, b, step: SOBA(a, b), 5),
    "MA-SOBA": Method(lambda a, b, step: MASOBA(a, b, weight=0.1), 5),
    "SABA": Method(lambda a, b, step: SABA(a, b), 5),
    "SRBA": Method(lambda a, b, step: SingleLoop(a, b, SARAH(period(a, b))), 10, full=True),
    "SPABA": Method(lambda a, b, step: SPABA(a, b), 10, full=True),
    "AmIGO": Method(lambda a, b, step: AmIGO(a, b), 2 * INNER + 3, INNER),
    "StocBiO": Method(lambda a, b, step: StocBiO(a, b, step, TERMS), INNER + TERMS + 3, INNER),
    "MRBO": Method(
        lambda a, b, step: SingleLoop(a, b, STORM(power(0.5, 2 / 3)), series_sums(TERMS, step)),
        8 + 2 * TERMS,
        None,
        (1 / 3, 1 / 3),
    ),
    "F2SA": Method(
        lambda a, b, step: F2SA(a, b, optax.sgd(power(step, 5 / 7, INNER)), growth=power(0.1, 1 / 7)),
        3 * INNER + 3,
        INNER,
        (4 / 7, 4 / 7),
    ),
}


def runner(problem: Problem, method: Method):
    """`(steps (k, 2), seed) -> x` at POINTS moments of the run, of shape (k, POINTS + 1, m); and calls an update."""
    train, validation = (FiniteSum.of(part, BATCH) for part in (problem.train, problem.validation))
    calls = BATCH * method.calls
    if method.full:
        n, m = BATCH * train.num_batches, BATCH * validation.num_batches
        calls += (3 * n + 2 * m) / period(train, validation)
    updates = max(round(problem.calls / calls / POINTS), 1)

    def run(steps, key):
        inner, outer = steps[0], steps[0] * steps[1]
        every = method.num_steps or 1
        solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(power(inner, method.exponents[0], every)))
        own = method.make(train, validation, inner)
        pair = jaxhpo.hypergradient(
            own, solver, lambda s, x, batch: problem.outer_loss(s.params, x, batch), num_steps=method.num_steps
        )
        rate = power(outer, method.exponents[1])

        def update(carry, key):
            x, state, count = carry
            grad, state, _ = pair.update(x, state, key=key)
            return (x - rate(count) * grad, state, count + 1), None

        def stretch(carry, key):
            carry, _ = jax.lax.scan(update, carry, jax.random.split(key, updates))
            return carry, carry[0]

        first, rest = jax.random.split(key)
        z, x = problem.start(first)
        _, found = jax.lax.scan(stretch, (x, pair.init(z, x), jnp.zeros(())), jax.random.split(rest, POINTS))
        return jnp.concatenate([x[None], found])

    return jax.jit(jax.vmap(run, (0, None))), calls * updates


def evaluate(problem, xs) -> np.ndarray:
    """(POINTS + 1, 2): suboptimality and |∇h|² at each moment; infinite where the run diverged."""
    found = np.array(
        [problem.value(x) if np.isfinite(x).all() and np.abs(x).max() < 100 else (np.nan,) * 2 for x in xs]
    )
    found[:, 0] -= problem.lowest
    return np.where(np.isfinite(found), found, np.inf)


def measure(problem: Problem, method: Method, seeds: int) -> dict[str, Any]:
    run, calls = runner(problem, method)
    grid = np.array([(inner, ratio) for inner in THETA for ratio in RATIOS])
    ends = [np.asarray(run(grid, jax.random.key(seed)))[:, -1] for seed in TUNED_ON]
    scores = np.mean([[evaluate(problem, [x])[0, 0] for x in end] for end in ends], 0)
    best = grid[int(np.argmin(scores))]
    curves = np.array(
        [evaluate(problem, np.asarray(run(best[None], jax.random.key(seed)))[0]) for seed in range(seeds)]
    )
    with np.errstate(invalid="ignore"):  # of a run that diverged
        error = curves.std(0, ddof=1) / seeds**0.5 if seeds > 1 else np.zeros_like(curves[0])
    return {
        "steps": [float(best[0]), float(best[0] * best[1])],
        "at the edge": bool(best[0] in (THETA[0], THETA[-1]) or best[1] in (RATIOS[0], RATIOS[-1])),
        "calls": [calls * k for k in range(POINTS + 1)],
        "suboptimality": curves[:, :, 0].mean(0).tolist(),
        "suboptimality_error": error[:, 0].tolist(),
        "gradient": np.exp(np.log(curves[:, :, 1]).mean(0)).tolist(),
    }


# --- report -----------------------------------------------------------------------------------------------------------


def table(name: str, rows: dict[str, Any]) -> str:
    """The rows of one problem in Markdown, best first."""
    lines = [
        "| method | steps of θ, h | h − h* at a third | at the end | &#124;∇h&#124;² at the end |",
        "|---|---|---|---|---|",
    ]
    for method, row in sorted(rows.items(), key=lambda item: item[1]["suboptimality"][-1]):
        third, end = (
            f"{row['suboptimality'][i]:.2g} ± {row['suboptimality_error'][i]:.1g}"
            if math.isfinite(row["suboptimality"][i])
            else "diverges for some seed"
            for i in (POINTS // 3, -1)
        )
        steps = ", ".join(f"{x:.3g}" for x in row["steps"])
        lines.append(f"| {method} | {steps} | {third} | {end} | {row['gradient'][-1]:.1g} |")
    return "\n".join([f"{name}:", "", *lines, ""])


def picture(report, path):
    figure, axes = plot.figure(1, len(report), width=5.4 * len(report) + 1.6, height=4.2)
    styles = [{"color": plot.PALETTE[i % 6], "ls": ("-", "--")[i // 6]} for i in range(len(METHODS))]
    styles = dict(zip(METHODS, styles, strict=True))
    for axis, (name, rows) in zip(axes[0], report.items(), strict=True):
        for method, row in sorted(rows.items(), key=lambda item: item[1]["suboptimality"][-1]):
            axis.plot(row["calls"], np.maximum(row["suboptimality"], 1e-16), label=method, **styles[method])
        axis.set(yscale="log", xlabel="oracle calls", title=name)
    axes[0, 0].set_ylabel("h − h*")
    axes[0, -1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    lowest = [min(rows, key=lambda name: rows[name]["suboptimality"][-1]) for rows in report.values()]
    figure.suptitle("Lowest at equal calls: " + ", ".join(map("{} ({})".format, lowest, report)), fontsize=plot.TITLE)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=5, quick=2)
    report = {}
    for name, make in PROBLEMS.items():
        problem, report[name] = make(given.quick), {}
        for title, method in METHODS.items():
            begun = time.perf_counter()
            report[name][title] = row = measure(problem, method, given.seeds)
            print(
                f"{name}, {title}: {row['suboptimality'][-1]:.3g}, {time.perf_counter() - begun:.0f} s", file=sys.stderr
            )
        print(table(name, report[name]))
    (given.out / "bilevel.json").write_text(json.dumps({"seeds": given.seeds, "problems": report}, indent=1) + "\n")
    picture(report, given.out / "bilevel.png")


if __name__ == "__main__":
    main()
