"""Steps that are shorter where the hypergradient is noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import norm, scaled, upcast
from jaxhpo._core.validate import check_nonnegative


class SlowState(NamedTuple):
    """State of `slow_where_noisy`.

    Attributes:
      inner: of the optimiser.
      noise: running mean of the squared standard error.
      size: that of the squared norm.

    Example:
      >>> state = jaxhpo.single_loop.slow_where_noisy(optax.sgd(0.1)).init(jnp.zeros(2))
      >>> print(state.noise, state.size)
      0.0 0.0
    """

    inner: Any
    noise: jax.Array
    size: jax.Array


def slow_where_noisy(
    optimizer: optax.GradientTransformation, memory: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""An optimiser whose steps are shortened by the share of the hypergradient that is noise.

    With D the hypergradient and s its standard error, :math:`E\|D\|^2 = \|g\|^2 + s^2` for the gradient g; so, with
    running means over updates,

    .. math:: \Delta h \leftarrow \max\Big(0, 1 - \frac{\overline{s^2}}{\overline{\|D\|^2}}\Big)\, \Delta h_{opt},

    the step that a quadratic model gains most by (the factor of Wiener's filter). It acts after the optimiser, as Adam
    and others undo any factor before them. `tune` passes s on: for methods that report `standard_error`, as
    `Online(parts=2)`, `EvolutionStrategies` and `PersistentES` do. One factor for all hyperparameters.

    **Cost and bias**: two numbers; unbiased steps become shorter ones.

    Args:
      optimizer: any optax transformation.
      memory: weight of the past in the running means, in [0, 1).

    Returns:
      An optax transformation, whose `update` takes `noise`, :math:`s^2 / \|D\|^2`.

    Raises:
      JaxhpoError: a setting out of its range; an update without `noise`.

    Example:
      >>> slow = jaxhpo.single_loop.slow_where_noisy(optax.sgd(1.0))
      >>> updates, state = slow.update(jnp.array([3.0, 4.0]), slow.init(jnp.zeros(2)), noise=0.75)
      >>> print(updates)  # three quarters of the squared norm are noise
      [-0.75 -1.  ]

    References:
      Wiener. Extrapolation, Interpolation, and Smoothing of Stationary Time Series. 1949.
    """
    check_nonnegative("slow_where_noisy(memory=...)", memory)
    if memory >= 1:
        raise JaxhpoError(f"`slow_where_noisy(memory=...)` got {memory}, but the past weighs less than all: write 0.9.")
    inner = optax.with_extra_args_support(optimizer)

    def init(params):
        zero = jnp.zeros_like(norm(upcast(params)))
        return SlowState(inner.init(params), zero, zero)

    def update(updates, state, params=None, *, noise=None, **extra):
        if noise is None:
            raise JaxhpoError(
                "`slow_where_noisy` got no `noise`: the method reports no `standard_error`. Write `Online(parts=2)`, "
                "or leave it out. (`optax.MultiSteps` passes none on: write `slow_where_noisy(optax.MultiSteps(...))`.)"
            )
        squared = norm(upcast(updates)) ** 2
        size = memory * state.size + (1 - memory) * squared
        variance = memory * state.noise + (1 - memory) * noise * squared
        share = jnp.clip(1 - variance / jnp.where(size > 0, size, 1), 0, 1)
        updates, after = inner.update(updates, state.inner, params, **extra)
        return scaled(share, updates), SlowState(after, variance.astype(size.dtype), size)

    return optax.GradientTransformationExtraArgs(init, update)
