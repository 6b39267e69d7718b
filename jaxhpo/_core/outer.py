"""The forms of an outer loss: `hparams -> scalar`, and the one that carries a state and takes a key."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import to_natural
from jaxhpo._core.types import Hypergradient, PyTree
from jaxhpo._core.validate import check_arrays, check_callable, check_residual, check_scalar, describe

WITH_CARRY = "outer_loss(hparams, carry, key) -> (value, carry, info)"


def in_one_form(outer_loss, gradient) -> tuple[Any, Callable | None]:
    """Converts both forms of the outer loss into one; raises for anything else.

    Returns:
      `(hparams, carry, key) -> (value, carry, info)`, or None, and in place of its differentiation
      `(hparams, carry, key) -> (value, hypergradient, carry, info)`, or None.
    """
    gradient = None if gradient is None else _checked_gradient(gradient)
    if outer_loss is None:
        if gradient is None:
            raise JaxhpoError("`outer_loss` got None without a `gradient`: pass a function `outer_loss(hparams)`.")
        return None, gradient
    if takes_carry(outer_loss):

        def loss(hparams, carry, key):
            value, carry, info = _outputs(outer_loss(hparams, carry, key), "outer_loss", "value, carry, info")
            return check_scalar(value, "outer_loss"), carry, info

        return loss, gradient
    check_callable("outer_loss", outer_loss, "outer_loss(hparams)", 1, " or `outer_loss(hparams, carry, key)`")
    return lambda h, carry, key: (check_scalar(outer_loss(h), "outer_loss"), carry, None), gradient


def in_search_units(transforms: PyTree, loss, gradient) -> tuple[Any, Callable | None]:
    """Returns what `in_one_form` returned as functions of the unconstrained hyperparameters, as `tune` sees them."""

    def loss_at(point, carry, key):
        return loss(to_natural(transforms, point), carry, key)

    def gradient_at(point, carry, key):
        hparams, pullback = jax.vjp(lambda u: to_natural(transforms, u), point)
        value, hypergrad, carry, info = gradient(hparams, carry, key)
        return value, pullback(hypergrad)[0], carry, info

    return loss and loss_at, gradient and gradient_at


def _checked_gradient(gradient):
    if isinstance(gradient, Hypergradient):
        raise JaxhpoError(
            "`gradient` got a pair: write `gradient=from_pair(pair)` and `carry=pair.init(params, hparams)`."
        )
    check_callable("gradient", gradient, "gradient(hparams, carry, key)", 3)

    def checked(hparams, carry, key):
        out = gradient(hparams, carry, key)
        value, hypergrad, carry, info = _outputs(out, "gradient", "value, hypergradient, carry, info")
        check_residual(hypergrad, hparams, "gradient", "hparams")
        hypergrad = jax.tree.map(lambda g, h: jnp.asarray(g, h.dtype), hypergrad, hparams)
        return check_scalar(value, "gradient"), hypergrad, carry, info

    return checked


def _outputs(out, what, wanted) -> tuple:
    if not isinstance(out, tuple) or len(out) != len(wanted.split()):
        raise JaxhpoError(
            f"`{what}(hparams, carry, key)` returned {describe(out)}: return `({wanted})`; carry and info may be None."
        )
    check_arrays(out[-2], "carry")
    check_arrays(out[-1], "info")
    return out


def takes_carry(outer_loss) -> bool:
    """Returns whether exactly three positional arguments are required: defaults do not make a carry."""
    try:
        parameters = inspect.signature(outer_loss).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) == 3


def is_deterministic(outer_loss, gradient) -> bool:
    """Returns whether the outer loss has no key, so that it has one value."""
    return outer_loss is not None and gradient is None and not takes_carry(outer_loss)
