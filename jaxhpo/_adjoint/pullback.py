"""Rules with a backward pass of their own: reverse mode only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxhpo._core.mesh import cast_varying, drop_varying, varying_axes
from jaxhpo._core.stop_gradient import first_order, warn_perturbed
from jaxhpo._core.trace import differentiable_inputs, trust, used_inputs
from jaxhpo._core.tree import Flags, cast_like, is_inexact, names, partition
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._inner.problem import Problem


class Inputs(NamedTuple):
    """All inputs of a run and of its rule; or, with the same structure, whether each leaf is perturbed.

    Attributes:
      state: the initial `InnerState`.
      inputs: `(hparams, closed-over values)`, as in `Problem`.
      xs: with leading axis `num_steps`, as in `Problem`.
      consts: the values that the rule's own functions close over.
    """

    state: Any
    inputs: Any
    xs: Any
    consts: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Pullback:
    adjoint: Any
    structure: Any
    forward: Callable[[Inputs], tuple[InnerState, PyTree]]
    pull: Callable[[Inputs, Inputs, PyTree, InnerState], list]
    check: Callable[[Inputs, Inputs], None]
    params_only: bool
    once: bool


def run_with_pullback(
    problem: Problem,
    adjoint: Any,
    forward: Callable,
    pull: Callable,
    check: Callable,
    consts: PyTree = (),
    params_only: bool = False,
    once: bool = True,
) -> tuple[InnerState, jax.Array]:
    """Runs the inner problem with a backward pass of the rule's own (a `custom_vjp`).

    Args:
      problem: the inner problem, without `tol`.
      adjoint: the rule, for messages.
      forward: `Inputs -> (final state, residuals)`.
      pull: `(inputs, perturbed, residuals, cotangent of the final state) -> list`, the cotangents of the perturbed
        leaves, in their order. Under `shard_map`, the cotangent of a device-invariant leaf is a sum over the devices:
        JAX's own transposes make it so, if no device-varying value is multiplied in afterwards.
      check: `(inputs, perturbed)`, called when a derivative is taken: warns of what the rule cannot see.
      consts: the values that the rule's own functions close over.
      params_only: True if `pull` reads the cotangent of the final parameters alone; then a warning names other results
        that are being differentiated.
      once: True if `pull` must not be differentiated, so that a second derivative raises.

    Returns:
      The final state, and the number of steps taken.
    """
    leaves, structure = jax.tree.flatten(Inputs(problem.state, problem.inputs, problem.xs, consts))
    state: Any = _run(_Pullback(adjoint, structure, forward, pull, check, params_only, once), leaves)
    return state, jnp.asarray(problem.num_steps, jnp.int32)


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(rule, leaves):
    return rule.forward(jax.tree.unflatten(rule.structure, leaves))[0]


def _run_fwd(rule, leaves):
    perturbed = Flags(tuple(bool(x.perturbed) and is_inexact(x.value) for x in leaves))
    leaves = [x.value for x in leaves]
    if rule.once:
        leaves = first_order(leaves, rule.adjoint)  # for forward over reverse mode
    inputs = jax.tree.unflatten(rule.structure, leaves)
    rule.check(inputs, jax.tree.unflatten(rule.structure, perturbed.values))
    state, kept = rule.forward(inputs)
    return state, (leaves, kept, perturbed)


def _run_bwd(rule, residuals, cotangent):
    leaves, kept, perturbed = residuals
    if rule.params_only:
        _warn_of_other_results(rule, cotangent)
    axes = varying_axes(jax.tree.unflatten(rule.structure, leaves).state)
    cotangent = jax.tree.map(lambda c: cast_varying(_instantiated(c), axes), cotangent, is_leaf=_is_zero)
    if rule.once:
        (leaves, kept), cotangent = first_order(((leaves, kept), cotangent), rule.adjoint)
    inputs = jax.tree.unflatten(rule.structure, leaves)
    pulled = iter(rule.pull(inputs, jax.tree.unflatten(rule.structure, perturbed.values), kept, cotangent))
    return ([_as_cotangent(next(pulled), x) if m else None for x, m in zip(leaves, perturbed.values, strict=True)],)


_run.defvjp(_run_fwd, _run_bwd, symbolic_zeros=True)


def _as_cotangent(c, x):
    """The cotangent in the leaf's type: NaN on one device becomes NaN on all for a device-invariant leaf."""
    own = varying_axes(x)
    return cast_varying(drop_varying(cast_like(c, x), varying_axes(c) - own), own)


def _is_zero(x) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(cotangent):
    if not _is_zero(cotangent):
        return cotangent
    aval = cotangent.aval
    return np.zeros(aval.shape, aval.dtype) if aval.dtype == jax.dtypes.float0 else jnp.zeros(aval.shape, aval.dtype)


def _warn_of_other_results(rule, cotangent):
    results = cotangent._replace(params=None)
    read = [not _is_zero(c) and c.dtype != jax.dtypes.float0 for c in jax.tree.leaves(results, is_leaf=_is_zero)]
    warn_perturbed(
        names(jax.tree.map(lambda c: 0, results, is_leaf=_is_zero), "solution"),
        read,
        f"is being differentiated, but {rule.adjoint!r} sees the solution's parameters alone: the hypergradient "
        "through it is exactly zero. `Unroll()` sees it.",
    )


def input_names(inputs: PyTree) -> list[str]:
    """The name of each leaf of `Problem.inputs`, for messages."""
    hparams, closed_over = inputs
    return [*names(hparams, "hparams"), *closed_over_names(closed_over)]


def closed_over_names(values: list) -> list[str]:
    """The names of closed-over values, for messages."""
    return [f"a {describe(value)} that is closed over" for value in values]


def used_in_steps(problem: Problem, at: Inputs, perturbed: Inputs) -> list[bool]:
    """For each leaf of `at.inputs`, whether it is perturbed and a step computes anything from it."""
    values, combine = partition(at.inputs, perturbed.inputs)
    first = jax.tree.map(lambda x: x[0], at.xs)
    used = used_inputs(lambda values: problem.advance(at.state, combine(values), first), values)
    return jax.tree.leaves(partition(jax.tree.map(lambda _: False, perturbed.inputs), perturbed.inputs)[1](used))


def in_condition(problem: Problem) -> list[bool]:
    """For each leaf of `problem.inputs`, whether it enters the condition; if not, it is a setting of the optimiser."""
    hparams, *rest = problem.residual_inputs
    moved, combine = partition(hparams, jax.tree.map(is_inexact, hparams))

    def residual(moved):
        return problem.residual(problem.state.params, problem.state.model_state, (combine(moved), *rest))

    seen = differentiable_inputs(residual, moved)
    every = partition(jax.tree.map(lambda _: True, hparams), jax.tree.map(is_inexact, hparams))[1](seen)
    return [*jax.tree.leaves(every), *problem.in_residual()]
