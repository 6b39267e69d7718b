"""Regression in closed form: features, Bayesian linear regression, kernel ridge regression. Pure functions."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import check_count as _check_count


def polynomial(x: jax.Array, degree: int) -> jax.Array:
    """The powers 1, x, … of a scalar input.

    Args:
      x: shape (n,).
      degree: the highest power.

    Returns:
      Shape (n, degree + 1).

    Raises:
      JaxhpoError: a degree that is no count.

    Example:
      >>> print(jaxhpo.models.regression.polynomial(jnp.array([2.0]), 3))
      [[1. 2. 4. 8.]]
    """
    _check_count("degree", degree, 0)
    return jnp.stack([x**k for k in range(degree + 1)], -1)


def fourier(x: jax.Array, num_frequencies: int, period: float = 1.0) -> jax.Array:
    r"""A constant, and sine and cosine of the multiples of a frequency.

    They are :math:`1, \sin(2\pi k x / p), \cos(2\pi k x / p)` for k = 1 … K.

    Args:
      x: shape (n,).
      num_frequencies: K.
      period: p.

    Returns:
      Shape (n, 2 K + 1): the constant, the sines, the cosines.

    Raises:
      JaxhpoError: a number that is no count.

    Example:
      >>> print(abs(jaxhpo.models.regression.fourier(jnp.array([0.25]), 1)).round(2))
      [[1. 1. 0.]]
    """
    _check_count("num_frequencies", num_frequencies)
    angles = 2 * math.pi / period * x[..., None] * jnp.arange(1, num_frequencies + 1).reshape((1,) * x.ndim + (-1,))
    return jnp.concatenate([jnp.ones_like(x)[..., None], jnp.sin(angles), jnp.cos(angles)], -1)


class LinearPosterior(NamedTuple):
    """The posterior of the weights of Bayesian linear regression, and the evidence; made by `bayesian_linear`.

    Attributes:
      mean: of the weights, shape (p,).
      covariance: shape (p, p).
      log_evidence: log p(y | X), all weights integrated out.

    Example:
      >>> posterior = jaxhpo.models.regression.bayesian_linear(jnp.eye(2), jnp.ones(2), 0.0)
      >>> print(posterior.mean, jnp.diag(posterior.covariance))
      [0.5 0.5] [0.5 0.5]
    """

    mean: jax.Array
    covariance: jax.Array
    log_evidence: jax.Array


def bayesian_linear(
    x: jax.Array, y: jax.Array, log_precision: jax.Array | float, log_noise_precision: jax.Array | float = 0.0
) -> LinearPosterior:
    r"""The posterior of linear regression with a Gaussian prior :math:`w_j \sim N(0, 1/\alpha_j)`, and its evidence.

    With noise of variance 1/β and A = diag(α): the covariance is :math:`(\beta X^\top X + A)^{-1}`, and
    :math:`\log p(y) = \tfrac12 [N \log\beta + \log|A| - \beta\|y - Xm\|^2 - m^\top A m - \log|\beta X^\top X + A|
    - N \log 2\pi]`. Its derivative is exact, so `-log_evidence` is an outer loss.

    **Cost and bias**: one Cholesky factorisation of p × p, and n p². Exact.

    Args:
      x: shape (n, p).
      y: shape (n,).
      log_precision: log α, a scalar or of shape (p,).
      log_noise_precision: log β.

    Returns:
      A `LinearPosterior`.

    Raises:
      JaxhpoError: shapes that do not fit.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (20, 3))
      >>> y = x[:, 0] + 0.1 * jax.random.normal(jax.random.key(1), (20,))
      >>> evidence = lambda h: jaxhpo.models.regression.bayesian_linear(x, y, h, jnp.log(100.0)).log_evidence
      >>> print((jax.grad(evidence)(jnp.zeros(3)) > 1e-6).tolist())  # which precisions should grow
      [False, True, True]

    References:
      MacKay. Bayesian Interpolation. 1992.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or jnp.shape(log_precision) not in ((), x.shape[1:]):
        raise JaxhpoError(
            f"shapes {x.shape} of x, {y.shape} of y and {jnp.shape(log_precision)} of log_precision do not fit: write "
            "(n, p), (n,), and () or (p,)."
        )
    n, p = x.shape
    h, beta = jnp.broadcast_to(log_precision, (p,)), jnp.exp(log_noise_precision)
    factor = jnp.linalg.cholesky(beta * x.T @ x + jnp.diag(jnp.exp(h)))
    covariance = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(p, dtype=factor.dtype))
    mean = beta * covariance @ (x.T @ y)
    energy = beta * jnp.sum((y - x @ mean) ** 2) + jnp.sum(jnp.exp(h) * mean**2)
    volume = 2 * jnp.sum(jnp.log(jnp.diag(factor))) - jnp.sum(h)
    return LinearPosterior(
        mean, covariance, 0.5 * (n * (log_noise_precision - math.log(2 * math.pi)) - energy - volume)
    )


def squared_exponential(a: jax.Array, b: jax.Array, log_lengthscales: jax.Array | float = 0.0) -> jax.Array:
    r"""The kernel :math:`\exp(-\tfrac12 \sum_j (a_j - b_j)^2 / l_j^2)`; a long lengthscale switches a feature off.

    Args:
      a: shape (n, p).
      b: shape (m, p).
      log_lengthscales: log l, a scalar or of shape (p,).

    Returns:
      Shape (n, m).

    Example:
      >>> x = jnp.array([[0.0], [1.0]])
      >>> print(jaxhpo.models.regression.squared_exponential(x, x).round(3))
      [[1.    0.607]
       [0.607 1.   ]]
    """
    scale = jnp.exp(-jnp.broadcast_to(log_lengthscales, (1, a.shape[-1])))
    difference = (a * scale)[:, None] - (b * scale)[None]  # exact zeros on the diagonal, whose derivative is zero
    return jnp.exp(-0.5 * jnp.sum(difference**2, -1))


def kernel_ridge(kernel: jax.Array, y: jax.Array, penalty: jax.Array | float) -> jax.Array:
    r"""The coefficients of kernel ridge regression, :math:`(K + \lambda I)^{-1} y`.

    The kernel of new and training inputs, times them, predicts.

    **Cost and bias**: one Cholesky factorisation of n × n.

    Args:
      kernel: K of the training inputs, shape (n, n).
      y: shape (n,) or (n, m).
      penalty: λ > 0.

    Returns:
      Of the shape of y.

    Example:
      >>> print(jaxhpo.models.regression.kernel_ridge(jnp.eye(2), jnp.array([1.0, 2.0]), 1.0))
      [0.5 1. ]
    """
    factor = jax.scipy.linalg.cho_factor(kernel + penalty * jnp.eye(len(kernel), dtype=kernel.dtype))
    return jax.scipy.linalg.cho_solve(factor, y)
