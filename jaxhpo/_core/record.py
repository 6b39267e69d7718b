"""Reports of the solves in a program: what was traced, and how each solve ended when it ran.

What is active lives in one context variable, and ends with its `with` block. Inside such a block JAX traces anew what
the user jitted before, and what it traces there is used nowhere else: no trace is left behind in JAX's caches.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from jaxhpo._core.tree import norm, num_bytes
from jaxhpo._core.types import Info, LinearInfo, LinearStatus, PyTree, Schedule


class LinearSolve(NamedTuple):
    """One linear solve that was run, as in `LinearInfo`."""

    status: LinearStatus
    residual: float
    num_iterations: int


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
      residuals: what plain autodiff keeps in addition to the state.
    """

    adjoint: Any
    num_steps: int
    schedule: Schedule
    state: int
    gradient: int
    activations: int
    residuals: float


class SolveLog:
    """The solves that were traced.

    Attributes:
      wants_runs: whether each solve is to report when it runs, which costs a gradient.
      wants_schedules: whether schedules are wanted, which take further traces.
      wants_distances: whether each solution given to `implicit` is to report when it is used, by one more linear solve.
      adjoints: the rule of every solve.
      roots: calls of `implicit`.
      distances: the relative length of Newton's step from the solution, for every call that was run.
      random: the rules that asked for a key.
      num_steps: inner steps of all solves, at most.
      longest: those of the longest solve.
      symmetric: whether every condition's Jacobian is symmetric.
      truncated: whether a linear solver takes a fixed number of terms, so that it has no tolerance to end at.
      params: the parameters of the largest inner problem, without values.
      runs: an `InnerRun` for every solve that was run.
      schedules: an `UnrolledSolve` for every solve that keeps states.
    """

    def __init__(self, runs: bool = False, schedules: bool = True, distances: bool = False):
        self.wants_runs, self.wants_schedules, self.wants_distances = runs, schedules, distances
        self.adjoints: list[Any] = []
        self.roots = 0
        self.distances: list[float] = []
        self.random: list[Any] = []
        self.num_steps = self.longest = 0
        self.symmetric = True
        self.truncated = False
        self.params: PyTree = None
        self.runs: list[InnerRun] = []
        self.schedules: list[UnrolledSolve] = []

    @property
    def param_bytes(self) -> int:
        """Bytes of the largest inner problem's parameters."""
        return num_bytes(self.params)

    @property
    def num_params(self) -> int:
        """Numbers in the largest inner problem's parameters."""
        return _size(self.params)


class StepLog:
    """Values of inner steps that are not finite: `(inner problem, inner step, name)` -> position in order of arrival.

    Attributes:
      num_problems: inner problems that were traced.
      before: leaves of a step's inputs.
      forward: leaves of its result, or the train loss.
      backward: cotangents of its inputs.
      arriving: cotangents of its result.
      faults: explanations of derivative rules that gave NaN on purpose.
      first: state, inputs and batch of a run's first step, by inner problem.
      broken: state and batch of the first step whose result is not finite, by inner problem.
      advance: the step, by inner problem.
    """

    def __init__(self):
        self.num_problems = 0
        self.before: dict[tuple[int, int, str], int] = {}
        self.forward: dict[tuple[int, int, str], int] = {}
        self.backward: dict[tuple[int, int, str], int] = {}
        self.arriving: dict[tuple[int, int, str], int] = {}
        self.faults: list[str] = []
        self.first: dict[int, tuple] = {}
        self.broken: dict[int, tuple] = {}
        self.advance: dict[int, Callable] = {}
        self.arrivals = itertools.count()


class Recording(NamedTuple):
    """The collections to which traced solves report; None for what is not wanted.

    Attributes:
      linear_solves: the `LinearSolve`s that are run.
      solves: the solves that are traced.
      steps: what is not finite in inner steps.
      schedule: `(checkpoint, memory_limit)` that every unrolled solve takes, whatever it asked for.
      rule: the derivative rule that a solve takes in the place of the one that it asked for, as a function of that.
      prints: whether linear solves are printed as they run, and distances.
    """

    linear_solves: list[LinearSolve] | None = None
    solves: SolveLog | None = None
    steps: StepLog | None = None
    schedule: tuple[int | str | None, float | None] | None = None
    rule: Callable[[Any], Any] = lambda rule: rule
    prints: bool = False


_active: contextvars.ContextVar[Recording] = contextvars.ContextVar("jaxhpo_recording", default=Recording())  # noqa: B039


def active() -> Recording:
    """Returns what is being recorded."""
    return _active.get()


@contextlib.contextmanager
def recording(**parts: Any) -> Iterator[None]:
    """While active, solves that are traced report to `parts`, the fields of `Recording`."""
    token = _active.set(_active.get()._replace(**parts))
    try:
        with traced_anew():
            yield
        jax.effects_barrier()
    finally:
        _active.reset(token)


@contextlib.contextmanager
def traced_anew() -> Iterator[None]:
    """While active, jitted functions are traced as if never before, and what is traced is used only here.

    Metadata are a part of the key by which JAX finds what it has traced.
    """
    with set_xla_metadata(jaxhpo_recording=_Itself("on")):
        yield


class _Itself(str):
    """A word that equals itself alone: a key of its own, but the same text in programs, as JAX's disk cache needs."""

    __eq__, __ne__, __hash__ = object.__eq__, object.__ne__, object.__hash__


@contextlib.contextmanager
def debug_solves() -> Iterator[None]:
    """Prints the linear solves of implicit rules as they run: status, relative residual, products.

    Of a solution given to `implicit` also the relative length of Newton's step from it, which takes one more solve.

    For a hypergradient that is NaN, or not trusted: under `jax.grad` the report of a linear solve reaches nobody
    otherwise. A pair has it in `info.linear`, and so has the history of `tune` with that pair; `check_hypergradient`
    has it in `linear_statuses`, and any history of `tune(record="linear_solves")`.

    **Cost and bias**: one call back to the host a solve; what was jitted before is traced anew inside the block.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50, adjoint=jaxhpo.Implicit())
      ...     return jnp.sum(sol.params**2)
      >>> with jaxhpo.debug_solves():
      ...     hypergrad = jax.grad(outer_loss)(jnp.ones(2))
      linear solve: CONVERGED at a relative residual of 0.0e+00 after 1 products
    """
    with recording(prints=True):
        yield


def report_linear_solve(info: LinearInfo) -> None:
    """Reports a linear solve, when it runs."""
    solves, prints = active().linear_solves, active().prints
    if solves is not None or prints:

        def append(status, residual, num_iterations):
            solve = LinearSolve(LinearStatus(int(status)), float(residual), int(num_iterations))
            if solves is not None:
                solves.append(solve)
            if prints:
                name, residual, count = solve.status.name, solve.residual, solve.num_iterations
                print(f"linear solve: {name} at a relative residual of {residual:.1e} after {count} products")

        jax.debug.callback(append, info.status, info.residual, info.num_iterations)


def report_schedule(make_row: Callable[[], UnrolledSolve]) -> None:
    """Reports the schedule of an unrolled solve."""
    log = active().solves
    if log is not None and log.wants_schedules:
        log.schedules.append(make_row())


def report_random(rule: Any) -> None:
    """Reports that a rule draws random numbers."""
    log = active().solves
    if log is not None:
        log.random.append(rule)


def report_truncated() -> None:
    """Reports a linear solver that takes a fixed number of terms."""
    log = active().solves
    if log is not None:
        log.truncated = True


def report_root(measure: Callable[[], tuple[jax.Array, jax.Array]]) -> None:
    """Reports a solution with an implicit derivative, found by a solver of the user's.

    Args:
      measure: returns the relative length of Newton's step from it, and whether the linear solve failed; called where
        somebody listens.
    """
    log, prints = active().solves, active().prints
    distances = None if log is None or not log.wants_distances else log.distances
    if log is not None:
        log.roots += 1
    if distances is None and not prints:
        return

    def tell(distance, failed):
        if prints and not failed:
            print(f"implicit: Newton's step from the solution is {distance:.1e} of its length")
        if distances is not None and not failed:
            distances.append(float(distance))

    with recording(linear_solves=None, solves=None, prints=False):
        distance, failed = measure()
    jax.debug.callback(tell, distance, failed)


def report_solve(problem: Any, adjoint: Any, info: Info) -> None:
    """Reports a solve, and if that is asked for how far its run came."""
    log = active().solves
    if log is None:
        return
    log.adjoints.append(adjoint)
    log.num_steps += problem.num_steps
    log.longest = max(log.longest, problem.num_steps)
    log.symmetric &= problem.solver.symmetric
    if _size(problem.state.params) > _size(log.params):
        log.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem.state.params)
    if log.wants_runs:
        state, inputs = jax.lax.stop_gradient((problem.state, problem.residual_inputs))
        start = norm(problem.residual(state.params, state.model_state, inputs))

        def append(steps, *norms):
            log.runs.append(InnerRun(int(steps), *map(float, norms)))

        jax.debug.callback(append, info.num_steps, start, info.optimality)


def report_fault(happened: jax.Array, text: str, **values: Any) -> None:
    """Reports a NaN that a derivative rule gave on purpose, and why: `text`, formatted with the values.

    It is to have happened only where all that the rule was given is finite: so it is the first cause.
    """
    log = active().steps
    if log is not None:

        def append(happened, values):
            if happened:
                log.faults.append(text.format(**{name: x.item() for name, x in values.items()}))

        jax.debug.callback(append, happened, jax.tree.map(jnp.asarray, values))


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
