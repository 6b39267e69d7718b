"""What the methods share that move hyperparameters at random, in unconstrained units."""

from __future__ import annotations

import jax
import optax

from jaxhpo._core.transforms import to_unconstrained
from jaxhpo._core.tree import add_scaled, cast_like, upcast, zeros_like
from jaxhpo._core.types import PyTree


def normal(key: jax.Array, like: PyTree) -> PyTree:
    """Independent standard normal numbers in the tree, shapes and types of `like`."""
    return optax.tree.random_like(key, like, sampler=jax.random.normal)


def mean_of_normals(weights: jax.Array, keys: jax.Array, like: PyTree) -> PyTree:
    """(1/K) Σ_k weights[k] · normal(keys[k]), drawn again one by one, so that K of them are never held at once."""

    def add(total, x):
        weight, key = x
        return add_scaled(total, weight / len(keys), normal(key, like)), None

    # In float32 at least: in bfloat16 a long sum no longer grows.
    return cast_like(jax.lax.scan(add, upcast(zeros_like(like)), (weights, keys))[0], like)


def in_natural_units(transforms: PyTree, hparams: PyTree, gradient: PyTree) -> PyTree:
    """A gradient with respect to unconstrained u as one with respect to h: (du/dh)ᵀ g."""
    return jax.vjp(lambda h: to_unconstrained(transforms, h), hparams)[1](gradient)[0]
