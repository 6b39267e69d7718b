"""The implicit function theorem, forward (`attach`) and in reverse (`pull_back`).

With g(θ(a), a) = 0 for all a, and H = ∂g/∂θ, differentiating along ȧ gives

    H θ̇ + ∂g/∂a ȧ = 0,      so that      θ̇ = −H⁻¹ ∂g/∂a ȧ.

Transposed, a cotangent v of θ becomes the cotangent −(∂g/∂a)ᵀ q of a, where Hᵀ q = v.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.stop_gradient import warn_zero
from jaxhpo._core.trace import differentiable_inputs, primitives, trust
from jaxhpo._core.tree import cast_like, has_derivative, mixed_types, partition, scaled, upcast, zeros_like
from jaxhpo._core.types import LinearInfo, LinearSolver, PyTree, declared
from jaxhpo._linear.system import run_solver, solve_by, solve_equation


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """The equation condition(params, leaves) = 0, and how to solve with its Jacobian. Hashed by identity.

    Attributes:
      condition: `(params, leaves) -> pytree like params`, which closes over nothing.
      linear_solver: solves with the condition's Jacobian in `params`.
      curvature: `(params, leaves, v) -> product of v with an approximation of that Jacobian`, or None.
      names: the name of every leaf, for warnings.
      remedy: the end of the warning about a leaf that does not enter the condition.
      on_failure: "nan" for a derivative of NaN where the linear solve failed, "keep" for what it returned.
    """

    condition: Callable[[PyTree, list], PyTree]
    linear_solver: LinearSolver | Callable
    curvature: Callable[[PyTree, list, PyTree], PyTree] | None
    names: tuple[str, ...]
    remedy: str
    on_failure: str


@trust
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach(root: Root, params: PyTree, leaves: list, key: jax.Array | None) -> PyTree:
    """Returns `params`, the root, with its derivative with respect to `leaves`; that of `params` itself is dropped."""
    return params


def _attach_jvp(root, primals, tangents):
    params, leaves, key = primals
    _, dots, _ = tangents
    # Attached again: H and ∂g/∂a are taken at θ(a), which depends on a too. Without this line second derivatives are
    # wrong, silently.
    params = attach(root, params, leaves, key)
    perturbed = [not isinstance(d, SymbolicZero) and has_derivative(x) for d, x in zip(dots, leaves, strict=True)]
    if not any(perturbed):
        return params, zeros_like(params)
    point = upcast(params)  # the linear solve of a bfloat16 model runs in float32
    values, linearised = _linearised(root, point, leaves, perturbed)
    dots = [d for d, p in zip(dots, perturbed, strict=True) if p]
    # ∂g/∂a ȧ, and v ↦ H v
    _, rhs, matvec = jax.jvp(linearised, (values,), (dots,), has_aux=True)
    _check_products(matvec, point)
    # Transposing `lax.custom_linear_solve` requires every leaf of the right-hand side to depend on the tangents. A
    # perturbed leaf may reach only some of them, so a zero that depends on all tangents is added.
    with mixed_types():
        zero = sum(jnp.sum(d) * 0 for d in dots)
    rhs = jax.tree.map(lambda r: r + jnp.asarray(zero).astype(r.dtype), rhs)
    linear_solver = root.linear_solver if key is None else functools.partial(root.linear_solver, key=key)
    symmetric = declared(root.linear_solver).needs_symmetry
    # θ̇ = H⁻¹ (−∂g/∂a ȧ)
    equation = functools.partial(solve_equation, symmetric=symmetric, on_failure=root.on_failure)
    params_dot, _ = solve_by(linear_solver, equation, matvec, scaled(-1.0, rhs), None)
    return params, cast_like(params_dot, params)


attach.defjvp(_attach_jvp, symbolic_zeros=True)


def pull_back(
    root: Root, params: PyTree, leaves: list, perturbed: list[bool], cotangent: PyTree, x0: PyTree, symmetric: bool
) -> tuple[list, PyTree, LinearInfo | None]:
    """The transpose of `attach`, written out, so that the linear solve can be warm-started and its report kept.

    Of first order; a linear solver that needs a key comes with it.

    Args:
      root: the equation.
      params: its solution θ.
      leaves: the other arguments of the condition.
      perturbed: for each leaf, whether its cotangent is wanted.
      cotangent: v, like `params`.
      x0: the start of the linear solve; None for its default.
      symmetric: True if H is, so that it is used as its own transpose.

    Returns:
      The cotangents of the perturbed leaves, q, and the linear solver's report.
    """
    point, rhs = upcast(params), upcast(cotangent)
    values, linearised = _linearised(root, point, leaves, perturbed)
    _, pull, matvec = jax.vjp(linearised, values, has_aux=True)
    _check_products(matvec, point)
    product = matvec if symmetric else _transposed(matvec, point)
    run = functools.partial(run_solver, on_failure=root.on_failure)
    q, info = solve_by(root.linear_solver, run, product, rhs, x0)  # Hᵀ q = v
    return scaled(-1.0, pull(q)[0]), q, info  # −(∂g/∂a)ᵀ q


def _linearised(root, point, leaves, perturbed) -> tuple[list, Callable]:
    """The perturbed leaves a, and `a -> (g(θ, a), v -> H v)`; warns of leaves that do not enter the condition."""
    perturbed_names = [name for name, p in zip(root.names, perturbed, strict=True) if p]
    values, combine = partition(leaves, perturbed)

    def condition(params, values):
        return cast_like(root.condition(params, combine(values)), point)

    def linearised(values):
        # Linearised once: the iterations of the linear solver repeat only what depends on v. Without `curvature`, H and
        # ∂g/∂a share one evaluation of g. (`jax.linearize` returns a pytree, so v -> H v can be an aux.)
        if root.curvature is None:
            return jax.linearize(lambda p: condition(p, values), point)
        curvature: Any = root.curvature
        return condition(point, values), jax.linearize(lambda v: curvature(point, leaves, v), zeros_like(point))[1]

    seen = differentiable_inputs(lambda values: condition(point, values), values) if values else []
    for name in [name for name, s in zip(perturbed_names, seen, strict=True) if not s]:
        warn_zero(name, root.remedy)
    return values, linearised


def _transposed(matvec, point):
    transposed = jax.linear_transpose(matvec, point)
    return lambda v: transposed(v)[0]


def _check_products(matvec, point):
    """Raises if JAX could not linearise the condition: it then leaves an equation that fails when it runs."""
    if "custom_lin" in primitives(matvec, point):
        raise JaxhpoError(
            "The condition holds a `jax.custom_vjp` function whose forward rule calls the function itself, or that has "
            "no second derivative, so its products with a vector cannot be taken. Let the forward rule compute the "
            "value without that call, write the function with `jax.custom_jvp`, or use `Unroll()`."
        )
