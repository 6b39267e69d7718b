"""The one custom derivative rule: a root of condition(point, args) moves as the implicit function theorem says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.stop_gradient import warn_zero
from jaxhpo._core.trace import closure_convert, differentiable_inputs, equations, trust
from jaxhpo._core.tree import cast_like, is_inexact, names, scaled, upcast, zeros_like
from jaxhpo._core.types import LinearSolver, PyTree
from jaxhpo._core.validate import check_arrays, check_callable, check_finite, check_params, check_residual, describe
from jaxhpo._inner.problem import Adjoint
from jaxhpo._linear.cg import CG


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """What `attach` needs besides arrays.

    Attributes:
      residual: `(params, leaves) -> pytree like params`, closing over nothing.
      linear_solver: solves with the residual's Jacobian in `params`.
      curvature: `(params, leaves, v) -> v times what stands in for that Jacobian`, or None.
      names: the name of every leaf, for warnings.
      remedy: the end of the warning about a leaf that the residual cannot see.
    """

    residual: Callable[[PyTree, list], PyTree]
    linear_solver: LinearSolver
    curvature: Callable[[PyTree, list, PyTree], PyTree] | None
    names: tuple[str, ...]
    remedy: str


@trust
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(rule: Rule, params: PyTree, leaves: list, key: jax.Array | None) -> PyTree:
    """Returns `params` unchanged, with the derivative of the root of `rule.residual` with respect to `leaves`."""
    return params


def _attach_jvp(rule, primals, tangents):
    # g(θ(h), h) = 0 for all h  ⟹  H θ̇ = −∂g/∂h ḣ  with H = ∂g/∂θ.
    params, leaves, key = primals
    _, dots, _ = tangents
    # Attached again, so that what follows depends on h through θ(h) too: without it second derivatives are wrong.
    params = attach(rule, params, leaves, key)
    perturbed = [i for i, d in enumerate(dots) if not isinstance(d, SymbolicZero) and is_inexact(leaves[i])]
    if not perturbed:
        return params, jax.tree.map(jnp.zeros_like, params)
    point = upcast(params)  # a bfloat16 model's linear solve runs in float32

    def residual(params, moved):
        every = list(leaves)
        for i, leaf in zip(perturbed, moved, strict=True):
            every[i] = leaf
        return cast_like(rule.residual(params, every), point)

    moved = [leaves[i] for i in perturbed]
    for i, seen in zip(perturbed, differentiable_inputs(lambda m: residual(point, m), moved), strict=True):
        if not seen:
            warn_zero(rule.names[i], rule.remedy)

    def linearised(m):
        # Linearised once, so that what does not depend on v is left out of the iterations; within the mixed product,
        # so that both share one evaluation at the point.
        if rule.curvature is None:
            return jax.linearize(lambda p: residual(p, m), point)
        return residual(point, m), jax.linearize(lambda v: rule.curvature(point, leaves, v), zeros_like(point))[1]

    _, rhs, matvec = jax.jvp(linearised, (moved,), ([dots[i] for i in perturbed],), has_aux=True)
    # What JAX leaves in place of a product that it cannot take, to fail when it is run.
    if any(equation.primitive.name == "custom_lin" for equation in equations(jax.make_jaxpr(matvec)(point).jaxpr)):
        raise JaxhpoError(
            "The condition holds a `jax.custom_vjp` function whose forward rule calls the function itself, or that has "
            "no second derivative, so its products with a vector cannot be taken. Let the forward rule compute the "
            "value without that call, write the function with `jax.custom_jvp`, or take `Unroll()`."
        )
    solve = rule.linear_solver if key is None else functools.partial(rule.linear_solver, key=key)
    # A leaf of the right-hand side that no moving input reaches is a constant zero; `lax.custom_linear_solve` is
    # transposed only if all of it depends on the tangents.
    zero = sum(jnp.sum(dots[i]) * 0 for i in perturbed)
    rhs = jax.tree.map(lambda r: r + jnp.asarray(zero).astype(r.dtype), rhs)
    params_dot = checked_solution(solve(matvec, scaled(-1.0, rhs)), rhs)
    return params, cast_like(params_dot, params)


attach.defjvp(_attach_jvp, symbolic_zeros=True)


def checked_solution(out: Any, rhs: PyTree) -> PyTree:
    """The solution that a linear solver returned; raises unless it returned one, and a report."""
    if not (isinstance(out, tuple) and len(out) == 2):
        raise JaxhpoError(
            f"`linear_solver` returned {describe(out)}, but it must return a solution and a report: write "
            f"`return x, info`, where info is a `LinearInfo` or None."
        )
    return check_residual(out[0], rhs, "linear_solver", "b")


def implicit(condition: Callable, params: PyTree, args: Any, linear_solver: LinearSolver | None = None) -> PyTree:
    r"""Attaches an implicit derivative to a point found by any solver whatever.

    Returns `params` unchanged, but with
    :math:`d\theta/da = -(\partial_\theta g)^{-1} \partial_a g` where g is the condition: closed forms, scikit-learn,
    SciPy or L-BFGS become differentiable with respect to `args` and to everything that `condition` closes over.
    First and higher derivatives, forward and reverse.

    **Cost and bias**: one linear solve a derivative, plus one mixed product; memory of one linearisation of the
    condition. Exact where the condition is zero and the linear solve converged.

    Args:
      condition: `(params, args) -> pytree like params`, zero at `params`; for a minimum, the gradient of the objective.
      params: the solution, a pytree of floating-point arrays. No derivative flows into how it was found.
      args: any pytree that the condition depends on; integer, boolean and key leaves are allowed.
      linear_solver: solves with the condition's Jacobian in `params`; `CG()` when None, which needs that Jacobian to be
        symmetric positive definite, as a Hessian at a minimum is. Otherwise take `Direct()`, or `Neumann`.

    Returns:
      `params`, differentiable.

    Raises:
      JaxhpoError: `params` has no floating-point leaf or an integer one, or the condition's result does not match it.

    Example:
      >>> X, y = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
      >>> def condition(w, log_penalty):
      ...     return X.T @ (X @ w - y) + jnp.exp(log_penalty) * w
      >>> def ridge(log_penalty):
      ...     w = jnp.linalg.solve(X.T @ X + jnp.exp(log_penalty) * jnp.eye(2), X.T @ y)
      ...     return jaxhpo.implicit(condition, w, log_penalty)
      >>> print(jax.grad(lambda h: jnp.sum(ridge(h)))(0.0).round(3))
      -0.412

    References:
      Blondel et al. Efficient and Modular Implicit Differentiation. 2022. arXiv:2105.15183
    """
    solver = CG() if linear_solver is None else check_linear_solver(linear_solver)
    check_callable("condition", condition, "condition(params, args)", 2)
    params = check_params(params, "params")
    check_finite(check_arrays(args, "args"), "args", allow_infinite=True)
    args = jax.tree.map(jnp.asarray, args)
    pure, consts = closure_convert(lambda p, a: check_residual(condition(p, a), p), upcast(params), upcast(args))
    leaves, structure = jax.tree.flatten(args)

    def residual(params, leaves):
        args = upcast(jax.tree.unflatten(structure, leaves[len(consts) :]))
        return pure(leaves[: len(consts)], params, args)

    remedy = (
        "does not enter the condition, so the derivative of the solution with respect to it is exactly zero. "
        "Put it into the condition, or do not differentiate with respect to it."
    )
    closed_over = [f"a {describe(c)} that the condition closes over" for c in consts]
    rule = Rule(residual, solver, None, (*closed_over, *names(args, "args")), remedy)
    return attach(rule, jax.lax.stop_gradient(params), [*consts, *leaves], None)


def check_linear_solver(linear_solver: Any) -> Any:
    """Raises unless this is a linear solver, set up and ready to be called."""
    if isinstance(linear_solver, type):
        name = linear_solver.__name__
        raise JaxhpoError(f"`linear_solver` got the class {name}, not an instance: write `{name}(...)`.")
    if not callable(linear_solver) and isinstance(linear_solver, Adjoint):
        raise JaxhpoError(
            f"`linear_solver` got {linear_solver!r}, which is a derivative rule and solves no linear system: pass it "
            f"to `solve` as `adjoint={linear_solver!r}`, or write a linear solver such as `CG()`."
        )
    if not callable(linear_solver):
        raise JaxhpoError(
            f"`linear_solver` got {linear_solver!r}, but it is called as `linear_solver(matvec, b)`: write "
            f"`CG()`, `Neumann(num_terms, step_size)`, `Identity(scale)` or `Direct()`."
        )
    check_callable("linear_solver", linear_solver, "linear_solver(matvec, b, x0=None)", 2)
    return linear_solver


def declared(linear_solver: Any) -> Any:
    """The object on which to read `needs_key` and `needs_symmetry`: the protocol's defaults for a plain function."""
    return linear_solver if isinstance(linear_solver, LinearSolver) else LinearSolver
