"""A multilayer perceptron in flax linen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers with an activation between them; no activation follows the last layer.

    Args:
      features: width of each layer, ending with that of the output, such as `(64, 10)`.
      activation: elementwise function between layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxhpo.models import MLP
      >>> model = MLP((64, 10))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
      >>> model.apply({"params": params}, jnp.zeros((5, 64))).shape
      (5, 10)
    """

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = jax.nn.tanh

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for width in self.features[:-1]:
            hidden = self.activation(nn.Dense(width)(hidden))
        return nn.Dense(self.features[-1])(hidden)
