"""The error bar of a hypergradient while a run goes on: exact tangents along random directions, pooled over steps.

With ĝ the hypergradient, g the derivative of the steps that were run and u a random direction of length √m,
⟨ĝ − g, u⟩² has the mean ‖ĝ − g‖². One direction says little, but errors change slowly from step to step, so the last
few are pooled; successive directions are orthogonal, so that m of them say all of an error that stays. Pooled is
⟨ĝ − g, u⟩² / ‖ĝ‖: far from an optimum errors go with the hypergradient's norm, near it the norm falls and they stay.
Of a few hyperparameters all directions are taken each time, which is exact, and nothing is pooled.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import ravel
from jaxhpo._core.processes import whole
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.transforms import to_natural
from jaxhpo._core.types import PyTree
from jaxhpo._diagnostics.tangents import Tangents, if_forward, length_factor, orthogonal
from jaxhpo._tune.step import OuterReport, OuterState, Step

FRESH = 6  # tangents at the first step; of so many hyperparameters or fewer, one for each at every measurement
EVERY = 2  # steps from one measurement to the next
HALF = 4  # steps after which a tangent has half of its weight in the mean
LAST = 32  # steps that are pooled: older ones have less than 1/256
MOST = 64  # directions that are made orthogonal to each other


class Measured(NamedTuple):
    """Results of the tangents of a step.

    Attributes:
      off: root mean square of ⟨ĝ − g, u⟩ over random directions u.
      size: that of ⟨g, u⟩.
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
        self.tangents: Tangents | None = None

    def measure(self, rows: int, state: OuterState, after: OuterState, report: OuterReport) -> Measured:
        """Takes the tangents of a step.

        Args:
          rows: steps that were recorded before.
          state: from which the step was taken, but for its point.
          after: what it returned.
          report: of the device.
        """
        flat, unravel = ravel(after.before)
        if rows % EVERY or not flat.size:
            return NONE
        key = jax.random.fold_in(state.key, state.step)
        directions = _directions(state.key, rows, flat.size)
        number = len(directions)
        if self.moves:
            move = np.asarray(whole(ravel(after.point)[0] - flat), float)
            length = np.linalg.norm(move)
            directions = np.concatenate([directions, move[None] / (length or 1.0)])
        found = if_forward(lambda: self._along(directions, flat, unravel, state.carry, key))
        if found is None:
            raise JaxhpoError(
                "`record='error'`, and `on_error`, need a derivative of the outer loss to hold the hypergradient "
                "against, and there is none: `implicit` stands around a solver of your own, or something in the loss "
                "calls back to Python. `check_hypergradient` takes differences there."
            )
        grad = np.asarray(whole(ravel(report.hypergradient)[0]), float)
        slope = float(found[-1]) if self.moves and length else math.nan  # no move, as of `optax.MultiSteps`
        off, size = (np.sqrt(np.mean(x[:number] ** 2)) for x in (directions @ grad - found, found))
        return Measured(float(off), float(size), slope)

    def _along(self, directions, flat, unravel, carry, key) -> np.ndarray | None:
        if self.tangents is None:

            def value(flat, carry, key):
                return self._value(unravel(flat), carry, key)

            log = SolveLog(schedules=False)
            with recording(solves=log), warnings.catch_warnings(action="ignore"):
                jax.eval_shape(value, flat, carry, key)
            if log.roots:
                return None
            together = flat.size if flat.size <= FRESH else 1
            self.tangents = Tangents(value, flat, carry, key, width=together + self.moves)
        return self.tangents.along(directions, flat, carry, key)[1]

    def _value(self, point: PyTree, carry: PyTree, key: jax.Array) -> jax.Array:
        """The outer loss whose hypergradient the step takes: the mean over keys, if it accumulates."""

        def value(key):
            if self.step.gradient is None:
                return self.step.objective(point, carry, key)[0]
            return self.step.gradient(to_natural(self.step.transforms, point), carry, key)[0]

        times = self.step.remedies.accumulate
        return value(key) if times == 1 else jnp.mean(jax.lax.map(value, jax.random.split(key, times)))


def _directions(key: jax.Array, rows: int, size: int) -> np.ndarray:
    """The directions of a step, shape (k, m): the next of a sequence that the key gives, or a basis."""
    if size <= FRESH:
        return math.sqrt(size) * np.eye(size)
    block = size if size <= MOST else FRESH
    which, start = divmod(FRESH + rows // EVERY - 1 if rows else 0, block)
    every = orthogonal(jax.random.fold_in(jax.random.fold_in(key, 2), which), block, size)
    return np.asarray(whole(every), float)[start : start + (1 if rows else FRESH)]


def pooled(measured: Sequence[float], norms: Sequence[float], size: int) -> float:
    """The error bar of the last of some steps; NaN before the first that was measured, and of one that is zero.

    Args:
      measured: `ErrorBar.measure` of every step.
      norms: of the hypergradients.
      size: the number of hyperparameters.
    """
    exact, last = size <= FRESH, len(norms) - 1
    if exact and np.isfinite(measured[-1]):
        return float(measured[-1])
    rows = [(i, off) for i, off in enumerate(measured) if np.isfinite(off) and norms[i] > 0]
    if not rows or not norms[-1]:
        return float("nan")
    if exact:
        rows = rows[-1:]
    # Sums over directions; the last of the squares of weights.
    squares, counts, weights = 0.0, 0.0, 0.0
    for i, off in rows:
        weight, number = 0.5 ** ((last - i) / HALF), size if exact else FRESH if i == 0 else 1
        squares += number * weight * off**2 / norms[i]
        counts, weights = counts + number * weight, weights + number * weight**2
    return float(length_factor(counts**2 / weights, size) * np.sqrt(norms[-1] * squares / counts))
