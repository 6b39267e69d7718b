"""A run on disk whose state is spread over the devices of several processes: arrays by Orbax, the rest by process 0."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.types import PyTree
from jaxhpo._tune.processes import from_first
from jaxhpo._tune.run_dir import (
    KEPT,
    PLAIN,
    DamagedError,
    Resumed,
    RunDir,
    check_structure,
    from_data,
    key_data,
    named_leaves,
    refuse_others,
    rows_of,
    same_bits,
    sync_folder,
)


class ShardedDir:
    """The folder of a run of several processes, which all of them see. A context manager, like `RunDir`.

    `state-ROWS.orbax` holds the arrays: each process writes and reads its own parts. Process 0 holds the folder, writes
    `history.jsonl` and, when all arrays are written, `sealed-SHA256.json` among them, with the checksums of all files;
    a checkpoint without a seal is none. What process 0 finds, and what the disk refuses it, is told to all.

    Args:
      path: the folder, made where it does not exist.

    Raises:
      ImportError: Orbax is not installed.
      JaxhpoError: nothing can be written there, or another run holds it.
    """

    def __init__(self, path: str | os.PathLike):
        self._orbax = _imported()
        self._checkpointer = self._orbax.Checkpointer(self._orbax.PyTreeCheckpointHandler())
        self._first: Any = None  # of process 0

        def take():
            self._first = _FirstDir(path)

        from_first(take)
        self.folder = pathlib.Path(path).absolute()
        self.num_rows = self.saved_rows = 0

    def __enter__(self) -> ShardedDir:
        """The folder itself."""
        return self

    def __exit__(self, *error) -> None:
        """Lets another run have it."""
        self._checkpointer.close()
        if self._first is not None:
            self._first.__exit__(*error)

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return from_first(lambda: self._first.begun)

    def append(self, row: PyTree) -> None:
        """Adds a row to the history."""
        self.num_rows += 1
        if self._first is not None:
            self._first.append(row)

    def write_status(self, **fields: Any) -> None:
        """Writes the run's status."""
        if self._first is not None:
            self._first.write_status(**fields)

    def save(self, tree: PyTree, settings: dict[str, Any]) -> bool:
        """Writes a checkpoint, as `RunDir.save`; every process must call it, and what Orbax cannot write is raised."""
        if self.num_rows == self.saved_rows:
            return True
        path = self.folder / f"state-{self.num_rows:08d}.orbax"
        rows = named_leaves(tree)
        arrays = {str(i): _to_save(x) for i, (_, x) in enumerate(rows)}
        leaves = [[name, str(x.dtype), x.shape] for (name, _), x in zip(rows, arrays.values(), strict=True)]
        if not self._done(lambda: self._first.sync()):
            return False
        # Where one process fails here the run ends: the others wait for it, and cannot be told.
        self._checkpointer.save(path, args=self._orbax.args.PyTreeSave(arrays), force=True)
        if not self._done(lambda: self._first.seal(path, leaves, settings)):
            return False
        self.saved_rows = self.num_rows
        return True

    def _done(self, fn) -> bool:
        """Whether process 0 could do it; warns where the disk refused."""
        try:
            from_first(fn)
        except OSError as error:
            warnings.warn(
                f"`run_dir`: the state after {self.num_rows} outer steps could not be saved in {self.folder} "
                f"({error}). The run goes on, and tries again; on disk it is at step {self.saved_rows}.",
                RuntimeWarning,
                stacklevel=5,
            )
            return False
        return True

    def resume(self, like: PyTree, row: PyTree, fixed: str) -> Resumed:
        """Reads the newest checkpoint that is whole, as `RunDir.resume`; arrays come with the shardings of `like`."""
        found = from_first(lambda: self._first.found())
        history = rows_of(self.folder, found["history"].encode(), row)
        rows = named_leaves(like)
        saved = {f"{i} {name}": jax.ShapeDtypeStruct(s, np.dtype(d)) for i, (name, d, s) in enumerate(found["leaves"])}
        check_structure(self.folder, saved, rows)
        arrays = self._restored(self.folder / found["name"], saved, rows)
        pairs = zip(rows, arrays, strict=True)
        others = [name for (name, x), y in pairs if name.startswith(fixed) and not _same(y, key_data(x))]
        refuse_others(self.folder, others, fixed)
        leaves = [from_data(array, x) for (_, x), array in zip(rows, arrays, strict=True)]
        self.num_rows = self.saved_rows = len(history)
        tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return Resumed(tree, history, found["settings"], found["notes"])

    def _restored(self, path, saved, rows) -> list:
        def how(struct, x):
            if not _is_spread(x):
                return self._orbax.RestoreArgs(restore_type=np.ndarray)
            return self._orbax.ArrayRestoreArgs(sharding=x.sharding, global_shape=struct.shape, dtype=struct.dtype)

        hows = {str(i): how(s, x) for i, (s, (_, x)) in enumerate(zip(saved.values(), rows, strict=True))}
        args = self._orbax.args.PyTreeRestore(item=dict.fromkeys(hows, 0), restore_args=hows)
        arrays = self._checkpointer.restore(path, args=args)
        return [arrays[str(i)] for i in range(len(rows))]


class _FirstDir(RunDir):
    """What process 0 does of it."""

    PATTERN, OTHER = RunDir.OTHER, RunDir.PATTERN

    def _checkpoints(self):
        return [path for path in super()._checkpoints() if any(path.glob("sealed-*.json"))]

    def seal(self, path, leaves, settings) -> None:
        """Makes a checkpoint of what Orbax has written; deletes what is older, or was left behind."""
        files = {str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if file.is_file()}
        plain = dict(zip(PLAIN, self._plain(settings), strict=True))
        text = json.dumps({**plain, "leaves": leaves, "files": files}).encode()
        temporary = path / "seal.tmp"
        with open(temporary, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path / f"sealed-{hashlib.sha256(text).hexdigest()}.json")
        sync_folder(path)
        sync_folder(self.folder)
        self.saved_rows = self.num_rows
        kept = self._checkpoints()[:KEPT]
        for old in {*self.folder.glob("state-*.orbax*")} - {*kept}:
            shutil.rmtree(old, ignore_errors=True)

    def found(self) -> dict[str, Any]:
        """Name, history, settings and leaves of the newest checkpoint that is whole; takes it up."""
        notes: list[str] = []
        damaged = []
        for path in self._checkpoints():
            try:
                plain = _unsealed(path)
                text, log = self._history_of(*(plain[name] for name in PLAIN[:3]))
            except DamagedError as error:
                damaged.append(path)
                notes.append(f"{path.name} is damaged ({error})")
                continue
            for other in damaged:  # a folder is not renamed onto another
                shutil.rmtree(other.with_suffix(".damaged"), ignore_errors=True)
            self._go_on(log, damaged)
            settings = json.loads(plain["settings"])
            told = {"name": path.name, "history": text.decode(), "notes": notes}
            return {**told, "settings": settings, "leaves": plain["leaves"]}
        raise self._unreadable(notes)


def open_run_dir(path: str | os.PathLike) -> RunDir | ShardedDir:
    """The folder of a run: of several processes, or of one."""
    shared = jax.process_count() > 1
    with contextlib.suppress(TypeError, OSError):  # the folder itself tells
        shared = shared or any(pathlib.Path(path).glob(RunDir.OTHER))
    return ShardedDir(path) if shared else RunDir(path)


def _imported():
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise ImportError(
            "`run_dir` with several processes keeps the state with Orbax, but orbax-checkpoint cannot be imported "
            f"({error}). Install it: pip install 'jaxhpo[orbax]'; or leave `run_dir` out."
        ) from error
    return orbax


def _unsealed(path) -> dict[str, Any]:
    """What a seal says, where all files are those that were sealed."""
    try:
        (seal,) = path.glob("sealed-*.json")
        text = seal.read_bytes()
        if hashlib.sha256(text).hexdigest() not in seal.name:
            raise DamagedError("the checksum of its seal does not match")
        plain = json.loads(text)
        for name, digest in plain["files"].items():
            if _digest(path / name) != digest:
                raise DamagedError(f"the checksum of {name} does not match")
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from error
    return plain


def _digest(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_spread(x) -> bool:
    sharding = getattr(x, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def _to_save(x):
    """What lies on one device is the same for all processes, and Orbax takes it as NumPy only."""
    return key_data(x) if _is_spread(x) else np.asarray(key_data(x))


def _same(array, x) -> bool:
    return bool(jnp.array_equal(array, x)) if _is_spread(x) else same_bits(array, x)
