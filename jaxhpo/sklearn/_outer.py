"""The outer problem of the estimators: log penalties that a criterion chooses, and that are shrunk towards a plan."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize

SHRINKAGES = (0.0, 0.3, 0.6, 1.2, 2.5, 5.0)
RISEN = 5.0  # nats above the lowest score at which the search for a shrinkage ends
FLAT = 1e-3  # eigenvalues below it are those of a direction in which the criterion does not change


class Criterion(NamedTuple):
    """A function of log penalties h, in nats, so that a shrinkage means the same for each.

    Attributes:
      value_and_grad: h to C(h), a float, and dC/dh.
      hessian: h to d²C/dh², exact or positive semidefinite.
    """

    value_and_grad: Callable[[np.ndarray], tuple[float, np.ndarray]]
    hessian: Callable[[np.ndarray], np.ndarray]


class Level(NamedTuple):
    """The solution at one shrinkage.

    Attributes:
      shrinkage: τ; zero is one penalty, or what the covariates alone say.
      log_penalties: one for each penalty.
      criterion: C there, in nats.
      score: the criterion of τ itself, in nats; lower is better.
    """

    shrinkage: float
    log_penalties: np.ndarray
    criterion: float
    score: float


class Region(NamedTuple):
    """The region of the search.

    Attributes:
      starts: some h on the plan; the search begins at the best of them.
      low: the least h, a number or one for each entry.
      high: the largest h.
    """

    starts: list[np.ndarray]
    low: np.ndarray
    high: np.ndarray


def search(criterion: Criterion, plan: np.ndarray, region: Region, shrinkages: Sequence[float]) -> list[Level]:
    """Minimise C(h) + |Mh|²/(2τ²) for growing τ, each from the solution before it.

    h = Zb + d, where b is free and d ~ N(0, τ²). With U an orthonormal basis of the columns of Z and M = I − UUᵀ the
    prior of h is exp(−|Mh|²/(2τ²)), as b is flat.

    Args:
      criterion: of h.
      plan: U, shape (penalties, free).
      region: where h lies.
      shrinkages: those to try, in growing order, the first of them zero.
    """
    h = min(region.starts, key=lambda h: criterion.value_and_grad(h)[0])
    levels: list[Level] = []
    for tau in shrinkages:
        h = _on_the_plan(criterion, plan, h, region) if tau == 0 else _shrunk(criterion, plan, h, region, tau)
        levels.append(Level(tau, h, criterion.value_and_grad(h)[0], _score(criterion, plan, h, tau)))
        if levels[-1].score > min(level.score for level in levels) + RISEN:
            break
    return levels


def _on_the_plan(criterion, plan, h, region):
    """The minimum over b of C(Ub)."""

    def objective(b):
        inside = np.clip(plan @ b, region.low, region.high)
        value, grad = criterion.value_and_grad(inside)
        return value, plan.T @ (grad * (inside == plan @ b))

    found = scipy.optimize.minimize(objective, plan.T @ h, jac=True, method="L-BFGS-B", options={"ftol": 1e-9})
    return np.clip(plan @ found.x, region.low, region.high)


def _shrunk(criterion, plan, h, region, tau):
    """The minimum over h of C(h) + |Mh|²/(2τ²)."""

    def objective(h):
        value, grad = criterion.value_and_grad(h)
        away = _off(plan, h) / tau**2
        return value + 0.5 * h @ away, grad + away

    bounds, options = scipy.optimize.Bounds(region.low, region.high), {"ftol": 1e-8, "maxiter": 200}
    return scipy.optimize.minimize(objective, h, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def _off(plan, h):
    """Mh, what the plan does not explain."""
    return h - plan @ (plan.T @ h)


def _score(criterion, plan, h, tau):
    """−log of the integral of exp(−C(h)) over the prior of h, by Laplace, up to a constant that τ does not change.

    C + |Mh|²/(2τ²) + ½ log|H + M/τ²| + (p − k) log τ; at τ = 0 only b is left to integrate: C + ½ log|UᵀHU|.
    """
    penalties, free = plan.shape
    if not np.isfinite(tau):
        return np.inf  # the prior has no mass
    hessian = criterion.hessian(h)
    if tau == 0:
        curvature, price = plan.T @ hessian @ plan, 0.0
    else:
        curvature = hessian + (np.eye(penalties) - plan @ plan.T) / tau**2
        price = (penalties - free) * np.log(tau) + 0.5 * h @ _off(plan, h) / tau**2
    volume = 0.5 * np.log(np.maximum(np.linalg.eigvalsh(curvature), FLAT)).sum()
    return criterion.value_and_grad(h)[0] + volume + price


def inverse(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """The inverse of a positive definite matrix, and its log determinant."""
    factor = scipy.linalg.cholesky(matrix, lower=True, check_finite=False)
    (invert,) = scipy.linalg.get_lapack_funcs(("potri",), (factor,))
    lower, _ = invert(factor, lower=1)
    return np.tril(lower) + np.tril(lower, -1).T, 2 * np.log(np.diag(factor)).sum()


def by_group(values: np.ndarray, starts: np.ndarray, *axes: int) -> np.ndarray:
    """Sums over the members of each group, along axes; members lie beside each other, the first at `starts`."""
    for axis in axes:
        values = np.add.reduceat(values, starts, axis) if len(starts) < values.shape[axis] else values
    return values
