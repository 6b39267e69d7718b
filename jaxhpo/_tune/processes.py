"""What several JAX processes, each of which runs the same program, must agree on. One process asks nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxhpo._core.errors import JaxhpoError


def on_any(yes: bool) -> bool:
    """Whether one process or more says so: clocks differ, and a signal comes where it comes."""
    return yes if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(yes)).any())


def from_first(fn: Callable[[], Any]) -> Any:
    """What `fn()` returns on process 0, where alone it runs, on all of them; raises on all what it raises there.

    Args:
      fn: returns what JSON can hold; raises `JaxhpoError` or `OSError`.
    """
    told: Any = None
    if jax.process_index() == 0:
        try:
            told = {"found": fn()}
        except (JaxhpoError, OSError) as error:
            told = {"refused": isinstance(error, JaxhpoError), "error": str(error)}
    told = _broadcast(told)
    if "error" in told:
        raise JaxhpoError(told["error"]) if told["refused"] else OSError(told["error"])
    return told["found"]


def _broadcast(message):
    if jax.process_count() == 1:
        return message
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    text = text if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())


def whole(x: Any) -> np.ndarray:
    """An array in NumPy; gathered where parts of it lie with other processes."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
