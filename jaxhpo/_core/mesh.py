"""Varying-axes types under `shard_map`."""

from __future__ import annotations

import jax

from jaxhpo._core.types import PyTree


def varying_axes(tree: PyTree) -> frozenset:
    """Mesh axes of an enclosing `shard_map` over which any leaf differs from device to device."""
    axes = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        # The attribute is `manual_axis_type.varying` from jax 0.10 on; it was `vma` before.
        manual = getattr(kind, "manual_axis_type", None)
        axes |= frozenset(manual.varying if manual is not None else getattr(kind, "vma", None) or ())
    return axes


def cast_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """Casts every leaf to vary over (at least) the given mesh axes; values are unchanged."""

    def cast(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def drop_varying(tree: PyTree, axes: frozenset) -> PyTree:
    """The inverse of `cast_varying` for leaves that hold equal values along the axes: their mean."""

    def drop(x):
        extra = tuple(sorted(axes & varying_axes(x)))
        return jax.lax.pmean(x, extra) if extra else x

    return jax.tree.map(drop, tree) if axes else tree
