"""Agreement of several processes; with one process nothing of it does anything."""

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree

MOST_BYTES = 4096  # of what a process tells: all exchanges are one program, so that any of them meets any other
PATIENCE = 10  # seconds in which the others are to come, before an exception leaves the process
TOLD = "The other processes are told of it, and end, too."
MOST_LETTERS = 600  # of an exception, of which JSON takes up to six bytes each


class AnotherProcessError(JaxhpoError):
    """Ends a process because another one has raised."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Has all processes raise where one raises within: it tells the others at the exchange to which they come next.

    So that they come to one, an exchange precedes whatever waits for all processes: a collective operation of the
    library, and, after it is compiled, a program that the devices of all processes run. The last is at the end.
    """
    try:
        yield
        exchange()
    except AnotherProcessError:
        raise
    except BaseException as error:
        if jax.process_count() > 1 and TOLD not in getattr(error, "__notes__", ()):  # by a run within a run
            error.add_note(TOLD)
            with contextlib.suppress(Exception):  # of another, too; or the others are gone
                exchange(error=error, seconds=PATIENCE)
        raise


def exchange(value: Any = None, error: BaseException | None = None, seconds: float = math.inf) -> list[Any]:
    """Waits for all processes; returns what each of them gives, or raises where one has raised instead.

    Args:
      value: what JSON can hold, in `MOST_BYTES`.
      error: what this process has raised.
      seconds: raises TimeoutError after so many; the others are told nonetheless, while this process lives.
    """
    if jax.process_count() == 1:
        return [value]
    raised = "" if error is None else _in_words(error)
    text = json.dumps([value, raised], ensure_ascii=False).encode(errors="replace").ljust(MOST_BYTES)
    every = [json.loads(own.tobytes()) for own in _gathered(np.frombuffer(text, np.uint8), seconds)]
    for index, (_, raised) in enumerate(every):
        if raised:
            raise AnotherProcessError(f"The run ends on all processes, as process {index} raised {raised}")
    return [value for value, _ in every]


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MOST_LETTERS]


def agreed(fn: Callable[[], Any]) -> Any:
    """Calls `fn`; raises on all processes where it raises on one, after which they may go on as if it had on each."""
    result = own = None
    try:
        result = fn()
    except Exception as error:
        own = error
    told = exchange(own and _in_words(own))
    if own is not None:
        raise own
    for index, raised in enumerate(told):
        if raised:
            raise JaxhpoError(f"Process {index} raised {raised}")
    return result


def _gathered(text: np.ndarray, seconds: float) -> np.ndarray:
    """Returns the texts of all processes, as `process_allgather` does, but for how it waits."""
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = jax.sharding.Mesh(devices, ("processes", "devices"))
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, PartitionSpec("processes"))
        parts = jax.make_array_from_process_local_data(spread, text[None])
        every = wait_for(jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(parts), seconds)
    return np.asarray(every.addressable_data(0))


def _same(x):
    return x


def wait_for(array: Any, seconds: float = math.inf) -> Any:
    """Waits as `block_until_ready` does, but handles signals meanwhile, as it may be for a process that is lost."""
    start = time.monotonic()
    while not array.is_ready():
        waited = time.monotonic() - start
        if waited > seconds:
            raise TimeoutError
        time.sleep(min(waited / 8, 0.05))
    return array


def on_any(value: bool) -> bool:
    """Returns whether the value is True on any process, as clocks and signals differ."""
    return any(exchange(value))


def check_same(arguments: dict[str, Any]) -> None:
    """Raises on all processes where an argument is another on one of them.

    Arrays of which each process holds a part are compared by type and sharding, all others by their values.
    """
    if jax.process_count() == 1:
        return
    every = exchange([_digest(argument) for argument in arguments.values()])
    differing = [name for name, *digests in zip(arguments, *every, strict=True) if len({*digests}) > 1]
    if differing:
        raise JaxhpoError(
            f"The {jax.process_count()} JAX processes were given different `{'`, `'.join(differing)}`, so each would "
            "compute something else, or wait for the others without end: make the same call on all of them. (What is "
            "drawn at random, or read from the clock: `jax.experimental.multihost_utils.broadcast_one_to_all(value)`.)"
        )


def check_same_value(value: Any) -> None:
    """Raises on all processes where the outer loss, shape () or (members,), is another on one of them."""
    if jax.process_count() == 1:
        return
    value = whole(value)
    exchange()
    every = multihost_utils.process_allgather(value)
    # Hosts of two kinds may round differently.
    if not np.allclose(every, every[0], rtol=float(np.finfo(every.dtype).eps) ** 0.5, atol=0, equal_nan=True):
        raise JaxhpoError(
            f"The outer loss of the first step is {every.tolist()} on processes 0 to {len(every) - 1}: their losses "
            "close over different values. If each process holds a part of the data, make one array of the parts: "
            "`jax.make_array_from_process_local_data(sharding, part)`."
        )


def _digest(tree) -> str:
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
    return digest.hexdigest()[:32]


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
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    length = exchange(len(text))[0]
    text = text if jax.process_index() == 0 else np.zeros(length, np.uint8)
    message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())
    if "error" in message:
        raise JaxhpoError(message["error"]) if message["refused"] else OSError(message["error"])
    return message["result"]


def whole(tree: PyTree) -> Any:
    """Returns the arrays of a tree in NumPy, all fetched at once; gathers those that lie with several processes."""

    def gathered(x):
        if jax.process_count() == 1 or not isinstance(x, jax.Array):
            return x
        wait_for(x)
        if x.is_fully_addressable or x.is_fully_replicated:
            return x
        exchange()
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(np.asarray, jax.device_get(jax.tree.map(gathered, tree)))
