"""Settings of an optax transformation, read from the closures of its functions."""

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxhpo._tune.history import distinct, key_data
from jaxhpo._tune.processes import whole

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
    return distinct(_settings(optimizer.update, "", 0))


def _settings(value, name, depth) -> Iterator[tuple[str, str]]:
    if depth > DEEPEST:
        return
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
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
    else:
        parts = []
        yield name, _text(value)
    for part, content in parts:
        yield from _settings(content, part, depth + 1)


def _text(value) -> str:
    if isinstance(value, (bool, int, float, complex, str, type(None), np.generic)):
        return repr(value)
    if not isinstance(value, (np.ndarray, jax.Array)):
        return type(value).__name__
    value = whole(key_data(value))
    if value.size > SHORT:
        return f"{value.dtype}{list(value.shape)}, {_hash(value.tobytes())}"
    return np.array2string(value, floatmode="unique")


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
