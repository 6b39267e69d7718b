"""What an unrolled hypergradient will take, schedule by schedule, before anything runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.checkpointing import describe_schedule
from jaxhpo._core.cost import available_bytes, count_and_peak, count_arithmetic
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import SolveLog, UnrolledSolve, recording
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_params, check_positive, short_name

CHOICES = (None, 1, "sqrt", "auto", "binomial")
UNKNOWN_LENGTH = 100  # iterations that a loop to a tolerance is counted as


class PlanRow(NamedTuple):
    """One schedule of a `MemoryPlan`.

    Attributes:
      call: how to ask for it.
      bytes: predicted peak of temporary memory.
      time: counted operations of outer loss and hypergradient, in units of the outer loss's alone.
      keeps: what it keeps, in words, for each inner solve.
    """

    call: str
    bytes: int
    time: float
    keeps: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What `memory_plan` found; prints as a table.

    Attributes:
      asked: the row of the outer loss as it is written.
      rows: the rows of all schedules; empty if no solve is differentiated by unrolling.
      limit: bytes that were taken to be available.
      param_bytes: bytes of the largest inner problem's parameters.
      population: hyperparameter vectors that the outer loss takes at once.
      reasons: for each unrolled solve, what its schedule was chosen by.
    """

    asked: PlanRow
    rows: tuple[PlanRow, ...]
    limit: float
    param_bytes: int
    population: int
    reasons: tuple[str, ...]

    @property
    def fitting(self) -> tuple[PlanRow, ...]:
        """The schedules that fit, the fastest first."""
        return tuple(sorted((row for row in self.rows if row.bytes <= self.limit), key=lambda row: row.time))

    def __str__(self) -> str:
        head = f"{'schedule':34} {'memory':>10} {'copies of θ':>12} {'trainings':>10}  keeps"
        lines = [head, *(self._line(row) for row in dict.fromkeys((*self.rows, self.asked)))]
        of = f" for a population of {self.population}" if self.population > 1 else ""
        lines.append(f"As written, {self.asked.call}: {human(self.asked.bytes)} of {human(self.limit)}{of}.")
        return "\n".join([*lines, *self.reasons])

    def _line(self, row):
        fits = "" if row.bytes <= self.limit else "  (does not fit)"
        copies = row.bytes / max(self.param_bytes, 1)
        keeps = "; ".join(dict.fromkeys(row.keeps))
        return f"{row.call:34} {human(row.bytes):>10} {copies:12.1f} {row.time:10.2f}  {keeps}{fits}"


def human(size: float) -> str:
    """Bytes with a unit.

    Example:
      >>> human(2.5 * 2**30)
      '2.50 GiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def memory_plan(
    outer_loss: Callable[[PyTree], jax.Array], hparams: PyTree, *, memory_limit: float | None = None
) -> MemoryPlan:
    """Prints what each checkpoint schedule would take in memory and time; raises if the one asked for cannot fit.

    Nothing is run or compiled: the hypergradient's program is traced once a schedule, the life of each of its arrays
    followed, and its operations counted. The memory is that of intermediate results, beside arguments and results. For
    a population give `jax.vmap(outer_loss)` and stacked hyperparameters: what is traced is what will run.

    **Cost and bias**: six traces (half a minute for a transformer). Where the states stored are at least half of the
    memory, within 20 % of what the compiler allocates, else within a factor of 1.5 (on CPU, for the problems of the
    tests); operations are exact, but for loops to a tolerance, which count as 100 passes.

    Args:
      outer_loss: `hparams -> scalar`, or `-> (N,)` for a population.
      hparams: a pytree of floating-point arrays; shapes alone matter.
      memory_limit: bytes that there are; None asks the device, or the machine.

    Returns:
      A `MemoryPlan`.

    Raises:
      JaxhpoError: what is asked for takes more than there is; says which schedules would fit.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum(jnp.exp(h) * p**2), optax.sgd(0.1, momentum=0.9))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.ones(10_000), h), h, num_steps=1000)
      ...     return jnp.sum((sol.params - 1.0) ** 2)
      >>> plan = jaxhpo.memory_plan(outer_loss, jnp.zeros(10_000))  # doctest: +ELLIPSIS
      schedule ...
      >>> plan.fitting[0].call
      'Unroll(checkpoint=None)'

    References:
      Griewank, Walther. Algorithm 799: Revolve. 2000.
    """
    check_callable("outer_loss", outer_loss, "outer_loss(hparams)", 1)
    hparams = check_params(hparams, "hparams")
    if memory_limit is not None:
        check_positive("memory_limit", memory_limit)
    limit = available_bytes() if memory_limit is None else memory_limit
    shape = jax.eval_shape(outer_loss, hparams)
    if not hasattr(shape, "shape") or len(shape.shape) > 1:
        raise JaxhpoError(
            f"`outer_loss` returned {shape}; it must return one number, or for a population a vector of them: "
            "`memory_plan(jax.vmap(outer_loss), hparams)`."
        )
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise JaxhpoError(
            f"`outer_loss` returned {shape.dtype}, which has no derivative: return a floating-point loss."
        )
    unit = max(count_arithmetic(outer_loss, hparams, unknown_length=UNKNOWN_LENGTH), 1.0)
    asked, log = _row(outer_loss, hparams, shape, unit)
    rows = []
    rules: dict[Any, None] = dict.fromkeys(row.adjoint for row in log.schedules)
    for checkpoint in CHOICES if rules else ():
        if [*rules] == [dataclasses.replace(rule, checkpoint=checkpoint, memory_limit=None) for rule in rules]:
            rows.append(asked)
            continue
        calls = [short_name(dataclasses.replace(rule, checkpoint=checkpoint, memory_limit=None)) for rule in rules]
        with recording(schedule=(checkpoint, None)):
            rows.append(_row(outer_loss, hparams, shape, unit, ", ".join(dict.fromkeys(calls)))[0])
    if rules and all(row.bytes > limit for row in (asked, *rows)):
        rows += _within(outer_loss, hparams, shape, unit, rules, limit)
    population = shape.shape[0] if shape.shape else 1
    reasons = tuple(dict.fromkeys(map(_reason, log.schedules)))
    plan = MemoryPlan(asked, tuple(rows), limit, log.param_bytes, population, reasons)
    print(plan)
    if asked.bytes > limit:
        raise JaxhpoError(_too_much(plan))
    return plan


def _row(outer_loss, hparams, shape, unit, call=None) -> tuple[PlanRow, SolveLog]:
    def with_grad(hparams):
        value, pullback = jax.vjp(outer_loss, hparams)
        return value, pullback(jnp.ones(shape.shape, shape.dtype))

    log = SolveLog()
    with warnings.catch_warnings(), recording(solves=log):
        warnings.simplefilter("ignore")  # they are for the run
        operations, peak = count_and_peak(with_grad, hparams, unknown_length=UNKNOWN_LENGTH)
    call = call or ", ".join(dict.fromkeys(map(short_name, log.adjoints))) or "no solve"
    return PlanRow(call, peak, operations / unit, tuple(describe_schedule(row.schedule) for row in log.schedules)), log


def _within(outer_loss, hparams, shape, unit, rules, limit) -> list[PlanRow]:
    """The row of `memory_limit`, which knows more schedules, if one of them fits."""
    calls = [short_name(dataclasses.replace(rule, checkpoint="auto", memory_limit=limit)) for rule in rules]
    try:
        with recording(schedule=("auto", limit)):
            return [_row(outer_loss, hparams, shape, unit, ", ".join(dict.fromkeys(calls)))[0]]
    except JaxhpoError:  # none does
        return []


def _reason(row: UnrolledSolve) -> str:
    steps = row.num_steps
    text = (
        f"{short_name(row.adjoint)} keeps {describe_schedule(row.schedule)}: a state is {human(row.state)}, {steps} of "
        f"them {human(steps * row.state)}, with all that plain autodiff may keep at most "
        f"{human(steps * (row.state + row.residuals))}"
    )
    if row.gradient:
        text += f"; a gradient is {human(row.gradient)}, the activations of a step {human(row.activations)}"
    return text + "."


def _too_much(plan) -> str:
    needs = f"`{plan.asked.call}` takes about {human(plan.asked.bytes)}, and there are {human(plan.limit)}."
    if plan.fitting:
        calls = ", ".join(f"`{row.call}` ({human(row.bytes)}, {row.time:.2f} trainings)" for row in plan.fitting)
        return f"{needs} What would fit: {calls}."
    return (
        f"{needs} No schedule fits: make the batch or the population smaller, differentiate fewer steps "
        "(`Unroll(truncate=...)`), run momentum backwards (`Reversible()`), or write `Implicit(CG())`, which stores "
        "none."
    )
