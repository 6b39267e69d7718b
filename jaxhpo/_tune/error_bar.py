"""The error bar of a hypergradient while a run goes on: the exact derivative of a step now and then.

g, the derivative of the inner steps that were run, is taken by reverse mode with the checkpoints of `Unroll()`, past
every rule. That costs little more than one tangent, and says all of the error, of which a tangent along a random
direction says one number. Errors change slowly from step to step, so it is taken at every fourth, and holds until the
next.

Where there is no reverse mode (a run to a `tol`), where it is NaN (a root of zero) or does not fit into memory,
tangents along six random directions take its place: with u one of them, of length √m, ⟨ĝ − g, u⟩² has the mean
‖ĝ − g‖².
"""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import ravel
from jaxhpo._core.processes import whole
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.transforms import to_natural
from jaxhpo._core.types import PyTree
from jaxhpo._diagnostics.tangents import Tangents, if_defined, length_factor, orthogonal
from jaxhpo._tune.step import OuterReport, OuterState, Step

EVERY = 4  # steps from one measurement to the next
OF_MOVES = 2  # the same where moves are judged
DIRECTIONS = 6  # of tangents: an error is within a factor of two of what they say in 97 % of cases

NO_DERIVATIVE = (
    "`record='error'`, and `on_error`, need a derivative of the outer loss to hold the hypergradient against, and "
    "there is none: `implicit` stands around a solver of your own, or something in the loss calls back to Python. "
    "`check_hypergradient` takes differences there."
)


class Measured(NamedTuple):
    """The measured error of a step.

    Attributes:
      off: ‖ĝ − g‖.
      size: ‖g‖.
      slope: ⟨g, Δ⟩ / ‖Δ‖ along the move Δ.
    """

    off: float
    size: float
    slope: float


NONE = Measured(math.nan, math.nan, math.nan)


class ErrorBar:
    """Measures the error of the hypergradients of a run.

    Args:
      step: of the run.
      moves: whether the slope along each move is measured too.
    """

    def __init__(self, step: Step, moves: bool):
        self.step, self.moves = step, moves
        self.exact: Tangents | None = None
        self.tangents: Tangents | None = None
        self.begun = False
        self.last = -EVERY  # the last row that was measured

    def resume(self, rows: list[dict[str, Any]]) -> None:
        """Goes on after the rows of an earlier call."""
        self.last = max((i for i, row in enumerate(rows) if np.isfinite(row["measured_error"])), default=-EVERY)

    def measure(self, rows: int, state: OuterState, after: OuterState, report: OuterReport) -> Measured:
        """Measures a step, where that is due.

        Args:
          rows: steps that were recorded before.
          state: from which the step was taken, but for its point.
          after: what it returned.
          report: of the device.
        """
        flat, unravel = ravel(after.before)
        since, moves = rows - self.last, np.zeros((0, flat.size))
        if self.moves and since >= OF_MOVES:
            move = np.asarray(whole(ravel(after.point)[0] - flat), float)
            if move.any():  # not of `optax.MultiSteps`, between its steps
                moves = move[None] / np.linalg.norm(move)
        if not (flat.size and (since >= EVERY or len(moves))):
            return NONE

        def value(flat, carry, key):
            return self._value(unravel(flat), carry, key)

        at = flat, state.carry, jax.random.fold_in(state.key, state.step)
        grad = np.asarray(whole(ravel(report.hypergradient)[0]), float)
        exact = self._gradient(value, *at)
        if exact is not None and np.isfinite(exact).all():
            off, size, slopes = np.linalg.norm(grad - exact), np.linalg.norm(exact), moves @ exact
        else:
            random = jax.random.fold_in(jax.random.fold_in(state.key, 2), rows)
            number = min(DIRECTIONS, flat.size)
            directions = np.asarray(whole(orthogonal(random, number, flat.size)), float)
            found, slopes = np.split(self._along(np.concatenate([directions, moves]), value, *at), [number])
            length_of = lambda x: length_factor(number, flat.size) * np.sqrt(np.mean(np.square(x)))  # noqa: E731
            off, size = length_of(directions @ grad - found), length_of(found)
        self.last = rows if np.isfinite(off) else self.last
        return Measured(float(off), float(size), float(slopes[0]) if len(slopes) else math.nan)

    def _gradient(self, value, *at) -> np.ndarray | None:
        """g, by reverse mode; None where there is none, or it does not fit into memory."""
        if not self.begun:
            self.begun, log = True, SolveLog(schedules=False)
            with recording(solves=log), warnings.catch_warnings(action="ignore"):
                jax.eval_shape(value, *at)
            if log.roots:  # a derivative under `implicit` is its rule
                raise JaxhpoError(NO_DERIVATIVE)
            try:
                self.exact = Tangents(value, *at, rule=Unroll())
            except JaxhpoError:  # a run to a `tol`
                return None
        exact = self.exact
        found = None if exact is None else if_defined(lambda: exact.gradient(*at))
        if found is None:
            self.exact = None
        return found

    def _along(self, directions, value, *at) -> np.ndarray:
        """⟨g, u⟩ for each direction u, by forward mode."""
        if self.tangents is None:
            self.tangents = Tangents(value, *at)
        tangents = self.tangents
        found = if_defined(lambda: tangents.along(directions, *at)[1])
        if found is None:
            raise JaxhpoError(NO_DERIVATIVE)
        return found

    def _value(self, point: PyTree, carry: PyTree, key: jax.Array) -> jax.Array:
        """The outer loss whose hypergradient the step takes: the mean over keys, if it accumulates."""

        def value(key):
            if self.step.gradient is None:
                return self.step.objective(point, carry, key)[0]
            return self.step.gradient(to_natural(self.step.transforms, point), carry, key)[0]

        times = self.step.remedies.accumulate
        return value(key) if times == 1 else jnp.mean(jax.lax.map(value, jax.random.split(key, times)))
