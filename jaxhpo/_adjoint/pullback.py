"""Rules with a backward pass of their own: reverse mode only."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import as_array, cast_varying, drop_varying, varying_axes
from jaxhpo._core.stop_gradient import first_order, reverse_only, warn_perturbed
from jaxhpo._core.trace import differentiable_inputs, trust, used_inputs
from jaxhpo._core.tree import Flags, cast_like, has_derivative, is_inexact, names, partition
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._inner.problem import Problem


def refuse_tol(problem, rule):
    """Raises where `tol` is set: it ends the inner loop at a data-dependent step, and the rule needs a fixed length."""
    if problem.tol is not None:
        raise JaxhpoError(
            f"`tol={problem.tol}` stops the inner loop at a data-dependent step, and {rule!r} cannot differentiate "
            "such a loop: omit `tol`, or use `adjoint=Implicit(...)`."
        )


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
class Pullback:
    """A backward pass of the rule's own (a `custom_vjp`).

    Attributes:
      adjoint: the rule, for messages.
      forward: `Inputs -> (final state, residuals)`.
      pull: `(inputs, perturbed, residuals, cotangent of the final state) -> list`, the cotangents of the perturbed
        leaves, in their order. Under `shard_map`, the cotangent of a device-invariant leaf is a sum over the devices:
        JAX's own transposes make it so, if no device-varying value is multiplied in afterwards.
      check: `(inputs, perturbed)`, called when a derivative is taken: warns of what the rule cannot see.
      params_only: True if `pull` reads the cotangent of the final parameters alone; then a warning names other results
        that are being differentiated.
      once: True if `pull` must not be differentiated, so that a second derivative raises.
    """

    adjoint: Any
    forward: Callable[[Inputs], tuple[InnerState, PyTree]]
    pull: Callable[[Inputs, Inputs, PyTree, InnerState], list]
    check: Callable[[Inputs, Inputs], None] = lambda inputs, perturbed: None
    params_only: bool = False
    once: bool = True

    def run(self, problem: Problem, consts: PyTree = ()) -> tuple[InnerState, jax.Array]:
        """Returns the final state, and the number of steps taken; raises where the problem has a `tol`.

        Args:
          problem: the inner problem.
          consts: the values that the rule's own functions close over.
        """
        refuse_tol(problem, self.adjoint)
        given = Inputs(problem.state, problem.inputs, problem.xs, consts)
        state: Any = _run(self, reverse_only(given, f"`{self.adjoint!r}`"))
        return state, jnp.asarray(problem.num_steps, jnp.int32)


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(rule, inputs):
    return rule.forward(inputs)[0]


def _run_fwd(rule, inputs):
    perturbed = jax.tree.map(lambda x: bool(x.perturbed) and has_derivative(x.value), inputs)
    inputs = jax.tree.map(lambda x: x.value, inputs)
    if rule.once:
        inputs = first_order(inputs, rule.adjoint)  # for forward over reverse mode
    rule.check(inputs, perturbed)
    state, kept = rule.forward(inputs)
    return state, (inputs, kept, Flags(tuple(jax.tree.leaves(perturbed))))


def _run_bwd(rule, residuals, cotangent):
    inputs, kept, flags = residuals
    perturbed = jax.tree.unflatten(jax.tree.structure(inputs), flags.values)
    if rule.params_only:
        _warn_of_other_results(rule, cotangent)
    axes = varying_axes(inputs.state)
    cotangent = jax.tree.map(lambda c: as_array(c, axes), cotangent)
    if rule.once:
        (inputs, kept), cotangent = first_order(((inputs, kept), cotangent), rule.adjoint)
    pulled = iter(rule.pull(inputs, perturbed, kept, cotangent))
    return (jax.tree.map(lambda x, m: _as_cotangent(next(pulled), x) if m else None, inputs, perturbed),)


_run.defvjp(_run_fwd, _run_bwd, symbolic_zeros=True)


def _as_cotangent(c, x):
    """The cotangent in the leaf's type: NaN on one device becomes NaN on all for a device-invariant leaf."""
    own = varying_axes(x)
    return cast_varying(drop_varying(cast_like(c, x), varying_axes(c) - own), own)


def _warn_of_other_results(rule, cotangent):
    results = cotangent._replace(params=None)
    read = [not isinstance(c, SymbolicZero) and c.dtype != jax.dtypes.float0 for c in jax.tree.leaves(results)]
    alone = f"is being differentiated, but {rule.adjoint!r} sees the solution's parameters alone: "
    instead = "the hypergradient through it is exactly zero. `Unroll()` sees it."
    warn_perturbed(names(results, "solution"), read, alone + instead)


def input_names(inputs: PyTree) -> list[str]:
    """The name of each leaf of `Problem.inputs`, for messages."""
    hparams, closed_over = inputs
    return [*names(hparams, "hparams"), *closed_over_names(closed_over)]


def closed_over_names(values: list) -> list[str]:
    """The names of closed-over values, for messages."""
    return [f"a {describe(value)} that is closed over" for value in values]


def not_entering(what: str, rule: str, others: str = "`Unroll()`") -> str:
    """The warning about a leaf that does not enter what a rule differentiates."""
    return (
        f"does not enter {what}, so under {rule} its hypergradient through this solve is exactly zero. If it is a "
        f"setting of the optimiser (a learning rate, a momentum), {others} sees it; if nothing uses it, remove it; if "
        "it enters the outer loss directly, that part is still right."
    )


def warn_of_schedules(problem: Problem, at: Inputs, perturbed: Inputs, seen: list[bool], message: str) -> None:
    """Warns of perturbed leaves of `at.inputs` that steps use but the rule has not `seen`, unless single numbers.

    An entry of a schedule may be used in some steps alone; a single number is used in every step.
    """
    first = jax.tree.map(lambda x: x[0], at.xs)
    used = used_inputs(lambda inputs: problem.advance(at.state, inputs, first), at.inputs)
    rows = zip(jax.tree.leaves(perturbed.inputs), used, seen, jax.tree.leaves(at.inputs), strict=True)
    unseen = [m and u and not s and x.ndim > 0 for m, u, s, x in rows]
    warn_perturbed(input_names(at.inputs), unseen, message, partial=True)


def in_condition(problem: Problem) -> list[bool]:
    """For each leaf of `problem.inputs`, whether it enters the condition; if not, it is a setting of the optimiser."""
    hparams, *rest = problem.residual_inputs
    leaves, structure = jax.tree.flatten(hparams)

    def residual(leaves):
        hparams = jax.tree.unflatten(structure, leaves)
        return problem.residual(problem.state.params, problem.state.model_state, (hparams, *rest))

    return [*differentiable_inputs(residual, leaves), *problem.in_residual()]


def varying_zeros(tree: PyTree) -> PyTree:
    """Zeros like the leaves, that vary over the same mesh axes."""
    return jax.tree.map(lambda x: cast_varying(jnp.zeros_like(x), varying_axes(x)), tree)


def pull_step(
    problem: Problem, at: Inputs, perturbed: Inputs, state: InnerState, x: PyTree, cotangent: list
) -> tuple[list, list, list]:
    """Pulls a cotangent back through the inner step Φ_t from `state` with the data `x`.

    Returns:
      (∂_θ Φ_t)ᵀ a, (∂_h Φ_t)ᵀ a and (∂_x Φ_t)ᵀ a, where a and the first are cotangents of the state's floating-point
      leaves, the others of the perturbed leaves of `at.inputs` and of the data.
    """
    floats, combine_state = partition(state, jax.tree.map(is_inexact, state))
    shared, combine = partition(at.inputs, perturbed.inputs)
    data, combine_data = partition(x, perturbed.xs)

    def step(floats, shared, data):
        after = problem.advance(combine_state(floats), combine(shared), combine_data(data))
        return partition(after, jax.tree.map(is_inexact, after))[0]

    return jax.vjp(step, floats, shared, data)[1](cotangent)
