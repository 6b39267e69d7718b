"""Are exact hypergradients called exact, is an error bar as large as the error, and what foretells a finite step?

Three parts. "exact": `check_hypergradient` in float32 on hypergradients that are exact: closed-form ridge regression by
five folds with penalties of 0.01 to 200, a transformer of 100 steps (`Unroll`), scikit-learn's logistic regression
(`implicit`). "bars": `tune(record="error")` with five rules on a small network by SGD and Adam: how often the error bar
is within a factor of two of the true error, of 40 outer steps each. "predictivity": the correlation of predicted and
real change of the validation loss along eight random steps of 0.1 of 400 examples' weights, for twelve draws of the
steps each, by `eps_root` of Adam. Six seeds; the picture shows the error bars against the truth.

    python benchmarks/error_bars.py [--out DIR] [--quick]
"""

import argparse
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import unroll
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import LogisticRegression

import jaxhpo
import jaxhpo.data
from jaxhpo import Implicit, Unroll, plot
from jaxhpo._diagnostics.predictivity import retrain

RULES = {
    "Unroll(truncate=5)": Unroll(truncate=5),
    "Unroll(truncate=20)": Unroll(truncate=20),
    "Implicit(Neumann(5, 0.3))": Implicit(jaxhpo.Neumann(5, 0.3)),
    "SAMA()": jaxhpo.SAMA(),
    "FiniteDifference(0.3)": jaxhpo.FiniteDifference(step_size=0.3),
}
OPTIMISERS = {"sgd": optax.sgd(0.3, momentum=0.9), "adam": optax.adam(1e-2, eps_root=1e-6)}


def ridge(penalty):
    """Five folds of the diabetes data, in closed form; the penalty of all ten features."""
    x, y = map(np.asarray, load_diabetes(return_X_y=True))
    x, y = jnp.asarray((x - x.mean(0)) / x.std(0), jnp.float32), jnp.asarray(y - y.mean(), jnp.float32)
    folds = jnp.ones((5, len(y)), jnp.float32).at[jnp.arange(len(y)) % 5, jnp.arange(len(y))].set(0.0)

    def fit(h, row):
        return jnp.linalg.solve((x.T * row[None]) @ x + jnp.diag(h), x.T @ (row * y))

    def loss(h):
        return jnp.mean((1 - folds) * (jax.vmap(lambda row: fit(h, row))(folds) @ x.T - y[None]) ** 2)

    return loss, jnp.full(10, penalty, jnp.float32)


def transformer(seed):
    """Two layers, 100 steps of Adam: decays, a rate per step and examples' weights around their usual values."""
    model = unroll.language_model(layers=2, width=32, heads=2, vocabulary=64, length=16, batch=8)
    case = unroll.make_case(model, "adam", 100, "all", {"rule": Unroll()})
    leaves, structure = jax.tree.flatten(case.args[0])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    return lambda h: case.losses["rule"](h, *case.args[1:]), structure.unflatten(leaves)


def logistic(seed):
    """Ten features of the breast cancer data: a penalty each, e^-3 to e^3; scikit-learn finds the minimum."""
    x, y = map(np.asarray, load_breast_cancer(return_X_y=True))
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)[:, :10]
    train, val = slice(300), slice(300, None)

    def condition(w, h):
        z = x[train] @ w
        return x[train].T @ (jax.nn.sigmoid(z) - y[train]) + jnp.exp(h) * w

    def fit(h):
        scale = np.exp(-np.asarray(h, float) / 2)  # |w|² of scaled features
        model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=10_000)
        return model.fit(x[train] * scale, y[train]).coef_[0] * scale

    def loss(h):
        z = x[val] @ jaxhpo.implicit(condition, fit, h, like=jnp.zeros(10))
        return jnp.mean(jnp.logaddexp(0, z) - y[val] * z)

    return loss, jnp.asarray(np.random.default_rng(seed).uniform(-3, 3, 10), jnp.float32)


def exact(number):
    """The verdicts on exact hypergradients, and the largest relative error that was found."""
    problems = {"ridge": (ridge, np.geomspace(0.01, 200, number)), "transformer": (transformer, range(number))}
    problems["logistic regression"] = logistic, range(number)
    rows = []
    for name, (make, settings) in problems.items():
        checks = [jaxhpo.check_hypergradient(*make(setting)) for setting in settings]
        agree, worst = sum(check.verdict == "agrees" for check in checks), max(check.relative_error for check in checks)
        rows.append({"problem": name, "agrees": agree, "of": len(checks), "largest error": worst})
        print(f"{name}: agrees {agree} of {len(checks)}, largest relative error {worst:.1e}", flush=True)
    return rows


def network(seed, hidden, examples):
    """The parts of a network 64-hidden-10 on digits, and its cross-entropy per example."""
    parts = jaxhpo.data.digits(seed=seed, train=examples, validation=examples)
    data = [(jnp.asarray(part.inputs, jnp.float32), jnp.asarray(part.targets)) for part in parts[:2]]
    keys = jax.random.split(jax.random.key(seed))
    start = {
        "in": jax.random.normal(keys[0], (64, hidden), jnp.float32) / 8,
        "out": jax.random.normal(keys[1], (hidden, 10), jnp.float32) / hidden**0.5,
    }

    def losses(p, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ p["in"]) @ p["out"], y)

    return start, losses, *data


def bars(steps):
    """Error bars and true errors of 1184 penalties on a network 64-16-10, T = 100, by rule and optimiser."""
    start, losses, train, val = network(0, 16, 200)
    h, rows = jax.tree.map(lambda x: jnp.full_like(x, -6.0), start), []

    def train_loss(p, h, batch):
        return losses(p, *train).mean() + sum(jnp.sum(jnp.exp(h[k]) * p[k] ** 2) for k in p)

    for optimiser, tx in OPTIMISERS.items():
        solver = jaxhpo.from_optax(train_loss, tx)

        def outer_loss(h, rule, solver=solver):
            sol = jaxhpo.solve(solver, solver.init(start, h), h, num_steps=100, adjoint=rule)
            return losses(sol.params, *val).mean()

        true = jax.jit(jax.grad(lambda h, f=outer_loss: f(h, Unroll())))
        for name, rule in RULES.items():
            settings = {"record": ("error", "hypergradient", "hparams"), "progress": False}
            loss = lambda h, rule=rule, f=outer_loss: f(h, rule)  # noqa: E731
            history = jaxhpo.tune(loss, h, optax.adam(0.1), num_steps=steps, **settings).history
            exact_ones = jax.lax.map(true, jax.tree.map(jnp.asarray, history["hparams"]))
            off = jax.tree.map(lambda a, b: a - np.asarray(b), history["hypergradient"], exact_ones)
            flat = np.concatenate([x.reshape(steps, -1) for x in jax.tree.leaves(off)], axis=1)
            errors = np.linalg.norm(flat, axis=1)
            ratio = history["error"] / errors
            within = {str(f): float(np.mean((ratio > 1 / f) & (ratio < f))) for f in (2, 3)}
            relative = float(np.median(errors / history["hypergradient_norm"]))
            rows.append({"rule": name, "optimiser": optimiser, "within": within, "relative error": relative})
            rows[-1] |= {"bars": history["error"].tolist(), "errors": errors.tolist()}
            print(f"{optimiser}, {name}: error / norm {relative:.1f}, within a factor {within}", flush=True)
    return rows


def predictivity(seeds, draws):
    """Correlations of predicted and real change, by `eps_root`, and how often 1e-5 is above 1e-8."""
    rows = []
    for seed in range(seeds):
        start, losses, train, val = network(seed, 32, 400)
        h, found = jnp.zeros(400, jnp.float32), {}
        for eps_root in (1e-8, 1e-5):
            solver = jaxhpo.from_optax(
                lambda p, h, batch: jnp.mean((1 + h) * losses(p, *train)),  # noqa: B023
                optax.adam(1e-2, eps_root=eps_root),
            )

            def outer_loss(h, solver=solver):
                return losses(jaxhpo.solve(solver, solver.init(start, h), h, num_steps=200).params, *val).mean()  # noqa: B023

            grad = np.asarray(jax.jit(jax.grad(outer_loss))(h), float)
            keys = jax.random.split(jax.random.key(seed), draws)
            each = [retrain(jax.jit(outer_loss), h, (0.1,), key)[0].predictivity(grad).correlation for key in keys]
            found[eps_root] = np.array(each)
        ranked = float((found[1e-5][:, None] > found[1e-8][None]).mean())
        means = {f"{eps_root:.0e}": float(x.mean()) for eps_root, x in found.items()}
        rows.append({"seed": seed, "correlation": means, "ranked right": ranked})
        print(f"seed {seed}: correlation {means}, ranked right {ranked:.3f}", flush=True)
    return rows


def draw(rows, path):
    figure = Figure((6, 5), layout="constrained")
    axis = figure.subplots()
    colours = dict(zip(RULES, plot.PALETTE, strict=False))
    for row in rows:
        style = {"marker": {"sgd": "o", "adam": "x"}[row["optimiser"]], "color": colours[row["rule"]], "ms": 4}
        axis.plot(row["errors"], row["bars"], ls="", alpha=0.6, label=f"{row['rule']}, {row['optimiser']}", **style)
    ends = np.array([min(min(row["errors"]) for row in rows) / 2, max(max(row["errors"]) for row in rows) * 2])
    axis.plot(ends, ends, color="0.3", lw=1)
    axis.fill_between(ends, ends / 2, ends * 2, color="0.5", alpha=0.2, linewidth=0, label="a factor of two")
    near = np.mean([row["within"]["2"] for row in rows])
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="true error of the hypergradient")
    axis.set(ylabel="error bar", title=f"{100 * near:.0f} % of error bars are within a factor of two of the error")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.set_major_formatter("{x:g}")
        each.set_minor_formatter(NullFormatter())
    axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a few of each; nothing is written")
    parsed = parser.parse_args(arguments)
    warnings.simplefilter("ignore", jaxhpo.ZeroHypergradientWarning)
    few = parsed.quick
    report = {"exact": exact(1 if few else 20), "bars": bars(4 if few else 40)}
    report["predictivity"] = predictivity(*((1, 2) if few else (6, 12)))
    if not few:
        parsed.out.mkdir(parents=True, exist_ok=True)
        (parsed.out / "error_bars.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(report["bars"], parsed.out / "error_bars.png")


if __name__ == "__main__":
    main()
