"""The report of a linear solve: its residual, and the status that follows from it."""

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import norm
from jaxhpo._core.types import LinearInfo, LinearStatus


def epsilon(dtype) -> float:
    """Return the distance from 1 to the next number: ε of the working precision."""
    return float(jnp.finfo(dtype).eps)


def default_tolerance(dtype, tol=None) -> float:
    """Return `tol`, or ε^¾ of the working precision: 6e-6 in float32, 2e-12 in float64."""
    return epsilon(dtype) ** 0.75 if tol is None else tol


def largest(b) -> jax.Array:
    """Return the largest entry of b in absolute value, or 1 where all are zero or one is NaN."""
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(b)]))
    return jnp.where(size > 0, size, 1)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ b of two vectors, elementwise: a `dot_general` would count as a product of matrices."""
    return jnp.sum(a * b)


def relative_norm(a, b) -> jax.Array:
    """Return ‖a‖ / ‖b‖, or ‖a‖ where b = 0.

    Both are divided by the largest entry of b first: squares of very small or large entries would underflow or
    overflow.
    """
    size = largest(b)
    a_norm, b_norm = (norm(jax.tree.map(lambda x: x / size.astype(x.dtype), tree)) for tree in (a, b))
    return a_norm / jnp.where(b_norm > 0, b_norm, 1)


def residual_of(matvec, x, b) -> jax.Array:
    """Return ‖b − A x‖ / ‖b‖. Costs one product with A; free under `jit` when the result is unused."""
    return relative_norm(jax.tree.map(jnp.subtract, b, matvec(x)), b)


def is_accurate(residual, x, size, inverse) -> jax.Array:
    """Return whether the relative error of x is below 1 %, as far as can be told.

    The error is A⁻¹ r, and r itself is known up to the rounding of A x only: ‖e‖ ≤ ‖A⁻¹‖ (‖r‖ + ε ‖A‖ ‖x‖). As the
    norms are bounds from below, this estimate must be below half of that.

    Args:
      residual: ‖r‖ = ‖b − A x‖.
      x: the answer.
      size: a lower bound of ‖A‖.
      inverse: a lower bound of ‖A⁻¹‖; 0 where nothing is known of it.
    """
    length = norm(x)
    return inverse * (residual + epsilon(x.dtype) * size * length) <= 0.005 * length


def first_of(*cases, otherwise) -> jax.Array:
    """Return the status of the first `(condition, status)` whose condition holds, as int32."""
    status = otherwise
    for condition, case in reversed(cases):
        status = jnp.where(condition, case, status)
    return status.astype(jnp.int32)


def report(residual, num_iterations, ended, threshold=None, *, failed) -> LinearInfo:
    """Return the diagnostics of a solve.

    Args:
      residual: ‖b − A x‖ / ‖b‖.
      num_iterations: products taken to get `x`.
      ended: the status where the residual is finite and above the threshold.
      threshold: residual up to which the status is CONVERGED; twice `default_tolerance` when None.
      failed: whether the answer is no solution.
    """
    limit = 2 * default_tolerance(residual.dtype) if threshold is None else threshold
    cases = (~jnp.isfinite(residual), LinearStatus.NOT_FINITE), (residual <= limit, LinearStatus.CONVERGED)
    status = first_of(*cases, otherwise=ended)
    return LinearInfo(residual, jnp.asarray(num_iterations, jnp.int32), status, failed)


def completed(info: LinearInfo) -> LinearInfo:
    """Return the diagnostics as arrays, with `failed` where a user's solver left it out."""
    residual, num_iterations, status, failed = info
    if failed is None:
        failed = (status == LinearStatus.INDEFINITE) | (status == LinearStatus.NOT_FINITE)
        failed |= (status == LinearStatus.CONVERGED) & ~(residual < 1)
    num_iterations, status = (jnp.asarray(n, jnp.int32) for n in (num_iterations, status))
    return LinearInfo(jnp.asarray(residual), num_iterations, status, jnp.asarray(failed, bool))


def still_falls(before, after) -> jax.Array:
    """Return whether a norm fell by more than a fraction √ε; an iteration that is slower makes no progress."""
    return after < (1 - jnp.finfo(before.dtype).eps ** 0.5) * before


def series_status(last, following) -> jax.Array:
    """Return the status of a truncated series, from the norms of its last term and of the first omitted one."""
    return jnp.where(still_falls(last, following), LinearStatus.MAX_ITERATIONS, LinearStatus.STALLED)
