"""The loop over inner steps: a scan with checkpoints, and a loop that stops at a tolerance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import norm
from jaxhpo._core.types import InnerState, PyTree, Schedule
from jaxhpo._inner.gradient import GRADIENT
from jaxhpo._inner.problem import Problem


def split_steps(xs: PyTree, counts: PyTree) -> tuple[list, list, Callable]:
    """Separates step indices, which a loop counts, from the data, of which it takes slices.

    Args:
      xs: with a leading axis of steps, as in `Problem`.
      counts: for each leaf whether it holds successive step indices.

    Returns:
      The other leaves; the first index of each leaf of indices; and `(slices, indices) -> x`, a slice of `xs`.
    """
    leaves, structure = jax.tree.flatten(xs)
    flags = jax.tree.leaves(counts)
    data = [x for x, count in zip(leaves, flags, strict=True) if not count]
    first = [x[0] for x, count in zip(leaves, flags, strict=True) if count]

    def join(slices, indices):
        slices, indices = iter(slices), iter(indices)
        return structure.unflatten([next(indices if count else slices) for count in flags])

    return data, first, join


def step_slice(xs: PyTree, counts: PyTree, t: jax.Array) -> PyTree:
    """The slice of step t, as `jax.tree.map(lambda x: x[t], xs)`."""
    data, first, join = split_steps(xs, counts)
    return join([x[t] for x in data], [i + t.astype(i.dtype) for i in first])


def scan_slices(
    body: Callable, carry: PyTree, xs: PyTree, counts: PyTree, length: int, reverse: bool = False
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan(body, carry, xs, length, reverse)`, with a counter in the place of an array of step indices."""
    data, first, join = split_steps(xs, counts)

    def counted(carry, slices):
        indices, carry = carry
        carry, out = body(carry, join(slices, indices))
        return ([i - 1 if reverse else i + 1 for i in indices], carry), out

    start = [i + (length - 1) for i in first] if reverse else first
    (_, carry), out = jax.lax.scan(counted, (start, carry), data, length, reverse)
    return carry, out


def scan_steps(problem: Problem, schedule: Schedule = Schedule()) -> InnerState:  # noqa: B008
    """Takes all inner steps; the schedule's segments say which values reverse mode stores."""
    advance, inputs, num_steps = problem.advance, problem.inputs, problem.num_steps
    data, first, join = split_steps(problem.xs, problem.counts)
    start = (first, problem.state)

    def body(carry, slices):
        indices, state = carry
        return ([i + 1 for i in indices], advance(state, inputs, join(slices, indices))), None

    k = schedule.segment
    if k is None:
        return jax.lax.scan(body, start, data, num_steps)[0][1]
    # Inside a scan XLA cannot merge a step with its recomputation, so the barriers of `prevent_cse` are not needed. The
    # segment below is also called outside of one.
    stored = jax.checkpoint_policies.save_only_these_names(*([GRADIENT] if schedule.gradients else []))
    step = jax.checkpoint(body, prevent_cse=False, policy=stored)
    if k == 1:
        return jax.lax.scan(step, start, data, num_steps)[0][1]

    # Two levels: one state per segment is stored, the states inside are recomputed.
    def segment(length):
        return jax.checkpoint(lambda carry, data: jax.lax.scan(step, carry, data, length)[0])

    num_segments, rest = divmod(num_steps, k)
    carry = start
    if num_segments:
        whole = segment(k)
        head = [x[: num_segments * k].reshape(num_segments, k, *x.shape[1:]) for x in data]
        carry = jax.lax.scan(lambda s, x: (whole(s, x), None), carry, head, num_segments)[0]
    if rest:
        carry = segment(rest)(carry, [x[num_segments * k :] for x in data])
    return carry[1]


def run(problem: Problem) -> tuple[InnerState, jax.Array]:
    """Runs until `num_steps` or `tol` is reached, with no custom derivative; returns final state and steps taken.

    With `tol`, it ends where ‖residual‖ < tol, and is not reverse-differentiable.
    """
    if problem.tol is None:
        return scan_steps(problem), jnp.asarray(problem.num_steps, jnp.int32)

    def unfinished(carry):
        t, state = carry
        residual = problem.residual(state.params, state.model_state, problem.residual_inputs)
        # `>=` is False for NaN, so the loop ends, and `info.finite` reports it.
        return (t < problem.num_steps) & (norm(residual) >= problem.tol)

    def body(carry):
        t, state = carry
        return t + 1, problem.advance(state, problem.inputs, step_slice(problem.xs, problem.counts, t))

    steps, state = jax.lax.while_loop(unfinished, body, (jnp.asarray(0, jnp.int32), problem.state))
    return state, steps
