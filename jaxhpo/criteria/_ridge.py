"""Leave-one-out and generalised cross-validation of ridge regression, in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast


def leave_one_out(x: Any, y: Any, penalties: Any, *, intercept: bool = True) -> jax.Array:
    r"""The mean squared error of n ridge regressions, each without one example.

    With :math:`\hat y = S y` the fitted values, it is :math:`\frac1n \sum_i (y_i - \hat y_i)^2 / (1 - S_{ii})^2`, by
    the formula of Sherman and Morrison: no model is fitted again. Each minimises
    :math:`\|Xw + b - y\|^2 + \sum_j \lambda_j w_j^2`, with a free intercept b.

    **Cost and bias**: one factorisation, of p × p or n × n, whichever is smaller, in reverse mode twice that. Exact.

    Args:
      x: shape (n, p).
      y: shape (n,), or (n, m) of m targets, over which the error is a mean, too.
      penalties: λ > 0, a scalar or of shape (p,).
      intercept: without it, the model goes through zero.

    Returns:
      The error, a scalar.

    Raises:
      JaxhpoError: shapes that do not fit, fewer than two rows, or a penalty that is not above 0.

    Example:
      >>> x = jnp.array([[0.0], [1.0], [2.0]])
      >>> print(jaxhpo.criteria.leave_one_out(x, jnp.array([0.0, 1.0, 2.0]), 1e-3).round(4))
      0.0

    References:
      Allen. The Relationship Between Variable Selection and Data Augmentation and a Method for Prediction. 1974.
    """
    residuals, left = _fitted(x, y, penalties, intercept)
    return jnp.mean((residuals / left[:, None]) ** 2)


def generalised_cross_validation(x: Any, y: Any, penalties: Any, *, intercept: bool = True) -> jax.Array:
    r"""Leave-one-out with the mean leverage in place of each example's.

    It is :math:`\frac1n \sum_i (y_i-\hat y_i)^2 / (1 - \mathrm{tr} S / n)^2`, S as for `leave_one_out`, and does
    not change where examples are rotated among each other.

    **Cost and bias**: as `leave_one_out`.

    Args:
      x: as for `leave_one_out`.
      y: as for `leave_one_out`.
      penalties: as for `leave_one_out`.
      intercept: as for `leave_one_out`.

    Returns:
      The criterion, a scalar.

    Raises:
      JaxhpoError: shapes that do not fit, fewer than two rows, or a penalty that is not above 0.

    Example:
      >>> x, y = jnp.eye(3), jnp.arange(3.0)
      >>> print(f"{jaxhpo.criteria.generalised_cross_validation(x, y, 1.0):.3f}")
      1.500

    References:
      Golub, Heath, Wahba. Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter. 1979.
    """
    residuals, left = _fitted(x, y, penalties, intercept)
    return jnp.mean((residuals / left.mean()) ** 2)


def _fitted(x, y, penalties, intercept) -> tuple[jax.Array, jax.Array]:
    """The residuals, shape (n, m), and 1 − S_ii, shape (n,)."""
    x, y, penalties = upcast((jnp.asarray(x), jnp.asarray(y), jnp.asarray(penalties)))  # no Cholesky in bfloat16
    n, p = x.shape if x.ndim == 2 else (-1, -1)
    if n < 0 or y.ndim not in (1, 2) or y.shape[0] != n or penalties.shape not in ((), (p,)):
        raise JaxhpoError(
            f"shapes {x.shape} of x, {y.shape} of y and {penalties.shape} of penalties do not fit: write (n, p), "
            "(n,) or (n, m), and () or (p,)."
        )
    if n < 2:
        raise JaxhpoError(f"x has {n} rows, of which none is left to train on where one is left out: give two or more.")
    if not isinstance(penalties, Tracer) and not np.all(np.asarray(penalties) > 0):
        raise JaxhpoError("`penalties` has entries that are not above 0, by whose root x is divided: write 1e-6, say.")
    y = y.reshape(n, -1)
    if intercept:  # b = mean(y) − mean(x) w at the optimum, so centred data have none; its leverage is 1/n for each
        x, y = x - x.mean(0, keepdims=True), y - y.mean(0, keepdims=True)
    scaled = x / jnp.sqrt(jnp.broadcast_to(penalties, (1, p)))
    if p < n:  # S = Z (I + ZᵀZ)⁻¹ Zᵀ, Z = X Λ^(−1/2)
        factor = jax.scipy.linalg.cho_factor(jnp.eye(p, dtype=scaled.dtype) + scaled.T @ scaled)
        smoothed = scaled @ jax.scipy.linalg.cho_solve(factor, scaled.T @ y)
        leverages = jnp.sum(scaled * jax.scipy.linalg.cho_solve(factor, scaled.T).T, 1)
        return y - smoothed, 1 - leverages - (1 / n if intercept else 0)
    # I − S = Q (I + QᵀZZᵀQ)⁻¹ Qᵀ, where the columns of Q are orthogonal to the constant, which the intercept fits: as a
    # difference of numbers near 1/n it would be lost to rounding where the penalty is small.
    basis = jnp.asarray(np.linalg.qr(np.ones((n, 1)), "complete")[0][:, 1:] if intercept else np.eye(n), scaled.dtype)
    kernel = basis.T @ scaled
    factor = jax.scipy.linalg.cho_factor(jnp.eye(basis.shape[1], dtype=scaled.dtype) + kernel @ kernel.T)
    rest = jax.scipy.linalg.cho_solve(factor, basis.T)
    return basis @ (rest @ y), jnp.sum(basis.T * rest, 0)
