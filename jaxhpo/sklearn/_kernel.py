"""Kernel ridge regression with a lengthscale per feature or group, by the evidence."""

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.base import RegressorMixin

from jaxhpo._core.errors import JaxhpoError
from jaxhpo.sklearn._base import LARGEST, LEAST, NOISE, Bilevel, Data
from jaxhpo.sklearn._outer import Criterion, Region, by_group, inverse, search

STEP = 1e-3  # of differences of a gradient


class BilevelKernelRidge(RegressorMixin, Bilevel):
    r"""Kernel ridge regression whose penalty and lengthscales, one per feature or group, are chosen by the evidence.

    The kernel is :math:`\exp(-\frac12 \sum_j (a_j - b_j)^2 / l_j^2)`, with a free intercept: the mean of a Gaussian
    process whose noise has λ times its variance. Log squared lengthscales are a common one + d, d ~ N(0, τ²), and τ is
    chosen as by `BilevelRidge`: one lengthscale is kept unless others gain more than `min_gain` nats. A feature with a
    long lengthscale does not matter.

    Do not use it where the function is linear, or with more than some thousand rows.

    **Cost and bias**: some hundred inversions of n × n, and at each τ two for each lengthscale. Exact but for Laplace's
    approximation over lengthscales; the evidence may have several optima, of which the one next to the best common
    lengthscale is found.

    Args:
      groups: as for `BilevelRidge`; features of one label share a lengthscale.
      shrinkage: as for `BilevelRidge`.
      min_gain: as for `BilevelRidge`.
      standardize: whether features are divided by their standard deviations first.

    Attributes:
      lengthscales_: l of each (standardised) feature.
      penalty_: λ.
      dual_coef_: the weights of the kernel's columns, shape (rows,).
      intercept_: a number.
      groups_: the lengthscale of each label, or without `groups` of each feature, a dict.
      shrinkage_: as of `BilevelRidge`.
      one_penalty_: whether one lengthscale was kept.
      reason_: why.
      path_: what was found at each τ; `log_penalties` are log λ, and the log squared lengthscales.
      n_features_in_: the number of features.
      feature_names_in_: their names, where X has names.

    Raises:
      JaxhpoError: as of `BilevelRidge`, and too many rows.

    Example:
      >>> from jaxhpo.sklearn import BilevelKernelRidge
      >>> rng = np.random.default_rng(0)
      >>> X = rng.uniform(-2, 2, size=(60, 4))
      >>> model = BilevelKernelRidge().fit(X, np.sin(2 * X[:, 0]) + 0.1 * rng.normal(size=60))
      >>> print(model.lengthscales_.argmin(), model.score(X, np.sin(2 * X[:, 0])) > 0.95)
      0 True

    References:
      Rasmussen, Williams. Gaussian Processes for Machine Learning. 2006.
    """

    _criteria = ("evidence",)
    _penalty = "lengthscale"
    criterion, cv, covariates = "evidence", None, None

    def __init__(self, *, groups=None, shrinkage="score", min_gain=2.0, standardize=True):
        super().__init__(groups=groups, shrinkage=shrinkage, min_gain=min_gain, standardize=standardize)

    def predict(self, X):
        """The values at new rows.

        Args:
          X: shape (rows, n_features).

        Returns:
          Shape (rows,).
        """
        x = (self._rows(X) - self._mean) / self._scale / self.lengthscales_
        return _kernel(x, self._x / self.lengthscales_) @ self.dual_coef_ + self.intercept_

    def _fit(self, data, plan, name, shrinkages):
        if len(data.x) > LARGEST:
            raise JaxhpoError(
                f"{len(data.x)} rows need a matrix of as many rows, and {LARGEST} are the most: take fewer."
            )
        order = np.argsort(self._index, kind="stable")
        ordered, size = data._replace(x=data.x[:, order]), np.log(max((data.x**2).sum(1).mean(), 1e-12))
        level = np.full(len(plan), size)
        starts = [np.append(rho, level + 2 * m) for rho in (-6.0, -3.0, 0.0) for m in (-1, -0.5, 0, 0.5, 1)]
        low, high = np.append(-14.0, level - 8), np.append(6.0, level + 14)
        free = np.zeros((len(plan) + 1, plan.shape[1] + 1))  # log λ is free, too
        free[0, 0], free[1:, 1:] = 1.0, plan
        self.path_ = search(evidence(ordered), free, Region(starts, low, high), shrinkages)
        h = self._choose(self.path_).log_penalties
        self.penalty_, lengthscales = float(np.exp(h[0])), np.exp(h[1:] / 2)
        self.lengthscales_, self._x = lengthscales[self._index], data.x
        k, mass = _kernel(data.x / self.lengthscales_), data.weights / data.weights.sum()
        root = np.sqrt(data.weights)
        a = inverse(np.eye(len(k)) + _centred(k, mass, root) / self.penalty_)[0] @ (root * (data.y - mass @ data.y))
        beta = root * a / self.penalty_
        self.dual_coef_ = beta - mass * beta.sum()
        self.intercept_ = float(mass @ data.y - mass @ k @ self.dual_coef_)
        return lengthscales


def _kernel(x, other=None):
    return np.exp(-0.5 * cdist(x, x if other is None else other, "sqeuclidean"))


def _centred(k, mass, root):
    """C k Cᵀ with C = diag(√m)(I − 1μᵀ), μ = m/Σm: what a free intercept leaves, of rows that count m times."""
    k = k - mass @ k
    return root[:, None] * (k - (k @ mass)[:, None]) * root


def evidence(data: Data) -> Criterion:
    """Minus the log evidence at (log λ, log squared lengthscales), intercept and variance of the noise as for ridge.

    C = ½ [(N − 1) log s + log|I + G/λ|], G = C K Cᵀ of `_centred`, s = yᵀPy with P = (I + G/λ)⁻¹, N = Σm. With a = Py
    and V = ½ (P/λ − (N − 1) aaᵀ/(λs)): dC = ⟨V, dG⟩ − ⟨V, G⟩ d log λ, and of a log squared lengthscale
    dK = ½ K∘d²/l². The Hessian is taken by differences.
    """
    mass, root = data.weights / data.weights.sum(), np.sqrt(data.weights)
    y, count = root * (data.y - mass @ data.y), data.weights.sum() - 1
    floor = NOISE * (y @ y) + LEAST

    def value_and_grad(u):
        lam, x = np.exp(u[0]), data.x * np.exp(-data.expand(u[1:]) / 2)
        k = _kernel(x)
        g = _centred(k, mass, root)
        p, volume = inverse(np.eye(len(y)) + g / lam)
        a = p @ y
        s = y @ a + floor
        v = 0.5 * (p - count / s * np.outer(a, a)) / lam
        c = root[:, None] * v * root
        c = c - c.sum(0) * mass[:, None]  # CᵀVC
        c = (c - c.sum(1)[:, None] * mass) * k
        slopes = (c.sum(1) + c.sum(0)) @ x**2 - 2 * (x * (c @ x)).sum(0)  # ⟨c, d²⟩ of each feature
        grad = np.append(-(v * g).sum(), 0.5 * by_group(slopes, data.starts, 0))
        return 0.5 * (count * np.log(s) + volume), grad

    def hessian(u):
        sides = [value_and_grad(u + e)[1] - value_and_grad(u - e)[1] for e in STEP * np.eye(len(u))]
        return (np.array(sides) + np.array(sides).T) / (4 * STEP)

    return Criterion(value_and_grad, hessian)
