"""Pytree algebra, names of leaves, and partition into leaves that are perturbed and leaves that are not."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from jaxhpo._core.types import PyTree

# A context manager and decorator: numbers of several types mix, whatever `jax_numpy_dtype_promotion` allows the user.
# For arithmetic of this library and of optax, and for functions of the user's whose arguments are cast for them.
mixed_types = functools.partial(jax.numpy_dtype_promotion, "standard")

ravel_pytree: Callable[[PyTree], tuple[jax.Array, Callable]] = mixed_types()(jax.flatten_util.ravel_pytree)
norm: Callable[[PyTree], jax.Array] = mixed_types()(optax.tree.norm)
zeros_like: Callable[[PyTree], PyTree] = optax.tree.zeros_like
where: Callable[[Any, PyTree, PyTree], PyTree] = optax.tree.where


@mixed_types()
def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Sum of the products of all entries: elementwise, as `optax.tree.vdot` counts as a product of matrices."""
    return jnp.asarray(optax.tree.sum(optax.tree.mul(a, b)))


# optax's `add_scale`, `scale` and `cast_like` differ: under a traced scalar of a wider dtype, as a float64 step size,
# the leaves would take its dtype, and a cast would reach integer leaves.


@mixed_types()
def add_scaled(a: PyTree, scale, b: PyTree) -> PyTree:
    """a + scale · b, in the dtypes of a."""
    return jax.tree.map(lambda x, y: x + _in_dtype(scale, x) * y, a, b)


def scaled(scale, a: PyTree) -> PyTree:
    """scale · a, in the dtypes of a."""
    return jax.tree.map(lambda x: _in_dtype(scale, x) * x, a)


def _in_dtype(scale, x):
    return scale.astype(x.dtype) if hasattr(scale, "astype") else scale


def is_inexact(x) -> bool:
    """Returns whether a leaf is floating-point or complex, so that it can have a derivative."""
    return jnp.issubdtype(jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype, jnp.inexact)


def has_derivative(x) -> bool:
    """Returns whether a leaf is inexact and has an entry, so that something can depend on it."""
    return is_inexact(x) and jnp.size(x) > 0


def num_bytes(a: PyTree) -> int:
    """Bytes of all leaves, which are arrays or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(a))


def all_finite(a: PyTree) -> jax.Array:
    """Returns whether every floating-point entry is finite."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a) if is_inexact(x)]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))


def upcast(a: PyTree) -> PyTree:
    """Casts float16 and bfloat16 leaves to float32; leaves others unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_inexact(x) and x.dtype.itemsize < 4 else x, a)


def cast_like(a: PyTree, like: PyTree) -> PyTree:
    """Casts real floating-point leaves of `a` to the dtypes of `like`; leaves others unchanged."""

    def cast(x, y):
        both_float = is_inexact(x) and is_inexact(y) and not jnp.iscomplexobj(x)
        return x.astype(y.dtype) if both_float and x.dtype != y.dtype else x

    return jax.tree.map(cast, a, like)


def without_weak_types(a: PyTree) -> PyTree:
    """Removes JAX's weak types, which arrays made from Python numbers have and files do not keep."""
    return jax.tree.map(lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, a)


def normal(key: jax.Array, like: PyTree) -> PyTree:
    """Returns independent standard normal numbers in the tree, shapes and dtypes of `like`."""
    return optax.tree.random_like(key, like, sampler=jax.random.normal)


def named_leaves(tree: PyTree, root: str) -> list[tuple[str, Any]]:
    """Every leaf, with its path as a user would write it: `hparams['log_lr']`."""
    return [(root + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def names(tree: PyTree, root: str) -> list[str]:
    """The path of every leaf."""
    return [name for name, _ in named_leaves(tree, root)]


def partition(tree: PyTree, perturbed: PyTree) -> tuple[list, Callable[[list], PyTree]]:
    """Returns the leaves where `perturbed`, a tree of booleans, is True, and `combine`, which replaces those leaves."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, m in enumerate(jax.tree.leaves(perturbed)) if m]

    def combine(replacements):
        every = list(leaves)
        for i, leaf in zip(where, replacements, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(structure, every)

    return [leaves[i] for i in where], combine


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Flags:
    """Booleans that are part of a pytree's structure: a derivative rule may keep them among its residuals."""

    values: tuple[bool, ...]


def map_in_chunks(fn: Callable, xs: PyTree, size: int | None) -> PyTree:
    """`vmap(fn)(xs)`, `size` rows at a time; None takes all at once. `lax.map` refuses empty leaves."""
    num_rows = jax.tree.leaves(xs)[0].shape[0]
    if size is None or size >= num_rows:
        return jax.vmap(fn)(xs)
    end = num_rows // size * size
    chunks = jax.tree.map(lambda x: x[:end].reshape(end // size, size, *x.shape[1:]), xs)
    out = jax.tree.map(lambda x: x.reshape(end, *x.shape[2:]), jax.lax.map(jax.vmap(fn), chunks))
    if end == num_rows:
        return out
    last = jax.vmap(fn)(jax.tree.map(lambda x: x[end:], xs))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last)
