"""The gradient of the train loss, and its derivative in mixed mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import as_array, cast_varying, varying_axes
from jaxhpo._core.stop_gradient import reverse_only
from jaxhpo._core.trace import closure_convert, trust, untrusted_rule
from jaxhpo._core.tree import Flags, cast_like, has_derivative, partition
from jaxhpo._core.types import PyTree

GRADIENT = "jaxhpo_gradient"  # the name, for checkpoint policies, of a gradient of `mixed_value_and_grad`


def train_loss_of(problem: Any) -> tuple[Callable, list]:
    """`(pure, consts)` with `pure(consts, state, hparams, x)` the train loss on a slice `x` of `problem.xs`."""
    loss: Any = problem.solver.loss
    return problem.closure_convert(lambda state, h, batch: loss(state.params, h, batch, state.model_state)[0])


def value_and_grad(loss: Callable, params: PyTree, hparams, batch, model_state) -> tuple[tuple, PyTree]:
    """Returns `((value, new model state), gradient)` of `loss(params, hparams, batch, model_state)`.

    If the value is not finite, the gradient is not finite either.
    """
    params = _cast_to_vary(loss, params, hparams, batch, model_state)
    out, grad = jax.value_and_grad(loss, has_aux=True)(params, hparams, batch, model_state)
    return out, _spread_nan(out[0], cast_like(grad, params))


def _spread_nan(value, grad):
    """The gradient plus the loss if that is not finite: log x is NaN at -1, but has the derivative -1 there."""
    value = jax.lax.stop_gradient(value)
    add = jnp.where(jnp.isfinite(value), 0, value)
    return jax.tree.map(lambda g: g + add.astype(g.dtype), grad)


def mixed_value_and_grad(
    loss: Callable, params: PyTree, hparams, batch, model_state, part: Callable | None = None
) -> tuple[tuple, PyTree]:
    r"""`value_and_grad` whose reverse-mode derivative is one forward-over-reverse pass that stores the inputs alone.

    The derivative of the gradient in reverse mode is :math:`v \mapsto ((\partial_\theta \nabla_\theta L)^\top v,
    (\partial_h \nabla_\theta L)^\top v)`. Reverse over reverse mode stores for it everything that the two passes of the
    gradient computed. Second derivatives are symmetric, so it is also the directional derivative of
    :math:`(\nabla_\theta L, \nabla_h L)` along v in θ: forward over reverse mode, which needs the inputs alone. With
    `part`, that derivative is taken on `part(batch)` in place of the batch.

    A gradient changed by a `custom_vjp` of the user's (reversed, clipped) may be the gradient of no function, with a
    derivative that is not symmetric: then this is plain reverse over reverse mode.

    References:
      Kemaev et al. Scalable Meta-Learning via Mixed-Mode Differentiation. 2025. arXiv:2505.00793
    """
    rest = (hparams, batch, model_state)
    rule = untrusted_rule(loss, params, *rest)
    if rule is not None:
        if part is not None:
            raise JaxhpoError(
                f"`Unroll(hvp_fraction=...)` takes Hessian products of the train loss, but it contains {rule}, with a "
                "derivative rule of its own, which may have no Hessian: omit `hvp_fraction`."
            )
        out, grad = value_and_grad(loss, params, *rest)
        return out, checkpoint_name(grad, GRADIENT)
    params = _cast_to_vary(loss, params, *rest)
    pure, consts = closure_convert(lambda params, rest: loss(params, *rest), params, rest)
    on_all = on_part = lambda params, given: pure(given[0], params, given[2])
    part_consts = []
    if part is not None:
        pure_part, part_consts = closure_convert(lambda p, h, b, state: loss(p, h, part(b), state), params, *rest)
        on_part = lambda params, given: pure_part(given[1], params, *given[2])  # noqa: E731
    given = reverse_only((params, (consts, part_consts, rest)), "a schedule of `Unroll` that keeps inner gradients")
    out, grad = _mixed((on_all, on_part), *given)
    # NaN is added before the name: if the gradient is stored, the loss is not recomputed.
    return out, checkpoint_name(_spread_nan(out[0], cast_like(grad, params)), GRADIENT)


def _cast_to_vary(loss, params, *rest):
    # Inside `shard_map`, the gradient of a device-varying loss at device-invariant parameters is summed over devices:
    # separate inner problems would silently become one. A loss with a `pmean` does not vary.
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return params
    value = jax.eval_shape(lambda: loss(params, *rest)[0])
    return cast_varying(params, varying_axes(value))


@trust
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(losses, params, rest):
    return jax.value_and_grad(losses[0], has_aux=True)(params, rest)


def _mixed_fwd(losses, params, rest):
    perturbed = Flags(tuple(bool(x.perturbed) and has_derivative(x.value) for x in jax.tree.leaves(rest)))
    params, rest = custom_vjp_primal_tree_values((params, rest))
    # Not `_mixed(...)`: forward mode over this rule, as in a Hessian, must find plain operations.
    return jax.value_and_grad(losses[0], has_aux=True)(params, rest), (params, rest, perturbed)


def _mixed_bwd(losses, residuals, cotangents):
    # With (c, v) the cotangents of L and ∇_θ L, and z the perturbed ones of h, batch and model state, the cotangent of
    # θ is c ∇_θ L + ∇²_θθ L v, and that of z is c ∇_z L + ∇²_zθ L v. By symmetry
    #     (∇²_θθ L v, ∇²_zθ L v) = d/dε (∇_θ L, ∇_z L)(θ + ε v, z) at ε = 0,
    # a JVP of one gradient.
    params, rest, flags = residuals
    perturbed = jax.tree.unflatten(jax.tree.structure(rest), flags.values)
    z, combine = partition(rest, perturbed)

    of_loss, of_grad = cotangents
    pulled = []
    if not all(map(_is_zero, jax.tree.leaves(of_grad))):
        v = _arrays(of_grad, params)
        grads = jax.grad(lambda params, z: losses[1](params, combine(z))[0], argnums=(0, 1))
        pulled.append(jax.jvp(lambda params: grads(params, z), (params,), (v,))[1])
    if not all(map(_is_zero, jax.tree.leaves(of_loss))):
        out, pullback = jax.vjp(lambda params, z: losses[0](params, combine(z)), params, z)
        pulled.append(pullback(_arrays(of_loss, out)))
    by_params, by_z = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), pulled)
    by_z = iter(by_z)
    return by_params, jax.tree.map(lambda p: next(by_z) if p else None, perturbed)


_mixed.defvjp(_mixed_fwd, _mixed_bwd, symbolic_zeros=True)


def _is_zero(x):
    return isinstance(x, SymbolicZero)


def _arrays(cotangents, primals):
    return jax.tree.map(lambda c, primal: as_array(c, varying_axes(primal)), cotangents, primals)
