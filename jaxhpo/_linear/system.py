"""A x = b as a differentiable equation: what every iterative solver is wrapped in."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, drop_varying, varying_axes
from jaxhpo._core.record import report_linear_solve
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.types import LinearInfo, PyTree
from jaxhpo._linear.report import largest


def solve_system(
    matvec: Callable,
    b: PyTree,
    x0: PyTree,
    solve: Callable,
    transpose_solve: Callable | None = None,
    symmetric: bool = False,
) -> tuple[PyTree, LinearInfo]:
    """Solves A x = b by `solve`, and differentiates the equation instead of the iteration.

    An iteration in a plain loop has no transpose, and is not linear in b. Under `shard_map`, `custom_linear_solve`
    wants one varying-axes type for all that it touches; a data-parallel A reads varying data, but takes and gives
    vectors that are equal on all devices, so these are cast on the way in and out.

    Args:
      matvec: products with A.
      b: the right-hand side.
      x0: where to start, or None.
      solve: `(operator, b, x0) -> (x, LinearInfo)` on vectors, b with a largest entry of one.
      transpose_solve: the same for the transposed system, given its operator; `solve` when None.
      symmetric: A is its own transpose.

    Returns:
      x and the diagnostics.
    """
    # One vector: the transpose of `custom_linear_solve` wants every leaf of b to be differentiated, but a
    # hyperparameter may reach some leaves only (a penalty on kernels and not on biases).
    b, unravel = ravel_pytree(b)
    x0 = None if x0 is None else jax.lax.stop_gradient(ravel_pytree(x0)[0])
    pure, consts = closure_convert(lambda v: ravel_pytree(matvec(unravel(v)))[0], b)
    own = varying_axes(b)
    axes = own | varying_axes(consts)

    @jax.jit  # lowering traces anew what is not inside a call or a loop, with types in which axes are missing
    def operator(v):
        return cast_varying(pure(consts, drop_varying(v, axes - own)), axes)

    def scaled(solve, x0):
        # Solved for b scaled to a largest entry of one: squares of very small or large entries would leave the range.
        def run(operator, b):
            size = largest(b)
            start = None if x0 is None else jnp.where(jnp.any(b != 0), x0 / size, 0)
            x, info = solve(operator, b / size, start)
            report_linear_solve(info)
            return size * x, info

        return run

    x, info = jax.lax.custom_linear_solve(
        operator,
        cast_varying(b, axes),
        scaled(solve, cast_varying(x0, axes)),
        # A start for A x = b is none for the transposed system of a derivative.
        scaled(transpose_solve or solve, None),
        symmetric=symmetric,
        has_aux=True,
    )
    return unravel(drop_varying(x, axes - own)), info
