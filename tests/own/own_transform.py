"""A transform of a user's: the binary logarithm."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo import Transform


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Transform):
    """h = 2ᵘ; the fields have names that once were looked for."""

    schedule: int = 0
    curvature: int = 0
    thins: int = 0
    pair: int = 0

    def forward(self, unconstrained: jax.Array) -> jax.Array:
        return 2.0**unconstrained

    def inverse(self, natural: jax.Array) -> jax.Array:
        return jnp.log2(natural)
