"""A run on disk: two checkpoints and a history. No moment at which it is stopped leaves one that cannot go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import warnings
import zipfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import names
from jaxhpo._core.types import PyTree
from jaxhpo._tune.history import decode, encode

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None

SCHEMA = 3  # of what a checkpoint holds; another number is refused
KEPT = 2  # checkpoints, the newest
STATUS = "status.json"
PLAIN = ("schema", "rows", "history", "settings")  # arrays beside the leaves of the state


class Resumed(NamedTuple):
    """What `RunDir.resume` found.

    Attributes:
      tree: the state, with NumPy arrays and keys for leaves.
      rows: of the history.
      settings: those of the call that saved it.
      notes: what was damaged, and passed over.
    """

    tree: PyTree
    rows: list[PyTree]
    settings: dict[str, Any]
    notes: list[str]


class _Log(NamedTuple):
    """Of the history: replaced whole, so that an interruption finds the one before or the one after.

    Attributes:
      rows: how many there are.
      digest: of their lines.
      written: bytes of them in the file.
      pending: lines that are still to be written.
    """

    rows: int
    digest: Any
    written: int
    pending: bytes


class RunDir:
    """The folder of a run, held by one process at a time. A context manager.

    `state-ROWS-SHA256.npz` holds the state after so many rows of history, and in its name the checksum of its bytes.
    It is written under another name, synced, and renamed; the two newest are kept. `history.jsonl` grows by a line a
    row. A checkpoint knows the length and the checksum of the history that belongs to it; lines beyond are those of
    steps that will be taken again.

    Args:
      path: the folder, made where it does not exist.

    Raises:
      JaxhpoError: nothing can be written there, or another process holds it.
    """

    PATTERN, OTHER = "state-*.npz", "state-*.orbax"  # checkpoints, and those of several processes

    def __init__(self, path: str | os.PathLike):
        try:
            if path == "":
                raise ValueError("it is empty")
            self.folder = pathlib.Path(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "a+b")  # noqa: SIM115 (held until `close`)
        except (OSError, TypeError, ValueError) as error:
            raise JaxhpoError(
                f"`run_dir` got {path!r}, where no file can be written ({error}): name a folder."
            ) from error
        self._take_lock()
        if any(self.folder.glob(self.OTHER)):
            self._lock.close()
            raise JaxhpoError(
                f"`run_dir`: {self.folder} holds checkpoints of the form {self.OTHER}, those here have the form "
                f"{self.PATTERN}, and a run of one process cannot be gone on with by several: name another folder."
            )
        self._history = _open(self.folder / "history.jsonl")
        if not self.begun:
            self._history.truncate(0)  # of steps that were never saved
        self._log = _Log(0, hashlib.sha256(), 0, b"")
        self.saved_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows of the history so far."""
        return self._log.rows

    def _take_lock(self):
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().decode(errors="replace").strip()
            self._lock.close()
            raise JaxhpoError(
                f"`run_dir`: {self.folder} is in use by process {holder}, and two runs in one folder would spoil each "
                "other: wait for it, stop it, or name another folder."
            ) from None
        except OSError as error:
            warnings.warn(
                f"`run_dir`: {self.folder} cannot be locked ({error}): see to it that no other process uses it.",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        # That of a process that was killed is freed with it; its number stays behind, and is replaced.
        with contextlib.suppress(OSError):
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()} on {os.uname().nodename}".encode())
            self._lock.flush()

    def __enter__(self) -> RunDir:
        """The folder itself."""
        return self

    def __exit__(self, *_) -> None:
        """Lets another process have it."""
        self._history.close()
        self._lock.close()

    def append(self, row: PyTree) -> None:
        """Adds a row to the history; where the disk refuses, it is kept for the next time."""
        line, digest = encode(self.num_rows, row), self._log.digest.copy()
        digest.update(line)
        self._log = _Log(self.num_rows + 1, digest, self._log.written, self._log.pending + line)
        with contextlib.suppress(OSError):  # `save` tells
            self._flush()

    def _flush(self):
        while self._log.pending:
            # Where the last whole write ended: an interrupted one is written over.
            self._history.seek(self._log.written)
            count = self._history.write(self._log.pending)
            self._log = self._log._replace(written=self._log.written + count, pending=self._log.pending[count:])

    def sync(self) -> None:
        """Has the history on disk, or raises."""
        self._flush()
        os.fsync(self._history.fileno())

    def save(self, tree: PyTree, settings: dict[str, Any]) -> bool:
        """Writes a checkpoint of the state after the rows so far; warns where the disk refuses, and says whether not.

        Args:
          tree: arrays and keys.
          settings: numbers and strings, to be compared with those of the call that resumes.
        """
        if self.num_rows == self.saved_rows:
            return True
        temporary = self.folder / "state.tmp"
        try:
            self.sync()
            digest = _write(temporary, self._arrays(tree, settings))
            os.replace(temporary, self.folder / f"state-{self.num_rows:08d}-{digest}.npz")
            sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            warnings.warn(
                f"`run_dir`: the state after {self.num_rows} outer steps could not be saved in {self.folder} "
                f"({error}). The run goes on, and tries again; on disk it is at step {self.saved_rows}.",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        self.saved_rows = self.num_rows
        for old in self._checkpoints()[KEPT:]:
            with contextlib.suppress(OSError):
                old.unlink()
        return True

    def write_status(self, **fields: Any) -> None:
        """Leaves word of how the run stands, for `jaxhpo show`; nothing depends on it, so a disk may refuse it."""
        temporary = self.folder / "status.tmp"
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(fields) + "\n")
            os.replace(temporary, self.folder / STATUS)

    def _plain(self, settings) -> tuple[str, ...]:
        history = f"{self._log.written} {self._log.digest.hexdigest()}"
        return str(SCHEMA), str(self.num_rows), history, json.dumps(settings, sort_keys=True, default=float)

    def _arrays(self, tree, settings):
        plain = zip(PLAIN, self._plain(settings), strict=True)
        arrays = {name: np.frombuffer(text.encode(), np.uint8) for name, text in plain}
        return arrays | {f"{i} {name}": np.asarray(key_data(x)) for i, (name, x) in enumerate(named_leaves(tree))}

    def _checkpoints(self) -> list[pathlib.Path]:
        """The newest first."""
        return sorted(self.folder.glob(self.PATTERN), reverse=True)

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(self._checkpoints())

    def resume(self, like: PyTree, row: PyTree, fixed: str) -> Resumed:
        """Reads the newest checkpoint that is whole.

        Args:
          like: a tree of the state's structure and shapes.
          row: the same of a row of history.
          fixed: leaves whose names begin with this must hold the same values.

        Raises:
          JaxhpoError: all checkpoints are damaged, or they are those of another run.
        """
        notes: list[str] = []
        damaged = []
        for path in self._checkpoints():
            try:
                arrays = _read(path)
                rows, settings, log = self._belonging(arrays, row)
            except DamagedError as error:
                damaged.append(path)
                notes.append(f"{path.name[:14]}….npz is damaged ({error})")
                continue
            tree = _matched(path, arrays, like, fixed)
            self._go_on(log, damaged)
            return Resumed(tree, rows, settings, notes)
        raise self._unreadable(notes)

    def _unreadable(self, notes) -> JaxhpoError:
        return JaxhpoError(
            f"`run_dir`: {self.folder} holds no checkpoint that can be read: {'; '.join(notes)}. Move the folder away, "
            "or name another, to start anew."
        )

    def _go_on(self, log, damaged):
        """Takes up a checkpoint's history; newer ones that are damaged make way for those that will follow."""
        for path in damaged:
            path.rename(path.with_suffix(".damaged"))
        self._history.truncate(log.written)
        self._log, self.saved_rows = log, log.rows

    def _belonging(self, arrays, row) -> tuple[list[PyTree], dict[str, Any], _Log]:
        """The history and the settings of a checkpoint."""
        plain = [arrays.pop(name, np.zeros(0, np.uint8)).tobytes().decode() for name in PLAIN]
        text, log = self._history_of(*plain[:3])
        return rows_of(self.folder, text, row), json.loads(plain[3]), log

    def _history_of(self, schema: str, count: str, history: str) -> tuple[bytes, _Log]:
        """The lines that a checkpoint was saved with."""
        if int(schema or 0) != SCHEMA:
            raise JaxhpoError(
                f"`run_dir`: {self.folder} was written by another version of jaxhpo (schema {int(schema or 0)}, where "
                f"this one reads {SCHEMA}): go on with that version, or name another folder."
            )
        length, checksum = history.split()
        self._history.seek(0)
        text = self._history.read(int(length))
        digest = hashlib.sha256(text)
        if digest.hexdigest() != checksum:
            raise DamagedError("history.jsonl is not the one that it was saved with")
        return text, _Log(int(count), digest, int(length), b"")


class DamagedError(Exception):
    """A checkpoint that cannot be used."""


def rows_of(folder: pathlib.Path, text: bytes, row: PyTree) -> list[PyTree]:
    """The rows of a history, with the structure and the types of `row`."""
    try:
        return [decode(line, row) for line in text.splitlines()]
    except ValueError as error:
        raise JaxhpoError(
            f"`run_dir`: rows of the history in {folder} are others than those of this call ({error}): use another "
            "folder, or the `record`, the `remedies.accumulate`, the hyperparameters and the info of that run."
        ) from error


def _open(path):
    try:
        return open(path, "r+b", buffering=0)
    except FileNotFoundError:
        return open(path, "w+b", buffering=0)


def _write(path, arrays) -> str:
    """Writes and syncs the arrays; their checksum."""
    with open(path, "w+b") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() not in path.name:
                raise DamagedError("its checksum does not match")
            file.seek(0)
            with np.load(file) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DamagedError(str(error)) from error


def in_use(folder: pathlib.Path) -> str:
    """Who holds the folder of a run; empty where nobody does, or nobody can tell."""
    if fcntl is None:
        return ""
    try:
        with open(folder / "lock", "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().decode(errors="replace").strip() or "unknown"
    except OSError:
        pass
    return ""


def sync_folder(folder: pathlib.Path) -> None:
    """Has the names in a folder on disk."""
    # The new name, too, must survive a power cut. Windows cannot open a folder.
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _matched(path, arrays, like, fixed) -> PyTree:
    """The arrays in the structure of `like`; raises where names, shapes or fixed values are others."""
    rows = named_leaves(like)
    check_structure(path.parent, arrays, rows)
    pairs = list(zip(rows, arrays.values(), strict=True))
    others = [name for (name, x), y in pairs if name.startswith(fixed) and not same_bits(y, key_data(x))]
    refuse_others(path.parent, others, fixed)
    return jax.tree.unflatten(jax.tree.structure(like), [from_data(array, x) for (_, x), array in pairs])


def check_structure(folder: pathlib.Path, arrays: dict[str, Any], rows: list[tuple[str, Any]]) -> None:
    """Raises where the saved arrays, by place and name, have other names, shapes or types than the leaves here."""
    # Two leaves may have one name; their place tells them apart.
    found = {(name.split(" ", 1)[1], name): array for name, array in arrays.items()}
    if [name for name, _ in found] != [name for name, _ in rows]:
        other = sorted({name for name, _ in found} ^ {name for name, _ in rows})
        of_optimizer = all(name.startswith("run['state'].opt_state") for name in other)
        raise JaxhpoError(
            f"`run_dir`: {folder} belongs to a run of another {'optimiser' if of_optimizer else 'structure'}; they "
            f"differ in {', '.join(other[:5])}. Use another folder, or the hyperparameters, carry and optimiser of "
            "that run (another number may take a number's place, a schedule may not)."
        )
    for (name, x), array in zip(rows, found.values(), strict=True):
        data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
        shape, dtype = np.shape(data), np.dtype(getattr(data, "dtype", array.dtype))
        # Types that NumPy does not know (bfloat16) come back as raw bytes.
        same = dtype == array.dtype or (array.dtype.kind == "V" and dtype.itemsize == array.dtype.itemsize)
        if array.shape != shape or not same:
            raise JaxhpoError(
                f"`run_dir`: `{name}` is {array.dtype}{list(array.shape)} in {folder}, but {dtype}{list(shape)} "
                "here: use another folder, or the precision (`jax_enable_x64`) and shapes of that run."
            )


def same_bits(array: np.ndarray, x: Any) -> bool:
    """Of equal shapes; raw bytes have no `==`."""
    return array.tobytes() == np.asarray(x).tobytes()


def refuse_others(folder: pathlib.Path, others: list[str], fixed: str) -> None:
    """Raises where fixed values are others; their names begin with `fixed`."""
    if others:
        others = [name.removeprefix(fixed) for name in others]
        # Another transform has another start, too.
        what = next((name for name in others if "transforms" in name), ", ".join(others))
        raise JaxhpoError(
            f"`run_dir`: the run in {folder} began with another value of {what}, so its numbers mean something "
            "else: use another folder, or the start (`hparams`), `key` and `transforms` of that run."
        )


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves, each with its name."""
    return list(zip(names(tree, "run"), jax.tree.leaves(tree), strict=True))


def _is_key(x) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def key_data(x: Any) -> Any:
    """An array, or the data of a key."""
    return jax.random.key_data(x) if _is_key(x) else x


def from_data(array: Any, like: Any) -> Any:
    """What `key_data` was made of."""
    if _is_key(like):
        # A shape does not tell which kind of key, but its type makes one that does.
        like = jnp.empty((), like.dtype) if isinstance(like, jax.ShapeDtypeStruct) else like
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return array.view(like.dtype) if array.dtype.kind == "V" else array
