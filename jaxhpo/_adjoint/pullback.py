"""What the rules share that pull a cotangent back through the run by an approximation of their own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex

from jaxhpo._core.mesh import cast_varying, drop_varying, varying_axes
from jaxhpo._core.stop_gradient import first_order, warn_perturbed
from jaxhpo._core.trace import differentiable_inputs, trust
from jaxhpo._core.tree import Flags, cast_like, is_inexact, names, partition
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._inner.problem import Problem


class Inputs(NamedTuple):
    """All that a run and its rule depend on; or, with the same tree, whether each leaf is being differentiated.

    Attributes:
      state: the initial `InnerState`.
      inputs: `(hparams, closed-over values)`, as in `Problem`.
      xs: with leading axis `num_steps`, as in `Problem`.
      consts: what the rule's own hoisted functions close over.
    """

    state: Any
    inputs: Any
    xs: Any
    consts: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Rule:
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
    """Runs the inner problem; how a cotangent of the result is pulled back is for the rule to say.

    In reverse mode alone.

    Args:
      problem: the inner problem, without `tol`.
      adjoint: the rule, for messages.
      forward: `Inputs -> (final state, kept)`, where kept is what `pull` needs besides.
      pull: `(inputs, moving, kept, cotangent of the final state) -> list`, the cotangents of the leaves that are
        moving, in their order. Under `shard_map`, the cotangent of a leaf that is the same on all devices is a sum over
        them: JAX's own transposes make it so, as long as nothing that differs is multiplied in afterwards.
      check: `(inputs, moving)`, called where a derivative is taken: warns of what the rule cannot see.
      consts: what the rule's own hoisted functions close over.
      params_only: whether `pull` looks at the cotangent of the final parameters alone; then a warning tells of others.
      once: whether a second derivative raises, as `pull` is not to be differentiated.

    Returns:
      The final state, and the number of steps taken.
    """
    leaves, structure = jax.tree.flatten(Inputs(problem.state, problem.inputs, problem.xs, consts))
    state: Any = _run(_Rule(adjoint, structure, forward, pull, check, params_only, once), leaves)
    return state, jnp.asarray(problem.num_steps, jnp.int32)


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(rule, leaves):
    return rule.forward(jax.tree.unflatten(rule.structure, leaves))[0]


def _run_fwd(rule, leaves):
    perturbed = Flags(tuple(bool(x.perturbed) and is_inexact(x.value) for x in leaves))
    leaves = [x.value for x in leaves]
    if rule.once:
        leaves = first_order(leaves, rule.adjoint)  # forward over reverse mode begins here
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
    """In the leaf's own type. Where a rule gave NaN on one device alone, an input of all devices gets NaN on all."""
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
        f"is being differentiated, and {rule.adjoint!r} sees the solution's parameters alone: what is computed from it "
        "has a hypergradient of exactly zero. `Unroll()` sees it.",
    )


def closed_over_names(values: list) -> list[str]:
    """What closed-over values are called in messages."""
    return [f"a {describe(value)} that is closed over" for value in values]


def used_in_steps(problem: Problem, at: Inputs, perturbed: Inputs) -> list[bool]:
    """For each leaf of `at.inputs`, whether it is moving and a step computes anything from it."""
    moved, combine = partition(at.inputs, perturbed.inputs)
    first = jax.tree.map(lambda x: x[0], at.xs)
    jaxpr = jax.make_jaxpr(lambda moved: problem.advance(at.state, combine(moved), first))(moved).jaxpr
    needed = set(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    used = partition(jax.tree.map(lambda _: False, perturbed.inputs), perturbed.inputs)[1](
        [v in needed for v in jaxpr.invars]
    )
    return jax.tree.leaves(used)


def in_condition(problem: Problem) -> list[bool]:
    """For each leaf of `problem.inputs`, whether the condition sees it; if not, it is a setting of the optimiser."""
    hparams, *rest = problem.residual_inputs
    moved, combine = partition(hparams, jax.tree.map(is_inexact, hparams))

    def residual(moved):
        return problem.residual(problem.state.params, problem.state.model_state, (combine(moved), *rest))

    seen = differentiable_inputs(residual, moved)
    every = partition(jax.tree.map(lambda _: True, hparams), jax.tree.map(is_inexact, hparams))[1](seen)
    return [*jax.tree.leaves(every), *problem.in_residual()]
