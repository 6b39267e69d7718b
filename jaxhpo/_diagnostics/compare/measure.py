"""One method on one problem: traced, compiled, run once, and what became known on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhpo._core.cost import available_bytes, temporary_bytes
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import LinearSolve, SolveLog, recording
from jaxhpo._inner.problem import Adjoint


class Measured(NamedTuple):
    """What one run of a method gave.

    Attributes:
      value: the outer loss.
      grad: (m,) the flat hypergradient.
      solves: the iterative linear solves that it ran.
      warnings: what was warned of while tracing.
      program: the compiled `flat -> (value, gradient)`, without anything that reports.
      random: whether the rule asked for a key.
      error: what was raised, in which case the rest is empty.
    """

    value: float = float("nan")
    grad: np.ndarray | None = None
    solves: tuple[LinearSolve, ...] = ()
    warnings: tuple[Warning, ...] = ()
    program: Any = None
    random: bool = False
    error: Exception | None = None


class RuleNotUsed(JaxhpoError):
    """`make_outer_loss` does not pass its argument on: an error of the comparison, not of a method."""


def measure(make_loss: Callable[[Adjoint], Callable], rule: Adjoint, flat: jax.Array) -> Measured:
    """Runs a method once; whatever it raises becomes its `error`.

    Args:
      make_loss: `rule -> (flat hyperparameters -> scalar)`.
      rule: the method.
      flat: (m,) hyperparameters.
    """
    with_grad = lambda rule: jax.value_and_grad(make_loss(rule))  # noqa: E731
    try:
        solves = []
        with warnings.catch_warnings(record=True) as caught, recording(linear_solves=solves):
            warnings.simplefilter("always")
            traced, log = trace(with_grad, rule, flat)
            program = compiled_if_it_fits(traced)
            value, grad = jax.block_until_ready(program(flat))
        if traced.jaxpr.effects:
            program = compiled_if_it_fits(silent_trace(with_grad, rule, flat))
    except RuleNotUsed:
        raise
    except Exception as error:  # of whatever kind: the other methods are still to be compared
        return Measured(error=error)
    messages = tuple(w.message for w in caught if isinstance(w.message, Warning))
    return Measured(float(value), np.asarray(grad, float), tuple(solves), messages, program, bool(log.random))


def trace(make: Callable, rule: Adjoint, flat: jax.Array, runs: bool = False) -> tuple[Any, SolveLog]:
    """Traces `make(rule)` at `flat`, and notes the inner solves met; raises unless the rule got to one of them."""
    log = SolveLog(runs)
    with recording(solves=log):
        traced = jax.jit(make(rule)).trace(flat)
    if rule not in log.adjoints:
        met = f"only with {log.adjoints[0]!r}" if log.adjoints else "not at all"
        raise RuleNotUsed(
            f"`make_outer_loss({rule!r})` returned a function that calls `solve` {met}, so every method would look the "
            "same: pass the argument on, `solve(..., adjoint=adjoint)`."
        )
    return traced, log


def silent_trace(make: Callable, rule: Adjoint, flat: jax.Array) -> Any:
    """Traces `make(rule)` at `flat` with nothing recorded, so that its time is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were met before
        return jax.jit(make(rule)).trace(flat)


def compiled_if_it_fits(traced: Any) -> Any:
    """The compiled program; raises where it asks for more than half of the memory there is."""
    program = traced.lower().compile()
    needed, limit = temporary_bytes(program), available_bytes() / 2
    if needed is not None and needed > limit:
        raise JaxhpoError(
            f"it needs {needed / 2**30:.1f} GiB of temporary memory, more than half of what there is "
            f"({limit / 2**29:.1f} GiB): not run."
        )
    return program
