"""Directional derivatives of an outer loss, by central differences, and the distance of a hypergradient from them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import NonFiniteError, ZeroHypergradientError
from jaxhpo._core.mesh import ravel
from jaxhpo._core.processes import whole
from jaxhpo._core.trace import compilable
from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree

TANGENTS, DIFFERENCES = "exact tangents", "central differences"
FINE = 1e-3  # an error of differences at which no other step is tried
UNRELIABLE = (
    "the trained parameters jump or bend sharply with the hyperparameters, as networks with ReLU do over many steps "
    "(tanh and gelu do not), or rounding errors dominate (try float64)"
)


class Differences(NamedTuple):
    """Directional derivatives of an outer loss, by central differences unless `kind` says otherwise.

    Attributes:
      directions: (k, m) unit vectors.
      numeric: (k,) fourth-order differences along them.
      coarse: (k,) second-order ones, whose distance from `numeric` bounds the error of a smooth loss.
      rounding: (k,) the error by rounding the outer loss to its precision.
      coordinates: the name of each direction where they are coordinates, else None (random directions).
      kind: what they are.
    """

    directions: np.ndarray
    numeric: np.ndarray
    coarse: np.ndarray
    rounding: np.ndarray
    coordinates: tuple[str, ...] | None
    kind: str = DIFFERENCES

    @property
    def valid(self) -> bool:
        """True where the outer loss is finite at all points visited, and changes along some direction."""
        return bool(np.isfinite([self.numeric, self.coarse]).all() and self.numeric.any())

    @property
    def error(self) -> float:
        """Estimated relative error of the differences themselves; NaN where there is nothing to compare with."""
        # ‖D₄ − D₂‖ / ‖D₄‖ = O(s²), which bounds the error O(s⁴) of D₄ for small s; kinks enter it too.
        if not self.valid:
            return float("nan")
        off = np.hypot(np.linalg.norm(self.coarse - self.numeric), np.linalg.norm(self.rounding))
        return float(off / np.linalg.norm(self.numeric))

    def along(self, gradient) -> np.ndarray:
        """The directional derivatives ⟨d, g⟩ of a flat gradient g."""
        return self.directions @ whole(gradient).astype(float)

    def check(self, context: str = "") -> None:
        """Raises unless the differences are valid.

        Args:
          context: a sentence to begin the first message with.

        Raises:
          NonFiniteError: the outer loss is not finite somewhere.
          ZeroHypergradientError: the outer loss does not change.
        """
        if not np.isfinite([self.numeric, self.coarse]).all():
            raise NonFiniteError(
                f"{context}The outer loss is not finite at all points that the differences visit: move the "
                "hyperparameters away from the edge of their domain (or pass `check_hypergradient` a smaller "
                "`step_size`)."
            )
        if not self.valid:
            raise ZeroHypergradientError(
                "The outer loss does not change along any direction tried: no hyperparameter affects it, or it is "
                "piecewise constant, as an accuracy is. Pass the hyperparameters on to `solve`, and use them in the "
                "train loss or the optimiser; take a smooth loss, or `EvolutionStrategies`."
            )

    def __str__(self) -> str:
        return f"{self.kind} along {len(self.numeric)} {'coordinates' if self.coordinates else 'random directions'}"


class Agreement(NamedTuple):
    """Distance of one vector from another, the reference.

    Attributes:
      relative_error: ‖got − want‖ / ‖want‖.
      cosine: of the angle between the two.
      norm_ratio: ‖got‖ / ‖want‖.
    """

    relative_error: float
    cosine: float
    norm_ratio: float


def agreement(got, want) -> Agreement:
    """Compares `got` with `want`; where that is zero the relative error and the norm ratio are infinite."""
    got, want = np.asarray(got, float), np.asarray(want, float)
    size, wanted = np.linalg.norm(got), np.linalg.norm(want)
    if not wanted:
        return Agreement(np.inf, 0.0, np.inf) if size else Agreement(0.0, 0.0, np.nan)
    cosine = float(got @ want / (size * wanted)) if size else 0.0
    return Agreement(float(np.linalg.norm(got - want) / wanted), cosine, float(size / wanted))


def central_differences(
    loss: Callable,
    hparams: PyTree,
    num_directions: int | None,
    step_size: float | None,
    key: jax.Array,
    after_each: Callable[[], None] = lambda: None,
) -> Differences:
    """Differences of `loss(flat hyperparameters)`: four evaluations per direction, compiled once.

    Args:
      loss: of the ravelled hyperparameters.
      hparams: where to differentiate.
      num_directions: number of random directions; None takes every coordinate.
      step_size: relative to each hyperparameter's scale; None takes ε^(1/5), and where that is not good to 1e-3 also
        four times as much, and the part of |h| above 1 (a scale of at most 1 suits logarithms): the one of these with
        the smallest estimated error.
      key: for the directions.
      after_each: called after each direction.
    """
    flat, scale = ravel(hparams)[0], scale_of(hparams)
    normal = None if num_directions is None else jax.random.normal(key, (num_directions, flat.size), flat.dtype)
    coordinates = coordinate_names(hparams) if num_directions is None else None

    def by(scale) -> Differences:
        directions = jnp.diag(scale) if normal is None else normal * scale[None]
        return Differences(*differences_along(loss, flat, directions, step_size, after_each), coordinates)

    found, large = by(scale), jnp.maximum(scale, jnp.abs(flat))
    if step_size is None and not found.error <= FINE:
        others = [4 * scale] + [large] * bool(whole(jnp.any(large > scale)))
        found = min(found, *map(by, others), key=lambda found: found.error if found.valid else np.inf)
    return found


def differences_along(
    loss: Callable,
    flat: jax.Array,
    directions: jax.Array,
    step_size: float | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors of some directions, differences along them of fourth and second order, and their rounding errors.

    Args:
      loss: of the ravelled hyperparameters.
      flat: where to differentiate.
      directions: (k, m) moves, each of the hyperparameters' own scale.
      step_size: the part of a move that is taken; None takes ε^(1/5).
      after_each: called after each direction.
    """
    # The error s⁴ of the formula plus the rounding error ε/s is least at s = O(ε^(1/5)).
    step = float(jnp.finfo(flat.dtype).eps) ** 0.2 if step_size is None else step_size
    directions = whole(directions)  # rows of what several processes hold cannot be taken
    program, (*consts, _, _, _) = compilable(lambda *args: _along(loss, *args), flat, directions[0], step)
    found = []
    for direction in directions:  # one program for each in turn, between which progress is shown
        found.append([float(whole(x)) for x in program(*consts, flat, direction, step)])
        after_each()
    numeric, coarse, rounding = np.array(found).T
    directions = directions.astype(float)
    lengths = np.linalg.norm(directions, axis=1)
    # D is linear in d, so the derivative along the unit vector d / ‖d‖ is D / ‖d‖.
    return directions / lengths[:, None], numeric / lengths, coarse / lengths, rounding / lengths


def difference_along(
    loss: Callable, hparams: PyTree, row: np.ndarray, step_size: float | None = None
) -> tuple[float, float]:
    """The difference along one direction of any length, and its estimated error.

    Args:
      loss: of the ravelled hyperparameters.
      hparams: where to differentiate.
      row: (m,) the direction.
      step_size: as for `differences_along`.
    """
    flat, size = ravel(hparams)[0], np.linalg.norm(row)
    move = row / np.linalg.norm(row / np.asarray(whole(scale_of(hparams)), float))
    _, found, coarse, rounding = differences_along(loss, flat, jnp.asarray(move[None], flat.dtype), step_size)
    return float(found[0] * size), float((abs(found[0] - coarse[0]) + rounding[0]) * size)


def _along(loss, flat, d, step):
    """Fourth-order difference along a direction, the second-order one, and the rounding error."""
    # With f(s) = F(h + s d) and D(s) = (f(s) − f(−s)) / 2s = f′(0) + s² f‴(0)/6 + s⁴ f⁽⁵⁾(0)/120 + …, Richardson's
    # extrapolation cancels the term in s²:
    #   D₄ = (4 D(s) − D(2s)) / 3 = (8 f(s) − 8 f(−s) − f(2s) + f(−2s)) / 12s = f′(0) − s⁴ f⁽⁵⁾(0)/30 + …
    # A loop, not four calls: the loss, a whole training, is traced and compiled once.
    f = jax.lax.map(lambda times: loss(flat + times * step * d), jnp.array([1, -1, 2, -2], flat.dtype))
    near = (f[0] - f[1]) / (2 * step)  # D(s)
    far = (f[2] - f[3]) / (4 * step)  # D(2s)
    # Its weights, 18 / 12s in all, of values good to ε / 2.
    rounding = 0.75 * jnp.finfo(f.dtype).eps * jnp.max(jnp.abs(f)) / step
    return (4 * near - far) / 3, near, rounding


def scale_of(hparams: PyTree) -> jax.Array:
    """The scale of each hyperparameter, as one vector."""
    return ravel(jax.tree.map(_scale, hparams))[0]


def _scale(leaf):
    """The scale of each entry h: |h|, at most 1; where h = 0 the leaf's root mean square, or 1."""
    size = jnp.abs(leaf)
    typical = jnp.sqrt(jnp.mean(leaf**2))
    scale = jnp.minimum(1, jnp.where(size > 0, size, jnp.where(typical > 0, typical, 1)))
    # A step s · scale = ε^0.2 scale below ε^0.8 |h| would be lost in rounding.
    return jnp.maximum(scale, float(jnp.finfo(leaf.dtype).eps) ** 0.6 * size).astype(leaf.dtype)


def coordinate_names(hparams: PyTree) -> tuple[str, ...]:
    """The name of every hyperparameter, in the order of the ravelled vector."""
    every = [(name, index) for name, leaf in named_leaves(hparams, "hparams") for index in np.ndindex(leaf.shape)]
    return tuple(name + (f"[{', '.join(map(str, index))}]" if index else "") for name, index in every)
