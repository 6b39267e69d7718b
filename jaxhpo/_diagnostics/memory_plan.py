"""`memory_plan`: predicted memory and time of an unrolled hypergradient under each checkpoint schedule."""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.checkpointing import describe_schedule
from jaxhpo._core.cost import (
    SAFE_PART,
    UNKNOWN_LENGTH,
    available_bytes,
    count_and_peak,
    count_arithmetic,
    human_bytes,
    with_memory,
)
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.processes import exchange, together
from jaxhpo._core.progress import write
from jaxhpo._core.record import SolveLog, UnrolledSolve, recording
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_hparams, check_positive, short_name

_MORE_ARGUMENTS = ", or of more arguments give `lambda hparams: outer_loss(hparams, carry, key)[0]`"
CHOICES = (None, 1, "sqrt", "auto", "binomial")


class PlanRow(NamedTuple):
    """One schedule of a `MemoryPlan`.

    Attributes:
      call: the rule, as written in code.
      bytes: predicted peak of temporary memory.
      time: counted operations of outer loss and hypergradient, in units of the outer loss's alone.
      cost: the same, with 64 operations more for every byte beyond 32 MiB, as memory is slow.
      keeps: what it keeps, in words, for each inner solve.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum(h * p**2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(10_000), h), h, num_steps=1000).params)
      >>> plan = jaxhpo.memory_plan(outer_loss, jnp.ones(10_000))  # doctest: +ELLIPSIS
      schedule ...
      >>> plan.fitting[0].call, plan.fitting[0].bytes < plan.asked.bytes
      ("Unroll(checkpoint='sqrt')", True)
    """

    call: str
    bytes: int
    time: float
    cost: float
    keeps: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The result of `memory_plan`; prints as a table.

    Attributes:
      asked: the row of the outer loss as it is written.
      rows: the rows of all schedules; empty if no solve is differentiated by unrolling.
      limit: bytes taken to be available.
      param_bytes: bytes of the largest inner problem's parameters.
      population: hyperparameter vectors that the outer loss takes at once.
      reasons: for each unrolled solve, the sizes by which its schedule was chosen.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum(h * p**2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(10_000), h), h, num_steps=1000).params)
      >>> plan = jaxhpo.memory_plan(outer_loss, jnp.ones(10_000))  # doctest: +ELLIPSIS
      schedule ...
      >>> print(plan.advice)  # doctest: +ELLIPSIS
      On this machine write `Unroll(checkpoint='sqrt')`: ... trainings instead of ..., in ... of memory instead of ...
    """

    asked: PlanRow
    rows: tuple[PlanRow, ...]
    limit: float
    param_bytes: int
    population: int
    reasons: tuple[str, ...]

    @property
    def advice(self) -> str:
        """The schedule to write on this machine: of least cost, with a fifth of the memory left; and what it gains."""
        asked, limit = self.asked, SAFE_PART * self.limit
        fitting = [row for row in self.fitting if row.bytes <= limit]
        if not self.rows:
            return "No solve keeps states, so there is no schedule to choose."
        if not fitting:
            return f"No schedule fits into {human_bytes(limit)}, four fifths of that."
        best, fewest = fitting[0], min(fitting, key=lambda row: row.time)
        if asked.bytes <= limit and asked.cost <= 1.05 * best.cost:
            best, text = asked, f"On this machine `{asked.call}` has the least cost of what fits: leave it as it is."
        else:
            text = (
                f"On this machine write `{best.call}`: {best.time:.2f} trainings instead of {asked.time:.2f} "
                f"({_change(best, asked)}), in {human_bytes(best.bytes)} of memory instead of "
                f"{human_bytes(asked.bytes)}."
            )
        if fewest.time <= 0.95 * best.time:
            text += (
                f" `{fewest.call}` takes {_change(fewest, best)} and {human_bytes(fewest.bytes)}, and is often slower "
                "on a CPU, where memory is slow: `compare` measures that."
            )
        return text

    @property
    def fitting(self) -> tuple[PlanRow, ...]:
        """The schedules that fit, that of least cost first."""
        return tuple(sorted((row for row in self.rows if row.bytes <= self.limit), key=lambda row: row.cost))

    def __str__(self) -> str:
        lines = [f"{'schedule':34} {'memory':>10} {'param copies':>12} {'trainings':>10}  keeps"]
        for row in dict.fromkeys((*self.rows, self.asked)):
            copies = row.bytes / max(self.param_bytes, 1)
            fits = "" if row.bytes <= self.limit else "  (does not fit)"
            numbers = f"{human_bytes(row.bytes):>10} {copies:12.1f} {row.time:10.2f}"
            lines.append(f"{row.call:34} {numbers}  {'; '.join(dict.fromkeys(row.keeps))}{fits}")
        of = f" for a population of {self.population}" if self.population > 1 else ""
        used, limit = human_bytes(self.asked.bytes), human_bytes(self.limit)
        return "\n".join([*lines, f"As written, {self.asked.call}: {used} of {limit}{of}.", *self.reasons, self.advice])


@together()
def memory_plan(
    outer_loss: Callable[[PyTree], jax.Array], hparams: PyTree, *, memory_limit: float | None = None
) -> MemoryPlan:
    """Prints what each checkpoint schedule takes, and which to write here; raises if the one asked for cannot fit.

    Nothing is run or compiled: the hypergradient's program is traced once per schedule, the life of each of its arrays
    followed, and its operations counted. The memory is that of intermediate results, without arguments and results. For
    a population give `jax.vmap(outer_loss)` and stacked hyperparameters: the program traced is the one that will run.

    **Cost and bias**: six traces (half a minute for a transformer). Where the stored states are at least half of the
    memory, the prediction is within 20 % of what the compiler allocates, else within a factor of 1.5 (on CPU, for the
    problems of the tests); operations are exact, except for loops to a tolerance, which count as 100 passes. They are
    not seconds, for memory is slow: the last sentence, and the order of `fitting`, take a byte beyond the first 32 MiB
    for 64 operations, as `Unroll()` does. `compare` measures.

    Args:
      outer_loss: `hparams -> scalar`, or `-> (N,)` for a population.
      hparams: a pytree of floating-point arrays; only shapes matter.
      memory_limit: bytes available; None asks what the device, or the machine, has free. The schedule that the last
        sentence names leaves a fifth of them free.

    Returns:
      A `MemoryPlan`.

    Raises:
      JaxhpoError: the schedule asked for takes more memory than there is; names the schedules that would fit.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum(jnp.exp(h) * p**2), optax.sgd(0.1, momentum=0.9))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.ones(10_000), h), h, num_steps=1000)
      ...     return jnp.sum((sol.params - 1.0) ** 2)
      >>> plan = jaxhpo.memory_plan(outer_loss, jnp.zeros(10_000))  # doctest: +ELLIPSIS
      schedule ...
      >>> plan.fitting[0].call
      "Unroll(checkpoint='sqrt')"

    References:
      Griewank, Walther. Algorithm 799: Revolve. 2000.
    """
    check_callable("outer_loss", outer_loss, "outer_loss(hparams)", 1, _MORE_ARGUMENTS)
    hparams = check_hparams(hparams)
    if memory_limit is not None:
        check_positive("memory_limit", memory_limit)
    limit = min(exchange(available_bytes())) if memory_limit is None else memory_limit
    shape = jax.eval_shape(outer_loss, hparams)
    if not isinstance(shape, jax.ShapeDtypeStruct) or len(shape.shape) > 1:
        raise JaxhpoError(
            f"`outer_loss` returned {shape}; it must return one number, or for a population a vector of them: "
            "`memory_plan(jax.vmap(outer_loss), hparams)`."
        )
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise JaxhpoError(f"`outer_loss` returned {shape.dtype}, which has no derivative: return floating point.")

    def with_grad(hparams):
        value, pullback = jax.vjp(outer_loss, hparams)
        return value, pullback(jnp.ones(shape.shape, shape.dtype))

    training = max(count_arithmetic(outer_loss, hparams, unknown_length=UNKNOWN_LENGTH), 1.0)
    asked, log = _row(with_grad, hparams, training)
    unrolled: list[Any] = [*dict.fromkeys(row.adjoint for row in log.schedules)]

    def row_of(checkpoint, memory_limit=None) -> PlanRow:
        rules = [dataclasses.replace(rule, checkpoint=checkpoint, memory_limit=memory_limit) for rule in unrolled]
        return asked if rules == unrolled else _row(with_grad, hparams, training, rules, (checkpoint, memory_limit))[0]

    rows = [row_of(checkpoint) for checkpoint in CHOICES if unrolled]
    if unrolled and all(row.bytes > limit for row in (asked, *rows)):
        with contextlib.suppress(JaxhpoError):  # a limit has more schedules to choose from; none of them may fit
            rows.append(row_of("auto", limit))
    population = shape.shape[0] if shape.shape else 1
    reasons = tuple(dict.fromkeys(map(_reason, log.schedules)))
    plan = MemoryPlan(asked, tuple(rows), limit, log.param_bytes, population, reasons)
    write(str(plan), sys.stdout)
    if asked.bytes > limit:
        raise JaxhpoError(_does_not_fit(plan))
    return plan


def _row(with_grad, hparams, training, rules: Iterable = (), schedule: Any = None) -> tuple[PlanRow, SolveLog]:
    """The row of a program whose solves take `schedule` as if by `rules`, or, by default, what they ask for."""
    log = SolveLog()
    with warnings.catch_warnings(action="ignore"), recording(solves=log, schedule=schedule):  # the run will warn
        operations, peak = count_and_peak(with_grad, hparams, unknown_length=UNKNOWN_LENGTH)
    call = ", ".join(dict.fromkeys(map(short_name, rules or log.adjoints))) or "no solve"
    keeps = tuple(describe_schedule(row.schedule) for row in log.schedules)
    return PlanRow(call, peak, operations / training, with_memory(operations, peak) / training, keeps), log


def _change(row: PlanRow, other: PlanRow) -> str:
    ratio = row.time / other.time
    return f"{abs(1 - ratio):.0%} {'fewer' if ratio < 1 else 'more'} operations"


def _reason(row: UnrolledSolve) -> str:
    steps = row.num_steps
    text = (
        f"{short_name(row.adjoint)} keeps {describe_schedule(row.schedule)}: a state is {human_bytes(row.state)}, "
        f"{steps} of them {human_bytes(steps * row.state)}; plain autodiff may keep at most "
        f"{human_bytes(steps * (row.state + row.residuals))}"
    )
    if row.gradient:
        text += f"; a gradient is {human_bytes(row.gradient)}, the activations of a step {human_bytes(row.activations)}"
    return f"{text}."


def _does_not_fit(plan) -> str:
    text = f"`{plan.asked.call}` takes about {human_bytes(plan.asked.bytes)}, and there are {human_bytes(plan.limit)}."
    if plan.fitting:
        calls = (f"`{row.call}` ({human_bytes(row.bytes)}, {row.time:.2f} trainings)" for row in plan.fitting)
        return f"{text} What would fit: {', '.join(calls)}."
    return (
        f"{text} No schedule fits: make the batch or the population smaller, differentiate fewer steps "
        "(`Unroll(truncate=...)`), run momentum backwards (`Reversible()`), or write `Implicit(CG())`, which stores "
        "no states."
    )
