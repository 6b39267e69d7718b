"""The compiled outer step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._diagnose import diagnose
from jaxhpo._transforms import to_natural
from jaxhpo._tree import all_finite, differentiable_inputs, norm, upcast
from jaxhpo._types import PyTree


class State(NamedTuple):
    """All that an outer step depends on."""

    point: PyTree  # unconstrained hyperparameters
    opt_state: PyTree
    carry: PyTree
    key: jax.Array
    step: Any


class Report(NamedTuple):
    """What an outer step tells the host."""

    value: jax.Array
    hparams: PyTree
    hypergradient: PyTree
    hypergradient_norm: jax.Array
    finite: jax.Array
    info: PyTree


class Search:
    """The compiled outer step."""

    def __init__(self, evaluate, optimizer, transforms):
        self.evaluate, self.transforms = evaluate, transforms
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.step = jax.jit(self._step)

    def objective(self, point, carry, key):
        """`(point, carry, key) -> (value, (carry, info))` where it can be differentiated."""
        value, carry, info = self.evaluate.loss(to_natural(self.transforms, point), carry, key)
        return value, (carry, info)

    def _value_and_grad(self, point, carry, key):
        if self.evaluate.gradient is None:
            (value, (carry, info)), grad = jax.value_and_grad(self.objective, has_aux=True)(point, carry, key)
            return value, grad, carry, info
        hparams, pullback = jax.vjp(lambda u: to_natural(self.transforms, u), point)
        value, grad, carry, info = self.evaluate.gradient(hparams, carry, key)
        return value, pullback(grad)[0], carry, info

    def _step(self, state):
        key = jax.random.fold_in(state.key, state.step)
        value, grad, carry, info = self._value_and_grad(state.point, state.carry, key)
        updates, opt_state = self.optimizer.update(
            grad,
            state.opt_state,
            state.point,
            value=value,
            grad=grad,
            value_fn=lambda u: self.objective(u, state.carry, key)[0],
        )
        point = optax.apply_updates(state.point, updates)
        after = State(point, opt_state, carry, state.key, state.step + 1)
        finite = jnp.isfinite(value) & all_finite(grad) & all_finite(point)
        grad_norm = norm(upcast(grad))  # squares of float16 overflow
        return after, Report(value, to_natural(self.transforms, state.point), grad, grad_norm, finite, info)

    def structure(self, state):
        """A function that tells for each leaf whether its derivative can be non-zero; None where that is unknown."""
        if self.evaluate.gradient is not None:
            return None
        leaves, tree = jax.tree.flatten(state.point)

        def value(leaves):
            return self.objective(jax.tree.unflatten(tree, leaves), state.carry, state.key)[0]

        return lambda: differentiable_inputs(value, leaves)

    def diagnosis(self, state) -> str:
        """Where the step from `state` ceases to be finite."""
        if self.evaluate.gradient is not None:
            return "It comes from the `gradient` function that was given."
        key = jax.random.fold_in(state.key, state.step)
        return diagnose(lambda u: self.objective(u, state.carry, key)[0], state.point)
