"""The implicit hypergradient written out, for the pairs that keep its linear solve from one outer step to the next."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.implicit import curvature_product, not_in_condition, trained_state_is_constant
from jaxhpo._adjoint.implicit_function import checked_solution
from jaxhpo._core.stop_gradient import warn_zero
from jaxhpo._core.trace import differentiable_inputs
from jaxhpo._core.tree import all_finite, cast_like, is_inexact, names, upcast, zeros_like
from jaxhpo._core.types import HypergradientInfo, InnerState, LinearInfo, LinearStatus, PyTree, Solution
from jaxhpo._inner.problem import Problem, info_of


class ImplicitProduct(NamedTuple):
    """What an update of an implicit pair makes of an inner run.

    Attributes:
      hypergradient: like the hyperparameters.
      linear_solution: q, where the next linear solve may start.
      info: the report.
    """

    hypergradient: PyTree
    linear_solution: PyTree
    info: HypergradientInfo


def implicit_product(
    rule: Any,
    problem: Problem,
    ended: tuple[InnerState, jax.Array],
    outer_loss: Callable,
    outer_batch: Any,
    linear_solver: Callable,
    start: PyTree,
    curvature: Any = "hessian",
) -> ImplicitProduct:
    """The hypergradient at the end of an inner run.

    With F the outer loss, g the condition and θ the parameters at the end,

        Hᵀ q = ∂F/∂θ,  H = ∂g/∂θ,      dF/dh = ∂F/∂h − (∂g/∂h)ᵀ q.

    Args:
      rule: the method, for messages.
      problem: the inner problem.
      ended: the final state, and the number of steps taken.
      outer_loss: `(solution, hparams, outer_batch) -> (value, metrics)`.
      outer_batch: its data.
      linear_solver: solves with Hᵀ.
      start: where the linear solve starts; None for zeros.
      curvature: what stands in for H, as in `Implicit`.
    """
    final, steps = ended
    info = info_of(problem, final, steps)
    hparams, *rest = problem.residual_inputs
    point = upcast(final.params)  # a bfloat16 model's linear solve runs in float32

    def outer(params, hparams, others):
        return outer_loss(Solution(params, others[0], others[1], info), hparams, outer_batch)

    def residual(params, hparams):
        return cast_like(problem.residual(params, final.model_state, (hparams, *rest)), point)

    _warn(rule, problem, final, lambda others: outer(final.params, hparams, others)[0], lambda h: residual(point, h))
    (value, metrics), (rhs, direct) = jax.value_and_grad(outer, (0, 1), has_aux=True)(final.params, hparams, final[1:])
    pull, transposed = _linearised(curvature, problem, residual, point, hparams)
    q, linear = _solved(linear_solver, transposed, upcast(rhs), start)
    hypergrad = jax.tree.map(jnp.subtract, direct, pull(q)[0])
    return ImplicitProduct(hypergrad, _next_start(q, linear), HypergradientInfo(value, metrics, info, linear))


def _linearised(curvature, problem, residual, point, hparams):
    """w ↦ (∂g/∂h)ᵀ w and v ↦ Hᵀ v, of one evaluation: linearised once for all iterations."""

    def at(hparams):
        if curvature == "hessian":
            return jax.linearize(lambda p: residual(p, hparams), point)
        apply, consts = curvature_product(curvature, problem)  # symmetric, as every curvature is
        product = functools.partial(apply, point, problem.residual_inputs, consts)
        return residual(point, hparams), jax.linearize(product, zeros_like(point))[1]

    _, pull, product = jax.vjp(at, hparams, has_aux=True)
    if curvature != "hessian" or problem.solver.symmetric:
        return pull, product  # forward over reverse, the cheaper way round
    transposed = jax.linear_transpose(product, point)
    return pull, lambda v: transposed(v)[0]


def _solved(linear_solver, matvec, rhs, start):
    """q and the report; a linear solver without `x0` starts where it likes."""
    if start is not None and "x0" in _parameters(linear_solver):
        linear_solver = functools.partial(linear_solver, x0=start)
    out = linear_solver(matvec, rhs)
    return cast_like(checked_solution(out, rhs), rhs), out[1]


def _parameters(fn):
    try:
        return inspect.signature(fn).parameters
    except ValueError:
        return ()  # a builtin without a signature


def _next_start(q, linear: LinearInfo | None):
    """q, or zeros where it is no good start: NaN would stay for ever, and an indefinite H drives iterates apart."""
    good = all_finite(q)
    if linear is not None:
        good &= (linear.status != LinearStatus.INDEFINITE) & (linear.status != LinearStatus.NOT_FINITE)
    return jax.tree.map(lambda x: jnp.where(good, x, 0), q)


def _warn(rule, problem, final, outer_of_others, residual_of_hparams):
    """A `ZeroHypergradientWarning` for what the rule does not see and the outer loss, or the caller, may count on."""
    leaves, structure = jax.tree.flatten(final[1:])
    perturbed = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    every = [*names(final.opt_state, "opt_state"), *names(final.model_state, "model_state")]

    def outer(moved):
        others = list(leaves)
        for i, leaf in zip(perturbed, moved, strict=True):
            others[i] = leaf
        return outer_of_others(jax.tree.unflatten(structure, others))

    read = differentiable_inputs(outer, [leaves[i] for i in perturbed]) if perturbed else []
    for i in [i for i, seen in zip(perturbed, read, strict=True) if seen][:1]:
        warn_zero(every[i], trained_state_is_constant(rule))
    leaves, structure = jax.tree.flatten(problem.residual_inputs[0])
    if leaves:
        enters = differentiable_inputs(lambda h: residual_of_hparams(jax.tree.unflatten(structure, h)), leaves)
        for name, seen in zip(names(problem.residual_inputs[0], "hparams"), enters, strict=True):
            if not seen:
                warn_zero(name, not_in_condition(rule, problem.solver.name))
