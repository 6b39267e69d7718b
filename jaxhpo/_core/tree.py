"""Pytree algebra, names of leaves, hoisting of closed-over values, and casts between varying-axes types."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._core.types import PyTree

# --- algebra -----------------------------------------------------------------------------------------------------


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Sum of the products of all entries."""
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))


def norm(a: PyTree) -> jax.Array:
    """Euclidean norm over all entries."""
    return jnp.sqrt(vdot(a, a))


def add_scaled(a: PyTree, scale, b: PyTree) -> PyTree:
    """a + scale · b, in the types of a."""
    return jax.tree.map(lambda x, y: x + _in_type(scale, x) * y, a, b)


def scaled(scale, a: PyTree) -> PyTree:
    """scale · a, in the types of a."""
    return jax.tree.map(lambda x: _in_type(scale, x) * x, a)


def _in_type(scale, x):
    return scale.astype(x.dtype) if hasattr(scale, "astype") else scale


def zeros_like(a: PyTree) -> PyTree:
    """A tree of zeros of the same shapes and types."""
    return jax.tree.map(jnp.zeros_like, a)


def is_inexact(x) -> bool:
    """Whether a leaf is floating-point or complex, so that it can have a derivative."""
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def num_bytes(a: PyTree) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(a))


def all_finite(a: PyTree) -> jax.Array:
    """Whether every floating-point entry is finite."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a) if is_inexact(x)]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))


def upcast(a: PyTree) -> PyTree:
    """float16 and bfloat16 leaves as float32; others unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_inexact(x) and x.dtype.itemsize < 4 else x, a)


def cast_like(a: PyTree, like: PyTree) -> PyTree:
    """Floating-point leaves of `a` in the types of `like`: optimiser states keep their types under traced settings."""

    def cast(x, y):
        both_float = is_inexact(x) and is_inexact(y) and not jnp.iscomplexobj(x)
        return x.astype(y.dtype) if both_float and x.dtype != y.dtype else x

    return jax.tree.map(cast, a, like)


def names(tree: PyTree, root: str) -> list[str]:
    """The path of every leaf, as a user would write it: `hparams['log_lr']`."""
    return [root + jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def partition(tree: PyTree, perturbed: PyTree) -> tuple[list, Callable[[list], PyTree]]:
    """The leaves that `perturbed`, a tree of booleans, marks, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, m in enumerate(jax.tree.leaves(perturbed)) if m]

    def combine(moved):
        every = list(leaves)
        for i, leaf in zip(where, moved, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(structure, every)

    return [leaves[i] for i in where], combine


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flags:
    """Booleans that are part of a pytree's structure: a derivative rule may keep them among its residuals."""

    values: tuple[bool, ...]


# --- closures ----------------------------------------------------------------------------------------------------


# --- inputs that a rule treats as constants ------------------------------------------------------------------------


# --- varying axes (`shard_map`) --------------------------------------------------------------------------------------
