"""Multi-host agreement; a no-op with one process."""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree

MOST_BYTES = 200  # of an exception's text, as it is told to other processes


def on_any(fn: Callable[[], bool]) -> bool:
    """Returns whether `fn()` is True on any process, as clocks and signals differ; what one raises ends all of them."""
    if jax.process_count() == 1:
        return fn()
    yes, text, own = False, b"", None
    try:
        yes = fn()
    except (Exception, KeyboardInterrupt) as error:
        own, text = error, f"{type(error).__name__}: {error}".encode()[:MOST_BYTES]
    told = np.frombuffer(bytes([yes]) + text.ljust(MOST_BYTES, b"\0"), np.uint8)
    every = multihost_utils.process_allgather(told)
    if own is not None:
        raise own
    for index, (_, *others) in enumerate(every.tolist()):
        if any(others):
            text = bytes(others).rstrip(b"\0").decode(errors="replace")
            raise JaxhpoError(f"The run ends on all processes, as process {index} raised {text}")
    return bool(every[:, 0].any())


def check_same(arguments: dict[str, Any]) -> None:
    """Raises on all processes where an argument is another on one of them.

    Arrays of which each process holds a part are compared by type and sharding, all others by their values.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack([np.frombuffer(_digest(argument), np.uint8) for argument in arguments.values()])
    every = multihost_utils.process_allgather(digests)  # (processes, arguments, 32)
    same = (every == every[0]).all((0, 2))
    if not same.all():
        differing = "`, `".join(name for name, s in zip(arguments, same, strict=True) if not s)
        raise JaxhpoError(
            f"The {jax.process_count()} JAX processes were given different `{differing}`, so each would compute "
            "something else, or wait for the others without end: make the same call on all of them. (What is drawn at "
            "random, or read from the clock: `jax.experimental.multihost_utils.broadcast_one_to_all(value)`.)"
        )


def check_same_value(value: Any) -> None:
    """Raises on all processes where the outer loss, shape () or (members,), is another on one of them."""
    if jax.process_count() == 1:
        return
    every = multihost_utils.process_allgather(whole(value))
    # Hosts of two kinds may round differently.
    if not np.allclose(every, every[0], rtol=float(np.finfo(every.dtype).eps) ** 0.5, atol=0, equal_nan=True):
        raise JaxhpoError(
            f"The outer loss of the first step is {every.tolist()} on processes 0 to {len(every) - 1}: their losses "
            "close over different values. If each process holds a part of the data, make one array of the parts: "
            "`jax.make_array_from_process_local_data(sharding, part)`."
        )


def _digest(tree) -> bytes:
    digest = hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", str(jax.tree.structure(tree))).encode())
    leaves: list[Any] = jax.tree.leaves(tree)
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            digest.update(f"{leaf.dtype}{leaf.shape}{leaf.sharding.shard_shape(leaf.shape)}".encode())
        elif isinstance(leaf, jax.Array | np.ndarray | np.generic):
            array: Any = leaf
            is_key = jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key)
            values = np.asarray(jax.random.key_data(array) if is_key else array)
            digest.update(f"{array.dtype}{array.shape}".encode() + values.tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()


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


def whole(tree: PyTree) -> Any:
    """Returns the arrays of a tree in NumPy, all fetched at once; gathers those that lie with several processes."""

    def gathered(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gathered, tree)))
