"""The settings of an optax transformation, which it keeps in the closures of its functions."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DEEPEST = 12  # closures within closures


def fingerprint(optimizer: Any) -> dict[str, str]:
    """Every number and name found in the closures of the optimiser's update, by the function that holds it.

    Enough to tell a user that another learning rate is in use; two optimisers may agree in it and differ all the same.

    Example:
      >>> import optax
      >>> fingerprint(optax.sgd(0.5))["scale.step_size"]
      '-0.5'
    """
    found: dict[str, str] = {}

    def note(name, text):
        count = sum(key == name or key.startswith(f"{name} (") for key in found)
        found[f"{name} ({count + 1})" if count else name] = text

    def visit(value, name, depth):
        if depth > DEEPEST:
            return
        if isinstance(value, functools.partial):
            value = (value.func, value.args, value.keywords)
        if isinstance(value, types.FunctionType):
            owner = value.__qualname__.split(".<locals>")[0].rpartition(".")[2]
            note(f"{name}()" if name else "update", owner)
            for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                visit(_content(cell), f"{owner}.{variable}", depth + 1)
        elif isinstance(value, (bool, int, float, complex, str, type(None), np.generic)):
            note(name, repr(value))
        elif isinstance(value, (np.ndarray, jax.Array)):
            value = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
            note(name, str(np.asarray(value)) if value.size <= 8 else f"{value.dtype}{list(value.shape)}")
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                visit(value[key], f"{name}[{key!r}]", depth + 1)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item, name, depth + 1)
        elif dataclasses.is_dataclass(value):
            visit({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, name, depth + 1)
        else:
            note(name, type(value).__name__)

    visit(optimizer.update, "", 0)
    return found


def described(functions: Any) -> str | None:
    """What prints of a tree of functions, without the addresses, which differ from process to process."""
    return None if functions is None else re.sub(r" at 0x[0-9a-f]+", "", repr(functions))


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # of a variable that was never set
        return None
