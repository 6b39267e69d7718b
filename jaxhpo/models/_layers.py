"""A multilayer perceptron, LeNet and self-tuning layers in flax linen.

The weights of a self-tuning layer are an affine function of the hyperparameters.
"""

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


class LeNet(nn.Module):
    """Convolutions with an average pool of 2×2 after each, then dense layers; an activation follows all but the last.

    Call it with images of shape (n, height, width, channels). By default it is the network of LeCun, with 6 and 16
    filters of 5×5 pixels and layers of 120, 84 and 10 units, in today's form: rectified, the second convolution of all
    channels.

    Args:
      features: width of each dense layer, ending with that of the output.
      channels: number of filters of each convolution.
      kernel_size: of the filters.
      padding: of the convolutions, "VALID" or "SAME" (for images too small for the former).
      activation: elementwise function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxhpo.models import LeNet
      >>> model = LeNet()
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
      >>> model.apply({"params": params}, jnp.zeros((5, 28, 28, 1))).shape
      (5, 10)

    References:
      LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document Recognition. 1998.
    """

    features: Sequence[int] = (120, 84, 10)
    channels: Sequence[int] = (6, 16)
    kernel_size: Sequence[int] = (5, 5)
    padding: str = "VALID"
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = images
        for channels in self.channels:
            filtered = self.activation(nn.Conv(channels, self.kernel_size, padding=self.padding)(hidden))
            hidden = nn.avg_pool(filtered, (2, 2), (2, 2))
        hidden = hidden.reshape(len(hidden), -1)
        for width in self.features[:-1]:
            hidden = self.activation(nn.Dense(width)(hidden))
        return nn.Dense(self.features[-1])(hidden)


class SelfTuningDense(nn.Module):
    r"""A dense layer whose weights are an affine function of the hyperparameters, gated row by row.

    .. math:: y = Wx + b + (Uh) \circ (W_h x) + (U_b h) \circ b_h

    The weights are W(h) = W + diag(Uh) W_h. The layer has about twice the parameters of a dense layer, whatever the
    number m of hyperparameters; a full affine response has m + 1 times as many. At first U = U_b = 0, and it is a dense
    layer. Train it with `jaxhpo.Hypernetwork(..., network=jaxhpo.self_response)`. It learns best from hyperparameters
    that are centred and of order one, such as the change of a logarithm since the start.

    Call it with the inputs x, of shape (..., n), and h, of shape (m,), or (batch, m) for different hyperparameters in
    each example. It returns y, of shape (..., features).

    Args:
      features: number of entries of y.
      use_bias: include b, U_b and b_h.

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

    It is `SelfTuningDense` with convolutions in place of W and W_h. Output channel c is
    :math:`(W_c + (Uh)_c W_{h,c}) * x + b_c + (U_b h)_c b_{h,c}`.

    Call it with the inputs, of shape (batch, ..., channels), and h, of shape (m,), or (batch, m) for different
    hyperparameters in each example.

    Args:
      features: number of output channels.
      kernel_size: of the filters, such as `(3, 3)`.
      strides: of the convolution.
      use_bias: include b, U_b and b_h.

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
        settings = self.features, self.kernel_size, self.strides
        plain = nn.Conv(*settings, use_bias=self.use_bias, name="plain")(inputs)
        response = nn.Conv(*settings, use_bias=False, name="response")(inputs)
        return _Gate(self.use_bias, name="gate")(plain, response, hparams)


class _Gate(nn.Module):
    """The affine response of a layer, from plain = Wx + b and response = W_h x."""

    use_bias: bool

    @nn.compact
    def __call__(self, plain, response, hparams):
        features = plain.shape[-1]

        def aligned(x):  # (features,) or (batch, features): insert axes of length 1 before the last, up to plain.ndim
            return x.reshape(*x.shape[:-1], *(1,) * (plain.ndim - x.ndim), features)

        def rows(name):
            return aligned(nn.Dense(features, use_bias=False, kernel_init=nn.initializers.zeros, name=name)(hparams))

        # W(h) x + b(h), with W(h) = W + diag(Uh) W_h and b(h) = b + (U_b h) ∘ b_h, needs no W(h), as
        #     diag(Uh) W_h x = (Uh) ∘ (W_h x):
        output = plain + rows("rows") * response
        if not self.use_bias:
            return output
        # b_h starts at one: if U_b and b_h were both zero, so would be the gradients of both, forever.
        bias = self.param("bias", nn.initializers.ones, (features,))
        return output + rows("bias_rows") * aligned(bias)


class SelfTuningMLP(nn.Module):
    """Self-tuning dense layers with an activation between them; no activation follows the last layer.

    Call it with the inputs and the hyperparameters h, as `SelfTuningDense`. An optional third argument, a function
    `between(i, hidden) -> hidden`, is applied to the output of the i-th activation, to drop hidden units or add noise.

    Args:
      features: width of each layer, ending with that of the output, such as `(64, 10)`.
      activation: elementwise function between layers.

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
        self, inputs: jax.Array, hparams: jax.Array, between: Callable = lambda i, hidden: hidden
    ) -> jax.Array:
        hidden = inputs
        for i, width in enumerate(self.features[:-1]):
            hidden = between(i, self.activation(SelfTuningDense(width)(hidden, hparams)))
        return SelfTuningDense(self.features[-1])(hidden, hparams)
