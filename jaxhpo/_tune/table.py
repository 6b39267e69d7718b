"""The history of a run as a table: of a result, or of a folder in which one is going on."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import names
from jaxhpo._core.validate import describe
from jaxhpo._tune.run_dir import STATUS, in_use
from jaxhpo._tune.tune import TuneResult


def history_table(source: TuneResult | str | os.PathLike) -> Any:
    """The history of a run, a row an outer step: a pandas `DataFrame` where pandas is installed, else a dict of arrays.

    A hyperparameter of several entries has a column for each, `hparams['rate'][0]`; one of more than 1024 has its
    minimum, quartiles and maximum.

    **Cost and bias**: reads one file.

    Args:
      source: what `tune` returned, or its `run_dir`, also while the run is going on.

    Returns:
      The table.

    Raises:
      JaxhpoError: neither, or a folder without a history.

    Example:
      >>> result = jaxhpo.tune(lambda h: jnp.sum(h**2), jnp.ones(2), optax.sgd(0.1), num_steps=3, progress=False)
      >>> table = jaxhpo.history_table(result)
      >>> print(np.round(table["hparams[0]"], 2).tolist())
      [1.0, 0.8, 0.64]

    References:
      McKinney. Data Structures for Statistical Computing in Python. 2010.
    """
    flat: dict[str, np.ndarray] = {}
    for name, values in history_columns(source).items():
        if values.ndim == 1:
            flat[name] = values
        for index in np.ndindex(values.shape[1:]) if values.ndim > 1 else ():
            flat[f"{name}[{', '.join(map(str, index))}]"] = values[(slice(None), *index)]
    try:
        import pandas
    except ImportError:
        return flat
    return pandas.DataFrame(flat)


def history_columns(source: TuneResult | str | os.PathLike) -> dict[str, np.ndarray]:
    """The history by the name of its leaves, each with a leading axis of outer steps."""
    if isinstance(source, TuneResult):
        fields = source.history.items()
        return {
            name: np.asarray(leaf)
            for key, tree in fields
            for name, leaf in zip(names(tree, key), jax.tree.leaves(tree), strict=True)
        }
    try:
        path = pathlib.Path(source) / "history.jsonl"
        # A run that is going on may be in the middle of a line.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except TypeError as error:
        raise JaxhpoError(f"`source` got {describe(source)}: give the result of `tune`, or its `run_dir`.") from error
    except OSError as error:
        raise JaxhpoError(f"{source} holds no history of a run ({error}): name the `run_dir` of a `tune`.") from error
    if not lines:
        raise JaxhpoError(f"{path} is empty: no outer step has ended yet.")
    try:
        rows = [json.loads(line) for line in lines]
        return {name: _numbers([row[name] for row in rows]) for name in rows[0] if name != "step"}
    except (ValueError, KeyError, TypeError) as error:
        raise JaxhpoError(
            f"{path} is no history of a run, or damaged ({type(error).__name__}: {error}): the same `tune` goes on "
            "from the last checkpoint, and mends it."
        ) from error


def standing(folder: str | os.PathLike, steps: int) -> str:
    """In words, how the run in a folder stands after so many rows of history, and where the same call goes on."""
    told, running = _status(pathlib.Path(folder)), in_use(pathlib.Path(folder))
    if running:
        return f"going on (process {running}): {steps} of {told.get('num_steps', '?')} steps"
    checkpoints = [path.name for path in pathlib.Path(folder).glob("state-*")]
    saved = max((int(name.split("-")[1].split(".")[0]) for name in checkpoints), default=0)
    status = told.get("status", "unknown")
    if status == "running":
        text = "cut off: nothing was left to tell why, so it was killed"
    else:
        text = f"{status.replace('_', ' ')}: {told.get('message', '')}"
    if saved < steps:
        text += f". The same call goes on after step {saved - 1}, from the last checkpoint" if saved else ""
    return text


def _status(folder) -> dict[str, Any]:
    try:
        return json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        return {}


def _numbers(values: list) -> np.ndarray:
    array = np.asarray(values)
    return array.astype(float) if array.dtype.kind in "UO" else array
