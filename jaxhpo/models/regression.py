"""Regression: features; Bayesian linear, kernel ridge, logistic and softmax regression. Pure functions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as _Tracer

import jaxhpo as _jaxhpo
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast as _upcast
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


class Logits(NamedTuple):
    """A linear classifier: logits are x @ weights + intercept.

    Attributes:
      weights: shape (p,) of two classes, (p, k) of k.
      intercept: shape () or (k,).

    Example:
      >>> classifier = jaxhpo.models.regression.Logits(jnp.array([2.0]), jnp.array(-1.0))
      >>> print(classifier(jnp.array([[0.0], [1.0]])))
      [-1.  1.]
    """

    weights: jax.Array
    intercept: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits of rows of x, shape (n,) or (n, k)."""
        logits = x @ self.weights
        return logits + jnp.broadcast_to(self.intercept, logits.shape)

    def losses(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Minus the log-likelihood of each label, an integer from 0 on, shape (n,)."""
        logits = self(x)
        if logits.ndim == 1:
            return jax.nn.softplus(jnp.where(labels == 1, -logits, logits))
        chosen = jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen


def logistic_regression(
    x: jax.Array,
    labels: jax.Array,
    penalties: jax.Array | float,
    weights: jax.Array | None = None,
    *,
    num_classes: int = 2,
    num_steps: int = 25,
) -> Logits:
    r"""Logistic regression, or of more classes softmax regression, at its optimum and differentiable.

    Of more classes the weights are constant under a shift of all intercepts, whose sum :math:`\frac12 (\sum_k b_k)^2`
    keeps at zero: put that term into the `prior` of `criteria.laplace_evidence`, or its matrix is singular.

    It minimises :math:`\sum_i m_i \ell_i + \tfrac12 \sum_{jk} \lambda_j w_{jk}^2` with the losses of `Logits` and a
    free intercept, by Newton's method with halved steps, from zero.

    **Cost and bias**: `num_steps` Cholesky factorisations of P × P, P = p + 1, times the classes if more than two, for
    features up to about a thousand; a derivative in penalties, weights or x is implicit, one more solve. Exact once
    Newton's method has converged, in a dozen steps where the penalties are not tiny.

    Args:
      x: shape (n, p).
      labels: integers from 0 to `num_classes` − 1, shape (n,).
      penalties: λ > 0, a scalar or shape (p,).
      weights: m, of the examples; None is one for each.
      num_classes: of two, the logits are those of the class 1, one for each row.
      num_steps: of Newton's method.

    Returns:
      The classifier.

    Raises:
      JaxhpoError: shapes that do not fit, labels that are no classes, or a penalty that is not above 0.

    Example:
      >>> x, labels = jnp.array([[-1.0], [0.5], [1.0], [3.0]]), jnp.array([0, 1, 0, 1])
      >>> def held_out_loss(penalty):  # of the last example
      ...     fitted = jaxhpo.models.regression.logistic_regression(x, labels, penalty, jnp.array([1.0, 1, 1, 0]))
      ...     return fitted.losses(x, labels)[3]
      >>> value, slope = jax.value_and_grad(held_out_loss)(1.0)
      >>> print(f"{value:.3f} {slope:.3f}")
      0.722 0.222
    """
    _check_count("num_classes", num_classes, 2)
    _check_count("num_steps", num_steps)
    _check_labels(labels, num_classes)
    if not isinstance(penalties, _Tracer) and not np.all(np.asarray(penalties) > 0):
        raise JaxhpoError("`penalties` has entries that are not above 0, so that there may be no optimum: write 1e-6.")
    x, labels, penalties = _upcast(jnp.true_divide(x, 1)), jnp.asarray(labels), jnp.asarray(penalties)
    n, p = x.shape if x.ndim == 2 else (-1, -1)
    weights = jnp.ones(n if n > 0 else 0, x.dtype) if weights is None else jnp.asarray(weights)
    if n < 0 or labels.shape != (n,) or weights.shape != (n,) or penalties.shape not in ((), (p,)):
        raise JaxhpoError(
            f"shapes {x.shape} of x, {labels.shape} of labels, {penalties.shape} of penalties and {weights.shape} of "
            "weights do not fit: write (n, p), (n,), () or (p,), and (n,)."
        )
    shape = () if num_classes == 2 else (num_classes,)
    start = Logits(jnp.zeros((p, *shape), x.dtype), jnp.zeros(shape, x.dtype))

    def loss(params, args):
        x, penalties, weights = args
        each = jnp.broadcast_to(penalties, (p,)).reshape((p,) + (1,) * len(shape))
        # Of several classes a constant moves all intercepts without an effect: their sum is kept at zero.
        still = jnp.sum(params.intercept) ** 2 if shape else 0.0
        return jnp.vdot(weights, params.losses(x, labels)) + 0.5 * jnp.sum(each * params.weights**2) + 0.5 * still

    args = x, penalties.astype(x.dtype), weights.astype(x.dtype)
    found = _newton(loss, start, jax.lax.stop_gradient(args), num_steps)

    def condition(params, args):
        return tuple(jax.grad(loss)(Logits(*params), args))

    # As a tuple, since a `Logits` can be called, and `implicit` takes functions for solvers.
    return Logits(*_jaxhpo.implicit(condition, tuple(found), args, _jaxhpo.Direct()))


def _check_labels(labels, num_classes) -> None:
    kind = jnp.result_type(labels)
    if not (jnp.issubdtype(kind, jnp.integer) or kind == jnp.bool_):
        raise JaxhpoError(f"`labels` has the type {kind}: write integers from 0 to {num_classes - 1}.")
    if isinstance(labels, _Tracer) or not np.size(labels):
        return
    held = np.asarray(labels)  # of an array of JAX NumPy's functions would be traced
    low, high = held.min(), held.max()
    if low < 0 or high >= num_classes:
        raise JaxhpoError(
            f"`labels` has integers from {low} to {high}: write them from 0 to {num_classes - 1}, or "
            f"`num_classes={high + 1}`."
        )


def _newton(loss: Callable, start: Logits, args: tuple, num_steps: int) -> Logits:
    """The minimum of a convex loss. A step is halved until the loss does not rise."""
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    value = lambda flat: loss(unravel(flat), args)  # noqa: E731
    sizes, rounding = 0.5 ** jnp.arange(10), 8 * float(jnp.finfo(flat.dtype).eps)

    def step(_, flat):
        factor = jax.scipy.linalg.cho_factor(jax.hessian(value)(flat))
        direction = jax.scipy.linalg.cho_solve(factor, jax.grad(value)(flat))
        points = flat[None] - sizes[:, None].astype(flat.dtype) * direction[None]
        losses = jax.vmap(value)(points)
        now = value(flat)
        falls = losses <= now + rounding * jnp.abs(now)  # at the end the gradient still falls where the loss cannot
        stays = jnp.where(jnp.isfinite(now), flat, jnp.nan)  # a loss of NaN never falls
        return jnp.where(falls.any(), points[jnp.argmax(falls)], stays)

    return unravel(jax.lax.fori_loop(0, num_steps, step, flat))
