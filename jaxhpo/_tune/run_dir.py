"""Crash-safe run directory: two checkpoints and an append-only history."""

import array
import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxhpo._core.errors import JaxhpoError, warn
from jaxhpo._core.processes import from_first
from jaxhpo._core.tree import named_leaves
from jaxhpo._core.types import PyTree
from jaxhpo._tune.checkpoint import (
    DamagedError,
    Header,
    Leaves,
    absolute,
    check_structure,
    checkpoints,
    from_data,
    is_own,
    lies_at,
    opened,
    read,
    replace,
    rows_of,
    same,
    set_aside,
    sync_folder,
    to_npz,
)
from jaxhpo._tune.history import LINE, blank, decode, encode, key_data, printable, proven, ranges

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None

KEPT = 2  # checkpoints, the newest
TAIL = 2**20  # bytes: the last lines of the history, which a checkpoint holds too
HISTORY, LOCK, STATUS = "history.jsonl", "lock", "status.json"
HOLDER = re.compile(rb"([0-9]+ on [^\n]*)?")  # what a run writes into its lock
ATTEMPTS, PAUSE = 25, 0.02  # to take the lock, and seconds between them: `jaxhpo show` holds it for microseconds


class _Log(NamedTuple):
    """Position in the history; it is replaced as a whole, so that an interruption leaves a consistent one.

    Attributes:
      rows: their number.
      written: bytes in the file.
      pending: lines that are not written yet.
    """

    rows: int
    written: int
    pending: bytes


class RunDir(contextlib.ExitStack):
    """The folder of a run, held by one process at a time: a context manager, which closes its files.

    `state-ROWS-SHA256.npz` holds the state after so many rows of history, and in its name the checksum of its bytes.
    It is written under another name, synced, and renamed; the two newest are kept. It suffices to continue.
    `history.jsonl` grows by one line per row. A checkpoint holds the checksum of each line, and the last mebibyte of
    them: lines that were changed or lost are mended from there, or are blank; lines beyond belong to steps that will be
    taken again. Before each line and each checkpoint, what is open is compared with what lies at the path, and is made
    again where it was replaced. Only checkpoints and the file `jaxhpo.tmp` are deleted; a history or a checkpoint that
    cannot be used is renamed. With several processes (`ShardedDir`) all of them call the same methods, and process 0
    alone holds the folder and the history.

    Args:
      path: the folder, made where it does not exist.

    Raises:
      JaxhpoError: nothing can be written there, or another process holds it.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__()
        self.callback(self._close_lock)
        self.callback(self._close_history)
        self._lock: Any = None  # on process 0 only, like the file
        self._file: Any = None
        self._process, self._tells = os.getpid(), True
        self._rows: list[PyTree | None] = []  # None: lost
        self._sums = array.array("I")
        self._log, self.saved_rows = _Log(0, 0, b""), 0
        self._newest: pathlib.Path | None = None
        self._found: tuple[dict[int, bytes], list[pathlib.Path]] = ({}, [])
        self._arrays: list[np.ndarray] = []
        from_first(lambda: self._open(path))
        self.folder = absolute(path)

    def _open(self, path) -> None:
        try:
            if path == "":
                raise ValueError("it is empty")
            self.folder = absolute(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock(ATTEMPTS)
            self._open_history()
        except JaxhpoError:
            self.close()
            raise
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            self.close()
            message = f"`run_dir` got {path!r}, where no file can be written ({error}): name a folder."
            raise JaxhpoError(message) from error
        self._tells = _is_status(self.folder / STATUS)
        if not self._tells:
            _warn(f"{self.folder / STATUS} is not that of a run, and stays as it is: `jaxhpo show` has none to tell")

    def _open_history(self) -> None:
        path = self.folder / HISTORY
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode) or (found.st_size and not self._checkpoints()):
                kept = set_aside(path, ".jsonl")
                _warn(
                    f"{path} belongs to no checkpoint: it is kept as {kept}, and the run starts at its first step. "
                    "(One that is killed before its first checkpoint leaves such a file: `save_every=1` writes one "
                    "after the first row.)"
                )
        self._file = opened(path, "r+b", os.O_CREAT, buffering=0)

    @property
    def num_rows(self) -> int:
        """Rows of the history so far."""
        return self._log.rows

    @property
    def begun(self) -> bool:
        """True where there is a checkpoint."""
        return from_first(lambda: bool(self._checkpoints()))

    def __exit__(self, *details) -> bool | None:
        try:
            return super().__exit__(*details)
        except OSError as error:  # of closing: the result is not lost for it
            _warn(f"a file in {self.folder} could not be closed ({error}).")
            return False

    def _close_history(self) -> None:
        if self._file is not None:
            self._file.close()

    def _close_lock(self) -> None:
        if self._is_here and fcntl is not None and not self._lock.closed:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child that was forked meanwhile would keep it
        if self._lock is not None:
            self._lock.close()

    @property
    def _is_here(self) -> bool:
        """False on processes without the folder, and in a child that was forked: its files are its parent's."""
        return self._lock is not None and os.getpid() == self._process

    def _take_lock(self, attempts: int) -> None:
        self._lock = lock = opened(self.folder / LOCK, "r+b", os.O_CREAT, buffering=0)
        if fcntl is None:
            return
        for attempt in itertools.count(1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt >= attempts:
                    holder = _holder(lock)
                    lock.close()
                    raise JaxhpoError(
                        f"`run_dir`: {self.folder} is in use by process {holder}: wait for it, stop it, or name "
                        "another folder."
                    ) from None
                time.sleep(PAUSE)
            except OSError as error:
                _warn(f"{self.folder} cannot be locked ({error}): make sure that no other process uses it.")
                return
        # The lock of a process that was killed is released; its number in the file is replaced.
        with contextlib.suppress(OSError):
            if HOLDER.fullmatch(lock.read(256)):
                lock.truncate(0)
                lock.seek(0)
                lock.write(f"{os.getpid()} on {os.uname().nodename}".encode())

    def append(self, row: PyTree) -> None:
        """Adds a row to the history; where the disk refuses, it is kept for the next time."""
        self._rows[self.num_rows :] = [row]
        line = encode(self.num_rows, row) if self._is_here else b""
        self._sums[self.num_rows :] = array.array("I", [zlib.crc32(line.strip())])
        self._log = self._log._replace(rows=self.num_rows + 1, pending=self._log.pending + line)
        if self._is_here:
            with contextlib.suppress(OSError):  # `save` warns
                self._flush()

    def _flush(self) -> None:
        self._check_place()
        while self._log.pending:
            # From the end of the last complete write: an interrupted one is overwritten.
            self._file.seek(self._log.written)
            count = self._file.write(self._log.pending)
            self._log = self._log._replace(written=self._log.written + count, pending=self._log.pending[count:])

    def _check_place(self) -> None:
        """Makes the folder, the lock and the history again, where other ones or none lie at their paths."""
        path, pending = self.folder / HISTORY, self._log.pending
        if lies_at(self._file, path) and lies_at(self._lock, self.folder / LOCK):
            size = os.fstat(self._file.fileno()).st_size
            self._file.seek(min(size, self._log.written))
            if size >= self._log.written and pending.startswith(self._file.read(len(pending) + 1)):
                return  # beyond what was written, a part of what was to be
        self.folder.mkdir(parents=True, exist_ok=True)
        if not lies_at(self._lock, self.folder / LOCK):
            self._lock.close()
            try:
                self._take_lock(1)
            except JaxhpoError as error:
                raise OSError(str(error)) from None
        self._restore_history()

    def _restore_history(self) -> None:
        rows = enumerate(self._rows[: self.num_rows])
        _warn(self._write_history({i: encode(i, row).strip() for i, row in rows if row is not None}))

    def _write_history(self, lines: dict[int, bytes]) -> str:
        """Writes the history anew, and renames what lies there unless it is a part of it; returns that in words."""
        text, path, kept = b"".join(line + b"\n" for line in lines.values()), self.folder / HISTORY, ""
        if os.path.lexists(path) and not text.startswith(content(path)):
            kept = f", and what was there is kept as {set_aside(path, '.jsonl')}"
        replace(self.folder, HISTORY, lambda file: file.write(text))
        self._file.close()
        self._file = opened(path, "r+b", buffering=0)
        self._log = self._log._replace(written=len(text), pending=b"")
        return f"{path} was changed or removed by others: it is written anew{kept}"

    def _prepare(self) -> bool:
        """Returns whether the state after these rows is not on disk; if so, the history is when this returns."""
        self._flush()
        tail = self._tail()
        if len(proven([tail], self._sums)) < tail.count(b"\n"):  # changed in its place
            self._restore_history()
        if self.num_rows == self.saved_rows and self._newest is not None and self._newest.exists():
            return False
        os.fsync(self._file.fileno())
        return self.num_rows > 0

    def save(self, tree: PyTree, settings: dict[str, Any]) -> None:
        """Writes a checkpoint of the state after the rows so far; warns where the disk refuses.

        Args:
          tree: arrays and keys.
          settings: numbers and strings, to be compared with those of the call that resumes.
        """
        leaves = named_leaves(tree, "run")
        if self._succeeds(self._prepare) and self._write(leaves, settings):
            self.saved_rows = self.num_rows

    def _succeeds(self, fn: Callable[[], Any]) -> Any:
        """Calls `fn` on process 0; returns its result, or False with a warning where the disk refused."""
        try:
            return from_first(fn)
        except OSError as error:
            _warn(
                f"the state after {self.num_rows} outer steps could not be saved in {self.folder} "
                f"({error}). The run goes on, and tries again; on disk it is at step {self.saved_rows}."
            )
            return False

    def _write(self, leaves: Leaves, settings: dict[str, Any]) -> bool:
        arrays = [np.asarray(key_data(x)) for _, x in leaves]
        name = f"state-{self.num_rows:08d}-{{}}.npz"
        header = self._header(leaves, settings)
        commit = lambda: self._commit(self.folder, name, lambda file: to_npz(file, header, arrays))  # noqa: E731
        return self._succeeds(commit) is not False

    def _tail(self) -> bytes:
        """Returns the last lines of the history, as many as fit into a checkpoint."""
        start = max(0, self._log.written - TAIL)
        self._file.seek(start)
        tail = self._file.read(self._log.written - start)
        return tail.partition(b"\n")[2] if start else tail

    def _header(self, leaves: Leaves, settings: dict[str, Any]) -> Header:
        types = [str(np.result_type(x) if not hasattr(x, "dtype") else x.dtype) for _, x in leaves]
        names, tail = [name for name, _ in leaves], self._tail().decode(errors="replace")
        return Header(names, types, self._sums[: self.num_rows], tail, settings)

    def _commit(self, folder: pathlib.Path, name: str, write: Callable) -> None:
        """Writes the file that completes a checkpoint, with its checksum in its name; removes older checkpoints."""
        path = replace(folder, name, write)
        self._newest = path if folder == self.folder else folder
        for place in {folder, self.folder}:
            sync_folder(place)
        for old in self._stale():
            _remove(old)

    def _stale(self) -> list[pathlib.Path]:
        """Returns the older checkpoints; what was saved after more rows was not by this run."""
        older = [p for p in self._checkpoints() if rows_of(p) <= self.num_rows and p != self._newest]
        return [path for path in older[KEPT - 1 :] if is_own(path)]

    def write_status(self, **fields: Any) -> None:
        """Writes the run's status for `jaxhpo show`; nothing depends on it, so that the disk may refuse."""
        if self._is_here and self._tells and lies_at(self._lock, self.folder / LOCK):
            with contextlib.suppress(OSError):
                replace(self.folder, STATUS, lambda file: file.write(json.dumps(fields).encode() + b"\n"))

    def _checkpoints(self) -> list[pathlib.Path]:
        """Returns the checkpoints, the newest first."""
        return checkpoints(self.folder)

    def resume(self, like: PyTree, row: PyTree, fixed: str) -> tuple[PyTree, list[PyTree], dict, list[str]]:
        """Reads the newest checkpoint that is not damaged.

        Args:
          like: a tree of the state's structure and shapes; arrays on several devices are restored with its shardings.
          row: the same of a row of history.
          fixed: leaves whose names begin with this must hold the same values.

        Returns:
          The state, with arrays and keys for leaves; the rows of the history, `blank` where they are lost; the settings
          of the call that saved it; notes on what was damaged or lost.

        Raises:
          JaxhpoError: all checkpoints are damaged, or they are those of another run.
        """
        leaves = named_leaves(like, "run")
        found = from_first(lambda: self._find(leaves, row))
        lines = dict(found["lines"])
        rows = [self._decoded(lines[i], row) if i in lines else None for i in range(found["rows"])]
        pairs = list(zip(leaves, self._restored(found["name"], leaves), strict=True))
        others = [name for (name, x), y in pairs if name.startswith(fixed) and not same(y, key_data(x))]
        if others:  # another transform has another start, too
            what = next((name for name in others if "transforms" in name), ", ".join(others)).replace(fixed, "")
            raise JaxhpoError(
                f"`run_dir`: the run in {self.folder} began with another value of {what}, so that its numbers mean "
                "something else: use another folder, or the `hparams`, `key`, `transforms` and `monitor` of that run."
            )
        tree = jax.tree.unflatten(jax.tree.structure(like), [from_data(array, x) for (_, x), array in pairs])
        notes = found["notes"] + from_first(self._adopt)
        if lost := [i for i, row in enumerate(rows) if row is None]:
            notes.append(f"of {len(rows)} rows of the history {ranges(lost)} are lost, and NaN")
        self._rows, self.saved_rows = rows, len(rows)
        self._log = self._log._replace(rows=len(rows))
        empty = blank(row)
        return tree, [empty if row is None else row for row in rows], found["settings"], notes

    def _find(self, leaves: Leaves, row: PyTree) -> dict[str, Any]:
        """Returns what the newest checkpoint holds that can be used by this call."""
        notes, damaged, refusal = [], [], None

        def check(header: Header, saved: Leaves) -> None:
            self._found = lines, _ = lines_of(self.folder, header), damaged
            for line in itertools.islice(lines.values(), 1):
                self._decoded(line, row)
            check_structure(self.folder, saved, leaves)

        for path in self._checkpoints():
            try:
                header, self._arrays = read(path, check)
            except (DamagedError, JaxhpoError) as error:
                refusal = refusal or (error if isinstance(error, JaxhpoError) else None)
                damaged.append(path)
                notes.append(printable(f"{path.name[:14]}{path.suffix} is damaged ({error})"))
                continue
            self._sums, self._newest, lines = header.sums, path, self._found[0]
            found = {"name": path.name, "rows": len(header.sums), "notes": notes}  # what JSON can hold
            return {**found, "settings": header.settings, "lines": [(i, x.decode()) for i, x in lines.items()]}
        raise refusal or JaxhpoError(
            f"`run_dir`: {self.folder} holds no readable checkpoint: {'; '.join(notes)}. Name another, or move it away."
        )

    def _decoded(self, line: bytes | str, row: PyTree) -> PyTree:
        try:
            return decode(line, row)
        except ValueError as error:
            raise JaxhpoError(
                f"`run_dir`: rows of the history in {self.folder} differ from those of this call ({error}): use "
                "another folder, or the `record`, `on_error`, `population`, `accumulate`, `hparams` and info of that "
                "run."
            ) from error

    def _adopt(self) -> list[str]:
        """Continues the history of the checkpoint; damaged ones, which are newer, make room. Returns notes."""
        lines, damaged = self._found
        for path in damaged:
            set_aside(path)
        text, found = b"".join(line + b"\n" for line in lines.values()), content(self.folder / HISTORY)
        rest = found.removeprefix(text)
        beyond = [line for line in rest.splitlines(keepends=True) if not LINE.startswith(line[: len(LINE)])]
        if not found.startswith(text) or beyond or (rest and len(lines) < len(self._sums)):
            return [self._write_history(lines)]
        self._file.truncate(len(text))  # lines of steps that will be taken again
        self._log = self._log._replace(written=len(text))
        return []

    def _restored(self, name: str, leaves: Leaves) -> list:
        """Returns the arrays of the checkpoint that was found, placed as the leaves are."""
        del name, leaves
        return self._arrays


def lines_of(folder: pathlib.Path, header: Header) -> dict[int, bytes]:
    """Returns the rows of a checkpoint that are left: in the history, the checkpoint, histories that were set aside."""
    others = map(content, folder.glob("history.damaged-*.jsonl"))
    return proven(itertools.chain([content(folder / HISTORY), header.tail.encode()], others), header.sums)


def _warn(text: str) -> None:
    warn(f"`run_dir`: {text}")


def content(path: pathlib.Path) -> bytes:
    """Returns the bytes of a regular file; none where it cannot be read."""
    with contextlib.suppress(OSError), opened(path, "rb") as file:
        return file.read()
    return b""


def _is_status(path: pathlib.Path) -> bool:
    """Returns whether a file is what `write_status` writes, or there is none."""
    with contextlib.suppress(ValueError):
        return not os.path.lexists(path) or {"status", "message"} <= {*json.loads(content(path))}
    return False


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _holder(lock) -> str:
    """Returns the process that is written in a lock."""
    lock.seek(0)
    return printable(lock.read(256).decode(errors="replace").strip()) or "unknown"


def in_use(folder: pathlib.Path) -> str:
    """Returns the process that holds the folder of a run; empty where there is none, or it cannot be known."""
    if fcntl is not None:
        with contextlib.suppress(OSError), opened(folder / LOCK, "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _holder(lock)
    return ""
