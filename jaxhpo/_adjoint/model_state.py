"""Model states that training computes behind a `stop_gradient`, as flax nnx's batch norm does."""

from collections.abc import Callable
from typing import Any

import jax

from jaxhpo._core.stop_gradient import warn_zero, watch_constants
from jaxhpo._core.trace import flow_through_steps
from jaxhpo._core.tree import is_inexact, names
from jaxhpo._core.types import InnerState
from jaxhpo._inner.problem import Problem

_STOPPED = (
    "is read by what is being differentiated, but the train loss computes it behind `stop_gradient`, as flax nnx's "
    "batch norm does with its running statistics: it is a constant to every derivative, and the hypergradient lacks "
    "the part through it. Write a subclass that updates it without `stop_gradient` (the documentation has one, in its "
    "recipe for flax nnx), take linen's, or let the outer loss normalise by the statistics of its own batch."
)


def warn_of_stopped(problem: Problem, final: InnerState) -> InnerState:
    """Returns the final state of a rule that differentiates the steps; warns where a derivative through it is lost.

    A leaf of the model state is lost if it depends on something perturbed, but only behind a `stop_gradient` in the
    step. A `ZeroHypergradientWarning` names the lost leaves that are read: by a function of the solution that is being
    differentiated, or by later steps. It costs one pass over the step's jaxpr while tracing, where there is a model
    state, and nothing when the program runs.
    """
    leaves, structure = jax.tree.flatten(final.model_state)
    if not any(map(is_inexact, leaves)):
        return final
    given = (problem.state, problem.inputs, problem.xs)
    first = jax.tree.map(lambda x: x[0], problem.xs)
    step: Any = jax.make_jaxpr(problem.advance)(problem.state, problem.inputs, first).jaxpr
    num_params, end = len(jax.tree.leaves(final.params)), len(step.outvars)
    begin = end - len(leaves)

    every = [is_inexact(v.aval) for v in step.invars]
    start = [begin <= i < end for i in range(len(step.invars))]  # the model state itself

    def lost(wanted: list[bool], given: list[bool]) -> list[bool]:
        """For each leaf, whether it depends on what is wanted, but has no derivative with respect to what is given."""
        behind = flow_through_steps(step, wanted, problem.num_steps, past_stops=True)[begin:]
        reached = flow_through_steps(step, given, problem.num_steps, past_stops=False)[begin:]
        return [a and not b for a, b in zip(behind, reached, strict=True)]

    candidates = [i for i, m in enumerate(lost(every, [m and not s for m, s in zip(every, start, strict=True)])) if m]
    if not candidates:
        return final
    leaf_names = names(final.model_state, "model_state")

    def warn(perturbed: list[bool]) -> tuple[list[bool], Callable]:
        constant = lost(perturbed, perturbed)
        marked = [False] * begin + constant + [False] * (len(step.invars) - end)
        after = flow_through_steps(step, marked, problem.num_steps - 1, past_stops=False)
        trained_on = any(after[:num_params])  # later steps read them

        def warn_of_read(read: list[bool]) -> None:
            found = [leaf_names[i] for i, m in zip(where, read, strict=True) if m]
            if found:
                more = f"(and {', '.join(found[1:])}) " if len(found) > 1 else ""
                warn_zero(found[0], f"{more}{_STOPPED}")

        where = [i for i in candidates if constant[i]]
        if trained_on:
            warn_of_read([True] * len(where))
        return [constant[i] for i in candidates], (lambda read: None) if trained_on else warn_of_read

    watched = watch_constants(warn, [leaves[i] for i in candidates], jax.tree.leaves(given))
    for i, leaf in zip(candidates, watched, strict=True):
        leaves[i] = leaf
    return final._replace(model_state=jax.tree.unflatten(structure, leaves))
