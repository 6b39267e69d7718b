"""Crash-safe run directory: two checkpoints and an append-only history."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import warnings
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.processes import from_first
from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree
from jaxhpo._tune.history import decode, encode, is_key, key_data

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None

SCHEMA = 4  # of the contents of a checkpoint; another number is refused
KEPT = 2  # checkpoints, the newest
STATUS = "status.json"
HEADER = ("schema", "rows", "history", "settings")  # entries beside the leaves of the state
Leaves = list[tuple[str, Any]]  # each with its name


class DamagedError(Exception):
    """A checkpoint that cannot be used."""


class _Log(NamedTuple):
    """Position in the history; it is replaced as a whole, so that an interruption leaves a consistent one.

    Attributes:
      rows: their number.
      digest: checksum of their lines.
      written: bytes in the file.
      pending: lines that are not written yet.
    """

    rows: int
    digest: Any
    written: int
    pending: bytes


class RunDir(contextlib.ExitStack):
    """The folder of a run, held by one process at a time: a context manager, which closes its files.

    `state-ROWS-SHA256.npz` holds the state after so many rows of history, and in its name the checksum of its bytes.
    It is written under another name, synced, and renamed; the two newest are kept. `history.jsonl` grows by one line
    per row. A checkpoint stores the length and the checksum of its history; lines beyond belong to steps that will be
    taken again. With several processes (`ShardedDir`) all of them call the same methods, and process 0 alone holds the
    folder and the history.

    Args:
      path: the folder, made where it does not exist.

    Raises:
      JaxhpoError: nothing can be written there, or another process holds it.
    """

    FORM = "npz"  # suffix of checkpoints

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self._lock: Any = None  # on process 0 only, like the file
        self._file: Any = None
        self._log, self.saved_rows = _Log(0, hashlib.sha256(), 0, b""), 0
        self._found: tuple[_Log, list[pathlib.Path]] | None = None
        from_first(lambda: self._open(path))
        self.folder = pathlib.Path(path)

    def _open(self, path) -> None:
        try:
            if path == "":
                raise ValueError("it is empty")
            self.folder = pathlib.Path(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self.enter_context(open(self.folder / "lock", "a+b"))
        except (OSError, TypeError, ValueError) as error:
            message = f"`run_dir` got {path!r}, where no file can be written ({error}): name a folder."
            raise JaxhpoError(message) from error
        self._take_lock()
        if self.FORM != RunDir.FORM and any(self.folder.glob(f"state-*.{RunDir.FORM}")):
            self.close()
            raise JaxhpoError(
                f"`run_dir`: in {self.folder} a run of one process cannot be resumed by several: name another folder."
            )
        history = self.folder / "history.jsonl"
        history.touch()
        self._file = self.enter_context(open(history, "r+b", buffering=0))
        if not self._checkpoints():
            self._file.truncate(0)  # lines of steps that were never saved

    @property
    def num_rows(self) -> int:
        """Rows of the history so far."""
        return self._log.rows

    @property
    def begun(self) -> bool:
        """True where there is a checkpoint."""
        return from_first(lambda: bool(self._checkpoints()))

    def _take_lock(self):
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().decode(errors="replace").strip()
            self.close()
            raise JaxhpoError(
                f"`run_dir`: {self.folder} is in use by process {holder}: wait for it, stop it, or name another folder."
            ) from None
        except OSError as error:
            message = f"`run_dir`: {self.folder} cannot be locked ({error}): make sure that no other process uses it."
            warnings.warn(message, RuntimeWarning, stacklevel=4)
            return
        # The lock of a process that was killed is released; its number in the file is replaced.
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()} on {os.uname().nodename}".encode())
            self._lock.flush()

    def append(self, row: PyTree) -> None:
        """Adds a row to the history; where the disk refuses, it is kept for the next time."""
        if self._file is None:
            self._log = self._log._replace(rows=self.num_rows + 1)
            return
        line, digest = encode(self.num_rows, row), self._log.digest.copy()
        digest.update(line)
        self._log = _Log(self.num_rows + 1, digest, self._log.written, self._log.pending + line)
        with contextlib.suppress(OSError):  # `save` warns
            self._flush()

    def _flush(self):
        while self._log.pending:
            # From the end of the last complete write: an interrupted one is overwritten.
            self._file.seek(self._log.written)
            count = self._file.write(self._log.pending)
            self._log = self._log._replace(written=self._log.written + count, pending=self._log.pending[count:])

    def _sync(self):
        self._flush()
        os.fsync(self._file.fileno())

    def save(self, tree: PyTree, settings: dict[str, Any]) -> None:
        """Writes a checkpoint of the state after the rows so far; warns where the disk refuses.

        Args:
          tree: arrays and keys.
          settings: numbers and strings, to be compared with those of the call that resumes.
        """
        leaves = named_leaves(tree, "run")
        if self.num_rows > self.saved_rows and self._succeeds(self._sync) and self._write(leaves, settings):
            self.saved_rows = self.num_rows

    def _succeeds(self, fn: Callable[[], None]) -> bool:
        """Calls `fn` on process 0; returns whether the disk accepted it, and warns otherwise."""
        try:
            from_first(fn)
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.folder / "state.tmp").unlink(missing_ok=True)
            warnings.warn(
                f"`run_dir`: the state after {self.num_rows} outer steps could not be saved in {self.folder} "
                f"({error}). The run goes on, and tries again; on disk it is at step {self.saved_rows}.",
                RuntimeWarning,
                stacklevel=5,
            )
            return False
        return True

    def _write(self, leaves: Leaves, settings: dict[str, Any]) -> bool:
        arrays = {name: np.frombuffer(text.encode(), np.uint8) for name, text in self._header(settings).items()}
        arrays |= {f"{i} {name}": np.asarray(key_data(x)) for i, (name, x) in enumerate(leaves)}
        name = f"state-{self.num_rows:08d}-{{}}.npz"
        return self._succeeds(
            lambda: self._commit(self.folder, name, lambda file: np.savez(file, allow_pickle=False, **arrays))
        )

    def _header(self, settings) -> dict[str, str]:
        history = f"{self._log.written} {self._log.digest.hexdigest()}"
        values = (str(SCHEMA), str(self.num_rows), history, json.dumps(settings, sort_keys=True, default=float))
        return dict(zip(HEADER, values, strict=True))

    def _commit(self, folder: pathlib.Path, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Writes the file that completes a checkpoint, with its checksum in its name; removes older checkpoints."""
        temporary = folder / "state.tmp"
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name.format(checksum(temporary)))
        for place in {folder, self.folder}:
            sync_folder(place)
        for old in {*self.folder.glob(f"state-*.{self.FORM}*")} - {*self._checkpoints()[:KEPT]}:
            _remove(old)

    def write_status(self, **fields: Any) -> None:
        """Writes the run's status for `jaxhpo show`; nothing depends on it, so that the disk may refuse."""
        if self._file is not None:
            temporary = self.folder / "status.tmp"
            with contextlib.suppress(OSError):
                temporary.write_text(json.dumps(fields) + "\n")
                os.replace(temporary, self.folder / STATUS)

    def _checkpoints(self) -> list[pathlib.Path]:
        """Returns the checkpoints, the newest first."""
        return sorted(self.folder.glob(f"state-*.{self.FORM}"), reverse=True)

    def resume(self, like: PyTree, row: PyTree, fixed: str) -> tuple[PyTree, list[PyTree], dict, list[str]]:
        """Reads the newest checkpoint that is not damaged.

        Args:
          like: a tree of the state's structure and shapes; arrays on several devices are restored with its shardings.
          row: the same of a row of history.
          fixed: leaves whose names begin with this must hold the same values.

        Returns:
          The state, with arrays and keys for leaves; the rows of the history; the settings of the call that saved it;
          notes on damaged checkpoints, which were skipped.

        Raises:
          JaxhpoError: all checkpoints are damaged, or they are those of another run.
        """
        found = from_first(self._find)
        leaves = named_leaves(like, "run")
        try:
            rows = [decode(line, row) for line in found["history"].splitlines()]
        except ValueError as error:
            raise JaxhpoError(
                f"`run_dir`: rows of the history in {self.folder} differ from those of this call ({error}): use "
                "another folder, or the `record`, `population`, `accumulate`, `hparams` and info of that run."
            ) from error
        pairs = list(zip(leaves, self._restored(found, leaves), strict=True))
        others = [name for (name, x), y in pairs if name.startswith(fixed) and not _same(y, key_data(x))]
        if others:  # another transform has another start, too
            what = next((name for name in others if "transforms" in name), ", ".join(others)).replace(fixed, "")
            raise JaxhpoError(
                f"`run_dir`: the run in {self.folder} began with another value of {what}, so that its numbers mean "
                "something else: use another folder, or the `hparams`, `key`, `transforms` and `monitor` of that run."
            )
        tree = jax.tree.unflatten(jax.tree.structure(like), [from_data(array, x) for (_, x), array in pairs])
        from_first(self._adopt)
        self._log, self.saved_rows = self._log._replace(rows=len(rows)), len(rows)
        return tree, rows, found["settings"], found["notes"]

    def _find(self) -> dict[str, Any]:
        notes, damaged = [], []
        for path in self._checkpoints():
            try:
                header, leaves = self._read(path)
                text, log = self._history_of(header)
            except DamagedError as error:
                damaged.append(path)
                notes.append(f"{path.name[:14]}.{self.FORM} is damaged ({error})")
                continue
            self._found = log, damaged
            found = {"name": path.name, "history": text.decode(), "notes": notes, "leaves": leaves}
            return {**found, "settings": json.loads(header["settings"])}
        raise JaxhpoError(
            f"`run_dir`: {self.folder} holds no readable checkpoint: {'; '.join(notes)}. Name another, or move it away."
        )

    def _adopt(self):
        """Continues the history of the checkpoint; newer, damaged ones are renamed to make room."""
        assert self._found is not None
        self._log, damaged = self._found
        for path in damaged:
            _remove(path.with_suffix(".damaged"))
            path.rename(path.with_suffix(".damaged"))
        self._file.truncate(self._log.written)

    def _read(self, path) -> tuple[dict[str, str], dict[str, Any]]:
        """Returns header and leaves of a checkpoint."""
        try:
            if checksum(path) not in path.name:
                raise DamagedError("its checksum does not match")
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
            raise DamagedError(str(error)) from error
        return {name: arrays.pop(name, np.zeros(0, np.uint8)).tobytes().decode() for name in HEADER}, arrays

    def _restored(self, found: dict[str, Any], leaves: Leaves) -> list:
        check_structure(self.folder, found["leaves"], leaves)
        return list(found["leaves"].values())

    def _history_of(self, header: dict[str, str]) -> tuple[bytes, _Log]:
        """Returns the lines that a checkpoint was saved with."""
        schema = int(header["schema"] or 0)
        if schema != SCHEMA:
            raise JaxhpoError(
                f"`run_dir`: {self.folder} is of another version of jaxhpo (schema {schema}, where this one reads "
                f"{SCHEMA}): continue with that version, or name another folder."
            )
        length, expected = header["history"].split()
        self._file.seek(0)
        text = self._file.read(int(length))
        digest = hashlib.sha256(text)
        if digest.hexdigest() != expected:
            raise DamagedError("history.jsonl is not the one that it was saved with")
        return text, _Log(int(header["rows"]), digest, int(length), b"")


def checksum(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: pathlib.Path) -> None:
    """Has the names in a folder on disk, to survive a power cut. Windows cannot open a folder."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def in_use(folder: pathlib.Path) -> str:
    """Returns the process that holds the folder of a run; empty where there is none, or it cannot be known."""
    if fcntl is not None:
        with contextlib.suppress(OSError), open(folder / "lock", "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().decode(errors="replace").strip() or "unknown"
    return ""


def check_structure(folder: pathlib.Path, arrays: dict[str, Any], leaves: Leaves) -> None:
    """Raises where the saved arrays, by place and name, have other names, shapes or types than the leaves here."""
    # Two leaves may have one name; their place distinguishes them.
    saved = [name.split(" ", 1)[1] for name in arrays]
    if saved != [name for name, _ in leaves]:
        other = sorted({*saved} ^ {name for name, _ in leaves})
        of_optimizer = all(name.startswith("run['state'].opt_state") for name in other)
        raise JaxhpoError(
            f"`run_dir`: {folder} belongs to a run of another {'optimiser' if of_optimizer else 'structure'}; they "
            f"differ in {', '.join(other[:5])}. Use another folder, or the hyperparameters, carry and optimiser of "
            "that run (a number may replace a number, but not a schedule)."
        )
    for (name, x), array in zip(leaves, arrays.values(), strict=True):
        data = jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
        shape, dtype = np.shape(data), np.dtype(getattr(data, "dtype", array.dtype))
        # Types that NumPy does not know (bfloat16) are raw bytes on disk.
        same = dtype == array.dtype or (array.dtype.kind == "V" and dtype.itemsize == array.dtype.itemsize)
        if array.shape != shape or not same:
            raise JaxhpoError(
                f"`run_dir`: `{name}` is {array.dtype}{list(array.shape)} in {folder}, but {dtype}{list(shape)} "
                "here: use another folder, or the precision (`jax_enable_x64`) and shapes of that run."
            )


def is_spread(x: Any) -> bool:
    """Returns whether an array lies on several devices."""
    sharding = getattr(x, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def _same(array, x) -> bool:
    """Returns whether two arrays of one shape are equal; raw bytes have no `==`."""
    return bool(jnp.array_equal(array, x)) if is_spread(array) else array.tobytes() == np.asarray(x).tobytes()


def from_data(array: Any, like: Any) -> Any:
    """Inverts `key_data`."""
    if is_key(like):
        # The type of a key holds its implementation, which a shape does not.
        like = jnp.empty((), like.dtype) if isinstance(like, jax.ShapeDtypeStruct) else like
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return array.view(like.dtype) if array.dtype.kind == "V" else array
