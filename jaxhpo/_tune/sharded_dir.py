"""Run directory of several processes: Orbax writes the arrays, process 0 everything else."""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from jaxhpo._core.extra import needs_extra
from jaxhpo._tune.checkpoint import (
    SEALS,
    Check,
    Header,
    Leaves,
    absolute,
    checkpoints,
    checksum,
    from_orbax,
    is_spread,
    set_aside,
)
from jaxhpo._tune.history import key_data
from jaxhpo._tune.run_dir import RunDir

OPEN = re.compile(r"state-[0-9]{8,18}\.orbax(\.orbax-checkpoint-tmp.*)?")


class ShardedDir(RunDir):
    """The folder of a run of several processes, which all of them see.

    `state-ROWS.orbax` holds the arrays: each process writes and reads its own parts. When all arrays are written,
    process 0 adds `sealed-SHA256.json`, with the checksums of all files; a checkpoint without a seal is not valid.
    Process 0 sends what it finds, and the errors of its disk, to all.

    Args:
      path: the folder, made where it does not exist.

    Raises:
      ImportError: Orbax is not installed.
      JaxhpoError: nothing can be written there, or another run holds it.
    """

    FORM = "orbax"

    def __init__(self, path: str | os.PathLike):
        with needs_extra("`run_dir` of several processes needs Orbax", "orbax", "; or omit `run_dir`."):
            import orbax.checkpoint as orbax
        self._orbax = orbax
        self._checkpointer = self._orbax.Checkpointer(self._orbax.PyTreeCheckpointHandler())
        super().__init__(path)
        self.callback(self._checkpointer.close)

    def _checkpoints(self):
        return [path for path in super()._checkpoints() if any(path.glob(SEALS))]

    def _stale(self):
        """Also what Orbax had not completed when it was interrupted."""
        open_ = [path for path in self.folder.iterdir() if OPEN.fullmatch(path.name)]
        return super()._stale() + [path for path in open_ if self._is_own(path) and not any(path.glob(SEALS))]

    @staticmethod
    def _is_own(path):
        return not path.is_symlink() and (
            "orbax-checkpoint-tmp" in path.name or (path / "_CHECKPOINT_METADATA").exists()
        )

    def _write(self, leaves: Leaves, settings: dict[str, Any]) -> bool:
        path = self.folder / f"state-{self.num_rows:08d}.{self.FORM}"
        arrays = [_to_save(x) for _, x in leaves]
        # If one process fails here the run ends: the others wait for it, and cannot be informed.
        tree = {str(i): x for i, x in enumerate(arrays)}
        if self._succeeds(lambda: self._make_room(path)) is False:
            return False
        self._checkpointer.save(path, args=self._orbax.args.PyTreeSave(tree), force=True)
        structs = [[str(x.dtype), x.shape] for x in arrays]
        return self._succeeds(lambda: self._seal(path, structs, self._header(leaves, settings))) is not False

    def _make_room(self, path) -> None:
        if os.path.lexists(path) and not self._is_own(path):
            set_aside(path)

    def _seal(self, path, structs, header) -> None:
        """Makes a checkpoint of what Orbax has written."""
        files = {str(file.relative_to(path)): checksum(file) for file in sorted(path.rglob("*")) if file.is_file()}
        text = json.dumps({"header": header.texts(), "leaves": structs, "files": files}).encode()
        self._commit(path, "sealed-{}.json", lambda file: file.write(text))

    def _read(self, path, check):
        return from_orbax(path, check)

    def _restored(self, found, leaves) -> list:
        return _restore(self._checkpointer, self.folder / found["name"], found["leaves"], [x for _, x in leaves])


def _restore(checkpointer, path: pathlib.Path, structs, likes: list) -> list:
    """Returns the arrays of a checkpoint, sharded as the leaves here are."""
    import orbax.checkpoint as orbax

    def how(struct, x):
        if not is_spread(x):
            return orbax.RestoreArgs(restore_type=np.ndarray)
        return orbax.ArrayRestoreArgs(sharding=x.sharding, global_shape=struct.shape, dtype=struct.dtype)

    structs = [jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for dtype, shape in structs]
    hows = {str(i): how(struct, x) for i, (struct, x) in enumerate(zip(structs, likes, strict=True))}
    arrays = checkpointer.restore(path, args=orbax.args.PyTreeRestore(item=dict.fromkeys(hows, 0), restore_args=hows))
    return [arrays[name] for name in hows]


def arrays_of(path: pathlib.Path, check: Check) -> tuple[Header, list]:
    """Returns header and arrays of a checkpoint, in one process; see `from_npz`."""
    header, structs = from_orbax(path, check)
    with needs_extra("a `run_dir` of several processes is kept by Orbax", "orbax"):
        import orbax.checkpoint as orbax
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        return header, _restore(checkpointer, path, structs, structs)


def open_run_dir(path: str | os.PathLike) -> RunDir:
    """Returns the folder of a run: of several processes, or of one."""
    shared = jax.process_count() > 1
    with contextlib.suppress(TypeError, OSError, RuntimeError):  # opening the folder raises a better message
        shared = shared or bool(checkpoints(absolute(path), ShardedDir.FORM))
    return ShardedDir(path) if shared else RunDir(path)


def _to_save(x):
    """An array on one device is the same for all processes, and Orbax takes it as NumPy only."""
    return key_data(x) if is_spread(x) else np.asarray(key_data(x))
