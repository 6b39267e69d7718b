"""The history of a run as a table, from a result or from a run directory."""

import contextlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import describe
from jaxhpo._tune.checkpoint import DamagedError, Header, absolute, checkpoints, header_of, rows_of
from jaxhpo._tune.history import NUMBER, columns, printable
from jaxhpo._tune.run_dir import HISTORY, STATUS, content, in_use, lines_of
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
    folder = folder_of(source)
    rows = _rows(folder)
    path, last = folder / HISTORY, rows[max(rows)]
    try:
        lost = {name: _blank(value) for name, value in last.items()}
        complete = [rows.get(i, lost) for i in range(max(rows) + 1)]
        wanted = (*last, "value", "score", "seconds")  # the last three are in every row
        return {printable(name): _numbers([row[name] for row in complete]) for name in wanted if name != "step"}
    except (ValueError, KeyError, TypeError) as error:
        raise JaxhpoError(f"{path} is no history of a run ({error!r}): name the `run_dir` of a `tune`.") from error


def folder_of(source: Any) -> pathlib.Path:
    """Returns the path of a folder, or raises where it is none."""
    try:
        return absolute(source)
    except (TypeError, RuntimeError) as error:
        raise JaxhpoError(f"`source` got {describe(source)}: give the result of `tune`, or its `run_dir`.") from error


def _rows(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Returns the rows by their number: of the newest checkpoint those that are proven, beyond it what can be read."""
    header = newest_header(folder)
    proven = {} if header is None else lines_of(folder, header)
    try:
        # A run in progress may have written half of the last line.
        lines = [line for line in (folder / HISTORY).read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except OSError as error:
        if not proven:
            message = f"{folder} holds no history of a run ({error}): name the `run_dir` of a `tune`."
            raise JaxhpoError(message) from error
        lines = []
    if not lines and not proven:
        raise JaxhpoError(f"{folder / HISTORY} is empty: no outer step has ended yet.")
    beyond = ((NUMBER.match(line), line) for line in lines)
    after = {int(n[1]): line for n, line in beyond if n and (header is None or int(n[1]) >= len(header.sums))}
    rows = {}
    for step, line in (proven | after).items():
        with contextlib.suppress(ValueError):
            rows[step] = json.loads(line)
    if not rows:
        raise JaxhpoError(f"{folder / HISTORY} is no history of a run: name the `run_dir` of a `tune`.")
    return rows


def newest_header(folder: pathlib.Path) -> Header | None:
    """Returns the header of the newest checkpoint whose header can be read."""
    for path in saved_in(folder):
        with contextlib.suppress(DamagedError, JaxhpoError):
            return header_of(path)
    return None


def saved_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints in a folder, of one process or of several, the newest first."""
    with contextlib.suppress(OSError):
        return checkpoints(folder)
    return []


def _blank(value) -> Any:
    """Returns what stands for a lost value: NaN for floats, zero for others."""
    return np.full(np.shape(value), np.nan if np.asarray(value).dtype.kind in "fUO" else 0).tolist()


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
    folder = absolute(folder)
    fields = status_of(folder)
    per_call = fields.get("steps_per_call", 1)
    per_call = per_call if isinstance(per_call, int) else 1
    status, message = (printable(str(fields.get(name, ""))) for name in ("status", "message"))
    # Asked only where it can be: for the moment of asking, no other process can take the folder.
    if status in ("", "running") and (running := in_use(folder)):
        return (
            f"going on (process {running}): {per_call * steps} of {printable(str(fields.get('num_steps', '?')))} steps"
        )
    text = f"{status.replace('_', ' ') or 'unknown'}: {message}"
    if status == "running":
        text = "cut off: it left no message, so it was killed"
    saved = max(map(rows_of, saved_in(folder)), default=0)
    if saved and (saved < steps or status == "running"):
        text += f". The same call goes on after {per_call * saved} outer steps, from the last checkpoint"
    header = newest_header(folder)
    return ". ".join([text, *map(printable, [] if header is None else header.settings.get("past", []))])


def status_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what the run wrote of its status; nothing where it did not."""
    with contextlib.suppress(ValueError):
        found = json.loads(content(folder / STATUS))
        return found if isinstance(found, dict) else {}
    return {}


def _numbers(values: list) -> np.ndarray:
    array = np.asarray(values)
    return array.astype(float) if array.dtype.kind in "UO" else array
