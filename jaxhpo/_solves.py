"""What is seen of inner and linear solves while a program runs: how many there are, and how they ended."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxhpo._tree import norm
from jaxhpo._types import Adjoint, Info, LinearInfo, LinearStatus, Problem, PyTree, Schedule

_recordings = itertools.count()
_linear_solves: contextvars.ContextVar[list | None] = contextvars.ContextVar("linear_solves", default=None)
_solves: contextvars.ContextVar[SolveLog | None] = contextvars.ContextVar("solves", default=None)


class LinearSolve(NamedTuple):
    """One linear solve that was run, as in `LinearInfo`."""

    status: LinearStatus
    residual: float
    num_iterations: int


@contextlib.contextmanager
def traced_anew() -> Iterator[None]:
    """While active, functions that the user jitted are traced as if never before, and what is traced is used only here.

    Metadata are a part of the key by which JAX finds what it has traced.
    """
    with set_xla_metadata(jaxhpo_recording=str(next(_recordings))):
        yield


@contextlib.contextmanager
def recording_linear_solves() -> Iterator[list[LinearSolve]]:
    """While active, every linear solve that is traced reports to the list when it runs."""
    solves: list[LinearSolve] = []
    token = _linear_solves.set(solves)
    try:
        with traced_anew():
            yield solves
        jax.effects_barrier()
    finally:
        _linear_solves.reset(token)


def report_linear_solve(info: LinearInfo) -> None:
    """Reports to `recording_linear_solves`, where that is active."""
    solves = _linear_solves.get()
    if solves is not None:
        jax.debug.callback(
            lambda status, *rest: solves.append(LinearSolve(LinearStatus(int(status)), float(rest[0]), int(rest[1]))),
            info.status,
            info.residual,
            info.num_iterations,
        )


class InnerRun(NamedTuple):
    """One inner solve that was run.

    Attributes:
      num_steps: inner steps taken.
      start: norm of the condition at the initial state.
      end: the same at the solution, `info.optimality`.
    """

    num_steps: int
    start: float
    end: float


class UnrolledSolve(NamedTuple):
    """One solve that was traced by a rule which keeps states; sizes in bytes, of one step.

    Attributes:
      adjoint: the rule.
      num_steps: inner steps.
      schedule: what is kept.
      state: of the inner state.
      gradient: of the train loss's gradient; 0 where a step is no function of one.
      activations: what the gradient keeps between its two passes.
      residuals: what plain autodiff keeps beside the state.
    """

    adjoint: Adjoint
    num_steps: int
    schedule: Schedule
    state: int
    gradient: int
    activations: int
    residuals: float

    @classmethod
    def of(cls, adjoint: Adjoint, num_steps: int, schedule: Schedule, sizes: Any) -> UnrolledSolve:
        """The row of a solve whose step has these `Sizes`."""
        return cls(adjoint, num_steps, schedule, sizes.state, sizes.gradient, sizes.activations(), sizes.residuals())


class SolveLog:
    """What `recording_solves` collects.

    Attributes:
      adjoints: the rule of every solve that was traced.
      params: the parameters of the largest inner problem traced, without values.
      symmetric: whether every condition's Jacobian is symmetric.
      runs: an `InnerRun` for every solve that was run; empty unless asked for.
      schedules: an `UnrolledSolve` for every solve that keeps states.
      num_steps: inner steps of all solves that were traced, at most.
      random: the rules that asked for a key.
    """

    def __init__(self, runs: bool, schedules: bool):
        self.wants_runs, self.wants_schedules = runs, schedules
        self.adjoints: list[Adjoint] = []
        self.params: PyTree = None
        self.symmetric = True
        self.runs: list[InnerRun] = []
        self.schedules: list[UnrolledSolve] = []
        self.num_steps = 0
        self.random: list[Adjoint] = []

    @property
    def param_bytes(self) -> int:
        """Bytes of the largest inner problem's parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    @property
    def num_params(self) -> int:
        """Numbers in the largest inner problem's parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


@contextlib.contextmanager
def recording_solves(runs: bool = False, schedules: bool = True) -> Iterator[SolveLog]:
    """While active, every `solve` that is traced is noted, and with `runs` it reports when it runs.

    `schedules`, which take further traces, may be left out.
    """
    log = SolveLog(runs, schedules)
    token = _solves.set(log)
    try:
        with traced_anew():
            yield log
        jax.effects_barrier()
    finally:
        _solves.reset(token)


def report_schedule(make_row: Callable[[], UnrolledSolve]) -> None:
    """Reports to `recording_solves`, where that is active."""
    log = _solves.get()
    if log is not None and log.wants_schedules:
        log.schedules.append(make_row())


def report_random(rule: Adjoint) -> None:
    """Reports to `recording_solves`, where that is active, that a rule draws random numbers."""
    log = _solves.get()
    if log is not None:
        log.random.append(rule)


def report_solve(problem: Problem, adjoint: Adjoint, info: Info) -> None:
    """Reports to `recording_solves`, where that is active."""
    log = _solves.get()
    if log is None:
        return
    log.adjoints.append(adjoint)
    log.num_steps += problem.num_steps
    log.symmetric &= problem.solver.symmetric
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem.state.params)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (log.params, params)]
    log.params = params if sizes[1] > sizes[0] else log.params
    if log.wants_runs:
        state, inputs = jax.lax.stop_gradient((problem.state, problem.residual_inputs))
        start = norm(problem.residual(state.params, state.model_state, inputs))
        jax.debug.callback(
            lambda steps, *norms: log.runs.append(InnerRun(int(steps), *map(float, norms))),
            info.num_steps,
            start,
            info.optimality,
        )
