"""What the estimators of `jaxhpo.sklearn` gain, or lose, beside those of scikit-learn and himalaya.

Real data by repeated folds, compared by the corrected resampled t-test (Nadeau and Bengio); synthetic data by fresh
draws, compared by the paired t-test; Holm's correction over all comparisons of the table. Each estimator is behind
`StandardScaler`. Errors are mean squares over the variance of y, or log losses; seconds those of one processor for a
fit. himalaya's GroupRidgeCV takes part where it is installed.

    python benchmarks/estimators.py [--out DIR] [--seeds N] [--quick] [--tasks NAME ...]

Of tasks that are not named, the report that is there keeps its rows.
"""

import argparse
import json
import pathlib
import time
import warnings

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from sklearn import datasets, linear_model, metrics, model_selection
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from sklearn.kernel_ridge import KernelRidge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from threadpoolctl import threadpool_limits

import jaxhpo.sklearn as ours
from jaxhpo import plot

try:
    from himalaya.ridge import GroupRidgeCV
except ImportError:
    GroupRidgeCV = None

FIRST = 10_000  # seeds below it were looked at while the estimators were made
LEVEL = 0.05
NEW = 1000  # rows of a draw that test
FEWER = {"GroupRidgeCV (himalaya)": 10}  # seeds of what takes minutes


# --- data: each task gives (X, y, test X, test y) for a seed, and what is known of its features -----------------------


def linear(n, p, weights, noise=0.7):
    """A linear function of unit variance, and noise."""

    def draw(seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n + NEW, p))
        f = x @ weights(rng)
        y = f / f.std() + noise * rng.normal(size=len(f))
        return x[:n], y[:n], x[n:], y[n:]

    return draw


def labels(n, p, weights):
    """Two classes, whose logits are a linear function of standard deviation 2.5."""

    def draw(seed):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n + NEW, p))
        f = x @ weights(rng)
        y = (rng.random(len(f)) < 1 / (1 + np.exp(-2.5 * f / f.std()))).astype(int)
        return x[:n], y[:n], x[n:], y[n:]

    return draw


def friedman(seed):
    x, y = datasets.make_friedman1(100 + NEW, n_features=10, noise=1.0, random_state=seed)
    return x[:100], y[:100], x[100:], y[100:]


def friedman2(seed):
    x, y = datasets.make_friedman2(100 + NEW, noise=100.0, random_state=seed)
    return x[:100], y[:100], x[100:], y[100:]


def low_rank(seed):
    x, y = datasets.make_regression(100 + NEW, 50, n_informative=50, effective_rank=10, noise=1.0, random_state=seed)
    return x[:100], y[:100], x[100:], y[100:]


def folds(load, rows=None):
    """Ten folds of the shuffled rows a repetition: seeds 0 to 9 are the first one's."""
    x, y = load()

    def draw(seed):
        repetition, fold = divmod(seed - FIRST, 10)
        kind = model_selection.StratifiedKFold if y.dtype.kind == "i" else model_selection.KFold
        train, test = list(kind(10, shuffle=True, random_state=FIRST + repetition).split(x, y))[fold]
        return x[train], y[train], x[test], y[test]

    draw.correction = 1 / 9  # n_test / n_train
    return draw


def polynomial_diabetes():
    x, y = datasets.load_diabetes(return_X_y=True)
    return PolynomialFeatures(2, include_bias=False).fit_transform(StandardScaler().fit_transform(x)), y


def groups_of_polynomials(features=10):
    """Linear terms, squares, products."""
    powers = PolynomialFeatures(2, include_bias=False).fit(np.zeros((1, features))).powers_
    return np.where(powers.sum(1) == 1, "linear", np.where(powers.max(1) == 2, "square", "product"))


def linnerud():
    x, y = datasets.load_linnerud(return_X_y=True)
    return x, y[:, 1]  # the waist, by three exercises of 20 men


def noisy_wine():
    x, y = datasets.load_wine(return_X_y=True)
    return np.hstack([x, np.random.default_rng(FIRST).normal(size=(len(x), 20))]), y


GROUPS = np.repeat(np.arange(20), 15)
REGRESSION = {
    "diabetes": (folds(lambda: datasets.load_diabetes(return_X_y=True)), {}),
    "diabetes, degree 2 in 3 groups": (folds(polynomial_diabetes), {"groups": groups_of_polynomials()}),
    "linnerud": (folds(linnerud), {}),
    "friedman1": (friedman, {}),
    "low rank 100x50": (low_rank, {}),
    "dense 100x50": (linear(100, 50, lambda rng: rng.normal(size=50)), {}),
    "sparse 100x50": (linear(100, 50, lambda rng: rng.permutation(np.arange(50) < 5) * 1.0), {}),
    "decaying, covariate log j": (
        linear(100, 50, lambda rng: rng.normal(size=50) / np.arange(1, 51)),
        {"covariates": np.log(np.arange(1, 51))},
    ),
    "20 groups 150x300": (
        linear(150, 300, lambda rng: rng.normal(size=300) * np.exp(1.5 * rng.normal(size=20))[GROUPS]),
        {"groups": GROUPS},
    ),
}
LASSOS = {
    "dense 100x50, lasso": (REGRESSION["dense 100x50"][0], {"features": 50}),
    "sparse 100x50, lasso": (REGRESSION["sparse 100x50"][0], {"features": 50}),
    "5 of 20 features matter, 80 do not": (
        linear(100, 100, lambda rng: np.append(rng.permutation(np.arange(20) < 5), np.zeros(80))),
        {"features": 100, "groups": np.arange(100) < 20},
    ),
}
KERNELS = {
    "friedman1, kernels": (friedman, {"features": 10}),
    "friedman2, kernels": (friedman2, {"features": 4}),
}
CLASSIFICATION = {
    "breast cancer": (folds(lambda: datasets.load_breast_cancer(return_X_y=True)), {}),
    "iris": (folds(lambda: datasets.load_iris(return_X_y=True)), {}),
    "wine + 20 noise": (folds(noisy_wine), {}),
    "dense 200x50": (labels(200, 50, lambda rng: rng.normal(size=50)), {}),
    "sparse 200x50": (labels(200, 50, lambda rng: rng.permutation(np.arange(50) < 5) * 1.0), {}),
    "4 groups 100x100": (
        labels(100, 100, lambda rng: rng.normal(size=100) * np.repeat([2.0, 1.0, 0.2, 0.05], 25)),
        {"groups": np.repeat(np.arange(4), 25)},
    ),
}


# --- estimators -------------------------------------------------------------------------------------------------------


class GroupRidge(RegressorMixin, BaseEstimator):
    """himalaya's random search over group weights, 500 of them."""

    def __init__(self, groups, iterations=500):
        self.groups = groups
        self.iterations = iterations

    def fit(self, x, y):
        params = {"n_iter": self.iterations, "progress_bar": False, "alphas": np.logspace(-2, 5, 20)}
        self.model_ = GroupRidgeCV(groups=self.groups, solver_params=params, random_state=0, cv=5, fit_intercept=True)
        self.model_.fit(x, y[:, None])
        return self

    def predict(self, x):
        return np.ravel(self.model_.predict(x))


def regressors(known):
    """Rivals by name; the first is ours, as one would use it there."""
    yield "BilevelRidge", ours.BilevelRidge(**known)
    yield "one penalty", ours.BilevelRidge(shrinkage=0.0)
    yield "RidgeCV", linear_model.RidgeCV(np.logspace(-3, 5, 25))
    yield "LassoCV", linear_model.LassoCV(cv=5, max_iter=5000)
    yield "ElasticNetCV", linear_model.ElasticNetCV(l1_ratio=[0.1, 0.5, 0.9], cv=5, max_iter=5000)
    yield "ARDRegression", linear_model.ARDRegression()
    yield "BayesianRidge", linear_model.BayesianRidge()
    if GroupRidgeCV is not None and known.get("groups") is GROUPS:
        yield "GroupRidgeCV (himalaya)", GroupRidge(np.unique(known["groups"], return_inverse=True)[1])


def lassos(known):
    """As `regressors`."""
    yield "BilevelLasso", ours.BilevelLasso(groups=known.get("groups"))
    yield "BilevelLasso, one a feature", ours.BilevelLasso(groups=range(known["features"]))
    yield "LassoCV", linear_model.LassoCV(cv=5, max_iter=5000)
    yield "ElasticNetCV", linear_model.ElasticNetCV(l1_ratio=[0.1, 0.5, 0.9], cv=5, max_iter=5000)
    yield "BilevelRidge", ours.BilevelRidge(groups=known.get("groups"))


def kernel_machines(known):
    """As `regressors`."""
    grid = {"alpha": np.logspace(-3, 1, 5), "gamma": np.logspace(-3, 0, 7)}
    features = kernels.RBF(np.ones(known["features"]))
    process = kernels.ConstantKernel() * features + kernels.WhiteKernel()
    yield "BilevelKernelRidge", ours.BilevelKernelRidge()
    yield "one lengthscale", ours.BilevelKernelRidge(shrinkage=0.0)
    yield (
        "KernelRidge, grid",
        TransformedTargetRegressor(
            model_selection.GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=5), transformer=StandardScaler()
        ),
    )
    yield "GaussianProcessRegressor", GaussianProcessRegressor(process, normalize_y=True, random_state=0)


def classifiers(known):
    """As `regressors`."""
    settings = {"Cs": 10, "cv": 5, "scoring": "neg_log_loss", "max_iter": 2000}
    yield "BilevelLogisticRegression", ours.BilevelLogisticRegression(**known)
    yield "one penalty", ours.BilevelLogisticRegression(shrinkage=0.0)
    yield "LogisticRegressionCV, l2", linear_model.LogisticRegressionCV(**settings)
    yield (
        "LogisticRegressionCV, l1",
        linear_model.LogisticRegressionCV(l1_ratios=[1.0], solver="saga", tol=1e-3, **settings),
    )


TASKS = {name: (task, regressors) for name, task in REGRESSION.items()}
TASKS |= {name: (task, lassos) for name, task in LASSOS.items()}
TASKS |= {name: (task, kernel_machines) for name, task in KERNELS.items()}
TASKS |= {name: (task, classifiers) for name, task in CLASSIFICATION.items()}


def measure(task, seeds):
    """Errors and seconds of each estimator, by name, one for each seed."""
    (draw, known), rivals = TASKS[task]
    found: dict = {}
    for seed in seeds:
        x, y, new_x, new_y = draw(seed)
        for name, model in rivals(known):
            if len(found.get(name, ())) >= FEWER.get(name, len(seeds)):
                continue
            start = time.process_time()
            with warnings.catch_warnings(action="ignore"):
                fitted = make_pipeline(StandardScaler(), model).fit(x, y)
            seconds = time.process_time() - start
            if rivals is not classifiers:
                error = np.mean((fitted.predict(new_x) - new_y) ** 2) / np.var(y)
            else:
                error = metrics.log_loss(new_y, fitted.predict_proba(new_x), labels=np.unique(y))
            found.setdefault(name, []).append((float(error), seconds))
    return found


# --- comparisons ------------------------------------------------------------------------------------------------------


def compare(task, found):
    """A row for each estimator, against the first."""
    draw = TASKS[task][0][0]
    first = np.array(next(iter(found.values())))
    for name, values in found.items():
        errors, seconds = np.array(values).T
        count = len(errors)
        difference = first[:count, 0] - errors
        spread = np.sqrt((1 / count + getattr(draw, "correction", 0.0)) * difference.var(ddof=1))
        p = float(2 * scipy.stats.t.sf(abs(difference.mean()) / spread, count - 1)) if spread > 0 else None
        yield {
            "task": task,
            "estimator": name,
            "seeds": count,
            "error": float(errors.mean()),
            "difference": float(difference.mean()),
            "standard_error": float(spread),
            "p": p,
            "seconds": float(np.median(seconds)),
        }


def holm(rows):
    """Add whether a difference is significant, after Holm's correction over all rows that have a p value."""
    tested = sorted((row for row in rows if row["p"] is not None), key=lambda row: row["p"])
    so_far = True
    for rank, row in enumerate(tested):
        so_far = so_far and row["p"] <= LEVEL / (len(tested) - rank)
        row["significant"] = bool(so_far)
    for row in rows:
        row.setdefault("significant", False)
    return rows


def outcome(row):
    """Of ours: +1 significantly better than the row's estimator, −1 worse, 0 neither."""
    return -int(np.sign(row["difference"])) if row["significant"] else 0


def finding(rows):
    """The title: how often ours is significantly better or worse than an estimator that is not ours."""
    theirs = [row for row in rows if not row["estimator"].startswith(("Bilevel", "one"))]
    better, worse = (sum(outcome(row) == sign for row in theirs) for sign in (1, -1))
    return f"Ours is significantly better in {better} of {len(theirs)} comparisons, worse in {worse}"


def draw_picture(rows, path):
    figure = Figure((9, 7), layout="constrained")
    axis = figure.subplots()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["estimator"] for row in rows))[1:]
    names = [name for name in names if not name.startswith("Bilevel")]
    markers = "os^vD<>Pp*Xhd8"
    for i, name in enumerate(names):
        own = [row for row in rows if row["estimator"] == name]
        x = [100 * row["difference"] / row["error"] for row in own]
        y = [tasks.index(row["task"]) + 0.04 * (i - len(names) / 2) for row in own]
        color = plot.PALETTE[i % len(plot.PALETTE)]
        axis.plot(x, y, ls="", marker=markers[i % len(markers)], color=color, mfc="none", ms=6, label=name)
        sure = [(a, b) for a, b, row in zip(x, y, own, strict=True) if row["significant"]]
        if sure:
            axis.plot(*zip(*sure, strict=True), ls="", marker=markers[i % len(markers)], color=color, ms=6)
    axis.axvline(0, color="0.5", lw=1)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=10)
    ticks = [-70, -40, -20, -10, -5, 0, 5, 10, 20, 40, 70]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set(xlabel="error of ours, beside the other's, in % (left: ours is lower; filled: significant)")
    axis.set_title(finding(rows))
    axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results" / "estimators")
    parser.add_argument("--seeds", type=int, default=30, help="draws, or folds in repetitions of ten")
    parser.add_argument("--quick", action="store_true", help="three seeds of four tasks")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="all unless given")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    tasks = parsed.tasks or list(TASKS)
    if parsed.quick:
        tasks, parsed.seeds = parsed.tasks or ["linnerud", "decaying, covariate log j", "friedman2, kernels", "iris"], 3
    path, rows = parsed.out / "report.json", []
    if parsed.tasks and path.exists():
        rows = [row for row in json.loads(path.read_text())["rows"] if row["task"] not in tasks]
    with threadpool_limits(1):
        for task in tasks:
            start = time.process_time()
            rows += (new := list(compare(task, measure(task, range(FIRST, FIRST + parsed.seeds)))))
            print(f"{task}: {time.process_time() - start:.0f} s", flush=True)
            for row in new:
                print(
                    f"  {row['estimator']:32} {row['error']:.4f}  ours − it {row['difference']:+.4f} ± "
                    f"{row['standard_error']:.4f}  {row['seconds']:.3f} s",
                    flush=True,
                )
            path.write_text(json.dumps({"finding": finding(holm(rows)), "rows": rows}, indent=1) + "\n")
    print(finding(rows))
    draw_picture(rows, parsed.out / "estimators.png")


if __name__ == "__main__":
    main()
