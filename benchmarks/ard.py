"""Whether a precision for each feature, tuned by the evidence, finds 50 features of noise among the real ones.

Bayesian linear regression on scikit-learn's diabetes (ten features) and digits (the pixels that are not white in one
image of a hundred; one-hot labels as ten targets that share precisions), standardised, with 50 columns of Gaussian
noise. Adam moves log precisions and the noise's log precision by the gradient of the exact evidence.

The rule is set beforehand and knows nothing of the columns' origin: a feature is left out where that costs less than 2
nats of evidence, with all else as it is: log p(w = 0) − log p(w = 0 | data) < 2 (Savage and Dickey). Beside it
scikit-learn's `ARDRegression`, which leaves out what it gives a weight of zero (one fit for each target).

Not to be lost: on diabetes bmi, bp, s5 and sex, the features with |t| > 3.5 in a fit of all rows; on digits the ten
pixels with the largest weights in a fit without noise features, under one precision for all. Errors are mean squares
over held-out rows, of fits by the features that each keeps.

    python benchmarks/ard.py [--out DIR] [--quick] [--seeds 10]
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
import sklearn.linear_model
from _arguments import parse

from jaxhpo import plot
from jaxhpo.models.regression import bayesian_linear

NOISE, NATS = 50, 2.0
STRONG = ("bmi", "bp", "s5", "sex")


def posterior(h, x, y):
    """Of all targets, whose weights share the precisions."""
    return jax.vmap(bayesian_linear, (None, 1, None, None))(x, y, h["weights"], h["noise"])


def one_by_one(fn):
    """Over data sets in turn: on two cores, batched triangular solves may wait for each other's threads for ever."""
    return jax.jit(lambda *args: jax.lax.map(lambda given: fn(*given), args))


def tuned(x, y, shape, num_steps):
    """Log precisions for each of several data sets, with a leading axis, by Adam."""
    optimizer = optax.adam(0.1)

    def tune(x, y):
        def step(carry, _):
            h, state = carry
            gradient = jax.grad(lambda h: -posterior(h, x, y).log_evidence.sum())(h)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(h, updates), state), None

        h = {"weights": jnp.zeros(shape), "noise": jnp.zeros(())}
        return jax.lax.scan(step, (h, optimizer.init(h)), None, num_steps)[0][0]

    return one_by_one(tune)(x, y)


@one_by_one
def posteriors(h, x, y):
    found = posterior(h, x, y)
    return found.mean, jnp.diagonal(found.covariance, axis1=1, axis2=2)


def cost(h, x, y):
    """Nats of evidence that leaving out a feature costs: the log density of its weights at 0, before over after."""
    mean, variance = posteriors(h, x, y)
    each = 0.5 * (h["weights"][:, None] + jnp.log(variance) + mean**2 / variance)
    return np.asarray(each.sum(1))


def load(name):
    """Inputs, targets, names of features."""
    if name == "diabetes":
        data = sklearn.datasets.load_diabetes()
        return data.data, data.target[:, None], data.feature_names
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    used = np.flatnonzero((x > 0).mean(0) >= 0.01)  # the others are constant in some halves of the data
    return x[:, used], np.eye(10)[y], [f"pixel {i}" for i in used]


def draw(name, train, seed):
    """Inputs with noise features, targets: shuffled, and standardised by the first `train` rows."""
    x, y, _ = load(name)
    rng = np.random.default_rng(seed)
    x = np.concatenate([x, rng.standard_normal((len(x), NOISE))], 1)
    order = rng.permutation(len(x))
    return [(z - z[:train].mean(0)) / z[:train].std(0) for z in (x[order], y[order])]


def without_noise(x, y, width, num_steps):
    """The ten features with the largest weights, of each data set: one precision for all, no noise features."""
    x = x[:, :, :width]
    h = tuned(x, y, (), num_steps)
    size = np.linalg.norm(posteriors(h, x, y)[0], axis=1)
    return np.argsort(size)[:, -10:]


def measure(name, train, seeds, num_steps):
    """Rows of a data set, one for each seed and method, and the cost of leaving out each feature."""
    names = load(name)[2]
    x, y = map(np.stack, zip(*[draw(name, train, seed) for seed in range(seeds)], strict=True))
    seen = x[:, :train], y[:, :train]
    h = tuned(*seen, (x.shape[2],), num_steps)
    costs = cost(h, *seen)
    without = h | {"weights": jnp.where(costs >= NATS, h["weights"], 30.0)}  # e³⁰ leaves a weight out
    rival = [
        [sklearn.linear_model.ARDRegression().fit(a, target).coef_ for target in b.T]
        for a, b in zip(*seen, strict=True)
    ]
    found = {
        "evidence": (costs >= NATS, np.asarray(posteriors(without, *seen)[0])),
        "ARDRegression": (np.any(rival, axis=1), np.array(rival)),
    }
    if name == "diabetes":
        strong = np.tile([names.index(n) for n in STRONG], (seeds, 1))
    else:
        strong = without_noise(*seen, len(names), num_steps)
    rows = []
    for method, (keep, coef) in found.items():
        for seed in range(seeds):
            residual = x[seed, train:] @ coef[seed].T - y[seed, train:]
            row = {"data": name, "rows": train, "method": method, "seed": seed}
            row["noise found"] = float(1 - keep[seed, len(names) :].mean())
            row["real ones kept"] = int(keep[seed, : len(names)].sum())
            row["lost"] = [names[i] for i in strong[seed] if not keep[seed, i]]
            row["held-out error"] = float(np.mean(residual**2)) if len(residual) else None
            rows.append(row)
    return rows, costs


def summary(rows):
    """Over seeds, of each data set and method."""
    groups = {}
    for row in rows:
        groups.setdefault(f"{row['data']}, {row['rows']} rows, {row['method']}", []).append(row)

    def over(own):
        noise, errors = ([row[what] for row in own] for what in ("noise found", "held-out error"))
        return {
            "noise found": float(np.mean(noise)),
            "least": min(noise),
            "real ones kept": float(np.mean([row["real ones kept"] for row in own])),
            "seeds": len(own),
            "seeds that lose one of the strong": sum(bool(row["lost"]) for row in own),
            "lost": [name for row in own for name in row["lost"]],
            "held-out error": None if None in errors else float(np.mean(errors)),
        }

    return {name: over(own) for name, own in groups.items()}


def picture(costs, found, path):
    figure, axes = plot.figure(1, len(costs), width=4.5 * len(costs), height=3.6)
    for axis, (name, cost) in zip(axes.flat, costs.items(), strict=True):
        parts = {"real features": cost[:, :-NOISE].ravel(), "noise": cost[:, -NOISE:].ravel()}
        bins = np.geomspace(0.03, max(100, cost.max()), 40)  # what costs less is in the first
        for color, (label, values) in zip((plot.BLUE, plot.VERMILION), parts.items(), strict=True):
            axis.hist(np.maximum(values, bins[0]), bins, color=color, alpha=0.6, label=label)
        axis.axvline(NATS, color="0.3", lw=1, label=f"kept from {NATS:g} nats on")
        axis.set(xscale="log", yscale="log", xlabel="nats that leaving it out costs")
        axis.set_ylabel("features, all seeds")
        ours, rival = (100 * found[f"{name}, {method}"]["noise found"] for method in ("evidence", "ARDRegression"))
        axis.set_title(f"{name}:\n{ours:.0f} % of the noise found, {rival:.0f} % by ARDRegression", fontsize=plot.TITLE)
        axis.legend(**plot.LEGEND | {"fontsize": 8})
    figure.suptitle("By the gradient of the evidence, features of noise are told from real ones")
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=10, quick=2)
    jax.config.update("jax_enable_x64", True)
    rows, costs = [], {}
    for name, train in (("diabetes", 442), ("diabetes", 350), ("digits", 1000))[: 1 if given.quick else None]:
        own, costs[f"{name}, {train} rows"] = measure(name, train, given.seeds, 20 if given.quick else 300)
        rows += own
    found = summary(rows)
    for name, values in found.items():
        print(f"{name}: {json.dumps(values)}")
    (given.out / "ard.json").write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")
    picture(costs, found, given.out / "ard.png")


if __name__ == "__main__":
    main()
