"""Whether weights of an ensemble, tuned by the gradient of cross-validation, beat equal ones and the best model alone.

Models of scikit-learn, trained on each of five folds' complements, predict the rows held out. `tune` moves the weights
of their mixture on the simplex, to the lowest loss of these predictions; then each model is trained on all rows, and
the mixtures are judged on rows that neither saw. Beside it equal weights, the model of the lowest cross-validation loss
alone, weights at random, and the model that is best on the new rows, which nobody knows beforehand.

    diabetes    300 rows, 142 new: mean square, of standardised targets
    friedman    Friedman's first function, five of ten inputs matter: 200 rows, 2000 new
    digits      300 rows, 1497 new: log loss

    python benchmarks/stacking.py [--out DIR] [--quick] [--seeds 20]
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from _arguments import parse
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.svm import SVR

import jaxhpo
from jaxhpo import criteria, plot

FOLDS, SURE = 5, 0.999  # the rest of a probability is shared by all classes, so that no loss is infinite


def regressors(seed):
    return {
        "ridge": RidgeCV(np.logspace(-2, 3, 11)),
        "kernel ridge": KernelRidge(alpha=0.1, kernel="rbf", gamma=0.03),
        "support vectors": SVR(),
        "neighbours": KNeighborsRegressor(10),
        "forest": RandomForestRegressor(50, min_samples_leaf=3, random_state=seed),
    }


def classifiers(seed):
    return {
        "logistic": LogisticRegression(C=0.1, max_iter=1000),
        "naive Bayes": GaussianNB(var_smoothing=0.1),
        "neighbours": KNeighborsClassifier(5),
        "forest": RandomForestClassifier(50, random_state=seed),
    }


def squared(mixed, y):
    return jnp.mean((mixed - y) ** 2)


def log_loss(mixed, y):
    return -jnp.mean(jnp.log(jnp.take_along_axis(SURE * mixed + (1 - SURE) / 10, y[:, None], 1)))


def load(name, seed):
    """Inputs, targets, the number of rows to train on, models, loss."""
    if name == "digits":
        x, y = sklearn.datasets.load_digits(return_X_y=True)
        x, rows, models, loss = x / 16, 300, classifiers(seed), log_loss
    elif name == "friedman":
        x, y = sklearn.datasets.make_friedman1(2200, noise=1.0, random_state=seed)
        rows, models, loss = 200, regressors(seed), squared
    else:
        x, y = sklearn.datasets.load_diabetes(return_X_y=True)
        rows, models, loss = 300, regressors(seed), squared
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    if loss is squared:
        x, y = ((z - z[:rows].mean(0)) / z[:rows].std(0) for z in (x, y))
    return x, y, rows, models, loss


def predicted(model, x, y, new):
    model = model.fit(x, y)
    return model.predict_proba(new) if hasattr(model, "predict_proba") else model.predict(new)


def measure(name, seed, num_steps):
    x, y, rows, models, loss = load(name, seed)
    masks = np.asarray(criteria.folds(rows, FOLDS, seed=seed), bool)
    held_out, new = [], []
    for model in models.values():
        parts = [predicted(model, x[:rows][~mask], y[:rows][~mask], x[:rows][mask]) for mask in masks]
        whole = np.empty((rows, *parts[0].shape[1:]))
        for mask, part in zip(masks, parts, strict=True):
            whole[mask] = part
        held_out.append(whole)
        new.append(predicted(model, x[:rows], y[:rows], x[rows:]))
    held_out, new = jnp.asarray(np.array(held_out)), jnp.asarray(np.array(new))

    def judge(weights, predictions, targets):
        return loss(jnp.tensordot(weights, predictions, 1), targets)

    equal = jnp.full(len(models), 1 / len(models))
    tuned = jaxhpo.tune(
        lambda weights: judge(weights, held_out, y[:rows]),
        equal,
        optax.adam(0.1),
        num_steps=num_steps,
        transforms=jaxhpo.simplex,
        progress=False,
    ).best_hparams
    alone = np.array([judge(w, held_out, y[:rows]) for w in jnp.eye(len(models))])
    of_new = np.array([judge(w, new, y[rows:]) for w in jnp.eye(len(models))])
    weights = {
        "tuned": tuned,
        "equal": equal,
        "best alone": jnp.eye(len(models))[alone.argmin()],
        "random": jax.random.dirichlet(jax.random.key(seed), jnp.ones(len(models))),
        "best of new rows": jnp.eye(len(models))[of_new.argmin()],
    }
    return {
        "data": name,
        "seed": seed,
        "weights": {model: round(float(w), 3) for model, w in zip(models, tuned, strict=True)},
        "held out": {how: float(judge(w, held_out, y[:rows])) for how, w in weights.items()},
        "new rows": {how: float(judge(w, new, y[rows:])) for how, w in weights.items()},
    }


def summary(rows):
    """Mean losses on new rows, and paired differences of tuned weights to the others."""
    found = {}
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row["new rows"] for row in rows if row["data"] == name]
        losses = {how: np.array([row[how] for row in own]) for how in own[0]}
        found[name] = {"losses": {how: float(values.mean()) for how, values in losses.items()}}
        for how in list(losses)[1:]:
            less = losses["tuned"] - losses[how]
            error = float(less.std(ddof=1) / len(less) ** 0.5) if len(less) > 1 else None
            found[name][f"tuned minus {how}"] = {
                "mean": float(less.mean()),
                "error": error,
                "seeds below": int((less < 0).sum()),
                "of": len(less),
            }
    return found


def picture(rows, found, path):
    figure, axes = plot.figure(1, len(found), width=4 * len(found), height=3.2)
    rivals = ("equal", "best alone", "random", "best of new rows")
    for axis, name in zip(axes.flat, found, strict=True):
        own = [row["new rows"] for row in rows if row["data"] == name]
        more = np.array([[100 * (row["tuned"] / row[how] - 1) for how in rivals] for row in own])
        axis.axvline(0, color="0.6", lw=1)
        for place, values in enumerate(more.T):
            axis.plot(values, np.full(len(values), place), "o", ms=3, color=plot.BLUE, alpha=0.4)
            axis.plot(values.mean(), place, "D", ms=6, color=plot.VERMILION)
        axis.set_yticks(range(len(rivals)), rivals)
        axis.invert_yaxis()
        axis.set(xlabel="loss of tuned weights, % more")
        axis.set_title(f"{name}: {more[:, 0].mean():+.1f} % to equal, {more[:, 1].mean():+.1f} % to best", fontsize=10)

    def beaten(how):  # by two standard errors
        less = [values[f"tuned minus {how}"] for values in found.values()]
        return sum(x["error"] is not None and x["mean"] < -2 * x["error"] for x in less)

    title = "Tuned weights of an ensemble beat equal ones on {} of {} data sets, the best model alone on {}"
    figure.suptitle(title.format(beaten("equal"), len(found), beaten("best alone")), fontsize=12)
    plot.save(figure, path)


def main(arguments=None) -> None:
    given = parse(__doc__, arguments, seeds=20, quick=1)
    jax.config.update("jax_enable_x64", True)
    names = ("diabetes", "friedman", "digits")[: 1 if given.quick else None]
    rows = [measure(name, seed, 5 if given.quick else 200) for name in names for seed in range(given.seeds)]
    found = summary(rows)
    for name, values in found.items():
        print(f"{name}: {json.dumps(values)}")
    (given.out / "stacking.json").write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")
    picture(rows, found, given.out / "stacking.png")


if __name__ == "__main__":
    main()
