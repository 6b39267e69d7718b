"""One row of history an outer step, and its line of JSON: read back to the bit."""

from __future__ import annotations

import collections
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.tree import names
from jaxhpo._core.types import PyTree
from jaxhpo._tune.processes import whole

EXTRAS = ("hparams", "hypergradient", "linear_solves")  # what a row may hold beside
LARGE = 1024  # entries: larger leaves are kept as their extremes, quartiles and norm
SAMPLE = 2048  # entries, evenly spread, of which quartiles are taken: those of all would cost milliseconds a step


def summary(leaf: Any) -> np.ndarray:
    """A leaf as it is recorded: the whole of a small one; of a large one minimum, quartiles, maximum and norm."""
    leaf = whole(leaf)
    if leaf.size <= LARGE:
        return leaf.copy()
    flat = leaf.ravel()
    ordered = np.sort(flat[:: -(-flat.size // SAMPLE)])
    quartiles = ordered[np.arange(1, 4) * (len(ordered) - 1) // 4]
    wide = flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat  # squares of float16 overflow
    return np.array([flat.min(), *quartiles, flat.max(), np.sqrt(np.dot(wide, wide))], wide.dtype)


def to_numpy(x: Any) -> np.ndarray:
    """An array, or a key's data."""
    return np.array(whole(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x))


def encode(step: int, row: dict[str, Any]) -> bytes:
    """The row as one line of JSON; what is not finite as a string ("nan", "inf"), which JSON has no number for."""
    fields = {name: _plain(leaf) for name, leaf in zip(_names(row), jax.tree.leaves(row), strict=True)}
    return (json.dumps({"step": step, **fields}, allow_nan=False) + "\n").encode()


def decode(line: bytes, like: PyTree) -> PyTree:
    """The row that `encode` wrote, with the structure and the types of `like`; ValueError where it has others."""
    fields = json.loads(line)
    columns = _names(like)
    if other := fields.keys() ^ {"step", *columns}:
        raise ValueError(f"{sorted(other)[0]!r} is in one of them only")
    rows = zip(columns, jax.tree.leaves(like), strict=True)
    leaves = [_like(name, _array(fields[name], leaf.dtype), leaf) for name, leaf in rows]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _like(name, array, like):
    if array.size == like.size == 0:  # JSON's lists tell no more than the axes down to the first of length zero
        return array.reshape(like.shape)
    if array.shape != like.shape:
        raise ValueError(f"{name!r} has the shape {list(array.shape)} there, {list(like.shape)} here")
    return array


def _names(row) -> list[str]:
    """Of each leaf, without repeating one: two leaves of a tree may print alike."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    # A dictionary's leaves come in the order of its sorted keys.
    for name in (name for key in sorted(row) for name in names(row[key], key)):
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _plain(leaf) -> Any:
    """Numbers that JSON can hold and Python reads back exactly: every float is a float64."""
    leaf = np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _plain(np.stack([np.real(leaf), np.imag(leaf)], -1))
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.tolist()
    values = leaf.astype(np.float64)
    return values.tolist() if np.isfinite(values).all() else _spelled(values.tolist())


def _spelled(value):
    if isinstance(value, list):
        return [_spelled(x) for x in value]
    return value if np.isfinite(value) else str(value)


def _array(value, dtype) -> np.ndarray:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = _array(value, np.float64)
        whole = np.empty(parts.shape[:-1], dtype)  # a sum would make NaN of an infinity, and lose the sign of zero
        whole.real, whole.imag = parts[..., 0], parts[..., 1]
        return whole
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(_read(value), np.float64).astype(dtype)
    return np.asarray(value, dtype)


def _read(value):
    return [_read(x) for x in value] if isinstance(value, list) else float(value)
