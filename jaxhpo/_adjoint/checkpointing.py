"""Which inner states are kept for the backward pass: what a `checkpoint=` argument stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxhpo._adjoint.binomial import least_slots
from jaxhpo._core.cost import bytes_between_passes
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import active
from jaxhpo._core.tree import num_bytes
from jaxhpo._core.types import Schedule
from jaxhpo._inner.problem import Problem

EVERYTHING = Schedule()  # what plain autodiff keeps
MOST_REPEATS = 3  # of a step under "binomial"
MOST_TIMES, LONGEST = 20, 200_000  # that a step is taken for the sake of a memory limit, unless the table stays short
FEW = 16  # steps, or kept gradients, that are not worth saving memory on
LITTLE = 2**24  # nor are 16 MiB, about what a processor caches


class Sizes(NamedTuple):
    """Bytes of what a schedule may keep.

    Attributes:
      state: of an inner state.
      gradient: of the train loss's gradient; 0 where a step is no function of one.
      activations: asked for when needed, as it takes a trace: what the gradient keeps between its two passes.
      residuals: likewise: what plain autodiff keeps of a step; infinite where that has no derivative.
      peak: likewise: `Schedule -> bytes`, what run and backward pass take at their peak.
    """

    state: int
    gradient: int
    activations: Callable[[], int]
    residuals: Callable[[], float]
    peak: Callable[[Schedule], int] = lambda schedule: 0


def sizes_of(problem: Problem, peak: Callable[[Schedule], int]) -> Sizes:
    """The sizes of a problem's step."""
    solver, state, (hparams, closed_over) = problem.solver, problem.state, problem.inputs
    x = jax.tree.map(lambda x: x[0], problem.xs)

    def activations():
        loss: Any = solver.loss
        pure, consts = problem.closure_convert(lambda s, h, batch: loss(s.params, h, batch, s.model_state)[0])
        return bytes_between_passes(lambda p: pure(consts, state._replace(params=p), hparams, x), state.params)

    def residuals():
        try:
            return bytes_between_passes(lambda s, h: problem.advance(s, (h, closed_over), x), state, hparams)
        except (TypeError, ValueError, NotImplementedError):  # a step that has no derivative can be taken all the same
            return math.inf

    gradient = 0 if solver.apply is None else num_bytes(state.params)
    return Sizes(num_bytes(state), gradient, activations if gradient else lambda: 0, residuals, peak)


def choose(checkpoint: int | str | None, num_steps: int, sizes: Sizes, memory_limit: float | None = None) -> Schedule:
    """The schedule that a `checkpoint=` argument stands for.

    With segments of k steps, ⌈T/k⌉ states are kept, and k more, with their gradients g where these are kept, while a
    segment is redone: least at k = √(T state/(state + g)). A kept gradient saves redoing a third of a step's work, and
    its memory is nothing beside the activations of the one step that is being differentiated, unless those are small.
    """
    imposed = active().schedule
    if imposed is not None:
        checkpoint, memory_limit = imposed
    if memory_limit is not None:
        return _cheapest(num_steps, sizes, memory_limit)
    if checkpoint is None or checkpoint == "auto" and _little(num_steps, sizes):
        return EVERYTHING
    if checkpoint == "binomial":
        return Schedule(slots=least_slots(num_steps, MOST_REPEATS))
    if checkpoint == 1 or (checkpoint in ("auto", "sqrt") and num_steps <= FEW):
        return Schedule(1, gradients=True)  # every state, for the sake of time
    if checkpoint == "auto" and num_steps * (sizes.state + sizes.gradient) <= LITTLE:
        return Schedule(1, gradients=True)

    def affordable(segment):
        kept = segment * sizes.gradient
        return segment <= FEW or kept <= LITTLE or kept <= 2 * sizes.activations()

    if not isinstance(checkpoint, str):
        return Schedule(int(checkpoint), affordable(min(checkpoint, num_steps)))
    least = _root(num_steps)
    if checkpoint == "auto":
        with_gradients = _segment(num_steps, sizes)
        least = with_gradients if affordable(with_gradients) else least
    return Schedule(least, affordable(least))


def _little(num_steps, sizes):
    return num_steps * sizes.state <= LITTLE and num_steps * (sizes.state + sizes.residuals()) <= LITTLE


def _root(num_steps):
    return _even(num_steps, math.isqrt(num_steps - 1) + 1)


def _segment(num_steps, sizes):
    """The segments that take the least memory where gradients are kept."""
    return _even(num_steps, max(1, round(math.sqrt(num_steps * sizes.state / (sizes.state + sizes.gradient)))))


def _even(num_steps, segment):
    """The length nearest to this one that leaves no shorter segment, which would be compiled once more.

    A third more or less costs at most 5 % of the memory: (1.35 + 1/1.35) / 2 = 1.05.
    """
    divisors = [k for k in range(1, num_steps + 1) if num_steps % k == 0 and 1 / 1.35 <= k / segment <= 1.35]
    return min(divisors, key=lambda k: abs(math.log(k / segment)), default=segment)


def _cheapest(num_steps, sizes, memory_limit):
    peaks = {}
    for schedule in _by_time(num_steps, sizes):
        peaks[schedule] = sizes.peak(schedule)
        if peaks[schedule] <= memory_limit:
            return schedule
    least = min(peaks, key=peaks.__getitem__)
    raise JaxhpoError(
        f"`Unroll(memory_limit={memory_limit:.3g})`: {num_steps} inner steps and their backward pass take about "
        f"{peaks[least]:.3g} bytes even where what is kept is {describe(least)}. Raise the limit, make the batch "
        "smaller, differentiate fewer steps (`truncate=`), or write `Implicit(CG())`, which stores none."
    )


def _by_time(num_steps: int, sizes: Sizes) -> Iterator[Schedule]:
    """Schedules, the fastest first."""
    yield EVERYTHING
    if sizes.gradient:
        yield Schedule(1, gradients=True)
    yield Schedule(1)
    if num_steps > 2:
        if sizes.gradient:
            yield Schedule(_segment(num_steps, sizes), gradients=True)
        yield Schedule(_root(num_steps))
    slots = num_steps
    for repeats in range(2, min(num_steps, max(MOST_TIMES, LONGEST // num_steps))):
        fewer = least_slots(num_steps, repeats)
        if fewer < min(slots, _root(num_steps)):
            yield Schedule(slots=fewer)
        slots = min(slots, fewer)


def describe(schedule: Schedule) -> str:
    """What a schedule keeps, in words."""
    if schedule.slots is not None:
        return f"{schedule.slots} state{'s' * (schedule.slots > 1)}, by binomial checkpointing"
    if schedule.segment is None:
        return "what plain autodiff keeps of every step"
    if schedule.segment == 1:
        return f"every state{' and gradient' * schedule.gradients}"
    within = " and gradient" if schedule.gradients else ""
    return f"a state every {schedule.segment} steps, and every state{within} of one segment"
