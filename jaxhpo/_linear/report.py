"""The diagnostics that every linear solver returns."""

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import add_scaled, norm
from jaxhpo._core.types import LinearInfo, LinearStatus

RUNNING = -1  # the status inside a loop


def default_tolerance(dtype, tol=None) -> float:
    """`tol`, or ε^¾ of the working precision: 6e-6 in float32, 2e-12 in float64."""
    return float(jnp.finfo(dtype).eps) ** 0.75 if tol is None else tol


def largest(b) -> jax.Array:
    """The largest entry of b in absolute value, or 1 where all are zero or one is NaN."""
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(b)]))
    return jnp.where(size > 0, size, 1)


def relative_norm(a, b) -> jax.Array:
    """‖a‖ / ‖b‖, or ‖a‖ where b = 0, at any scale: squares of very small or large entries would leave the range."""
    size = largest(b)
    a_norm, b_norm = (norm(jax.tree.map(lambda x: x / size.astype(x.dtype), tree)) for tree in (a, b))
    return a_norm / jnp.where(b_norm > 0, b_norm, 1)


def residual_of(matvec, x, b) -> jax.Array:
    """‖b − A x‖ / ‖b‖: one more product with A, and free under `jit` when the result is unused."""
    return relative_norm(add_scaled(b, -1.0, matvec(x)), b)


def report(residual, num_iterations, ended, threshold=None) -> LinearInfo:
    """The diagnostics of a solve.

    Args:
      residual: ‖b − A x‖ / ‖b‖.
      num_iterations: products taken to get `x`.
      ended: the status where the residual is finite and above the threshold.
      threshold: residual up to which the status is CONVERGED; twice `default_tolerance` when None.
    """
    limit = 2 * default_tolerance(residual.dtype) if threshold is None else threshold
    status = jnp.where(residual <= limit, LinearStatus.CONVERGED, ended)
    status = jnp.where(jnp.isfinite(residual), status, LinearStatus.NOT_FINITE)
    return LinearInfo(residual, jnp.asarray(num_iterations, jnp.int32), status.astype(jnp.int32))


def report_iteration(residual, num_iterations, status, tol) -> LinearInfo:
    """The diagnostics of an iteration that left its loop with `status`; `tol` is None or what the caller asked for.

    One that thought itself converged and is not was misled by rounding. Where no tolerance was asked for, what rounding
    allows will do, up to a residual of √ε.
    """
    status = jnp.where(status == LinearStatus.CONVERGED, LinearStatus.STALLED, status)
    status = jnp.where(status == RUNNING, LinearStatus.MAX_ITERATIONS, status)
    limit = 2 * default_tolerance(residual.dtype, tol)
    if tol is None:
        limit = jnp.where(status == LinearStatus.STALLED, float(jnp.finfo(residual.dtype).eps) ** 0.5, limit)
    return report(residual, num_iterations, status, limit)


def initial_status(r, threshold) -> jax.Array:
    """The status of an iteration before its first step, at residual r."""
    status = jnp.where(norm(r) <= threshold, LinearStatus.CONVERGED, RUNNING)
    return jnp.where(jnp.isfinite(norm(r)), status, LinearStatus.NOT_FINITE).astype(jnp.int32)


def still_falls(before, after) -> jax.Array:
    """Whether a norm fell by more than a fraction √ε: what falls slower will not get anywhere."""
    return after < (1 - jnp.finfo(before.dtype).eps ** 0.5) * before


def of_series(last, following) -> jax.Array:
    """How a series that was cut ended, by the norms of its last term and of the one that would have followed."""
    return jnp.where(still_falls(last, following), LinearStatus.MAX_ITERATIONS, LinearStatus.STALLED)
