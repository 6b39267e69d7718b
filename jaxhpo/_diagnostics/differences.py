"""Central differences of an outer loss along directions, and how far a hypergradient is from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxhpo._core.tree import names
from jaxhpo._core.types import PyTree


class Differences(NamedTuple):
    """Directional derivatives of an outer loss by central differences.

    Attributes:
      directions: (k, m) unit vectors.
      numeric: (k,) fourth-order differences along them.
      coarse: (k,) second-order ones, whose distance from `numeric` bounds the error of a smooth loss.
      coordinates: the name of each direction where they are coordinates, else None (random directions).
    """

    directions: np.ndarray
    numeric: np.ndarray
    coarse: np.ndarray
    coordinates: tuple[str, ...] | None

    @property
    def error(self) -> float:
        """Estimated relative error of the differences themselves."""
        return float(np.linalg.norm(self.numeric - self.coarse) / np.linalg.norm(self.numeric))

    def along(self, gradient) -> np.ndarray:
        """The directional derivatives that a flat gradient implies."""
        return self.directions @ np.asarray(gradient, float)

    def __str__(self) -> str:
        return f"{len(self.numeric)} {'coordinates' if self.coordinates else 'random directions'}"


class Agreement(NamedTuple):
    """How one vector compares with another, the reference.

    Attributes:
      relative_error: ‖got − want‖ / ‖want‖.
      cosine: of the angle between the two.
      norm_ratio: ‖got‖ / ‖want‖.
    """

    relative_error: float
    cosine: float
    norm_ratio: float


def agreement(got, want) -> Agreement:
    """Compares `got` with `want`, which is not zero."""
    got, want = np.asarray(got, float), np.asarray(want, float)
    size, wanted = np.linalg.norm(got), np.linalg.norm(want)
    cosine = float(got @ want / (size * wanted)) if size else 0.0
    return Agreement(float(np.linalg.norm(got - want) / wanted), cosine, float(size / wanted))


def central_differences(
    loss: Callable[[jax.Array], jax.Array],
    hparams: PyTree,
    num_directions: int | None,
    step_size: float | None,
    key: jax.Array,
) -> Differences:
    """Differences of `loss(flat hyperparameters)`: four evaluations a direction, compiled once.

    Args:
      loss: of the ravelled hyperparameters.
      hparams: where to differentiate.
      num_directions: how many random directions; None takes every coordinate.
      step_size: relative to each hyperparameter's scale; None takes ε^(1/5).
      key: for the directions.
    """
    flat, _ = ravel_pytree(hparams)
    scale = ravel_pytree(jax.tree.map(_scale, hparams))[0]
    if num_directions is None:
        directions, lengths = jnp.diag(scale), scale
    else:
        directions = jax.random.normal(key, (num_directions, flat.size), flat.dtype) * scale[None]
        lengths = jnp.linalg.norm(directions, axis=1)
    step = float(jnp.finfo(flat.dtype).eps) ** 0.2 if step_size is None else step_size
    numeric, coarse = jax.jit(_along_each, static_argnums=0)(loss, flat, directions, step)
    directions, lengths, numeric, coarse = (np.asarray(x, float) for x in (directions, lengths, numeric, coarse))
    coordinates = _coordinate_names(hparams) if num_directions is None else None
    return Differences(directions / lengths[:, None], numeric / lengths, coarse / lengths, coordinates)


def _along_each(loss, flat, directions, step):
    """Fourth-order differences, and the second-order ones whose distance from them bounds the error."""

    def along(d):
        # A loop, not four calls: the loss, a whole training, is traced and compiled once.
        at = jax.lax.map(lambda steps: loss(flat + steps * step * d), jnp.array([1, -1, 2, -2], flat.dtype))
        near, far = (at[0] - at[1]) / (2 * step), (at[2] - at[3]) / (4 * step)
        return (4 * near - far) / 3, near

    return jax.lax.map(along, directions)


def _scale(leaf):
    size = jnp.abs(leaf)
    typical = jnp.sqrt(jnp.mean(leaf**2))
    scale = jnp.minimum(1, jnp.where(size > 0, size, jnp.where(typical > 0, typical, 1)))
    # A step below ε^0.8 |h| would be lost in rounding.
    return jnp.maximum(scale, float(jnp.finfo(leaf.dtype).eps) ** 0.6 * size).astype(leaf.dtype)


def _coordinate_names(hparams):
    out = []
    for name, leaf in zip(names(hparams, "hparams"), jax.tree.leaves(hparams), strict=True):
        indices = np.ndindex(leaf.shape)
        out += [name + (f"[{', '.join(map(str, i))}]" if i else "") for i in indices]
    return tuple(out)
