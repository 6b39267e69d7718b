"""The diagnostics that every linear solver returns."""

import jax.numpy as jnp

from jaxhpo._tree import add_scaled, norm
from jaxhpo._types import LinearInfo, LinearStatus


def report(matvec, x, b, num_iterations, threshold=None) -> LinearInfo:
    """Measures ‖b − A x‖ / ‖b‖: one more product with A, and free under `jit` when the result is unused.

    Args:
      matvec: products with A.
      x: the answer.
      b: the right-hand side.
      num_iterations: products taken to get `x`.
      threshold: residual above which the status is MAX_ITERATIONS; None for methods of a fixed number of terms.
    """
    b_norm = norm(b)
    residual = norm(add_scaled(b, -1.0, matvec(x))) / jnp.where(b_norm > 0, b_norm, 1)
    short = jnp.asarray(False) if threshold is None else residual > threshold
    status = jnp.where(short, LinearStatus.MAX_ITERATIONS, LinearStatus.CONVERGED)
    status = jnp.where(jnp.isfinite(residual), status, LinearStatus.NOT_FINITE)
    return LinearInfo(residual, jnp.asarray(num_iterations, jnp.int32), status.astype(jnp.int32))
