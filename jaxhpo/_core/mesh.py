"""Types on a mesh: the axes over which an array varies under `shard_map`, or is sharded where they are `Explicit`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes, explicit_axes, reshard

from jaxhpo._core.tree import ravel_pytree
from jaxhpo._core.types import PyTree


def varying_axes(tree: PyTree) -> frozenset:
    """Mesh axes of an enclosing `shard_map` over which any leaf varies."""
    return frozenset().union(*(_varying(_typeof(x)) for x in jax.tree.leaves(tree)))


def cast_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """Casts every leaf to vary over (at least) the given mesh axes; values are unchanged."""

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return _to_varying(x, missing) if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def drop_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """Inverse of `cast_varying` for leaves whose values are equal along the axes: takes their mean."""

    def drop(x):
        extra = tuple(sorted(axes & varying_axes(x)))
        return jax.lax.pmean(x, extra) if extra else x

    return jax.tree.map(drop, tree) if axes else tree


def as_array(cotangent: Any, axes: frozenset) -> jax.Array:
    """A cotangent, or zeros where it is a symbolic zero, that varies over (at least) the given mesh axes."""
    if isinstance(cotangent, SymbolicZero):
        aval: Any = cotangent.aval
        if aval.dtype == jax.dtypes.float0:
            cotangent = np.zeros(aval.shape, aval.dtype)
        else:
            sharding = aval.sharding if any(aval.sharding.spec) else None  # over `Explicit` mesh axes
            cotangent = jax.lax.full(aval.shape, 0, aval.dtype, sharding=sharding)
    return cast_varying(cotangent, axes)


def everywhere(x: jax.Array) -> NamedSharding | None:
    """The sharding of what lies whole on every device, where x is sharded over `Explicit` mesh axes; else None."""
    sharding = _explicit(x)
    return sharding and NamedSharding(sharding.mesh, PartitionSpec())


def gathered(x: jax.Array) -> jax.Array:
    """Gathers an array that is sharded over `Explicit` mesh axes."""
    return x if everywhere(x) is None else reshard(x, everywhere(x))


def whole(tree: PyTree) -> PyTree:
    """Has the leaves lie whole on every device, where mesh axes are `Auto` and the compiler would choose."""

    def constrained(x):
        mesh = jax.typeof(x).sharding.mesh
        if set(mesh.axis_types) != {AxisType.Auto}:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(constrained, tree)


def sharded_like(x: jax.Array, like: Any) -> jax.Array:
    """Shards an array over `Explicit` mesh axes as `like`, an array or its type."""
    sharding = _explicit(like)
    if sharding is None:
        return gathered(x)
    return x if _explicit(x) == sharding else reshard(x, sharding)


def ravel(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """`ravel_pytree`, also of leaves that are sharded over `Explicit` mesh axes.

    JAX refuses to join a sharded axis with another. So the vector lies whole on every device, and the inverse gives
    each leaf its sharding back.
    """
    types = jax.tree.map(jax.typeof, tree)
    flat, unravel = ravel_pytree(jax.tree.map(gathered, tree))
    return flat, lambda flat: jax.tree.map(sharded_like, unravel(flat), types)


def rows(x: jax.Array, index: Any) -> jax.Array:
    """`x[index]` for a vector of indices: sharded like x, but for the first axis where its shards would be unequal."""
    sharding = _explicit(x)
    if sharding is None:
        return x[index]
    shards = x.shape[0] // sharding.shard_shape(x.shape)[0]
    first, *others = sharding.spec
    spec = PartitionSpec(None if len(index) % shards else first, *others)
    return x.at[index].get(out_sharding=NamedSharding(sharding.mesh, spec))


def on_auto_axes(solve: Callable, matvec: Callable, b: PyTree, arrays: PyTree) -> tuple[PyTree, Any]:
    """`solve(matvec, b, arrays)` with `Explicit` mesh axes made `Auto` in `solve`, but not in `matvec`.

    So the algebra of a linear solver need not say how each of its results is sharded: the compiler decides, as for
    `Auto` axes. `solve` returns a solution like b, and what lies whole on every device; it must not close over arrays.
    """
    placed = jax.tree.map(lambda x: jax.typeof(x).sharding, b)
    mesh = max((s.mesh for s in jax.tree.leaves(placed)), key=lambda mesh: len(mesh.axis_names))
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    if not axes:
        return solve(matvec, b, arrays)
    placed = jax.tree.map(lambda s: NamedSharding(mesh, s.spec), placed)
    typed = explicit_axes(matvec, axes=axes, in_sharding=(placed,))
    outs = (placed, NamedSharding(mesh, PartitionSpec()))
    untyped: Any = auto_axes(functools.partial(solve, typed), axes=axes, out_sharding=outs)
    return untyped(b, arrays)


def _to_varying(x: jax.Array, axes: tuple) -> jax.Array:
    lax: Any = jax.lax
    return lax.pcast(x, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, axes)  # jax 0.7


def _varying(aval: Any) -> frozenset:
    if hasattr(aval, "manual_axis_type"):
        return aval.manual_axis_type.varying if aval.manual_axis_type is not None else frozenset()
    return aval.vma or frozenset()  # before jax 0.10


def _typeof(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct | ShapedArray) else jax.typeof(x)


def _explicit(x):
    sharding = _typeof(x).sharding
    return sharding if sharding is not None and any(sharding.spec) else None
