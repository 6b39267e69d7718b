"""Choice of the inner states that are stored for the backward pass: the meaning of a `checkpoint=` argument."""

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from jaxhpo._adjoint.binomial import least_slots
from jaxhpo._core.cost import SAFE_PART, available_bytes, bytes_between_passes, human_bytes, with_memory
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import active
from jaxhpo._core.tree import num_bytes
from jaxhpo._core.types import Schedule
from jaxhpo._inner.gradient import train_loss_of
from jaxhpo._inner.problem import Problem

EVERYTHING = Schedule()  # all that plain autodiff stores
MAX_REPEATS = 3  # times that a step is taken under "binomial"
# Under a memory limit a step is taken at most MAX_TIMES, unless the table of actions stays below MAX_ACTIONS.
MAX_TIMES, MAX_ACTIONS = 20, 200_000
FEW = 16  # a number of steps, or of stored gradients, for which it is not worth saving memory
LITTLE = 2**24  # bytes for which it is not worth saving memory: 16 MiB, about the cache of a processor
ENOUGH = 2**30  # bytes that the default may take to save time: 1 GiB, on every machine
NO_DERIVATIVE = (TypeError, ValueError, NotImplementedError)  # raised where a step has none; it can be run all the same


class Sizes(NamedTuple):
    """Bytes that a schedule may store for one step. The functions take a trace each, so they are called when needed.

    Attributes:
      state: of an inner state.
      gradient: of the train loss's gradient; 0 for steps that are not a function of one.
      activations: `() -> bytes` that the gradient stores between its two passes.
      residuals: `() -> bytes` that plain autodiff stores; infinite if the step has no derivative.
      cost: `Schedule -> (operations, bytes)` of the run and its backward pass, with the bytes at their peak.
    """

    state: int
    gradient: int
    activations: Callable[[], int]
    residuals: Callable[[], float]
    cost: Callable[[Schedule], tuple[float, int]] = lambda schedule: (0.0, 0)

    def peak(self, schedule: Schedule) -> int:
        """Returns the bytes that the run and its backward pass take at their peak."""
        return self.cost(schedule)[1]

    def measured(self) -> tuple[int, int, int, float]:
        """Returns the bytes of state, gradient, activations and residuals."""
        return self.state, self.gradient, self.activations(), self.residuals()


def sizes_of(problem: Problem, cost: Callable[[Schedule], tuple[float, int]]) -> Sizes:
    """Returns the sizes of a problem's step.

    Args:
      problem: whose step is traced when `activations` or `residuals` are called, and not before.
      cost: as in `Sizes`.
    """
    state, (hparams, closed_over) = problem.state, problem.inputs
    x = jax.tree.map(lambda x: x[0], problem.xs)

    def activations():
        pure, consts = train_loss_of(problem)
        return bytes_between_passes(lambda p: pure(consts, state._replace(params=p), hparams, x), state.params)

    def residuals():
        try:
            return bytes_between_passes(lambda s, h: problem.advance(s, (h, closed_over), x), state, hparams)
        except NO_DERIVATIVE:
            return math.inf

    gradient = 0 if problem.solver.apply is None else num_bytes(state.params)
    return Sizes(num_bytes(state), gradient, activations if gradient else lambda: 0, residuals, cost)


def choose(
    checkpoint: int | str | None, num_steps: int, sizes: Sizes, memory_limit: float | str | None = None
) -> Schedule:
    """Returns the schedule for a `checkpoint=` argument.

    With segments of k steps, ⌈T/k⌉ states are stored, and k more while a segment is recomputed, with their gradients g
    if these are stored: T/k · state + k (state + g), which is least at k = √(T state / (state + g)). A stored gradient
    saves a third of the work of recomputing a step; its memory matters only where the activations of the one step that
    is being differentiated are smaller.

    Args:
      checkpoint: the argument of `Unroll`: None, a segment's length k, "sqrt", "auto" or "binomial".
      num_steps: T.
      sizes: of a step.
      memory_limit: the argument of `Unroll`: bytes, "device", or None; it replaces `checkpoint`.

    Raises:
      JaxhpoError: no schedule stays below the limit; a limit by device on several processes.

    Example:
      >>> sizes = Sizes(state=2**20, gradient=2**20, activations=lambda: 2**24, residuals=lambda: 2.0**24)
      >>> choose("sqrt", 800, sizes)  # k = √(T / 2) = 20
      Schedule(segment=20, gradients=True, slots=None)
    """
    imposed = active().schedule
    if imposed is not None:
        checkpoint, memory_limit = imposed
    if memory_limit is not None:
        return _fastest_or_raise(num_steps, sizes, memory_limit)
    if checkpoint is None or checkpoint in ("auto", "sqrt") and _little(num_steps, sizes):
        return EVERYTHING
    if checkpoint == "auto":
        with contextlib.suppress(*NO_DERIVATIVE):
            found = _fastest_within(num_steps, sizes, ENOUGH)
            if found is not None:
                return _spare_memory(found, num_steps, sizes)
        checkpoint = "sqrt"
    if checkpoint == "binomial":
        return Schedule(slots=least_slots(num_steps, MAX_REPEATS))
    if checkpoint == 1 or (checkpoint == "sqrt" and num_steps <= FEW):
        return Schedule(1, gradients=True)
    if checkpoint == "sqrt" and num_steps * (sizes.state + sizes.gradient) <= LITTLE:
        return Schedule(1, gradients=True)

    def affordable(segment):
        stored = segment * sizes.gradient
        return segment <= FEW or stored <= LITTLE or stored <= 2 * sizes.activations()

    if not isinstance(checkpoint, str):
        return Schedule(int(checkpoint), affordable(min(checkpoint, num_steps)))
    segment = _gradient_segment(num_steps, sizes)
    if not affordable(segment):
        segment = _sqrt_segment(num_steps)
    return Schedule(segment, affordable(segment))


def _little(num_steps, sizes):
    return num_steps * sizes.state <= LITTLE and num_steps * (sizes.state + sizes.residuals()) <= LITTLE


def _sqrt_segment(num_steps):
    """⌈√T⌉, the best length if gradients are not stored."""
    return _even(num_steps, math.isqrt(num_steps - 1) + 1)


def _gradient_segment(num_steps, sizes):
    """√(T state / (state + gradient)), the best length if gradients are stored."""
    return _even(num_steps, max(1, round(math.sqrt(num_steps * sizes.state / (sizes.state + sizes.gradient)))))


def _even(num_steps, segment):
    """The nearest length that divides T: a shorter last segment would be compiled once more.

    A third more or less costs at most 5 % of the memory: (1.35 + 1/1.35) / 2 = 1.05.
    """
    divisors = [k for k in range(1, num_steps + 1) if num_steps % k == 0 and 1 / 1.35 <= k / segment <= 1.35]
    return min(divisors, key=lambda k: abs(math.log(k / segment)), default=segment)


def _fastest_or_raise(num_steps, sizes, memory_limit):
    if memory_limit == "device" and jax.process_count() > 1:
        raise JaxhpoError(
            "`Unroll(memory_limit='device')` lets each of several processes choose by what is free on its own device, "
            "but all must run the same program: write a number of bytes."
        )
    limit = SAFE_PART * available_bytes() if memory_limit == "device" else memory_limit
    found = _fastest_within(num_steps, sizes, limit)
    if found is not None:
        return found
    least = [*_in_segments(num_steps, sizes), *_in_slots(num_steps)][-1]
    given = f"{memory_limit!r})`, {human_bytes(limit)}" if memory_limit == "device" else f"{memory_limit:.3g})`"
    raise JaxhpoError(
        f"`Unroll(memory_limit={given}: {num_steps} inner steps and their backward pass take about "
        f"{sizes.peak(least):.3g} bytes even if what is kept is {describe_schedule(least)}. Raise the limit, make the "
        "batch smaller, differentiate fewer steps (`truncate=`), or write `Implicit(CG())`, which stores no states."
    )


def _fastest_within(num_steps: int, sizes: Sizes, limit: float) -> Schedule | None:
    """The fastest schedule whose peak is within the limit; None if there is none."""

    def fits(schedule):
        return _least_bytes(schedule, num_steps, sizes) <= limit and sizes.peak(schedule) <= limit

    found = next(filter(fits, _in_segments(num_steps, sizes)), None)
    if found is None:  # of the others each keeps less than the one before it
        others = [*_in_slots(num_steps)]
        first = bisect.bisect_left(others, True, key=fits)
        found = others[first] if first < len(others) else None
    return found


def _spare_memory(found: Schedule, num_steps: int, sizes: Sizes) -> Schedule:
    """The least `with_memory` of the schedule found, which has the fewest operations, and those that redo one pass.

    Two levels, which redo two, would on some CPUs save a tenth more; where memory is fast they lose two thirds.
    """

    def cost(schedule):
        return with_memory(*sizes.cost(schedule))

    choices = [s for s in _in_segments(num_steps, sizes) if s.segment in (None, 1)]
    if found not in choices or cost(found) <= 1.1 * sizes.cost(found)[0]:  # the others save less than a tenth
        return found
    return min((s for s in choices if sizes.peak(s) <= ENOUGH), key=cost)


def _least_bytes(schedule, num_steps, sizes):
    """A lower bound of the peak, which takes no trace: the states and gradients that are stored together."""
    if schedule.slots is not None:
        return schedule.slots * sizes.state
    if schedule.segment is None:
        return 0
    kept = sizes.state + sizes.gradient * schedule.gradients
    outside = num_steps // schedule.segment if schedule.segment > 1 else 0
    return outside * sizes.state + min(schedule.segment if outside else num_steps, num_steps) * kept


def _in_segments(num_steps: int, sizes: Sizes) -> Iterator[Schedule]:
    """Yields the schedules without slots, the fastest first."""
    yield EVERYTHING
    if sizes.gradient:
        yield Schedule(1, gradients=True)
    yield Schedule(1)
    if num_steps > 2:
        if sizes.gradient:
            yield Schedule(_gradient_segment(num_steps, sizes), gradients=True)
        yield Schedule(_sqrt_segment(num_steps))


def _in_slots(num_steps: int) -> Iterator[Schedule]:
    """Yields binomial schedules with fewer states than two levels have, the fastest first."""
    slots = num_steps
    for repeats in range(2, min(num_steps, max(MAX_TIMES, MAX_ACTIONS // num_steps))):
        fewer = least_slots(num_steps, repeats)
        if fewer < min(slots, _sqrt_segment(num_steps)):
            yield Schedule(slots=fewer)
        slots = min(slots, fewer)


def describe_schedule(schedule: Schedule) -> str:
    """Returns in words what a schedule stores.

    Args:
      schedule: as `choose` returns it.

    Example:
      >>> describe_schedule(Schedule(segment=20, gradients=True))
      'a state every 20 steps, and every state and gradient of one segment'
    """
    if schedule.slots is not None:
        return f"{schedule.slots} state{'s' * (schedule.slots > 1)}, by binomial checkpointing"
    if schedule.segment is None:
        return "what plain autodiff keeps of every step"
    within = f"every state{' and gradient' * schedule.gradients}"
    return within if schedule.segment == 1 else f"a state every {schedule.segment} steps, and {within} of one segment"
