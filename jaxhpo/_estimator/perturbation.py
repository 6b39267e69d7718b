"""Random perturbations of hyperparameters in unconstrained units."""

from __future__ import annotations

import jax
import optax

from jaxhpo._core.transforms import to_unconstrained
from jaxhpo._core.tree import add_scaled, cast_like, upcast, zeros_like
from jaxhpo._core.types import PyTree


def normal(key: jax.Array, like: PyTree) -> PyTree:
    """Return independent standard normal numbers in the tree, shapes and dtypes of `like`."""
    return optax.tree.random_like(key, like, sampler=jax.random.normal)


def mean_of_normals(weights: jax.Array, keys: jax.Array, like: PyTree) -> PyTree:
    """Return (1/K) Σ_k w_k ε_k, where ε_k = normal(keys[k]) is drawn again, so that only one is in memory."""

    def add(total, x):
        weight, key = x
        return add_scaled(total, weight / len(keys), normal(key, like)), None

    # The sum is in float32 at least: in bfloat16 a long sum stops growing.
    return cast_like(jax.lax.scan(add, upcast(zeros_like(like)), (weights, keys))[0], like)


def in_natural_units(transforms: PyTree, hparams: PyTree, gradient: PyTree) -> PyTree:
    """Convert a gradient with respect to unconstrained u into one with respect to h: g_h = (du/dh)ᵀ g_u."""
    return jax.vjp(lambda h: to_unconstrained(transforms, h), hparams)[1](gradient)[0]
