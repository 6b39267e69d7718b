"""What is seen while a program runs: how inner and linear solves ended, and where a NaN began."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._tree import is_inexact, names, norm
from jaxhpo._types import Adjoint, Info, LinearInfo, LinearStatus, Problem, PyTree, Schedule

_linear_solves: contextvars.ContextVar[list | None] = contextvars.ContextVar("linear_solves", default=None)
_solves: contextvars.ContextVar[SolveLog | None] = contextvars.ContextVar("solves", default=None)
_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


class Recorder:
    """Collects which leaves were not finite: `(inner problem, inner step, name)`, forward and backward."""

    def __init__(self):
        self.num_problems = 0
        self.forward: set[tuple[int, int, str]] = set()
        self.backward: set[tuple[int, int, str]] = set()
        self.arriving: set[tuple[int, int, str]] = set()  # cotangents of a step's result
        self.faults: list[str] = []  # what derivative rules know to be wrong


class LinearSolve(NamedTuple):
    """One linear solve that was run, as in `LinearInfo`."""

    status: LinearStatus
    residual: float
    num_iterations: int


@contextlib.contextmanager
def recording_linear_solves() -> Iterator[list[LinearSolve]]:
    """While active, every linear solve that is traced reports to the list when it runs."""
    solves: list[LinearSolve] = []
    token = _linear_solves.set(solves)
    try:
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


class SolveLog:
    """What `recording_solves` collects.

    Attributes:
      adjoints: the rule of every solve that was traced.
      params: the parameters of the largest inner problem traced, without values.
      symmetric: whether every condition's Jacobian is symmetric.
      runs: an `InnerRun` for every solve that was run; empty unless asked for.
      schedules: an `UnrolledSolve` for every solve that keeps states.
      num_steps: inner steps of all solves that were traced, at most.
    """

    def __init__(self, runs: bool, schedules: bool):
        self.wants_runs, self.wants_schedules = runs, schedules
        self.adjoints: list[Adjoint] = []
        self.params: PyTree = None
        self.symmetric = True
        self.runs: list[InnerRun] = []
        self.schedules: list[UnrolledSolve] = []
        self.num_steps = 0

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
        yield log
        jax.effects_barrier()
    finally:
        _solves.reset(token)


def report_schedule(make_row: Callable[[], UnrolledSolve]) -> None:
    """Reports to `recording_solves`, where that is active."""
    log = _solves.get()
    if log is not None and log.wants_schedules:
        log.schedules.append(make_row())


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


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """While active, every `solve` that is traced reports to the recorder."""
    recorder = Recorder()
    token = _recorder.set(recorder)
    jax.clear_caches()  # functions that the user jitted must be traced again, now and afterwards
    try:
        yield recorder
        jax.effects_barrier()
    finally:
        _recorder.reset(token)
        jax.clear_caches()


def watched(problem: Problem) -> Problem:
    """The problem itself, or, while recording, one whose steps report."""
    recorder = _recorder.get()
    if recorder is None:
        return problem
    index = recorder.num_problems
    recorder.num_problems += 1

    def advance(state: Any, inputs, x):
        t, x = x
        state = _report(_Tap(recorder, index, names(state, "state"), forward=False), state, t)
        hparams = _report(_Tap(recorder, index, names(inputs[0], "hparams"), forward=False), inputs[0], t)
        after = problem.advance(state, (hparams, *inputs[1:]), x)
        return _report(_Tap(recorder, index, names(after, "state")), after, t)

    def hoist(fn, *more):
        pure, consts = problem.hoist(fn, *more)
        return lambda consts, state, hparams, x, *more: pure(consts, state, hparams, x[1], *more), consts

    return problem._replace(advance=advance, xs=(jnp.arange(problem.num_steps), problem.xs), hoist=hoist)


def report_fault(happened: jax.Array, text: str, **values: Any) -> None:
    """Tells the recorder, where one is active, of a NaN that a derivative rule gave on purpose, and why."""
    recorder = _recorder.get()
    if recorder is not None:

        def tell(happened, values):
            if happened:
                recorder.faults.append(text.format(**{name: x.item() for name, x in values.items()}))

        jax.debug.callback(tell, happened, jax.tree.map(jnp.asarray, values))


def diagnose(fn: Callable, hparams: PyTree) -> str:
    """Runs `jax.value_and_grad(fn)(hparams)` with every inner step reporting; says in words where a NaN began."""
    with recording() as recorder:
        value, _ = jax.block_until_ready(jax.value_and_grad(fn)(hparams))
    return explain(recorder, bool(jnp.isfinite(value)))


def explain(recorder: Recorder, value_is_finite: bool) -> str:
    """The first inner step that went wrong, the leaves, the likeliest cause and its remedy."""
    if recorder.faults:
        return recorder.faults[0]
    if recorder.forward:
        index, step, _ = min(recorder.forward, key=lambda e: (e[1], e[0]))
        leaves = sorted(name for i, t, name in recorder.forward if (i, t) == (index, step))
        return (
            f"{_which(recorder, index)}`{_first(leaves, 'state.params')}` is not finite after inner step {step}: the "
            f"inner run diverges. The likeliest cause is an inner learning rate above 2 / curvature, where a penalty "
            f"in the train loss adds to the curvature: lower the rate, bound the penalty, or clip the inner gradients."
        )
    # The backward pass meets the last step first; what already arrives there broken was broken by the outer loss.
    broken = {(i, t) for i, t, _ in recorder.backward} - {(i, t) for i, t, _ in recorder.arriving}
    if broken and value_is_finite:
        index, step = max(broken, key=lambda e: (e[1], -e[0]))
        leaves = sorted(name for i, t, name in recorder.backward if (i, t) == (index, step))
        return (
            f"{_which(recorder, index)}The inner run is finite, but the derivative of inner step {step} with respect "
            f"to `{_first(leaves, 'state.opt_state')}` is not. The likeliest cause is a square root at zero, whose "
            f"derivative is infinite (Adam, RMSProp, Adagrad, a norm): write `optax.adam(..., eps_root=1e-8)`, or "
            f"`sqrt(x + eps)`."
        )
    return (
        "No inner step is at fault, so the outer loss itself, or the linear solve of an implicit rule, is: look for a "
        "logarithm or a square root at zero, or an overflow, in the outer loss, or raise the solver's `damping`."
    )


def _which(recorder, index) -> str:
    return f"Inner problem {index}: " if recorder.num_problems > 1 else ""


def _first(leaves, preferred) -> str:
    return next((name for name in leaves if name.startswith(preferred)), leaves[0])


class _Tap:
    """Says to whom a leaf's state is reported, and in which direction."""

    def __init__(self, recorder, index, leaf_names, forward=True):
        self.names = leaf_names
        self.forward = functools.partial(self._record, recorder.forward, index) if forward else None
        behind = recorder.arriving if forward else recorder.backward
        self.backward = functools.partial(self._record, behind, index)

    def _record(self, events, index, step, finite):
        events.update((index, int(step), name) for name, ok in zip(self.names, finite, strict=True) if not ok)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _report(tap, tree, step):
    if tap.forward:
        jax.debug.callback(tap.forward, step, _finite(tree))
    return tree


def _report_fwd(tap, tree, step):
    return _report(tap, tree, step), step


def _report_bwd(tap, step, cotangent):
    jax.debug.callback(tap.backward, step, _finite(cotangent))
    return cotangent, None


_report.defvjp(_report_fwd, _report_bwd)


def _finite(tree):
    ok = [jnp.all(jnp.isfinite(x)) if is_inexact(x) else jnp.asarray(True) for x in jax.tree.leaves(tree)]
    return jnp.stack(ok) if ok else jnp.ones((0,), bool)
