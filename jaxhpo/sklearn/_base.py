"""The estimators' common part: data, penalties and their groups, the choice among shrinkages, the picture."""

import collections.abc
import numbers
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from sklearn.base import BaseEstimator, RegressorMixin, is_classifier
from sklearn.model_selection import check_cv
from sklearn.utils.validation import check_is_fitted, validate_data

from jaxhpo import plot
from jaxhpo._core.errors import JaxhpoError
from jaxhpo.sklearn._outer import SHRINKAGES, Criterion, Level, Region, by_group, search

REACH = 12.0  # log penalties stay within that of the log of what they are to be compared with
NOISE = 1e-12  # of the variance of y: the least variance of the noise, so that its logarithm is finite
LEAST = 1e-100  # the same where y is constant; its square is finite, too
LARGE = 1e100  # the largest entry
LARGEST = 5000  # columns, after `rotated`: matrices of that many rows and columns are inverted


class Data(NamedTuple):
    """The data of a criterion: rows, their weights, groups of columns, folds.

    Attributes:
      x: shape (n, p), the features of a group beside each other.
      y: shape (n,).
      weights: of the rows, positive; how often each is there.
      sizes: the number of columns of each group.
      splits: pairs of indices, of rows to train and rows to test on.
    """

    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray
    sizes: np.ndarray
    splits: list

    @property
    def starts(self) -> np.ndarray:
        """The first column of each group."""
        return np.cumsum(self.sizes) - self.sizes

    def expand(self, h: np.ndarray) -> np.ndarray:
        """A number of each group for each of its columns."""
        return np.repeat(h, self.sizes)

    def take(self, rows) -> "Data":
        """Some rows."""
        return self._replace(x=self.x[rows], y=self.y[rows], weights=self.weights[rows])


class Bilevel(BaseEstimator):
    """The common base of the estimators; see `BilevelRidge`."""

    _criteria: tuple[str, ...] = ()
    _penalty = "penalty"  # what one of them is called
    _each = True  # whether each feature has a penalty of its own where nothing else is said
    path_: list[Level]

    def __init__(
        self,
        *,
        groups=None,
        covariates=None,
        criterion="evidence",
        cv=None,
        shrinkage="score",
        min_gain=2.0,
        standardize=True,
    ):
        self.groups = groups
        self.covariates = covariates
        self.criterion = criterion
        self.cv = cv
        self.shrinkage = shrinkage
        self.min_gain = min_gain
        self.standardize = standardize

    def fit(self, X, y, sample_weight=None):
        """Choose the penalties, and fit with them.

        Args:
          X: shape (rows, n_features), dense.
          y: shape (rows,).
          sample_weight: how often each row counts, shape (rows,); two is the same as the row twice.

        Returns:
          The estimator.
        """
        X, y = map(
            np.asarray,
            validate_data(self, X, y, dtype=np.float64, y_numeric=not is_classifier(self), ensure_min_samples=2),
        )
        name, shrinkages = self._settings()
        weights = _checked_weights(sample_weight, len(X))
        given: Any = 5 if self.cv is None else self.cv
        folds: Any = check_cv(given, y, classifier=is_classifier(self))
        rows = np.arange(len(X))  # so that pairs of lists, or of masks, are indices
        splits = [(rows[train], rows[test]) for train, test in folds.split(X, y)] if name == "folds" else []
        kept = weights > 0
        if not kept.all():  # a row that counts zero times is not there
            place = np.cumsum(kept) - 1
            splits = [tuple(place[part[kept[part]]] for part in split) for split in splits]
            X, y, weights = X[kept], y[kept], weights[kept]
        if any(len(train) < 2 or len(test) < 1 for train, test in splits):
            raise JaxhpoError(
                "`cv` has a fold in which fewer than two rows to train on count, or none to test on: write other folds."
            )
        y = self._encode(y)
        largest = max(np.abs(X).max(initial=0.0), np.abs(y).max(initial=0.0))
        if largest > LARGE:
            raise JaxhpoError(f"X or y has entries of {largest:.0e}, whose squares are infinite: divide by a constant.")
        mass = weights / weights.sum()
        self._mean, self._scale = mass @ X, np.ones(X.shape[1])
        X = X - self._mean
        if self.standardize:
            size = np.abs(X).max(0)
            size = np.where(size > 0, size, 1.0)  # squares of small entries are zero
            spread = size * np.sqrt(mass @ (X / size) ** 2)
            self._scale = np.where(spread > 1e-12 * np.abs(self._mean), spread, 1.0)  # of constants rounding is left
            X = X / self._scale
        self._labels, plan = self._plan(X.shape[1])
        data = Data(X, y, weights, np.bincount(self._index), splits)
        found = self._fit(data, plan, name, shrinkages if len(self._labels) > 1 else (0.0,))
        self.groups_ = dict(zip(self._labels, found.tolist(), strict=True))
        return self

    def plot(self, path=None):
        """Draw the penalties, and the score of each shrinkage; needs matplotlib.

        Args:
          path: a file to write the picture to.

        Returns:
          The matplotlib figure.
        """
        check_is_fitted(self)
        figure, axes = plot.figure(1, 2, width=9, height=3.6)
        left, right = axes[0]
        names, values = list(self.groups_), np.array(list(self.groups_.values()))
        order = np.argsort(values, kind="stable")
        left.plot(values[order], np.arange(len(names)), "o", ms=4)
        shown = order if len(names) <= 30 else []
        left.set_yticks(np.arange(len(shown)), [str(names[i]) for i in shown], fontsize=8)
        left.set(xscale="log", xlabel=self._penalty, title=f"shrinkage {self.shrinkage_:g}")
        right.plot([f"{level.shrinkage:g}" for level in self.path_], [level.score for level in self.path_], "o-")
        right.set(xlabel="shrinkage", ylabel="score in nats, lower is better")
        figure.suptitle(self.reason_, fontsize=10)
        if path is not None:
            plot.save(figure, path)
        return figure

    def _settings(self) -> tuple[str, tuple[float, ...]]:
        """The criterion's name, and the shrinkages to try."""
        if self.criterion not in self._criteria:
            known = ", ".join(map(repr, self._criteria))
            raise JaxhpoError(
                f"`criterion` got {self.criterion!r}, which {type(self).__name__} does not have: write one of {known}, "
                "or `cv=5` for folds."
            )
        name = self.criterion if self.cv is None else "folds"
        if not isinstance(self.min_gain, numbers.Real) or np.isnan(self.min_gain):
            raise JaxhpoError(f"`min_gain` got {self.min_gain!r}: write a number of nats, as 2.0.")
        if isinstance(self.shrinkage, str) and self.shrinkage == "score":
            return name, SHRINKAGES
        tau: Any = self.shrinkage
        if not isinstance(tau, numbers.Real) or not float(tau) >= 0:
            raise JaxhpoError(
                f"`shrinkage` got {self.shrinkage!r}: write 'score', or the standard deviation of log penalties around "
                "the common one; 0 keeps one penalty, np.inf shrinks nothing."
            )
        return name, (0.0, float(tau))[: 1 + (float(tau) > 0)]

    def _plan(self, features: int) -> tuple[list, np.ndarray]:
        """The labels of the penalties, and an orthonormal basis of what is free: the constant and the covariates."""
        names = getattr(self, "feature_names_in_", range(features))
        each = self.groups is None and (self._each or self.covariates is not None)
        none = np.arange(features) if each else np.full(features, "all features")
        given = none if self.groups is None else list(self.groups)
        if isinstance(self.groups, collections.abc.Mapping):
            raise JaxhpoError(
                f"`groups` got a {type(self.groups).__name__}: write a label for each feature, in the order of X's "
                "columns, as `[groups[name] for name in X.columns]`."
            )
        if len(given) != features:
            raise JaxhpoError(
                f"`groups` has {len(given)} entries, and X has {features} features: write a label for each feature."
            )
        try:
            labels, index = np.unique(np.asarray(given), return_inverse=True)
        except (TypeError, ValueError):
            labels, index = np.empty(0), np.empty(0, int)
        if index.shape != (features,):
            raise JaxhpoError(
                "`groups` has labels that cannot be sorted: of several types, missing, or lists. Write a string, or a "
                "number, for each feature."
            )
        self._index = index
        labels = list(names) if each else labels.tolist()
        if self.covariates is None:
            return labels, np.full((len(labels), 1), len(labels) ** -0.5)
        try:
            covariates = np.asarray(self.covariates, np.float64)
        except (TypeError, ValueError):
            raise JaxhpoError("`covariates` holds what is no number: write numbers, a row for each penalty.") from None
        covariates = covariates[:, None] if covariates.ndim == 1 else covariates
        if covariates.ndim != 2 or len(covariates) != len(labels) or not np.isfinite(covariates).all():
            raise JaxhpoError(
                f"`covariates` has the shape {np.shape(self.covariates)}, and there are {len(labels)} penalties: write "
                "finite numbers, a row for each, in the order of the features, or of the sorted labels of `groups`."
            )
        centred = covariates - covariates.mean(0)
        return labels, scipy.linalg.orth(np.column_stack([np.ones(len(labels)), centred / _norms(centred)]), 1e-10)

    def _choose(self, path: list[Level]) -> Level:
        """The level of the lowest score, if it gains enough over the first one; says why."""
        common = f"one {self._penalty}" if self.covariates is None else "the covariates alone"
        best = min(path, key=lambda level: level.score)
        if self.shrinkage != "score":
            best, self.reason_ = path[-1], f"shrinkage {self.shrinkage:g} was given"
        elif len(self._labels) == 1:
            self.reason_ = f"there is only one {self._penalty}"
        elif path[0].score - best.score > self.min_gain:
            gain = path[0].score - best.score
            self.reason_ = f"shrinkage {best.shrinkage:g} is {gain:.1f} nats better than {common}"
        else:
            gain = path[0].score - min(level.score for level in path[1:])
            than = f"{gain:.1f} nats better" if gain >= 0 else f"{-gain:.1f} nats worse"
            self.reason_ = f"{common} kept: the best other is {than}, and {self.min_gain:g} are asked for"
            best = path[0]
        self.shrinkage_ = best.shrinkage
        self.one_penalty_ = bool(best.shrinkage == 0 and (self.covariates is None or len(self._labels) == 1))
        return best

    def _rows(self, X) -> np.ndarray:
        """New rows, checked."""
        check_is_fitted(self)
        return np.asarray(validate_data(self, X, dtype=np.float64, reset=False))

    def _encode(self, y) -> np.ndarray:
        return y.astype(np.float64)

    def _fit(self, data: Data, plan: np.ndarray, name: str, shrinkages: tuple[float, ...]) -> np.ndarray:
        """Sets what is found, and returns it for each label. The features are not in the order of `data.sizes` yet."""
        raise NotImplementedError


class Linear(Bilevel):
    """The common base of what is linear in the features."""

    _turns = True  # whether a group's features may be rotated
    _grid = np.linspace(-5, 7, 13)  # of one log penalty, from the log of `_sizes` on

    def _fit(self, data, plan, name, shrinkages):
        x, sizes, back = rotated(data.x, self._index, len(data.x) if self._turns else data.x.shape[1])
        data = data._replace(x=x, sizes=sizes)
        if (size := x.shape[1] * (data.y.shape[1] - 1 if data.y.ndim == 2 else 1)) > LARGEST:
            raise JaxhpoError(
                f"{size} coefficients need a matrix of as many rows, and {LARGEST} are the most: write `groups=`, of "
                "which each counts for at most as many features as there are rows, or select features."
            )
        sizes = np.log(self._sizes(data))
        starts = [np.full(len(plan), sizes.mean() + m) for m in self._grid]
        region = Region(starts, sizes.min() - REACH, sizes.max() + REACH)
        self.path_ = search(self._make_criterion(data, name), plan, region, shrinkages)
        h = self._level(data, self._choose(self.path_).log_penalties)
        w, intercept = self._solve(data, h)
        self.coef_ = back(w).T / self._scale
        self.intercept_ = intercept - self.coef_ @ self._mean
        self.penalties_ = np.exp(h)[self._index]
        return np.exp(h)

    def _sizes(self, data: Data) -> np.ndarray:
        """The mean sum of squares of a group's columns, with which penalties are to be compared."""
        columns = by_group(data.weights @ data.x**2, data.starts, 0) / np.bincount(self._index)
        return np.where(columns > 1e-12 * columns.max(), columns, columns.max() or 1.0)

    def _level(self, data: Data, h: np.ndarray) -> np.ndarray:
        """The log penalties, all moved by one number if the criterion does not see it well."""
        return h

    def _make_criterion(self, data: Data, name: str) -> Criterion:
        raise NotImplementedError

    def _solve(self, data: Data, h: np.ndarray) -> tuple[np.ndarray, Any]:
        raise NotImplementedError


class LinearRegressor(RegressorMixin, Linear):
    """The common base of regressions that are linear in the features."""

    def predict(self, X):
        """The values at new rows.

        Args:
          X: shape (rows, n_features).

        Returns:
          Shape (rows,).
        """
        return self._rows(X) @ self.coef_ + self.intercept_


def rotated(x: np.ndarray, index: np.ndarray, most: int):
    """The columns, those of a group beside each other, and at most n of them a group.

    A group of more than n features enters through X_g X_gᵀ alone, as its penalty is that of |w_g|², which a rotation
    leaves. With X_gᵀ = QR it is replaced by Rᵀ, and w_g = Q w.

    Args:
      x: shape (n, p).
      index: the group of each column.
      most: the size of groups above which they are rotated, at least n.

    Returns:
      The columns, the number of them in each group, and a function from their weights to those of the features.
    """
    order, sizes = np.argsort(index, kind="stable"), np.bincount(index)
    blocks = [x[:, order]] if sizes.max() <= most else np.split(x[:, order], np.cumsum(sizes)[:-1], 1)
    turns = []
    for i, block in enumerate(blocks):
        q, r = np.linalg.qr(block.T) if sizes.max() > most < block.shape[1] else (None, block.T)
        turns.append(q)
        blocks[i] = r.T
    kept = sizes if len(blocks) < len(sizes) else np.array([block.shape[1] for block in blocks])

    def back(w):
        parts = np.split(w, np.cumsum([block.shape[1] for block in blocks])[:-1])
        full = np.concatenate([part if q is None else q @ part for q, part in zip(turns, parts, strict=True)])
        return full[np.argsort(order, kind="stable")]

    return np.hstack(blocks), kept, back


def _norms(columns):
    """Their lengths; one where there is none."""
    found = np.linalg.norm(columns, axis=0)
    return np.where(found > 0, found, 1.0)


def _checked_weights(given, rows: int) -> np.ndarray:
    if given is None:
        return np.ones(rows)
    weights = np.asarray(given, np.float64)
    weights = np.full(rows, weights) if weights.ndim == 0 else weights
    if weights.shape != (rows,) or not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() < 2:
        raise JaxhpoError(
            f"`sample_weight` has the shape {weights.shape} and the sum {weights.sum():g}: write for each of the "
            f"{rows} rows how often it counts, zero or more, and two in all at least."
        )
    return weights
