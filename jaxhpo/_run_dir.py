"""A run's whole state on disk: written under a temporary name, synced, renamed; no moment leaves half a file."""

from __future__ import annotations

import os
import pathlib
import tempfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._errors import JaxhpoError
from jaxhpo._tree import names
from jaxhpo._types import PyTree

_FILE = "state.npz"


def save(run_dir: str | os.PathLike, tree: PyTree) -> None:
    """Writes every array of `tree` to `run_dir/state.npz`, atomically; keys are stored as their data."""
    folder = pathlib.Path(run_dir)
    arrays = {f"{i} {name}": _to_numpy(x) for i, (name, x) in enumerate(_rows(tree))}
    temporary = folder / f"{_FILE}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / _FILE)


def make_folder(run_dir: str | os.PathLike) -> None:
    """Makes the folder; raises at once, and not after hours, where nothing can be written there."""
    try:
        folder = pathlib.Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, TypeError) as error:
        raise JaxhpoError(
            f"`run_dir` got {run_dir!r}, where no file can be written ({error}): name a folder."
        ) from error


def exists(run_dir: str | os.PathLike) -> bool:
    """Whether `save` has written to the folder."""
    return (pathlib.Path(run_dir) / _FILE).exists()


def load(run_dir: str | os.PathLike, like: PyTree, free_axis: str, settings: str) -> PyTree:
    """Reads what `save` wrote, in the structure of `like`.

    Args:
      run_dir: the folder.
      like: a tree of the same structure and shapes.
      settings: leaves whose names begin with this must hold the same values.
      free_axis: leaves whose names begin with this (`run['history']`) may have a leading axis of any length.

    Returns:
      The tree, with NumPy arrays and keys for leaves.

    Raises:
      JaxhpoError: the file cannot be read, or holds another tree or other settings; names the leaves.
    """
    path = pathlib.Path(run_dir) / _FILE
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise JaxhpoError(f"`run_dir`: {path} cannot be read ({error}): move it away to start anew.") from error
    rows = _rows(like)
    # Two leaves may have one name; their place tells them apart.
    arrays = {(name.split(" ", 1)[1], name): array for name, array in arrays.items()}
    if [name for name, _ in arrays] != [name for name, _ in rows]:
        other = sorted({name for name, _ in arrays} ^ {name for name, _ in rows})
        raise JaxhpoError(
            f"`run_dir`: {path} belongs to a run of another structure; they differ in {', '.join(other[:5])}. Use "
            f"another folder, or the hyperparameters, carry and optimiser of that run."
        )
    for (name, x), array in zip(rows, arrays.values(), strict=True):
        skip = 1 if name.startswith(free_axis) else 0
        if array.shape[skip:] != _data_shape(x)[skip:] and not name.startswith(settings):
            raise JaxhpoError(
                f"`run_dir`: `{name}` has shape {array.shape} in {path}, but {_data_shape(x)} here: use another folder."
            )
        if name.startswith(settings) and not np.array_equal(array, _to_numpy(x)):
            raise JaxhpoError(
                f"`run_dir`: the run in {path} began with another value of `{name}`, so its numbers mean something "
                f"else: use another folder, or the start (`hparams`), `key` and `transforms` of that run."
            )
    leaves = [_from_numpy(array, x) for (_, x), array in zip(rows, arrays.values(), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _rows(tree):
    return list(zip(names(tree, "run"), jax.tree.leaves(tree), strict=True))


def _is_key(x) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_numpy(x):
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _data_shape(x):
    return jax.eval_shape(jax.random.key_data, x).shape if _is_key(x) else np.shape(x)


def _from_numpy(array, like):
    if _is_key(like):
        impl = None if isinstance(like, jax.ShapeDtypeStruct) else jax.random.key_impl(like)
        return jax.random.wrap_key_data(array, impl=impl)
    # Types that NumPy does not know (bfloat16) come back as raw bytes.
    return array.view(like.dtype) if array.dtype.kind == "V" else array
