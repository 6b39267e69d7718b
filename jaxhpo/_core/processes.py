"""Multi-host agreement; a no-op with one process."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxhpo._core.errors import JaxhpoError


def on_any(yes: bool) -> bool:
    """Returns whether the argument is True on any process: clocks differ, and a signal may reach one process only."""
    return yes if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(yes)).any())


def from_first(fn: Callable[[], Any]) -> Any:
    """Calls `fn` on process 0 only; returns its result, or raises its exception, on all processes.

    Args:
      fn: returns what JSON can hold; raises `JaxhpoError` or `OSError`.
    """
    if jax.process_count() == 1:
        return fn()
    message: Any = None
    if jax.process_index() == 0:
        try:
            message = {"result": fn()}
        except (JaxhpoError, OSError) as error:
            message = {"refused": isinstance(error, JaxhpoError), "error": str(error)}
    message = _broadcast(message)
    if "error" in message:
        raise JaxhpoError(message["error"]) if message["refused"] else OSError(message["error"])
    return message["result"]


def _broadcast(message):
    """Sends the length, then the JSON text: all processes must know the shape of what they receive."""
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text), np.int32)))
    text = text if jax.process_index() == 0 else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())


def whole(x: Any) -> np.ndarray:
    """Returns the array in NumPy; gathers it where parts of it lie with other processes."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
