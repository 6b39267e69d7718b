"""Types under `shard_map`, which say over which mesh axes an array varies from device to device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxhpo._core.types import PyTree


def varying_axes(tree: PyTree) -> frozenset:
    """Mesh axes of an enclosing `shard_map` over which any leaf varies."""
    types = [x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(tree)]
    return frozenset().union(*(t.manual_axis_type.varying for t in types if t.manual_axis_type is not None))


def cast_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """Casts every leaf to vary over (at least) the given mesh axes; values are unchanged."""

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

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
        cotangent = (np if aval.dtype == jax.dtypes.float0 else jnp).zeros(aval.shape, aval.dtype)
    return cast_varying(cotangent, axes)
