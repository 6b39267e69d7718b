"""Run directory of several processes: each writes its part of the arrays, process 0 everything else."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.processes import exchange, from_first
from jaxhpo._tune.checkpoint import (
    SEALS,
    Leaves,
    arrays_in,
    bounds,
    checksum,
    is_own,
    is_spread,
    opened,
    set_aside,
    write_npz,
)
from jaxhpo._tune.history import key_data
from jaxhpo._tune.run_dir import PAUSE, RunDir

PATIENCE = 10  # seconds until what a process has written must appear to another, on a file system of a network


class ShardedDir(RunDir):
    """The folder of a run of several processes, which all of them see.

    `state-ROWS.parts` holds the arrays: each process writes a `part-INDEX.npz`, of the pieces that lie on its devices.
    When all are written, process 0 adds `sealed-SHA256.json`, with the checksums of all files; a checkpoint without a
    seal is not valid. Any number of processes continues from one, and from one of a single process. Process 0 sends
    what it finds, and the errors of its disk, to all.

    Args:
      path: the folder, made where it does not exist.

    Raises:
      JaxhpoError: nothing can be written there, another run holds it, or it is not one folder to all processes.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        try:
            self._prove_shared()
        except BaseException:
            self.close()
            raise

    def _prove_shared(self) -> None:
        """Each process writes a file, whose name nobody has asked for before; process 0 must see all of them."""
        token = from_first(lambda: secrets.token_hex(8))
        proofs = [f"jaxhpo-{token}-{i}.tmp" for i in range(jax.process_count())]
        own, problem = self.folder / proofs[jax.process_index()], ""
        try:
            _patiently(lambda: opened(own, "xb").close())
        except OSError as error:
            problem = error.strerror or str(error)
        told = exchange([str(self.folder)[-300:], problem[:300]])

        def refusal() -> str:
            for i, (folder, problem) in enumerate(told):
                if problem:
                    return f"process {i} cannot write in {folder} ({problem})"
                try:
                    _patiently((self.folder / proofs[i]).stat)
                except OSError:
                    return f"what process {i} writes in {folder} does not appear in {self.folder} on process 0"
            return ""

        refused = from_first(refusal)
        with contextlib.suppress(OSError):
            own.unlink()
        if refused:
            raise JaxhpoError(
                f"`run_dir`: {refused}, but a run of {jax.process_count()} processes keeps its parts in one folder: "
                "give all of them the same absolute path, on a file system that all hosts share and may write to; or "
                "omit `run_dir`."
            )

    def _stale(self):
        """Also what was not sealed when the run was interrupted."""
        open_ = [path for path in self.folder.glob("state-*.parts") if not any(path.glob(SEALS)) and is_own(path)]
        return super()._stale() + open_

    def _write(self, leaves: Leaves, settings: dict[str, Any]) -> bool:
        path = self.folder / f"state-{self.num_rows:08d}.parts"
        # What lies on this process's devices alone is the same on all processes.
        parted = [is_spread(x) and not x.is_fully_addressable for _, x in leaves]
        arrays = [key_data(x) if p else np.asarray(key_data(x)) for (_, x), p in zip(leaves, parted, strict=True)]
        if self._succeeds(lambda: _make_room(path)) is False:
            return False
        part, digest, problem = path / f"part-{jax.process_index()}.npz", "", ""
        try:
            _patiently(lambda: _write_part(part, arrays))
            digest = checksum(part)
        except OSError as error:
            problem = f"process {jax.process_index()}: {error}"[:300]
        told = exchange([digest, problem])
        structs = [[str(x.dtype), x.shape] for x in arrays]
        return self._succeeds(lambda: self._seal(path, told, structs, self._header(leaves, settings))) is not False

    def _seal(self, path, told, structs, header) -> None:
        """Makes a checkpoint of what all processes have written."""
        for problem in (problem for _, problem in told if problem):
            raise OSError(problem)
        files = {f"part-{i}.npz": digest for i, (digest, _) in enumerate(told)}
        for name in files:
            _patiently((path / name).stat)
        text = json.dumps({"header": header.texts(), "leaves": structs, "files": files}).encode()
        self._commit(path, "sealed-{}.json", lambda file: file.write(text))

    def _restored(self, name, leaves) -> list:
        arrays = _patiently(lambda: arrays_in(self.folder / name))
        return [_placed(array, x) for array, (_, x) in zip(arrays, leaves, strict=True)]


def _placed(array: Any, x: Any) -> Any:
    """Returns a saved array in NumPy, or, where the leaf here is spread over devices, as that is."""
    if not is_spread(x):
        return np.asarray(array[(slice(None),) * len(array.shape)])
    dtype = x.dtype if array.dtype.kind == "V" else array.dtype
    return jax.make_array_from_callback(array.shape, x.sharding, lambda index: np.asarray(array[index]).view(dtype))


def _make_room(path: pathlib.Path) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path) if is_own(path) else set_aside(path)
    path.mkdir()


def _write_part(path: pathlib.Path, arrays: list) -> None:
    """Writes the pieces of arrays that lie here; process 0 those that are the same everywhere."""
    pieces = {}
    for i, x in enumerate(arrays):
        here = jax.process_index() == 0
        own = [(tuple(slice(n) for n in x.shape), x)] * here
        if is_spread(x):
            own = [(shard.index, shard.data) for shard in x.addressable_shards if shard.replica_id == 0]
        pieces |= {f"{i}, {json.dumps(bounds(index, x.shape))}": np.asarray(data) for index, data in own}
    with opened(path, "xb") as file:
        write_npz(file, pieces)
        file.flush()
        os.fsync(file.fileno())


def _patiently(fn: Callable[[], Any]) -> Any:
    """Calls `fn`, again for a while where a file is missing: on a network it may appear later."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fn()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)
