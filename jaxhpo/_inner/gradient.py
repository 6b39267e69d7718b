"""The gradient of the train loss, and its derivative in mixed mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.trace import closure_convert, trust, untrusted_rule
from jaxhpo._core.tree import Flags, cast_like, is_inexact, partition
from jaxhpo._core.types import PyTree

GRADIENT = "jaxhpo_gradient"  # what checkpoint policies call a gradient that `mixed_value_and_grad` made


def value_and_grad(loss: Callable, params: PyTree, hparams, batch, model_state) -> tuple[tuple, PyTree]:
    """`((value, new model state), gradient)` of `loss(params, hparams, batch, model_state)`.

    Where the value is not finite, neither is the gradient.
    """
    params = _cast_to_vary(loss, params, hparams, batch, model_state)
    out, grad = jax.value_and_grad(loss, has_aux=True)(params, hparams, batch, model_state)
    return out, _broken_with(out[0], cast_like(grad, params))


def _broken_with(value, grad):
    """The gradient, not finite where the loss is not: log x has one at -1. No training goes on from such a loss."""
    value = jax.lax.stop_gradient(value)
    add = jnp.where(jnp.isfinite(value), 0, value)
    return jax.tree.map(lambda g: g + add.astype(g.dtype), grad)


def mixed_value_and_grad(
    loss: Callable, params: PyTree, hparams, batch, model_state, thin: Callable | None = None
) -> tuple[tuple, PyTree]:
    r"""The same, to be differentiated in reverse mode: from its inputs alone, in one pass.

    Reverse mode over reverse mode keeps, for :math:`v \mapsto (\partial_\theta \nabla_\theta L\, v, \partial_h
    \nabla_\theta L\, v)`, all that the gradient's own two passes computed. By the symmetry of second derivatives it is
    the gradient of the one number :math:`\langle \nabla_\theta L, v\rangle` in θ and h: forward over reverse mode, for
    which the inputs suffice. Where `thin` is given, that derivative is taken on `thin(batch)` in place of the batch.

    A gradient that a user's own derivative rule has made (one that reverses or clips it) need be that of no function,
    and its derivative not symmetric: then plain reverse mode over reverse mode it is.

    References:
      Kemaev et al. Scalable Meta-Learning via Mixed-Mode Differentiation. 2025. arXiv:2505.00793
    """
    rest = (hparams, batch, model_state)
    rule = untrusted_rule(loss, params, *rest)
    if rule is not None:
        if thin is not None:
            raise JaxhpoError(
                f"`Unroll(hvp_fraction=...)` takes Hessian products of the train loss, but that holds {rule}, with a "
                "derivative rule of its own, of which there may be no Hessian: leave `hvp_fraction` away."
            )
        out, grad = value_and_grad(loss, params, *rest)
        return out, checkpoint_name(grad, GRADIENT)
    params = _cast_to_vary(loss, params, *rest)
    pure, consts = closure_convert(lambda params, rest: loss(params, *rest), params, rest)
    on_all = on_part = lambda params, given: pure(given[0], params, given[2])
    part_consts = []
    if thin is not None:
        part, part_consts = closure_convert(lambda params, h, b, state: loss(params, h, thin(b), state), params, *rest)
        on_part = lambda params, given: part(given[1], params, *given[2])  # noqa: E731
    both: Any = _mixed((on_all, on_part), params, (consts, part_consts, rest))
    out, grad = both
    # Broken first: where the gradient is kept, the loss need not be taken again.
    return out, checkpoint_name(_broken_with(out[0], cast_like(grad, params)), GRADIENT)


def _cast_to_vary(loss, params, *rest):
    # Inside `shard_map`, the gradient of a loss that differs from device to device, at parameters that do not, would be
    # summed over devices: separate inner problems would silently become one. A loss with a `pmean` does not differ.
    value = jax.eval_shape(lambda: loss(params, *rest)[0])
    return cast_varying(params, varying_axes(value))


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(losses, params, rest):
    return jax.value_and_grad(losses[0], has_aux=True)(params, rest)


def _mixed_fwd(losses, params, rest):
    perturbed = Flags(
        tuple(bool(x.perturbed) and is_inexact(x.value) for x in jax.tree.leaves(rest, is_leaf=_is_marked))
    )
    params, rest = jax.tree.map(lambda x: x.value, (params, rest), is_leaf=_is_marked)
    # Not by calling itself: forward mode over this, as for a Hessian, must find plain operations.
    return jax.value_and_grad(losses[0], has_aux=True)(params, rest), (params, rest, perturbed)


def _mixed_bwd(losses, residuals, cotangents):
    params, rest, flags = residuals
    perturbed = jax.tree.unflatten(jax.tree.structure(rest), flags.values)
    moved, combine = partition(rest, perturbed)

    of_loss, of_grad = cotangents
    pulled = []
    if not all(map(_is_zero, jax.tree.leaves(of_grad, is_leaf=_is_zero))):
        direction = jax.tree.map(_dense, of_grad, params, is_leaf=_is_zero)
        grads = jax.grad(lambda params, moved: losses[1](params, combine(moved))[0], argnums=(0, 1))
        pulled.append(jax.jvp(lambda params: grads(params, moved), (params,), (direction,))[1])
    if not all(map(_is_zero, jax.tree.leaves(of_loss, is_leaf=_is_zero))):
        out, pullback = jax.vjp(lambda params, moved: losses[0](params, combine(moved)), params, moved)
        pulled.append(pullback(jax.tree.map(_dense, of_loss, out, is_leaf=_is_zero)))
    of_params, of_moved = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), pulled)
    of_moved = iter(of_moved)
    return of_params, jax.tree.map(lambda m: next(of_moved) if m else None, perturbed)


_mixed.defvjp(_mixed_fwd, _mixed_bwd, symbolic_zeros=True)


def _is_marked(x):
    return isinstance(x, CustomVJPPrimal)


def _is_zero(x):
    return isinstance(x, SymbolicZero)


def _dense(cotangent, primal):
    """A cotangent as an array that varies over the mesh axes of what it belongs to."""
    if not is_inexact(primal):
        return np.zeros(primal.shape, jax.dtypes.float0)
    cotangent = jnp.zeros_like(primal) if _is_zero(cotangent) else cotangent
    return cast_varying(cotangent, varying_axes(primal))
