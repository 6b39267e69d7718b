"""One run of one method on one problem: traced, compiled and run, with its solves and warnings recorded."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxhpo._core.cost import available_bytes, human_bytes, temporary_bytes
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.processes import AnotherProcessError, agreed, from_first, whole
from jaxhpo._core.record import InnerRun, LinearSolve, SolveLog, recording
from jaxhpo._core.trace import hoisted
from jaxhpo._core.types import LinearStatus
from jaxhpo._inner.problem import Adjoint


class Measured(NamedTuple):
    """One run of a method.

    Attributes:
      rule: the method.
      result: the program's result: of `measure`, the value and the (m,) hypergradient.
      log: the `SolveLog` of the inner solves that were traced.
      linear_solves: the linear solves that were run.
      program: the compiled program, without callbacks that report.
      args: its arguments.
      warnings: the warnings raised while tracing.
      error: the exception raised, in words; the other fields after `rule` are then empty.
    """

    rule: Adjoint
    result: Any = None
    log: Any = None
    linear_solves: tuple[LinearSolve, ...] = ()
    program: Any = None
    args: tuple = ()
    warnings: tuple[Warning, ...] = ()
    error: str | None = None


class RuleNotUsed(JaxhpoError):
    """`make_outer_loss` does not pass its argument on: an error of the comparison, not of a method."""


def run_once(make: Callable[[Adjoint], Callable], rule: Adjoint, flat: jax.Array, runs: bool = False) -> Measured:
    """Runs `make(rule)(flat)` once; raises unless the rule reaches an inner solve.

    Args:
      make: `rule -> (flat hyperparameters -> result)`.
      rule: the method.
      flat: (m,) hyperparameters.
      runs: records the condition before and after each inner solve, which costs a gradient, and its schedule.
    """
    linear_solves, log = [], SolveLog(runs, schedules=runs)

    def compiled() -> tuple:
        program, args = hoisted(make(rule), flat)
        traced = program.trace(*args)
        if rule not in log.adjoints:
            met = f"only with {log.adjoints[0]!r}" if log.adjoints else "not at all"
            raise RuleNotUsed(
                f"`make_outer_loss({rule!r})` returned a function that calls `solve` {met}, so every method would look "
                "the same: pass the argument on, `solve(..., adjoint=adjoint)`."
            )
        return compiled_if_it_fits(traced), args, traced.jaxpr.effects

    with recording(linear_solves=linear_solves, solves=log):
        program, args, reports = agreed(compiled)
        result = jax.block_until_ready(program(*args))
    log.runs[:] = [InnerRun(*run) for run in from_first(lambda: log.runs)]  # callbacks report to process 0 alone
    rows = from_first(lambda: linear_solves)
    linear_solves = [LinearSolve(LinearStatus(status), *rest) for status, *rest in rows]
    if reports:  # callbacks, which would be timed too
        with warnings.catch_warnings(action="ignore"):  # already raised above
            program, args, _ = agreed(compiled)
    return Measured(rule, result, log, tuple(linear_solves), program, args)


def measure(make_loss: Callable[[Adjoint], Callable], rule: Adjoint, flat: jax.Array) -> Measured:
    """Runs value and gradient of `make_loss(rule)` once; an exception becomes the `error`."""
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            measured = run_once(lambda rule: jax.value_and_grad(make_loss(rule)), rule, flat)
    except (RuleNotUsed, AnotherProcessError):
        raise
    except Exception as error:  # of any kind: the other methods are still compared
        return Measured(rule, error=first_words(f"{type(error).__name__}: {error}"))
    value, grad = measured.result
    messages = tuple(w.message for w in caught if isinstance(w.message, Warning))
    return measured._replace(result=(float(value), whole(grad).astype(float)), warnings=messages)


def first_words(text: str, limit: int = 300) -> str:
    """The text on one line, cut at a space where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0]} ..."


def compiled_if_it_fits(traced: Any) -> Any:
    """The compiled program; raises where it needs more than half of the available memory."""
    program = traced.lower().compile()
    needed, available = temporary_bytes(program), available_bytes()
    if needed is not None and needed > available / 2:
        raise JaxhpoError(
            f"it needs {human_bytes(needed)} of temporary memory, more than half of the {human_bytes(available)} that "
            "there are: not run."
        )
    return program
