"""The history of a run as a table, from a result or from a run directory."""

import contextlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import describe
from jaxhpo._tune.history import columns
from jaxhpo._tune.run_dir import STATUS, in_use
from jaxhpo._tune.tune import SHARED, TuneResult


def history_table(source: TuneResult | str | os.PathLike) -> Any:
    """The history of a run, one row per outer step: a pandas `DataFrame`, or a dict of arrays without pandas.

    A hyperparameter of several entries has a column for each, `hparams['rate'][0]`; one that `tune` has summed up, of
    more than 1024 entries or one of many, has its minimum, quartiles, maximum and norm, `hparams['rate'].median`. In a
    population the first index is that of the member, as in `value[3]`; the table of one member is
    `history_table(result.member(3))`.

    **Cost and bias**: reads one file.

    Args:
      source: what `tune` returned, or its `run_dir`, also during the run.

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
        for index in np.ndindex(values.shape[1:]):
            flat[f"{name}[{', '.join(map(str, index))}]" if index else name] = values[:, *index]
    try:
        import pandas
    except ImportError:
        return flat
    return pandas.DataFrame(flat)


def history_columns(source: TuneResult | str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the history by the name of its leaves, each with a leading axis of outer steps."""
    if isinstance(source, TuneResult):
        return {name: np.asarray(leaf) for name, leaf in columns(source.history).items()}
    try:
        path = pathlib.Path(source) / "history.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1]  # a run in progress may have written half of the last line
    except TypeError as error:
        raise JaxhpoError(f"`source` got {describe(source)}: give the result of `tune`, or its `run_dir`.") from error
    except OSError as error:
        raise JaxhpoError(f"{source} holds no history of a run ({error}): name the `run_dir` of a `tune`.") from error
    if not lines:
        raise JaxhpoError(f"{path} is empty: no outer step has ended yet.")
    try:
        rows = [json.loads(line) for line in lines]
        wanted = (*rows[0], "value", "score", "seconds")  # the last three are in every row
        return {name: _numbers([row[name] for row in rows]) for name in wanted if name != "step"}
    except (ValueError, KeyError, TypeError) as error:
        raise JaxhpoError(
            f"{path} is no history of a run, or damaged ({type(error).__name__}: {error}): the same `tune` repairs it, "
            "from its checkpoint."
        ) from error


def columns_of_best(source: TuneResult | str | os.PathLike) -> tuple[dict[str, np.ndarray], str]:
    """Returns `history_columns`, of a population those of its best member, and in words which that is."""
    found = history_columns(source)
    score = found["score"]
    if score.ndim == 1:
        return found, ""
    best = int(np.where(np.isnan(score), np.inf, score).min(0).argmin())
    own = {name: x if name.split("[")[0] in SHARED else x[:, best] for name, x in found.items()}
    return own, f"member {best}, the best of {score.shape[1]}"


def standing(folder: str | os.PathLike, steps: int) -> str:
    """Describes the status of a run in a folder after so many history rows, and where the same call continues."""
    folder = pathlib.Path(folder)
    fields: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        fields = dict(json.loads((folder / STATUS).read_bytes()))
    if running := in_use(folder):
        return f"going on (process {running}): {steps} of {fields.get('num_steps', '?')} steps"
    status = str(fields.get("status", "unknown"))
    text = f"{status.replace('_', ' ')}: {fields.get('message', '')}"
    if status == "running":
        text = "cut off: it left no message, so it was killed"
    numbers = (path.name[6:14] for path in folder.glob("state-????????*"))
    saved = max((int(number) for number in numbers if number.isdecimal()), default=0)
    if 0 < saved < steps:
        text += f". The same call goes on after step {saved - 1}, from the last checkpoint"
    return text


def _numbers(values: list) -> np.ndarray:
    array = np.asarray(values)
    return array.astype(float) if array.dtype.kind in "UO" else array
