"""Differentiable solution of A x = b: the one place where a linear solver is called, transposed, reports, and fails."""

import contextvars
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, drop_varying, on_auto_axes, varying_axes
from jaxhpo._core.record import report_fault, report_linear_solve
from jaxhpo._core.trace import closure_convert
from jaxhpo._core.tree import all_finite, ravel_pytree, where
from jaxhpo._core.types import LinearInfo, LinearStatus, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._linear.report import judged, largest

_FAILED = (
    "The linear solve of an implicit rule failed: it ended {} at a relative residual of {{residual:.1e}}. The Hessian, "
    "or the Jacobian of the condition, may be indefinite (`CG` and `Nystrom` need a positive definite one), not "
    "finite, or singular in a direction that the outer loss sees: train the inner problem further, or take "
    "`General()` as linear solver, one with `damping`, or a penalty. `on_failure='keep'` keeps what the solver "
    "returned."
)

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("jaxhpo_inside_a_linear_solve", default=False)


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
    matvec: Callable, b: PyTree, x0: PyTree, solve: Callable, symmetric: bool = False, damping: float = 0.0
) -> tuple[PyTree, LinearInfo]:
    """Solve (A + δI) x = b by an algorithm for vectors; what the linear solvers are made of.

    Args:
      matvec: products with A.
      b: the right-hand side.
      x0: where to start, or None.
      solve: `(operator, b, x0) -> (x, LinearInfo)` on vectors, b with a largest entry of one.
      symmetric: A is its own transpose.
      damping: δ.

    Returns:
      x and the diagnostics.
    """
    if not _inside.get():
        again = functools.partial(solve_system, x0=None, solve=solve, damping=damping)
        return solve_equation(matvec, b, x0, again, symmetric)
    b, unravel = ravel_pytree(b)
    x0 = None if x0 is None else ravel_pytree(x0)[0]

    def operator(v):
        product = ravel_pytree(matvec(unravel(v)))[0]
        return product + damping * v if damping else product

    x, info = solve_scaled(solve, operator, b, x0)
    return unravel(x), info


def solve_equation(
    matvec: Callable, b: PyTree, x0: PyTree, solve: Callable, symmetric: bool, on_failure: str = "keep"
) -> tuple[PyTree, Any]:
    """Solve A x = b by a linear solver, and differentiate the equation instead of the solve.

    Args:
      matvec: products with A.
      b: the right-hand side.
      x0: where to start, or None.
      solve: the linear solver.
      symmetric: A is its own transpose.
      on_failure: as in `run_solver`.

    Returns:
      x and the diagnostics.
    """
    # An iteration that ends by a tolerance has no transpose, and its answer is not linear in b. `custom_linear_solve`
    # replaces its derivative by that of the equation, with one more solve in either mode:
    #     A ẋ = ḃ − Ȧ x   (tangent),        Aᵀ b̄ = x̄,  Ā = −b̄ xᵀ   (cotangent).
    # b is made one vector because the transpose of `custom_linear_solve` needs every leaf of b to be perturbed, but a
    # hyperparameter may reach some leaves only (a penalty on kernels and not on biases).
    b, unravel = ravel_pytree(b)
    x0 = jax.lax.stop_gradient(x0)
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
        x, info = run_solver(lambda v: unravel(operator(ravel_pytree(v)[0])), unravel(b), x0, solve, on_failure)
        return ravel_pytree(x)[0], info

    start = cast_varying(x0, axes)
    forward, transposed = functools.partial(run, start), functools.partial(run, None)  # x0 is near A⁻¹b, not near A⁻ᵀx̄
    x, info = jax.lax.custom_linear_solve(
        operator, cast_varying(b, axes), forward, transposed, symmetric=symmetric, has_aux=True
    )
    return unravel(drop_varying(x, axes - own)), info


def run_solver(matvec: Callable, b: PyTree, x0: PyTree, solve: Callable, on_failure: str) -> tuple[PyTree, LinearInfo]:
    """Call `solve(matvec, b, x0=x0)`, not differentiable, check what it returns, and report.

    Where it failed, x is NaN if `on_failure` is "nan". This cannot be done to the result of a differentiable solve: x
    must be linear in b.
    """

    def started(matvec, b, x0):
        return solve(matvec, b, **({} if x0 is None or not _takes_start(solve) else {"x0": x0}))

    token = _inside.set(True)
    try:
        x, info = judged(started)(matvec, b, x0)
    finally:
        _inside.reset(token)
    # Under `shard_map` a constant among the results of `custom_linear_solve`, as a number of products, would be an
    # argument of another type than the others: it is made a result.
    finite = all_finite(b)
    info = where(finite, info, info)
    report_linear_solve(info)
    if on_failure == "nan":
        for status in LinearStatus:
            happened = info.failed & (info.status == status) & finite
            report_fault(happened, _FAILED.format(status.name), residual=info.residual)
        x = jax.tree.map(lambda leaf: jnp.where(info.failed, jnp.nan, leaf), x)
    return x, info


def solve_by(linear_solver: Any, equation: Callable, matvec: Callable, b: PyTree, x0: PyTree) -> tuple[PyTree, Any]:
    """`equation(matvec, b, x0, solve)`, where `solve` is the linear solver, on mesh axes that are `Auto`.

    Args:
      linear_solver: a `LinearSolver` or a function; arrays that it needs are keywords of a `functools.partial`.
      equation: `solve_equation` or `run_solver`, with their settings.
      matvec: products with A.
      b: the right-hand side.
      x0: where to start, or None.
    """
    given = linear_solver.keywords if isinstance(linear_solver, functools.partial) else {}
    arrays = {k: x for k, x in given.items() if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))}

    def solved(matvec, b, arguments):
        x0, arrays = arguments
        return equation(matvec, b, x0, functools.partial(linear_solver, **arrays))

    try:
        return on_auto_axes(solved, matvec, b, (x0, arrays))
    except ValueError as error:
        if "context mesh" not in str(error):
            raise
        raise JaxhpoError(
            f"`linear_solver`, {describe(linear_solver)}, closes over an array on `Explicit` mesh axes, but it runs "
            "with these axes made `Auto`: pass the array as a keyword, `functools.partial(linear_solver, name=array)`, "
            "or close over NumPy's."
        ) from error


def _takes_start(linear_solver) -> bool:
    try:
        return "x0" in inspect.signature(linear_solver).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
