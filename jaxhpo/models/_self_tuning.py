"""Self-tuning layers in flax linen: their weights respond to the hyperparameters that they were trained at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax


class SelfTuningDense(nn.Module):
    r"""A dense layer whose weights are an affine function of the hyperparameters, gated row by row.

    .. math:: y = Wx + b + (Uh) \circ (W_h x) + (U_b h) \circ b_h

    so that W(h) = W + diag(Uh) W_h: about twice the parameters of a dense layer, however many hyperparameters, where a
    full affine response has m + 1 times as many. At first U = U_b = 0, and it is a dense layer. To be trained by
    `jaxhpo.Hypernetwork(..., network=jaxhpo.self_response)`. It learns best from hyperparameters that are centred and
    of order one, such as the change of a logarithm since the start.

    Args:
      features: entries of y.
      use_bias: whether there are b, U_b and b_h.

    Call it with the inputs x, of shape (..., n), and h, of shape (m,), or (batch, m) for other hyperparameters at every
    example; it returns y, of shape (..., features).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxhpo.models import SelfTuningDense
      >>> layer = SelfTuningDense(3)
      >>> params = layer.init(jax.random.key(0), jnp.zeros((5, 4)), jnp.zeros(2))["params"]
      >>> layer.apply({"params": params}, jnp.zeros((5, 4)), jnp.zeros((5, 2))).shape
      (5, 3)

    References:
      MacKay, Vicol, Lorraine, Duvenaud, Grosse. Self-Tuning Networks. 2019. arXiv:1903.03088
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array, hparams: jax.Array) -> jax.Array:
        plain = nn.Dense(self.features, self.use_bias, name="plain")(inputs)
        response = nn.Dense(self.features, use_bias=False, name="response")(inputs)
        return _Gate(self.use_bias, name="gate")(plain, response, hparams)


class SelfTuningConv(nn.Module):
    r"""A convolution whose filters are an affine function of the hyperparameters, gated channel by channel.

    The layer of `SelfTuningDense` with convolutions for W and W_h: output channel c is
    :math:`(W_c + (Uh)_c W_{h,c}) * x + b_c + (U_b h)_c b_{h,c}`.

    Args:
      features: output channels.
      kernel_size: of the filters, such as `(3, 3)`.
      strides: of the convolution.
      use_bias: whether there are b, U_b and b_h.

    Call it with the inputs, of shape (batch, ..., channels), and h, of shape (m,), or (batch, m) for other
    hyperparameters at every example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxhpo.models import SelfTuningConv
      >>> layer = SelfTuningConv(6, (3, 3))
      >>> params = layer.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), jnp.zeros(1))["params"]
      >>> layer.apply({"params": params}, jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 1))).shape
      (2, 8, 8, 6)

    References:
      MacKay, Vicol, Lorraine, Duvenaud, Grosse. Self-Tuning Networks. 2019. arXiv:1903.03088
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array, hparams: jax.Array) -> jax.Array:
        settings: dict[str, Any] = {"kernel_size": self.kernel_size, "strides": self.strides}
        plain = nn.Conv(self.features, use_bias=self.use_bias, name="plain", **settings)(inputs)
        response = nn.Conv(self.features, use_bias=False, name="response", **settings)(inputs)
        return _Gate(self.use_bias, name="gate")(plain, response, hparams)


class _Gate(nn.Module):
    """plain + (Uh) ∘ response + (U_b h) ∘ b_h, for the parts of a layer that are already computed."""

    use_bias: bool

    @nn.compact
    def __call__(self, plain, response, hparams):
        features = plain.shape[-1]

        def rows(name):
            gate = nn.Dense(features, use_bias=False, kernel_init=nn.initializers.zeros, name=name)(hparams)
            between = (1,) * (plain.ndim - gate.ndim)  # the axis of examples comes first, that of features last
            return gate.reshape(*gate.shape[:-1], *between, features)

        output = plain + rows("rows") * response
        if not self.use_bias:
            return output
        # Ones: if U_b and b_h were both zero, neither would ever have a gradient.
        bias = self.param("bias", nn.initializers.ones, (features,))
        return output + rows("bias_rows") * bias.reshape((1,) * (plain.ndim - 1) + (features,))


class SelfTuningMLP(nn.Module):
    """Self-tuning dense layers with an activation between them; none after the last.

    Args:
      features: width of each layer, the output's last, such as `(64, 10)`.
      activation: elementwise function between layers.

    Call it with the inputs, the hyperparameters h, as for `SelfTuningDense`, and, where hidden units are to be dropped
    or made noisy, with a function `between(i, hidden) -> hidden`, applied to the output of the i-th activation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxhpo.models import SelfTuningMLP
      >>> model = SelfTuningMLP((64, 10))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 64)), jnp.zeros(2))["params"]
      >>> model.apply({"params": params}, jnp.zeros((5, 64)), jnp.zeros((5, 2))).shape
      (5, 10)

    References:
      MacKay, Vicol, Lorraine, Duvenaud, Grosse. Self-Tuning Networks. 2019. arXiv:1903.03088
    """

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = jax.nn.tanh

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        hparams: jax.Array,
        between: Callable[[int, jax.Array], jax.Array] = lambda i, hidden: hidden,
    ) -> jax.Array:
        hidden = inputs
        for i, width in enumerate(self.features[:-1]):
            hidden = between(i, self.activation(SelfTuningDense(width)(hidden, hparams)))
        return SelfTuningDense(self.features[-1])(hidden, hparams)
