"""The loop over inner steps: a scan with checkpoints, and a loop that stops at a tolerance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import norm
from jaxhpo._core.types import InnerState, Schedule
from jaxhpo._inner.gradient import GRADIENT
from jaxhpo._inner.problem import Problem


def scan_steps(advance: Callable, state: InnerState, xs, num_steps, schedule: Schedule = Schedule()) -> InnerState:  # noqa: B008
    """Takes T inner steps; the schedule's segments say which values reverse mode stores."""

    def body(state, x):
        return advance(state, x), None

    k = schedule.segment
    if k is None:
        return jax.lax.scan(body, state, xs, num_steps)[0]
    # Inside a scan XLA cannot merge a step with its recomputation, so the barriers of `prevent_cse` are not needed. The
    # segment below is also called outside of one.
    stored = jax.checkpoint_policies.save_only_these_names(*([GRADIENT] if schedule.gradients else []))
    step = jax.checkpoint(body, prevent_cse=False, policy=stored)
    if k == 1:
        return jax.lax.scan(step, state, xs, num_steps)[0]

    # Two levels: one state per segment is stored, the states inside are recomputed.
    segment = jax.checkpoint(lambda state, xs: jax.lax.scan(step, state, xs)[0])
    num_segments, rest = divmod(num_steps, k)
    if num_segments:
        head = jax.tree.map(lambda x: x[: num_segments * k].reshape(num_segments, k, *x.shape[1:]), xs)
        state = jax.lax.scan(lambda s, x: (segment(s, x), None), state, head)[0]
    if rest:
        state = segment(state, jax.tree.map(lambda x: x[num_segments * k :], xs))
    return state


def run(problem: Problem) -> tuple[InnerState, jax.Array]:
    """Runs until `num_steps` or `tol` is reached, with no custom derivative; returns final state and steps taken.

    With `tol`, it ends where ‖residual‖ < tol, and is not reverse-differentiable.
    """

    def advance(state, x):
        return problem.advance(state, problem.inputs, x)

    if problem.tol is None:
        state = scan_steps(advance, problem.state, problem.xs, problem.num_steps)
        return state, jnp.asarray(problem.num_steps, jnp.int32)

    def unfinished(carry):
        t, state = carry
        residual = problem.residual(state.params, state.model_state, problem.residual_inputs)
        # `>=` is False for NaN, so the loop ends, and `info.finite` reports it.
        return (t < problem.num_steps) & (norm(residual) >= problem.tol)

    def body(carry):
        t, state = carry
        return t + 1, advance(state, jax.tree.map(lambda x: x[t], problem.xs))

    steps, state = jax.lax.while_loop(unfinished, body, (jnp.asarray(0, jnp.int32), problem.state))
    return state, steps
