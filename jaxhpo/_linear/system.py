"""Differentiable solution of A x = b, shared by the iterative solvers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, drop_varying, varying_axes
from jaxhpo._core.record import report_linear_solve
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.tree import add_scaled
from jaxhpo._core.types import LinearInfo, PyTree
from jaxhpo._linear.report import largest


def damped(matvec: Callable, damping: float) -> Callable:
    """Return v ↦ A v + δ v."""
    return lambda v: add_scaled(matvec(v), damping, v)


def solve_scaled(solve: Callable, operator: Callable, b: jax.Array, x0: PyTree) -> tuple[jax.Array, LinearInfo]:
    """Solve A x = b by `solve(operator, b, x0)`, with b scaled to a largest entry of one.

    With s = maxᵢ |bᵢ|, A x = b is A (x/s) = b/s. Without it, squares of very small or large entries of b would
    underflow or overflow. For b = 0 the answer is 0 wherever the solve starts, so it starts there.
    """
    size = largest(b)
    start = None if x0 is None else jnp.where(jnp.any(b != 0), x0 / size, 0)
    x, info = solve(operator, b / size, start)
    return size * x, info


def solve_system(
    matvec: Callable, b: PyTree, x0: PyTree, solve: Callable, symmetric: bool = False
) -> tuple[PyTree, LinearInfo]:
    """Solve A x = b by `solve`, and differentiate the equation instead of the iteration.

    Args:
      matvec: products with A.
      b: the right-hand side.
      x0: where to start, or None.
      solve: `(operator, b, x0) -> (x, LinearInfo)` on vectors, b with a largest entry of one.
      symmetric: A is its own transpose.

    Returns:
      x and the diagnostics.
    """
    # A `while_loop` has no transpose, and the iterate it stops at is not linear in b. `custom_linear_solve` replaces
    # its derivative by that of the equation, with one more solve in either mode:
    #     A ẋ = ḃ − Ȧ x   (tangent),        Aᵀ b̄ = x̄,  Ā = −b̄ xᵀ   (cotangent).
    # b is made one vector because the transpose of `custom_linear_solve` needs every leaf of b to be perturbed, but a
    # hyperparameter may reach some leaves only (a penalty on kernels and not on biases).
    b, unravel = ravel_pytree(b)
    x0 = None if x0 is None else jax.lax.stop_gradient(ravel_pytree(x0)[0])
    pure, consts = closure_convert(lambda v: ravel_pytree(matvec(unravel(v)))[0], b)
    # Under `shard_map`, `custom_linear_solve` needs one varying-axes type for all that it touches. A data-parallel A
    # reads varying data, but maps vectors that are equal on all devices to such vectors: cast them on the way in and
    # out.
    own = varying_axes(b)
    axes = own | varying_axes(consts)

    @jax.jit  # lowering retraces what is outside a call or a loop, with types in which axes are missing
    def operator(v):
        return cast_varying(pure(consts, drop_varying(v, axes - own)), axes)

    def run(x0, operator, b):
        x, info = solve_scaled(solve, operator, b, x0)
        report_linear_solve(info)
        return x, info

    start = cast_varying(x0, axes)
    forward, transposed = functools.partial(run, start), functools.partial(run, None)  # x0 is near A⁻¹b, not near A⁻ᵀx̄
    x, info = jax.lax.custom_linear_solve(
        operator, cast_varying(b, axes), forward, transposed, symmetric=symmetric, has_aux=True
    )
    return unravel(drop_varying(x, axes - own)), info
