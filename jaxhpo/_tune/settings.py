"""Settings of an optax transformation, read from its functions and its first state."""

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxhpo._core.processes import whole
from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree
from jaxhpo._tune.checkpoint import is_spread
from jaxhpo._tune.history import distinct, key_data
from jaxhpo._tune.program import digest

SHORT = 8  # entries of arrays and lists: of longer ones a digest is told
DEEPEST = 16  # nesting of optax's own optimisers and schedules; a bound, as a function may close over itself


def fingerprint(optimizer: Any) -> dict[str, str]:
    """Returns every number and name in the closures of the optimiser's update, by the function that holds it.

    Of more than eight numbers in a list there is a digest. Enough to tell a user that another learning rate is in use;
    two different optimisers may have the same fingerprint.

    Example:
      >>> import optax
      >>> fingerprint(optax.sgd(0.5))["scale.step_size"]
      '-0.5'
    """
    return distinct(_settings(optimizer.update, "", ()))


def _settings(value, name, path) -> Iterator[tuple[str, str]]:
    if len(path) > DEEPEST or id(value) in path:
        return
    path = (*path, id(value))
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    elif callable(value) and not isinstance(value, (types.FunctionType, type)):
        value = inspect.unwrap(value)  # of a function that was jitted
    if isinstance(value, types.FunctionType):
        owner = value.__qualname__.split(".<locals>")[0].rpartition(".")[2]
        yield f"{name}()" if name else "update", owner
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts = [(f"{owner}.{variable}", _content(cell)) for variable, cell in cells]
    elif isinstance(value, (tuple, list, dict)) and len(value) > SHORT and _is_table(value):
        parts = []
        yield name, f"{len(value)} numbers, {_hash(repr(value).encode())}"
    elif isinstance(value, (tuple, list)):
        parts = [(name, item) for item in value]
    elif isinstance(value, dict):
        parts = [(f"{name}[{key!r}]", value[key]) for key in sorted(value, key=str)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{name}[{f.name!r}]", getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, types.MethodType):
        parts = [(name, value.__func__), *_fields(value.__self__)]
    elif callable(value) and not isinstance(value, type):
        yield name or "update", type(value).__name__
        parts = _fields(value)
    else:
        parts = []
        yield name, _text(value)
    for part, content in parts:
        yield from _settings(content, part, path)


def _fields(value) -> list[tuple[str, Any]]:
    return [(f"{type(value).__name__}.{field}", x) for field, x in sorted(getattr(value, "__dict__", {}).items())]


def held(opt_state: PyTree) -> dict[str, str]:
    """Returns the entries of an optimiser's first state, where settings such as those of `inject_hyperparams` lie."""
    return {name: _held(x) for name, x in _leaves(opt_state).items() if not is_spread(x)}


def retaken(opt_state: PyTree, first: PyTree, before: dict[str, str]) -> tuple[PyTree, list[str]]:
    """Returns the state of a resumed run with the settings of this call, and notes on those that it has left behind.

    All else that an optimiser's first state depends on is the same in both calls: what differs is a setting. It is
    taken where the run has never changed it.

    Args:
      opt_state: of the checkpoint.
      first: the first state of this call.
      before: `held(...)` of the call that saved.
    """
    starts, here, leaves, notes = _leaves(first), held(first), _leaves(opt_state), []
    for name, leaf in leaves.items():
        if before.get(name) != here.get(name):
            if _held(leaf) == before.get(name):
                leaves[name] = starts[name]
            else:
                notes.append(f"{name} goes on from {_held(leaf)}")
    return jax.tree.unflatten(jax.tree.structure(opt_state), leaves.values()), notes


def _leaves(opt_state) -> dict[str, Any]:
    return distinct(named_leaves(opt_state, "opt_state"))


def _held(x) -> str:
    return _text(x) if x.size <= SHORT else f"{x.dtype}{list(x.shape)}, {digest(x)[:12]}"


def _text(value) -> str:
    if isinstance(value, (bool, int, float, complex, str, type(None), np.generic)):
        return repr(value)
    if not isinstance(value, (np.ndarray, jax.Array)):
        return type(value).__name__
    value = whole(key_data(value))
    if value.size > SHORT:
        return f"{value.dtype}{list(value.shape)}, {_hash(value.tobytes())}"
    return np.array2string(value, floatmode="unique") if value.shape else str(value[()])


def _hash(data: bytes) -> str:
    return f"SHA-256 {hashlib.sha256(data).hexdigest()[:12]}"


def _is_table(value) -> bool:
    values = value.values() if isinstance(value, dict) else value
    return all(isinstance(x, (int, float, complex, np.generic)) for x in values)


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that was never set
        return None


def described(functions: Any) -> str | None:
    """Returns the repr of a tree of functions without addresses, which differ from process to process."""
    return None if functions is None else re.sub(r" at 0x[0-9a-f]+", "", repr(functions))
