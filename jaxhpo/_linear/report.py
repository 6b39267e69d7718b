"""The report of a linear solve: its residual, and the status that follows from it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._core.record import report_truncated
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
    length, eps = norm(x), epsilon(jnp.result_type(*jax.tree.leaves(x)))
    return inverse * (residual + eps * size * length) <= 0.005 * length


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


def is_right(solve: Callable, b, r, residual, x) -> jax.Array:
    """Return whether the relative error of x is below 1 %, by one more solve: it is A⁻¹ r with r = b − A x.

    For solvers that tell nothing of A⁻¹. Products alone do not: where conjugate gradients to 1e-6 or 1e-5 are wrong in
    float32, the bounds from sixteen more of them see it in 22 of 25 cases, and this in all. Only a status depends on
    it: free under `jit` where that is unused.

    Args:
      solve: right-hand side -> solution.
      b: the right-hand side.
      r: the residual.
      residual: ‖r‖ / ‖b‖.
      x: the answer.
    """
    scale = jnp.where(residual > 0, residual, 1)  # r / scale is as large as b, as tolerances may be absolute
    error = scale * norm(solve(jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), r)))
    length, size = norm(r), norm(jax.tree.map(jnp.subtract, b, r)) / norm(x)
    right = is_accurate(length, x, size, error / jnp.where(length > 0, length, 1))
    return (residual == 0) | ((residual < 1) & right)


def judged(solve: Callable) -> Callable:
    """Return `solve(matvec, b, x0) -> (x, report)` with a report in any case, of arrays.

    A report that says whether the solve `failed` is believed, as are those of the library's own solvers. In another,
    CONVERGED becomes STALLED where the answer may be wrong by more than 1 %, and where there is none the answer is all
    there is to judge by.
    """

    def judging(matvec, b, x0):
        x, info = solve(matvec, b, x0)
        if isinstance(info, LinearInfo) and info.failed is not None:
            return x, _as_arrays(info)
        r = jax.tree.map(jnp.subtract, b, matvec(x))
        residual = relative_norm(r, b)
        right = is_right(lambda r: solve(matvec, r, None)[0], b, r, residual, x)
        if not isinstance(info, LinearInfo):
            small = residual <= epsilon(residual.dtype) ** 0.5
            ended = first_of((small, LinearStatus.STALLED), otherwise=series_status(jnp.ones_like(residual), residual))
            return x, report(residual, 0, ended, jnp.where(right, 1, -1), failed=~(residual < 1))
        claimed = info.status == LinearStatus.CONVERGED
        failed = (info.status == LinearStatus.INDEFINITE) | (info.status == LinearStatus.NOT_FINITE)
        failed |= claimed & ~(residual < 1)
        status = jnp.where(claimed & ~right, LinearStatus.STALLED, info.status)
        return x, _as_arrays(LinearInfo(residual, info.num_iterations, status, failed))

    return judging


def _as_arrays(info):
    num_iterations, status = (jnp.asarray(n, jnp.int32) for n in (info.num_iterations, info.status))
    return LinearInfo(jnp.asarray(info.residual), num_iterations, status, jnp.asarray(info.failed, bool))


def still_falls(before, after) -> jax.Array:
    """Return whether a norm fell by more than a fraction √ε; an iteration that is slower makes no progress."""
    return after < (1 - jnp.finfo(before.dtype).eps ** 0.5) * before


def series_status(last, following) -> jax.Array:
    """Report a truncated series, and return its status, from the norms of its last term and of the first omitted."""
    report_truncated()
    return jnp.where(still_falls(last, following), LinearStatus.MAX_ITERATIONS, LinearStatus.STALLED)
