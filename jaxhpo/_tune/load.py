"""The result of a run, read from its folder."""

import ast
import contextlib
import os
import re
from typing import Any

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._tune.checkpoint import DamagedError, damage_told, read
from jaxhpo._tune.run_dir import in_use
from jaxhpo._tune.table import folder_of, history_columns, saved_in, standing, status_of
from jaxhpo._tune.tune import Member, TuneResult

# A part of the path of a leaf: ['name'] or [0], or .name.
PART = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\]]*)\]|\.([^.\[]+)""")
ATTEMPTS = 3  # to read a checkpoint of a run that is going on, and replaces them


def load(run_dir: str | os.PathLike) -> TuneResult:
    """The result of the run in a folder, finished or not, also during the run: without its outer loss and data.

    A folder does not keep the types of containers. Dictionaries and objects with named parts are dictionaries, lists
    and tuples are lists; a key of JAX is its data. `hparams`, `carry` and `best_hparams` are those of the newest
    checkpoint that can be read, as NumPy arrays to the bit (None, and `best_value` infinite, before there is one).
    `history` holds all rows in the folder, of steps after the checkpoint, too; its numbers are float64 and integers.

    **Cost and bias**: reads one checkpoint and the history; takes nothing from a run that is going on.

    Args:
      run_dir: the folder.

    Returns:
      A `TuneResult`. Its status may also be "running", "killed" (it left no message), "raised" (an exception of yours)
      or "unknown"; `message` says where the same call continues.

    Raises:
      JaxhpoError: the folder holds no history of a run.

    Example:
      >>> import tempfile
      >>> folder, loss = tempfile.mkdtemp(), lambda h: jnp.sum(h["rate"] ** 2)
      >>> tuned = jaxhpo.tune(loss, {"rate": 1.0}, optax.sgd(0.1), num_steps=3, run_dir=folder, progress=False)
      >>> result = jaxhpo.load(folder)
      >>> result.status, len(result.history["value"]), bool(result.hparams["rate"] == tuned.hparams["rate"])
      ('finished', 3, True)

    References:
      McKinney. Data Structures for Statistical Computing in Python. 2010.
    """
    folder = folder_of(run_dir)
    columns = history_columns(folder)
    history = {root: nested(columns, root) for root in dict.fromkeys(re.split(r"[\[.]", name)[0] for name in columns)}
    steps = len(history["value"])
    status = str(status_of(folder).get("status", "unknown"))
    if status == "running" and not in_use(folder):
        status = "killed"
    message = standing(folder, steps)
    for path in saved_in(folder) * ATTEMPTS:
        with contextlib.suppress(DamagedError, JaxhpoError), damage_told():
            return _result(path, history, status, message)
    return TuneResult(None, None, None, float("inf"), -1, history, status, f"{message}. No checkpoint can be read")


def _result(path, history, status, message) -> TuneResult:
    """Returns the result as of a checkpoint."""
    header, arrays = read(path, lambda header, saved: None)
    # Types that NumPy does not know (bfloat16) are raw bytes on disk.
    typed = (x.view(t) if x.dtype.kind == "V" else x for x, t in zip(arrays, header.types, strict=True))
    state, members = dict(zip(header.names, typed, strict=True)), ()
    best, best_step = state["run['best']"], state["run['best_step']"]
    shapes = {state[f"run[{name!r}]"].shape for name in ("best", "best_step", "waited", "steps", "failed")}
    if shapes != {history["value"].shape[1:]}:
        raise DamagedError("its members are not those of the history")
    if best.shape:
        ends = _ends(header.settings, state, history["value"], status)
        members = tuple(Member(str(end), int(n)) for end, n in zip(ends, state["run['steps']"], strict=True))
    else:
        best, best_step = float(best), int(best_step)
    hparams, best_hparams = (nested(state, f"run[{name!r}]") for name in ("hparams", "best_hparams"))
    carry = nested(state, "run['state'].carry")
    return TuneResult(hparams, carry, best_hparams, best, best_step, history, status, message, members)


def _ends(settings, state, values, status) -> np.ndarray:
    """Returns the status of each member."""
    failed, waited, steps = (state[f"run[{name!r}]"] for name in ("failed", "waited", "steps"))
    patience = settings["patience"] or np.inf
    lowest = np.where(np.isfinite(values), values, np.inf)
    falls = (lowest.argmin(0) >= steps - patience) & (lowest.min(0) < np.inf) & (settings["monitor"] is not None)
    ended = np.where(waited >= patience, np.where(falls, "overfitting", "patience"), status)
    return np.where(failed, "not_finite", ended)


def nested(values: dict[str, Any], root: str) -> Any:
    """Returns the tree of the values whose names begin with the root: dictionaries and lists; None without any.

    Example:
      >>> nested({"h['a'][0]": 1, "h['a'][1]": 2, "h.b": 3, "other": 4}, "h")
      {'a': [1, 2], 'b': 3}
    """
    inside = {name[len(root) :]: x for name, x in values.items() if name.startswith(root)}
    tree: Any = {}
    for rest, value in inside.items():
        keys = [_key(part) for part in PART.finditer(rest)]
        if "".join(part[0] for part in PART.finditer(rest)) != rest.split(" (")[0] or (rest and not keys):
            continue  # of another root, which only begins alike
        if not keys:
            return value
        place = tree
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
    return _listed(tree) if tree else None


def _key(part: re.Match) -> Any:
    if part[2] is not None:
        return part[2]
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(part[1])
    return part[1]


def _listed(tree: Any) -> Any:
    """Returns a tree in which dictionaries of the keys 0, 1, … are lists."""
    if not isinstance(tree, dict):
        return tree
    tree = {key: _listed(x) for key, x in tree.items()}
    return [tree[i] for i in range(len(tree))] if tree.keys() == {*range(len(tree))} else tree
