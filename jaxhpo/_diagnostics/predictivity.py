"""Predictivity: how well a hypergradient foretells the change of the outer loss along finite random steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.processes import whole
from jaxhpo._core.trace import compilable
from jaxhpo._core.tree import map_in_chunks

NUMBER = 8  # steps of each size
ONE_SIDED = 1.645  # standard deviations that a normal number exceeds in 5 % of cases
TOGETHER = 8  # trainings under one `vmap`
FORETELLS = 0.9  # a correlation of predicted and real change below which remedies are tried
STATIONARY = 0.01  # of real changes: predicted ones that are smaller are not what a step is taken for


class Predictivity(NamedTuple):
    """Predicted against real change of the outer loss, over random steps of one size.

    Attributes:
      step: the standard deviation by which each hyperparameter is moved.
      correlation: Pearson's, of the two.
      interval: its 95 % confidence interval, by Fisher's transformation.
      slope: real change for a predicted one, by least squares through zero; 1 for a loss that is straight.
      vain: why it foretells nothing, in words, where that is no fault of the training; else empty.
    """

    step: float
    correlation: float
    interval: tuple[float, float]
    slope: float
    vain: str = ""

    @property
    def low(self) -> bool:
        """True where another training may foretell more."""
        return not self.vain and self.correlation < FORETELLS

    def above(self, other: "Predictivity") -> bool:
        """True where the correlation is higher than another, over as many steps, by more than chance (5 %)."""
        mine, others = (np.arctanh(np.clip(np.nan_to_num(x.correlation), -1, 1)) for x in (self, other))
        return bool(mine - others > ONE_SIDED * np.sqrt(2 / (NUMBER - 3)))

    def __str__(self) -> str:
        if self.vain:
            return f"foretells nothing of steps of {self.step:.2g}: {self.vain}"
        low, high = self.interval
        return (
            f"foretells steps of {self.step:.2g} with correlation {self.correlation:.2f} ({low:.2f} to {high:.2f}), "
            f"slope {self.slope:.2f}"
        )


class Retrained(NamedTuple):
    """Real changes of the outer loss along random steps.

    Attributes:
      step: their size, as in `Predictivity`.
      moves: (n, m) the steps.
      changes: (n,) of the outer loss.
    """

    step: float
    moves: np.ndarray
    changes: np.ndarray

    def predictivity(self, grad: np.ndarray) -> Predictivity:
        """Compares the changes that a hypergradient foretells with these; NaN where an outer loss is not finite."""
        predicted = self.moves @ grad
        if bad := int(np.sum(~np.isfinite(self.changes))):
            vain = (
                f"at {bad} of {len(self.changes)} points the outer loss is not finite. Take a smaller `step`, or the "
                "`transforms=` that keep hyperparameters within their range"
            )
            return Predictivity(self.step, np.nan, (np.nan, np.nan), np.nan, vain)
        with np.errstate(invalid="ignore", divide="ignore"):  # of changes that are all alike
            correlation = float(np.corrcoef(predicted, self.changes)[0, 1])
            slope = float(predicted @ self.changes / (predicted @ predicted))
            # arctanh r is normal, nearly, with the standard deviation 1 / √(n − 3).
            ends = np.arctanh(np.clip(correlation, -1, 1)) + np.array([-1.96, 1.96]) / np.sqrt(len(self.moves) - 3)
        lengths = np.linalg.norm(predicted), np.linalg.norm(self.changes)
        vain = ""
        if lengths[0] < STATIONARY * lengths[1] and not correlation >= FORETELLS:
            vain = f"changes are {lengths[1] / lengths[0]:.2g} times as large as foretold, as near a stationary point"
        return Predictivity(self.step, correlation, (float(np.tanh(ends[0])), float(np.tanh(ends[1]))), slope, vain)


def retrain(
    value: Callable, flat: jax.Array, sizes: tuple[float, ...], key: jax.Array, *args: Any
) -> tuple[Retrained, ...]:
    """Trains at `NUMBER` random points of each distance, and takes the changes of the outer loss.

    Args:
      value: `(flat, *args) -> outer loss`.
      flat: the hyperparameters.
      sizes: the standard deviations of each entry's move, in the hyperparameters' own units.
      key: for the moves; those of the first size are the same for any number of sizes.
      *args: of `value`.
    """
    # JAX counts random numbers by their place: those of the first size are the same for any number of sizes.
    normal = jax.random.normal(key, (len(sizes), NUMBER, flat.size), flat.dtype)
    steps = jnp.asarray(sizes, flat.dtype)[:, None, None] * normal
    moves = jnp.concatenate([jnp.zeros((1, flat.size), flat.dtype), steps.reshape(-1, flat.size)])

    def values(flat, moves, *args):
        return map_in_chunks(lambda move: value(flat + move, *args), moves, TOGETHER)

    program, given = compilable(values, flat, moves, *args)
    found, moves = np.asarray(whole(program(*given)), float), np.asarray(whole(moves), float)[1:]
    changes = (found[1:] - found[0]).reshape(len(sizes), NUMBER)
    return tuple(map(Retrained, sizes, moves.reshape(len(sizes), NUMBER, flat.size), changes))
