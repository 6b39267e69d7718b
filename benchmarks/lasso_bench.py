"""Whether the hypergradient beats Bayesian search, evolution and random search on LassoBench's synthetic problems.

A weighted lasso, min |y − Xw|²/2n + Σ αⱼ|wⱼ|, with one penalty for each of d features; log αⱼ lies between
log(αmax/100) and log αmax. The score is the held-out mean square of five folds over that of the true weights, the
oracle. Designs of correlation .6, d / 2 rows, 15 % of them for the test, signal-to-noise ratios of 10 and 3.
(arXiv:2111.02790)

All begin at αmax/10. Adam, at the rate .11 of LassoBench's own gradient baseline, follows the hypergradient for 1000
steps, or until the budget is spent: the implicit derivative on the features whose weights are not zero, by conjugate
gradients. Each fold is trained by FISTA to a relative step of 1e-4; the searches train from zero, Adam from where it
trained last. What is counted is products with X and Xᵀ: an iteration of FISTA is one training gradient, one of
conjugate gradients is another. Five folds with one gradient each count as one. The budget is what the cheapest search
spends on its trials. Seeds are those of the searches, of 1000 features only one.

Beside them the best of 100 common penalties, as of `LassoCV`. Test errors are of a training on all rows but the test's,
over the oracle's. Scores of what was found are computed anew, to a relative step of 1e-8.

    python benchmarks/lasso_bench.py [--out DIR] [--quick] [--seeds 3]
"""

import functools
import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import parse
from sklearn.model_selection import KFold, train_test_split

import jaxhpo
from jaxhpo import plot, search

SIZES = {60: 3, 100: 5, 300: 15, 1000: 50}  # features: how many of them matter
TRIALS = {60: 160, 100: 160, 300: 120, 1000: 80}
TOLERANCE, EXACT = 1e-4, 1e-8
SHARES = (1 / 20, 1)  # of the budget
GRID = np.geomspace(1 / 1000, 1, 61)  # of the pictures
BATCH = {"random": 20, "TPE": 1, "CMA-ES": 20}  # trials that are asked for together


class Data(NamedTuple):
    """Attributes:
    x: shape (n, d), the rows for training; all of them are in a fold.
    y: shape (n,).
    train: shape (5, n), 1 where a fold trains.
    rates: shape (5,), one over the largest eigenvalue of XᵀX/n of a fold; rate: of all rows.
    """

    x: jax.Array
    y: jax.Array
    train: jax.Array
    rates: jax.Array
    rate: jax.Array
    test: tuple
    oracle: tuple  # mean squares of the true weights, on the rows for training and for the test


def correlated(n, d, w, snr, correlation=0.6, seed=42):
    """The design and targets of `celer.datasets.make_correlated_data`, to the last bit."""
    rng = np.random.RandomState(seed)
    column, x = rng.randn(n), np.empty((n, d), order="F")
    for j in range(d):
        if j:
            column = correlation * column + np.sqrt(1 - correlation**2) * rng.randn(n)
        x[:, j] = column
    y, noise = x @ w, rng.randn(n)
    return x, y + noise / np.linalg.norm(noise) * np.linalg.norm(y) / snr


def load(d, snr):
    w = np.zeros(d)
    w[:: d // SIZES[d]] = (-1.0) ** np.arange(SIZES[d])
    x, test_x, y, test_y = train_test_split(*correlated(d // 2, d, w, snr), test_size=0.15, random_state=42)
    train = np.ones((5, len(y)))
    for fold, (_, held_out) in zip(train, KFold(5, shuffle=True, random_state=42).split(x), strict=True):
        fold[held_out] = 0
    rates = [len(rows) / np.linalg.norm(rows, 2) ** 2 for rows in [*(x[fold > 0] for fold in train), x]]
    oracle = tuple(np.mean((a @ w - b) ** 2) for a, b in ((x, y), (test_x, test_y)))
    return Data(*jax.tree.map(jnp.asarray, (x, y, train, np.array(rates[:5]), rates[5], (test_x, test_y), oracle)))


def soft(w, threshold):
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0)


def gradient(data, rows, w):
    """Of |y − Xw|²/2n over some rows."""
    return data.x.T @ (rows * (data.x @ w - data.y)) / rows.sum()


def descend(data, rows, rate, alpha, start, tolerance):
    """FISTA, which begins anew where it would go back: weights, and how many iterations."""

    def step(state):
        w, z, t, num, _ = state
        new = soft(z - rate * gradient(data, rows, z), rate * alpha)
        t = jnp.where((z - new) @ (new - w) > 0, 1.0, t)
        after = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        going = jnp.linalg.norm(new - z) > tolerance * jnp.linalg.norm(new)
        return new, new + (t - 1) / after * (new - w), after, num + 1, going

    state = (start, start, 1.0, 0, True)
    w, *_, num, _ = jax.lax.while_loop(lambda state: state[-1] & (state[-2] < 20_000), step, state)
    return w, num


def stationary(w, given):
    """Zero at the solution: the gradient of the train loss on the weights that are not zero; the others stay zero."""
    h, data, rows = given
    on = w != 0
    return jnp.where(on, gradient(data, rows, jnp.where(on, w, 0)) + jnp.exp(h) * jnp.sign(w), w)


def scored(h, data, starts, tolerance=TOLERANCE):
    """The score, which can be differentiated, and each fold's weights and iterations."""

    def fold(rows, rate, start):
        alpha = jnp.exp(jax.lax.stop_gradient(h))
        w, num = descend(data, rows, rate, alpha, start, tolerance)
        found = jaxhpo.implicit(stationary, w, (h, data, rows), jaxhpo.CG(maxiter=200, tol=1e-3))
        return (1 - rows) @ (data.x @ found - data.y) ** 2 / (1 - rows).sum(), w, num

    losses, weights, num = jax.vmap(fold)(data.train, data.rates, starts)
    return losses.mean() / data.oracle[0], (weights, num)


def box(data):
    """The least log α and the largest, one at which no weight of all rows is above zero."""
    largest = float(jnp.log(jnp.abs(data.x.T @ data.y).max() / len(data.y)))
    return largest - np.log(100), largest


@functools.partial(jax.jit, static_argnums=2)
def cold(h, data, tolerance=EXACT):
    """Scores of penalties of shape (trials, d), trained from zero."""
    return jax.vmap(lambda h: scored(h, data, jnp.zeros((5, len(h))), tolerance)[0])(h)


@functools.partial(jax.jit, static_argnums=2)
def tested(h, data, tolerance=EXACT):
    """Test error over the oracle's, and how many weights are not zero."""
    w, _ = descend(data, jnp.ones(len(data.y)), data.rate, jnp.exp(h), jnp.zeros(len(h)), tolerance)
    x, y = data.test
    return jnp.mean((x @ w - y) ** 2) / data.oracle[1], (w != 0).sum()


def by_gradient(data, start, num_steps, budget):
    """Values, costs and penalties of each step of Adam, until trainings alone have cost the budget."""
    low, high = box(data)
    spent = []

    def outer_loss(h, carry, key):
        value, (weights, num) = scored(h, data, carry)
        return value, weights, {"training": num.mean()}

    def stop(step):
        spent.append(float(step.info["training"]))
        return sum(spent) > budget

    history = jaxhpo.tune(
        outer_loss,
        start,
        optax.adam(0.11),
        num_steps=num_steps,
        projections=lambda h: jnp.clip(h, low, high),
        carry=jnp.zeros((5, len(start))),
        record=("hparams", "linear_solves"),
        callbacks=[stop],
        progress=False,
    ).history
    more = history["linear_solves"]["num_iterations"] / 5 + 2  # a gradient of the held-out loss, and the condition's
    return history["value"], history["info"]["training"] + more, history["hparams"]


SEARCHES = {
    "random": search.random,
    "TPE": functools.partial(search.bayes, sampler="tpe"),
    "CMA-ES": search.cmaes,
}


def by_search(data, start, num_trials, method, seed):
    low, high = box(data)

    def outer_loss(h, carry, key):
        value, (_, num) = scored(h, data, jnp.zeros((5, len(h))))
        return value, carry, {"training": num.mean()}

    space = {"low": low, "high": high, "batch": BATCH[method], "key": jax.random.key(seed), "progress": False}
    history = SEARCHES[method](outer_loss, start, num_trials=num_trials, **space).history
    return history["value"], history["info"]["training"], history["hparams"]


def measure(d, snr, seeds, quick):
    """A row for each method and seed; the first is the best common penalty's."""
    data = load(d, snr)
    low, high = box(data)
    start = jnp.full(d, (low + high) / 2)
    trials = 20 if quick else TRIALS[d]
    common = jnp.tile(jnp.linspace(low, high, 100)[:, None], (1, d))
    scores = np.concatenate([cold(part, data) for part in np.split(common, 10)])
    runs = {}
    for method in SEARCHES:
        for seed in range(seeds):
            print(f"{d} features, signal to noise {snr}: {method}, seed {seed}", file=sys.stderr, flush=True)
            runs[method, seed] = by_search(data, start, trials, method, seed)
    budget = min(costs.sum() for _, costs, _ in runs.values())
    runs["hypergradient", 0] = by_gradient(data, start, 20 if quick else 1000, budget)
    row = {"features": d, "signal to noise": snr}
    test, kept = tested(common[scores.argmin()], data)
    rows = [row | {"method": "one penalty", "score": float(scores.min()), "test": float(test), "kept": int(kept)}]
    for (method, seed), (values, costs, hparams) in runs.items():
        spent = np.cumsum(costs)
        lowest = np.minimum.accumulate(values)
        own = row | {"method": method, "seed": seed, "budget": float(budget), "spent": float(min(spent[-1], budget))}
        own["calls"] = len(values)
        for share in SHARES:
            best = hparams[values[: np.searchsorted(spent, share * budget, "right")].argmin()]
            (score,) = cold(best[None], data)
            test, kept = tested(best, data)
            own[f"at {share:g}"] = {"score": float(score), "test": float(test), "kept": int(kept)}
        places = np.searchsorted(spent, budget * GRID, "right") - 1
        own["curve"] = [float(lowest[at]) if at >= 0 else None for at in places]
        rows.append(own)
    return rows


def mean_and_error(values):
    """Over seeds; no error of a single one."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": None if error is None else float(error)}


def summary(rows):
    """Of each problem: scores, test errors and weights kept, after each share of the budget."""
    found = {}
    for row in rows:
        problem = f"{row['features']} features, signal to noise {row['signal to noise']}"
        if row["method"] == "one penalty":
            found[problem] = {"one penalty": {key: row[key] for key in ("score", "test", "kept")}}
            continue
        own = [r for r in rows if all(r[k] == row[k] for k in ("features", "signal to noise", "method"))]
        found[problem][row["method"]] = values = {
            "budget": row["budget"],
            "spent": float(np.mean([r["spent"] for r in own])),
        }
        for share in SHARES:
            ends = [r[f"at {share:g}"] for r in own]
            values[f"at {share:g}"] = {key: mean_and_error([end[key] for end in ends]) for key in ends[0]}
    return found


def is_lower(found, what, share):
    """Problems where hypergradients are lower after a share of the gradients than each search after all of them."""
    return sum(
        own["hypergradient"][f"at {share:g}"][what]["mean"]
        < min(own[method]["at 1"][what]["mean"] for method in SEARCHES)
        for own in found.values()
    )


COLORS = {"hypergradient": plot.BLUE, "TPE": plot.VERMILION, "CMA-ES": plot.GREEN, "random": "0.5"}


def picture(rows, found, path):
    noises = list(dict.fromkeys(row["signal to noise"] for row in rows))
    sizes = list(dict.fromkeys(row["features"] for row in rows))
    figure, axes = plot.figure(len(noises), len(sizes), width=11, height=2.7 * len(noises) + 0.5)
    for i, snr in enumerate(noises):
        for axis, d in zip(axes[i], sizes, strict=True):
            own = [row for row in rows if row["signal to noise"] == snr and row["features"] == d]
            for method, color in COLORS.items():
                curves = np.array([row["curve"] for row in own if row["method"] == method], float)
                error = curves.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else np.zeros(len(GRID))
                plot.band(axis, GRID, curves.mean(0), error, label=method, color=color, lw=2)
            axis.axhline(own[0]["score"], color="k", lw=1, ls=":", label="best common penalty")
            axis.axvline(1 / 20, color="0.8", lw=1, zorder=0)
            axis.set(xscale="log", yscale="log", xlim=(1 / 300, 1), title=f"{d} features, signal to noise {snr}")
            axis.title.set_fontsize(plot.TITLE)
            axis.set_xticks([1 / 100, 1 / 20, 1 / 5, 1], ["1/100", "1/20", "1/5", "1"])
            axis.minorticks_off()
            plot.plain_log_ticks(axis.yaxis)
    for axis in axes[-1]:
        axis.set_xlabel("training gradients, of the budget")
    for axis in axes[:, 0]:
        axis.set_ylabel("score (the oracle's is 1)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, **plot.LEGEND)
    title = "Lasso, a penalty each: hypergradients score below all searches in {} of {}, at 1/20 of the gradients in {}"
    below = [is_lower(found, "score", share) for share in SHARES]
    figure.suptitle(title.format(below[1], len(found), below[0]), fontsize=11)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=3, quick=1)
    jax.config.update("jax_enable_x64", True)
    problems, rows = [(d, snr) for d in SIZES for snr in (10, 3)], []
    for d, snr in problems[: 1 if given.quick else None]:
        rows += measure(d, snr, given.seeds if d < 1000 else 1, given.quick)
        found = summary(rows)
        print(json.dumps({name: values for name, values in found.items() if name == list(found)[-1]}))
        (given.out / "lasso_bench.json").write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")
    picture(rows, found, given.out / "lasso_bench.png")


if __name__ == "__main__":
    main()
