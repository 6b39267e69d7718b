"""History rows, and their lines of JSON, which are read back to the bit."""

import collections
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.tree import is_inexact, named_leaves
from jaxhpo._core.types import PyTree

EXTRAS = ("hparams", "hypergradient", "linear_solves", "agreement", "error")  # columns that `record` adds
ROW = 4096  # numbers that the hyperparameters of a row, or of a member's, take at most
LARGE = 1024  # entries: larger leaves are summed up, whatever there is room for
LINE = b'{"step": '  # begins each line
NUMBER = re.compile(LINE + rb"([0-9]{1,18})[,}]")
SAMPLE = 2048  # evenly spaced entries, from which quartiles are taken: those of all would cost milliseconds a step


class Summary(NamedTuple):
    """Summary of a large leaf, kept in its place by the history.

    Attributes:
      minimum: of all entries.
      lower_quartile: of every k-th entry, as are median and upper quartile.
      median: half of the entries are below.
      upper_quartile: three quarters of the entries are below.
      maximum: of all entries.
      norm: Euclidean, of all entries.
    """

    minimum: np.ndarray
    lower_quartile: np.ndarray
    median: np.ndarray
    upper_quartile: np.ndarray
    maximum: np.ndarray
    norm: np.ndarray


def largest_whole(sizes: Iterable[int]) -> int:
    """Returns L, where leaves of at most L entries are kept whole: as large as `LARGE` and `ROW` allow."""
    ordered = np.sort(np.asarray(list(sizes)))
    # With L = ordered[i], leaves up to the last one of that size are whole, and those after it summed up.
    last = np.searchsorted(ordered, ordered, side="right") - 1
    numbers = np.cumsum(ordered)[last] + len(Summary._fields) * (len(ordered) - 1 - last)
    return int(np.max(ordered[(numbers <= ROW) & (ordered <= LARGE)], initial=len(Summary._fields)))


def summary(leaf: np.ndarray, largest: int) -> np.ndarray | Summary:
    """Returns a copy of a leaf; the summary of one of more than `largest` entries."""
    if leaf.size <= largest:
        return leaf.copy()
    flat = leaf.ravel()
    ordered = np.sort(flat[:: -(-flat.size // SAMPLE)])
    quartiles = ordered[np.arange(1, 4) * (len(ordered) - 1) // 4]
    wide = flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat  # squares of float16 overflow
    numbers = (flat.min(), *quartiles, flat.max(), np.sqrt(np.dot(wide, wide)))
    return Summary(*(np.asarray(x, wide.dtype) for x in numbers))


def is_key(x: Any) -> bool:
    """Returns whether this is an array of typed keys, or its shape."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_data(x: Any) -> Any:
    """Returns the array, or the data of a key."""
    return jax.random.key_data(x) if is_key(x) else x


def encode(step: int, row: dict[str, Any]) -> bytes:
    """Returns the row as one line of JSON; NaN and infinities, which JSON lacks, as the strings "nan" and "inf"."""
    fields = {name: _plain(leaf) for name, leaf in columns(row).items()}
    return (json.dumps({"step": step, **fields}, allow_nan=False) + "\n").encode()


def decode(line: bytes | str, like: PyTree) -> PyTree:
    """Inverts `encode`, with the structure and the types of `like`; raises ValueError where they differ."""
    fields, wanted = json.loads(line), columns(like)
    if other := fields.keys() ^ {"step", *wanted}:
        raise ValueError(f"{sorted(other)[0]!r} is in one of them only")
    leaves = [_array(name, fields[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def blank(like: PyTree) -> PyTree:
    """Returns the row that stands for a lost one: NaN where there can be, zeros and False elsewhere."""
    return jax.tree.map(lambda x: np.full(x.shape, np.nan if is_inexact(x) else 0, x.dtype), like)


def proven(texts: Iterable[bytes], sums: Sequence[int]) -> dict[int, bytes]:
    """Returns, by their number, the lines of the texts whose CRC-32 is that of the row; stops when it has them all."""
    found: dict[int, bytes] = {}
    for text in texts:
        if len(found) == len(sums):
            break
        for line in text.split(b"\n"):
            line = line.strip()  # an editor may have written other line ends
            if (number := NUMBER.match(line)) and (step := int(number[1])) < len(sums):
                if zlib.crc32(line) == sums[step]:
                    found[step] = line
    return dict(sorted(found.items()))


def printable(text: str) -> str:
    """Returns a text of others' files as a terminal may have it: what it would obey is written as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def ranges(numbers: Iterable[int]) -> str:
    """Returns numbers in words.

    Example:
      >>> ranges([0, 3, 4, 5])
      '0, 3-5'
    """
    runs: list[list[int]] = []
    for n in numbers:
        if not runs or n != runs[-1][-1] + 1:
            runs.append([n, n])
        runs[-1][-1] = n
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a row, or of a whole history, by the name of their column."""
    # A dictionary's leaves are in the order of its sorted keys.
    return distinct(pair for key in sorted(row) for pair in named_leaves(row[key], key))


def distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns values by name, each under a name of its own: two leaves of a tree may print alike."""
    counts: collections.Counter[str] = collections.Counter()
    found = {}
    for name, value in pairs:
        counts[name] += 1
        found[name if counts[name] == 1 else f"{name} ({counts[name]})"] = value
    return found


def _plain(leaf) -> Any:
    """Returns numbers that JSON can hold and Python reads back exactly: every float becomes a float64."""
    leaf = np.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = np.stack([np.real(leaf), np.imag(leaf)], -1)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.tolist()
    values = leaf.astype(np.float64)
    finite = np.isfinite(values)
    return values.tolist() if finite.all() else np.where(finite, values.astype(object), values.astype(str)).tolist()


def _array(name, value, like) -> np.ndarray:
    array = np.asarray(value, np.float64 if jnp.issubdtype(like.dtype, jnp.inexact) else like.dtype)
    if array.size == like.size == 0:  # lists hold only the axes up to the first of length zero
        return np.empty(like.shape, like.dtype)
    if jnp.issubdtype(like.dtype, jnp.complexfloating):
        array = array.view(np.complex128)[..., 0]  # a sum would make NaN of an infinity, and lose the sign of zero
    if array.shape != like.shape:
        raise ValueError(f"{name!r} has the shape {list(array.shape)} there, {list(like.shape)} here")
    return array.astype(like.dtype)
