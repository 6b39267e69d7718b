"""Run directory of several processes: Orbax writes the arrays, process 0 everything else."""

import contextlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from jaxhpo._core.extra import needs_extra
from jaxhpo._tune.history import key_data
from jaxhpo._tune.run_dir import DamagedError, Leaves, RunDir, check_structure, checksum, is_spread


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
        return [path for path in super()._checkpoints() if any(path.glob("sealed-*.json"))]

    def _write(self, leaves: Leaves, settings: dict[str, Any]) -> bool:
        path = self.folder / f"state-{self.num_rows:08d}.{self.FORM}"
        arrays = {f"{i} {name}": _to_save(x) for i, (name, x) in enumerate(leaves)}
        structs = {name: [str(x.dtype), x.shape] for name, x in arrays.items()}
        # If one process fails here the run ends: the others wait for it, and cannot be informed.
        tree = {str(i): x for i, x in enumerate(arrays.values())}
        self._checkpointer.save(path.absolute(), args=self._orbax.args.PyTreeSave(tree), force=True)
        return self._succeeds(lambda: self._seal(path, structs, settings))

    def _seal(self, path, structs, settings) -> None:
        """Makes a checkpoint of what Orbax has written."""
        files = {str(file.relative_to(path)): checksum(file) for file in sorted(path.rglob("*")) if file.is_file()}
        text = json.dumps({"header": self._header(settings), "leaves": structs, "files": files}).encode()
        self._commit(path, "sealed-{}.json", lambda file: file.write(text))

    def _read(self, path):
        try:
            (seal,) = path.glob("sealed-*.json")
            if checksum(seal) not in seal.name:
                raise DamagedError("the checksum of its seal does not match")
            found = json.loads(seal.read_bytes())
            for name, digest in found["files"].items():
                if checksum(path / name) != digest:
                    raise DamagedError(f"the checksum of {name} does not match")
        except (OSError, ValueError) as error:
            raise DamagedError(str(error)) from error
        return found["header"], found["leaves"]

    def _restored(self, found, leaves) -> list:
        structs = {name: jax.ShapeDtypeStruct(s, np.dtype(d)) for name, (d, s) in found["leaves"].items()}
        check_structure(self.folder, structs, leaves)

        def how(struct, x):
            if not is_spread(x):
                return self._orbax.RestoreArgs(restore_type=np.ndarray)
            return self._orbax.ArrayRestoreArgs(sharding=x.sharding, global_shape=struct.shape, dtype=struct.dtype)

        hows = {str(i): how(s, x) for i, (s, (_, x)) in enumerate(zip(structs.values(), leaves, strict=True))}
        args = self._orbax.args.PyTreeRestore(item=dict.fromkeys(hows, 0), restore_args=hows)
        arrays = self._checkpointer.restore((self.folder / found["name"]).absolute(), args=args)
        return [arrays[name] for name in hows]


def open_run_dir(path: str | os.PathLike) -> RunDir:
    """Returns the folder of a run: of several processes, or of one."""
    shared = jax.process_count() > 1
    with contextlib.suppress(TypeError, OSError):  # opening the folder raises a better message
        shared = shared or any(pathlib.Path(path).glob(f"state-*.{ShardedDir.FORM}"))
    return ShardedDir(path) if shared else RunDir(path)


def _to_save(x):
    """An array on one device is the same for all processes, and Orbax takes it as NumPy only."""
    return key_data(x) if is_spread(x) else np.asarray(key_data(x))
