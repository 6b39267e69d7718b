"""Runs of one method on one problem: traced, compiled and run, with its solves and warnings recorded."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhpo._core.cost import available_bytes, human_bytes, temporary_bytes
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import ravel
from jaxhpo._core.processes import AnotherProcessError, agreed, from_first, whole
from jaxhpo._core.record import InnerRun, LinearSolve, SolveLog, recording
from jaxhpo._core.trace import compilable, hoisted
from jaxhpo._core.types import InnerState, LinearStatus, PyTree
from jaxhpo._inner.problem import Adjoint, Problem

CALLS = 6  # of a pair at the same hyperparameters, in which warm starts settle
DRAWS = 8  # of a random method


class Measured(NamedTuple):
    """A method, and what it gave.

    Attributes:
      rule: the method: a derivative rule, or the `gradient` of a pair.
      result: the program's result: of `measure`, the value and the (m,) hypergradient.
      log: the `SolveLog` of the inner solves that were traced.
      linear_solves: the linear solves that were run.
      program: the compiled program, without callbacks that report.
      args: its arguments.
      warnings: the warnings raised while tracing.
      error: the exception raised, in words; the other fields after `rule` are then empty.
      draws: (n, m) hypergradients, with other keys where the method is random; the first is that of `result`.
      first: (m,) the hypergradient of a pair's first call.
    """

    rule: Any
    result: Any = None
    log: Any = None
    linear_solves: tuple[LinearSolve, ...] = ()
    program: Any = None
    args: tuple = ()
    warnings: tuple[Warning, ...] = ()
    error: str | None = None
    draws: Any = None
    first: Any = None


@dataclasses.dataclass(frozen=True)
class Redrawn:
    """A rule with another key than the one given to `solve`, made of that and a number."""

    rule: Adjoint
    number: jax.Array

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the rule."""
        another = lambda rule: jax.random.fold_in(problem.require_key(rule), self.number)  # noqa: E731
        return self.rule.run(problem._replace(require_key=another))


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

    def check(log):
        if rule not in log.adjoints:
            met = f"only with {log.adjoints[0]!r}" if log.adjoints else "not at all"
            raise RuleNotUsed(
                f"`make_outer_loss({rule!r})` returned a function that calls `solve` {met}, so every method would look "
                "the same: pass the argument on, `solve(..., adjoint=adjoint)`."
            )

    return _run(rule, lambda *args: make(rule)(*args), (flat,), SolveLog(runs, schedules=runs), check)


def _run(method, fn, args, log, check=lambda log: None) -> Measured:
    """Traces, compiles and runs `fn(*args)` once; `check(log)` may refuse what was traced."""
    linear_solves = []

    def compiled() -> tuple:
        program, every = hoisted(fn, *args)
        traced = program.trace(*every)
        check(log)
        return compiled_if_it_fits(traced), every, traced.jaxpr.effects

    with recording(linear_solves=linear_solves, solves=log):
        program, every, reports = agreed(compiled)
        result = jax.block_until_ready(program(*every))
    log.runs[:] = [InnerRun(*run) for run in from_first(lambda: log.runs)]  # callbacks report to process 0 alone
    rows = from_first(lambda: linear_solves)
    linear_solves = [LinearSolve(LinearStatus(status), *rest) for status, *rest in rows]
    if reports:  # callbacks, which would be timed too
        with warnings.catch_warnings(action="ignore"):  # already raised above
            program, every, _ = agreed(compiled)
    return Measured(method, result, log, tuple(linear_solves), program, every)


def measure(make_loss: Callable[[Adjoint], Callable], rule: Adjoint, flat: jax.Array) -> Measured:
    """Runs value and gradient of `make_loss(rule)`, a random one several times; an exception becomes the `error`."""

    def run() -> Measured:
        measured = run_once(lambda rule: jax.value_and_grad(make_loss(rule)), rule, flat)
        value, grad = measured.result
        draws = [grad]
        if measured.log.random:

            def drawn(flat, number):
                with recording(rule=lambda given: Redrawn(given, number)):
                    return jax.grad(make_loss(rule))(flat)

            with warnings.catch_warnings(action="ignore"), recording(solves=None):
                program, (*consts, _) = agreed(lambda: compilable(drawn, flat, np.int32(0)))
                draws += [program(*consts, np.int32(number)) for number in range(1, DRAWS)]
        return measured._replace(result=value, draws=draws)

    return _caught(rule, run)


def measure_pair(gradient: Callable, carry: PyTree, hparams: PyTree, key: jax.Array) -> Measured:
    """Calls a pair several times at the same hyperparameters; an exception becomes the `error`.

    Args:
      gradient: `(hparams, carry, key) -> (value, hypergradient, carry, info)`.
      carry: of the first call.
      hparams: where to call it.
      key: for all calls.
    """
    flat, unravel = ravel(hparams)
    keys = jax.random.split(key, CALLS + DRAWS - 1)

    def call(flat, carry, key):
        value, grad, carry, _ = gradient(unravel(flat), carry, key)
        return value, ravel(grad)[0], carry

    def run() -> Measured:
        measured = _run(gradient, call, (flat, carry, keys[0]), SolveLog(schedules=False))
        first, out, consts = measured.result[1], measured.result, measured.args[:-2]
        for key in keys[1:CALLS]:
            before = out[2]
            out = measured.program(*consts, before, key)
        draws = [out[1]]
        for key in keys[CALLS:]:
            draws.append(measured.program(*consts, before, key)[1])
            if bool(whole((draws[-1] == draws[0]).all())):  # nothing is drawn
                draws = draws[:1]
                break
        return measured._replace(result=out[0], args=(*consts, before, key), draws=draws, first=whole(first))

    return _caught(gradient, run)


def _caught(method, run) -> Measured:
    """`run()`, with its warnings, and its results as numbers of this process."""
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            measured = run()
    except (RuleNotUsed, AnotherProcessError):
        raise
    except Exception as error:  # of any kind: the other methods are still compared
        return Measured(method, error=first_words(f"{type(error).__name__}: {error}"))
    draws = np.array([whole(grad) for grad in measured.draws], float)
    messages = tuple(w.message for w in caught if isinstance(w.message, Warning))
    return measured._replace(result=(float(measured.result), draws[0]), draws=draws, warnings=messages)


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
