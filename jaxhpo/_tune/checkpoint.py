"""Checkpoints on disk: what belongs to one, and how a file is read that somebody else may have made."""

import array
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import stat
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._tune.history import is_key, printable

SCHEMA = 5  # of the contents of a checkpoint; another number is refused
HEADER = ("schema", "names", "types", "sums", "tail", "settings")  # entries beside the leaves of the state
HEADER_BYTES = 2**26  # the most that they may take together: that is of eight million rows
TEMPORARY = "jaxhpo.tmp"  # what is being written
NAME = re.compile(r"state-[0-9]{8,18}(-[0-9a-f]{64}\.npz|\.parts)")
SEALS = "sealed-*.json"
PART = re.compile(r"part-[0-9]+\.npz|sealed-[0-9a-f]{64}\.json|jaxhpo\.tmp")  # what lies in a folder of parts
Leaves = list[tuple[str, Any]]  # each with its name
try:  # which Windows lacks. A pipe opens at once, and is refused.
    _NO_LINKS = os.O_NOFOLLOW | os.O_NONBLOCK
except AttributeError:
    _NO_LINKS = 0


class DamagedError(Exception):
    """A checkpoint that cannot be used."""


class Header(NamedTuple):
    """Description of a run that its checkpoint holds.

    Attributes:
      names: of the leaves of the state.
      types: of the leaves.
      sums: CRC-32 of each line of the history.
      tail: the last lines, as many as fit.
      settings: of the call that saved it.
    """

    names: list[str]
    types: list[str]
    sums: array.array
    tail: str
    settings: dict[str, Any]

    def texts(self) -> dict[str, str]:
        """Returns the entries of `HEADER`."""
        settings = json.dumps(self.settings, sort_keys=True, default=float)
        names, types = json.dumps(self.names), json.dumps(self.types)
        texts = (str(SCHEMA), names, types, self.sums.tobytes().hex(), self.tail, settings)
        return dict(zip(HEADER, texts, strict=True))


def _header(texts: dict[str, str], path: pathlib.Path) -> Header:
    """Inverts `Header.texts`, for the checkpoint at `path`."""
    if (schema := int(texts["schema"])) != SCHEMA:
        raise JaxhpoError(
            f"`run_dir`: {path.parent} is of another version of jaxhpo (schema {schema}, where this one reads "
            f"{SCHEMA}): continue with that version, or name another folder."
        )
    names, types, settings = (json.loads(texts[name]) for name in ("names", "types", "settings"))
    header = Header(names, types, array.array("I", bytes.fromhex(texts["sums"])), texts["tail"], settings)
    kinds = [type(settings[name]) for name in ("optimizer", "loss", "seconds", "inner_steps")]
    if kinds != [dict, dict, float, int] or not isinstance(names, list) or len(header.sums) != rows_of(path):
        raise DamagedError("its header is not one of a run")
    return header


def rows_of(path: pathlib.Path) -> int:
    """Returns after how many rows a checkpoint was saved, by its name."""
    return int(path.name.split("-")[1].split(".")[0])


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints in a folder, the newest first; files of other names are the user's."""

    def complete(path):
        return path.is_file() if path.suffix == ".npz" else any(path.glob(SEALS))

    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and complete(path)]
    return sorted(found, key=lambda path: (rows_of(path), path.name), reverse=True)


Check = Callable[[Header, Leaves], None]


@contextlib.contextmanager
def damage_told():
    """Raises `DamagedError` for whatever reading a file raises that somebody else may have made, but `JaxhpoError`."""
    try:
        yield
    except (DamagedError, JaxhpoError):
        raise
    except Exception as error:
        raise DamagedError(str(error) or type(error).__name__) from error


def to_npz(file: IO[bytes], header: Header, arrays: list[np.ndarray]) -> None:
    """Writes a checkpoint. Members are numbered: their names may be longer than the format allows."""
    texts = {name: np.frombuffer(text.encode(), np.uint8) for name, text in header.texts().items()}
    try:
        write_npz(file, texts | {str(i): x for i, x in enumerate(arrays)})
    except ValueError as error:  # zipfile's, where Ctrl-C came while a member was open
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def write_npz(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays as `np.savez` does, and pickles nothing, which NumPy before 2.2 cannot be told."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, x in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(x), allow_pickle=False)


def from_npz(path: pathlib.Path, check: Check) -> tuple[Header, list[np.ndarray]]:
    """Reads a checkpoint, of which nothing is unpacked before it is known to be what is expected.

    Args:
      path: its file.
      check: called with the header and arrays of no memory, of the names, shapes and types that the file claims, before
        they are read; raises where they are not those of this run.

    Raises:
      DamagedError: it cannot be used.
      JaxhpoError: it is that of another version; or what `check` raises.
    """
    with damage_told():
        if checksum(path) not in path.name:
            raise DamagedError("its checksum does not match")
        with zipfile.ZipFile(path) as file:
            header = _npz_header(file, path)
            infos = [file.getinfo(f"{i}.npy") for i in range(len(header.names))]
            if len(file.infolist()) != len(HEADER) + len(infos):
                raise DamagedError("its entries are not those of its header")
            check(header, [(name, _claimed(file, info)) for name, info in zip(header.names, infos, strict=True)])
            return header, [_array(file, info) for info in infos]


def _npz_header(file: zipfile.ZipFile, path: pathlib.Path) -> Header:
    infos = [file.getinfo(f"{name}.npy") for name in HEADER]
    if sum(_claimed(file, info).nbytes for info in infos) > HEADER_BYTES:
        raise DamagedError(f"its header takes more than {HEADER_BYTES} bytes")
    texts = [_array(file, info).tobytes().decode() for info in infos]
    return _header(dict(zip(HEADER, texts, strict=True)), path)


def _claimed(file, info) -> np.ndarray:
    """Returns an array without memory of the shape and type that a member claims, which its size must bear out."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise DamagedError("it is packed, as jaxhpo packs nothing")
    with file.open(info) as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        start = member.tell()
    claimed = np.broadcast_to(np.empty((), dtype), shape)
    if dtype.hasobject or info.file_size != start + claimed.size * dtype.itemsize:
        raise DamagedError("an entry is not the array that it claims to be")
    return claimed


def _array(file, info) -> np.ndarray:
    with file.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


class Pieces(NamedTuple):
    """An array whose pieces lie in several files; what is indexed is read.

    Attributes:
      shape: of the whole.
      dtype: its type.
      pieces: each as its range of every axis, and what reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: list[tuple[list[list[int]], Callable[[], np.ndarray]]]

    def __getitem__(self, index: Any) -> np.ndarray:
        box = bounds(index, self.shape)
        out = np.empty([stop - start for start, stop in box], self.dtype)
        for place, read in self.pieces:
            common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, place, strict=True)]
            if all(start < stop for start, stop in common):
                to, of = (
                    tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, base, strict=True))
                    for base in (box, place)
                )
                out[to] = read().view(self.dtype)[of]  # types that NumPy does not know are raw bytes on disk
        return out


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[list[int]]:
    """Returns first and last entry of each axis that an index of slices names."""
    return [list(s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)]


def arrays_in(path: pathlib.Path) -> list[Any]:
    """Returns the arrays of a checkpoint that another process has checked, which can be indexed by slices."""
    return from_npz(path, lambda header, saved: None)[1] if path.is_file() else _pieces(path, _seal(path))


def read(path: pathlib.Path, check: Check) -> tuple[Header, list[np.ndarray]]:
    """Reads a checkpoint of either form; see `from_npz`."""
    if path.is_file():
        return from_npz(path, check)
    with damage_told():
        seal = _seal(path)
        for name, digest in seal["files"].items():
            if checksum(path / name) != digest:
                raise DamagedError(f"the checksum of {name} does not match")
        header, arrays = _header(seal["header"], path), _pieces(path, seal)
        claimed = [np.broadcast_to(np.empty((), x.dtype), x.shape) for x in arrays]
        check(header, list(zip(header.names, claimed, strict=True)))
        return header, [x[(slice(None),) * len(x.shape)] for x in arrays]


def _pieces(path: pathlib.Path, seal: dict[str, Any]) -> list[Pieces]:
    arrays = [Pieces(tuple(shape), np.dtype(dtype), []) for dtype, shape in seal["leaves"]]
    for name in seal["files"]:
        with zipfile.ZipFile(path / name) as file:
            for info in file.infolist():
                i, place = json.loads(f"[{info.filename.removesuffix('.npy')}]")
                if _claimed(file, info).shape != tuple(stop - start for start, stop in place):
                    raise DamagedError(f"a piece in {name} is not where it claims to be")
                arrays[i].pieces.append((place, functools.partial(_piece, path / name, info)))
    for x in arrays:
        if sum(math.prod(b - a for a, b in place) for place, _ in x.pieces) != math.prod(x.shape):
            raise DamagedError("its pieces do not make up the whole")
    return arrays


def _piece(path, info) -> np.ndarray:
    with zipfile.ZipFile(path) as file:
        return _array(file, info)


def _seal(path: pathlib.Path) -> dict[str, Any]:
    (seal,) = path.glob(SEALS)
    if checksum(seal) not in seal.name:
        raise DamagedError("the checksum of its seal does not match")
    return json.loads(seal.read_bytes())


def header_of(path: pathlib.Path) -> Header:
    """Returns the header of a checkpoint of either form, of which nothing else is read or checked.

    Raises:
      DamagedError: it cannot be used.
      JaxhpoError: it is that of another version.
    """
    with damage_told():
        if path.is_dir():
            return _header(_seal(path)["header"], path)
        with zipfile.ZipFile(path) as file:
            return _npz_header(file, path)


def is_own(path: pathlib.Path) -> bool:
    """Returns whether a file has the entries of a checkpoint, or a folder the files: only such a one is deleted."""
    if path.is_dir():
        return not path.is_symlink() and all(PART.fullmatch(file.name) for file in path.iterdir())
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        return {*file.namelist()} >= {f"{name}.npy" for name in HEADER}
    return False


def check_structure(folder: pathlib.Path, saved: Leaves, leaves: Leaves) -> None:
    """Raises where saved arrays, by place and name, have other names, shapes or types than the leaves here."""
    names = [name for name, _ in saved]
    if names != [name for name, _ in leaves]:
        other = sorted({*names} ^ {name for name, _ in leaves})
        of_optimizer = all(name.startswith("run['state'].opt_state") for name in other)
        raise JaxhpoError(
            f"`run_dir`: {folder} belongs to a run of another {'optimiser' if of_optimizer else 'structure'}; they "
            f"differ in {printable(', '.join(other[:5]))}. Use another folder, or the hyperparameters, carry and "
            "optimiser of that run (a number may replace a number, but not a schedule)."
        )
    for (name, x), (_, saved_one) in zip(leaves, saved, strict=True):
        data = jax.eval_shape(jax.random.key_data, x) if is_key(x) else x
        shape, dtype = np.shape(data), np.dtype(getattr(data, "dtype", saved_one.dtype))
        # Types that NumPy does not know (bfloat16) are raw bytes on disk.
        same = dtype == saved_one.dtype or (saved_one.dtype.kind == "V" and dtype.itemsize == saved_one.dtype.itemsize)
        if saved_one.shape != shape or not same:
            raise JaxhpoError(
                f"`run_dir`: `{name}` is {printable(str(saved_one.dtype))}{list(saved_one.shape)} in {folder}, but "
                f"{dtype}{list(shape)} here: use another folder, or the precision (`jax_enable_x64`) and shapes of "
                "that run."
            )


def is_spread(x: Any) -> bool:
    """Returns whether an array lies on several devices."""
    sharding = getattr(x, "sharding", None)
    return sharding is not None and len(sharding.device_set) > 1


def same(saved: Any, x: Any) -> bool:
    """Returns whether two arrays of one shape are equal; raw bytes have no `==`."""
    return bool(jnp.array_equal(saved, x)) if is_spread(saved) else saved.tobytes() == np.asarray(x).tobytes()


def from_data(saved: Any, like: Any) -> Any:
    """Inverts `key_data`."""
    if is_key(like):
        # The type of a key holds its implementation, which a shape does not.
        like = jnp.empty((), like.dtype) if isinstance(like, jax.ShapeDtypeStruct) else like
        return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(like))
    return saved.view(like.dtype) if saved.dtype.kind == "V" else saved


# --- files ------------------------------------------------------------------------------------------------------------


def absolute(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path as it is now, whatever folder the process is in later; a leading `~` is the user's home."""
    return pathlib.Path(path).expanduser().absolute()


def opened(path: pathlib.Path, mode: str, more: int = 0, buffering: int = -1) -> Any:
    """Opens a regular file; raises OSError at a link, a pipe or a device, through which others would be written."""
    file = open(path, mode, buffering, opener=lambda name, flags: os.open(name, flags | more | _NO_LINKS, 0o666))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path.name} is not a regular file")
    return file


def replace(folder: pathlib.Path, name: str, write: Callable[[IO[bytes]], Any]) -> pathlib.Path:
    """Writes a file and syncs it under another name first; a `{}` in its name is replaced by its checksum."""
    temporary = _temporary(folder)
    try:
        with opened(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / (name.format(checksum(temporary)) if "{}" in name else name)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path


def _temporary(folder: pathlib.Path) -> pathlib.Path:
    """Returns a free name, where a file that a kill left behind is removed; what is no file is not this library's."""
    names = (folder / (f"{i}-{TEMPORARY}" if i else TEMPORARY) for i in itertools.count())
    path = next(p for p in names if not os.path.lexists(p) or stat.S_ISREG(p.lstat().st_mode))
    path.unlink(missing_ok=True)
    return path


def set_aside(path: pathlib.Path, suffix: str = "") -> str:
    """Renames a file to a name that is free, with this suffix, and returns that."""
    numbered = (path.with_name(f"{path.stem}.damaged-{i}{suffix}") for i in itertools.count(1))
    other = next(new for new in numbered if not os.path.lexists(new))
    os.rename(path, other)
    return other.name


def lies_at(file: Any, path: pathlib.Path) -> bool:
    """Returns whether the open file is the one at the path."""
    with contextlib.suppress(OSError):
        return not file.closed and os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    return False


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
