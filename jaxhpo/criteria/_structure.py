"""Discrete choices, relaxed so that they have a gradient: Concrete samples, mixtures, widths; and back to discrete."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_count


def _check_temperature(temperature) -> None:
    if not isinstance(temperature, Tracer) and not np.all(np.asarray(temperature) > 0):
        raise JaxhpoError(
            f"`temperature` got {temperature}, by which is divided: write a number above 0, such as 0.1; for the limit "
            "at 0 there are `one_hot` and `concrete(..., hard=True)`."
        )


def concrete(
    key: jax.Array, log_weights: jax.Array, temperature: jax.Array | float, *, hard: bool = False
) -> jax.Array:
    r"""A sample of the Concrete (Gumbel-softmax) distribution: a relaxed one-hot vector.

    .. math:: \gamma = \mathrm{softmax}\big((\log a + G) / t\big), \qquad G_k = -\log(-\log U_k)

    As t → 0 it is one-hot, k with probability :math:`a_k / \sum a`; as t → ∞ it is the centre of the simplex.

    **Cost and bias**: with `hard`, the forward value is the one-hot vector of the largest entry, an exact draw of the
    categorical distribution, and the derivative is that of the soft sample (straight-through): biased. Without, the
    value is biased as t > 0. The variance of either gradient grows as t → 0: lower t during the search.

    Args:
      key: a PRNG key.
      log_weights: log a, up to a constant; the choices are its last axis.
      temperature: t > 0, which may be traced (a schedule).
      hard: draw one-hot vectors.

    Returns:
      Of the shape of `log_weights`.

    Raises:
      JaxhpoError: a temperature that is not above 0.

    Example:
      >>> sample = jaxhpo.criteria.concrete(jax.random.key(0), jnp.zeros(3), 0.5)
      >>> print(f"{sample.sum():.3f}", jaxhpo.criteria.concrete(jax.random.key(0), jnp.zeros(3), 0.5, hard=True).max())
      1.000 1.0

    References:
      Maddison, Mnih, Teh. The Concrete Distribution. 2016. arXiv:1611.00712
      Jang, Gu, Poole. Categorical Reparameterization with Gumbel-Softmax. 2016. arXiv:1611.01144
    """
    _check_temperature(temperature)
    log_weights = jnp.true_divide(jnp.asarray(log_weights), 1)  # of integers, floats
    noisy = log_weights + jax.random.gumbel(key, log_weights.shape, log_weights.dtype)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    if not hard:
        return soft
    return jax.lax.stop_gradient(one_hot(noisy) - soft) + soft


def concrete_log_density(sample: jax.Array, log_weights: jax.Array, temperature: jax.Array | float) -> jax.Array:
    r"""The log density of the Concrete distribution on the simplex.

    .. math:: \log\Big[(K-1)!\, t^{K-1} \prod_k \frac{a_k \gamma_k^{-t-1}}{\sum_j a_j \gamma_j^{-t}}\Big]

    It is with respect to the first K − 1 coordinates.

    Args:
      sample: γ, with positive entries that sum to 1 over the last axis.
      log_weights: log a.
      temperature: t.

    Returns:
      Of the shape of `sample` without its last axis.

    Raises:
      JaxhpoError: as for `concrete`.

    Example:
      >>> print(f"{jaxhpo.criteria.concrete_log_density(jnp.array([0.3, 0.7]), jnp.zeros(2), 1.0):.3f}")  # uniform
      0.000

    References:
      Maddison, Mnih, Teh. The Concrete Distribution. 2016. arXiv:1611.00712
    """
    _check_temperature(temperature)
    sample, log_weights = (jnp.true_divide(jnp.asarray(x), 1) for x in (sample, log_weights))
    log_sample, k = jnp.log(sample), sample.shape[-1]
    total = jax.nn.logsumexp(log_weights - temperature * log_sample, axis=-1)
    each = jnp.sum(log_weights - (temperature + 1) * log_sample, axis=-1)
    return jax.lax.lgamma(jnp.asarray(k, sample.dtype)) + (k - 1) * jnp.log(temperature) + each - k * total


def one_hot(log_weights: jax.Array) -> jax.Array:
    """The discrete choice: 1 at the largest weight of the last axis, else 0.

    Args:
      log_weights: of which to choose.

    Returns:
      Of the same shape and type.

    Example:
      >>> print(jaxhpo.criteria.one_hot(jnp.array([0.1, 2.0, -1.0])))
      [0. 1. 0.]
    """
    log_weights = jnp.asarray(log_weights)
    return jax.nn.one_hot(jnp.argmax(log_weights, -1), log_weights.shape[-1], dtype=log_weights.dtype)


def width_mask(width: jax.Array | float, size: int, temperature: jax.Array | float = 1.0) -> jax.Array:
    r"""A mask of the first units of a layer, whose number has a derivative: :math:`\sigma((w - j - \tfrac12) / t)`.

    Args:
      width: w, the number of units in use, from 0 to `size`; under `box(0, size)` it can be tuned.
      size: units in all.
      temperature: t; as t → 0 the mask is 1 for the first w units, and 0 for the others.

    Returns:
      Shape (size,); multiply the outputs of the layer by it.

    Raises:
      JaxhpoError: a size that is no count, or a temperature as for `concrete`.

    Example:
      >>> print(jaxhpo.criteria.width_mask(2.0, 4, 0.01).round(2))
      [1. 1. 0. 0.]
    """
    check_count("size", size)
    _check_temperature(temperature)
    return jax.nn.sigmoid((width - jnp.arange(size) - 0.5) / temperature)


def discretisation_gap(loss: Callable[[PyTree], jax.Array], log_weights: PyTree) -> jax.Array:
    """The change of a loss by rounding a mixture to its largest weight: L(one-hot) − L(softmax).

    Args:
      loss: of the weights of choices, a pytree of vectors (of the last axis) that sum to 1. Where the model can be
        trained again after rounding, let it do that.
      log_weights: a pytree of logarithms of weights.

    Returns:
      The difference, a scalar.

    Raises:
      JaxhpoError: a loss of another signature.

    Example:
      >>> gap = jaxhpo.criteria.discretisation_gap(lambda w: w @ jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]))
      >>> print(gap)  # 1 for the first, 2 for the mixture
      -1.0

    References:
      Liu, Simonyan, Yang. DARTS: Differentiable Architecture Search. 2018. arXiv:1806.09055
    """
    check_callable("loss", loss, "loss(weights)", 1)
    soft = jax.tree.map(lambda x: jax.nn.softmax(x, axis=-1), log_weights)
    return loss(jax.tree.map(one_hot, log_weights)) - loss(soft)
