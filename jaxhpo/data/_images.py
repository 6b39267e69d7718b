"""Images: digits of scikit-learn, MNIST and Fashion-MNIST in idx format, CIFAR-10 in its binary format."""

import gzip
import math
import os
import pathlib
import tarfile
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.extra import needs_extra
from jaxhpo.data._download import fetch
from jaxhpo.data._split import Examples, Split, check_sizes, deal, split


class _Idx(NamedTuple):
    """Source of a data set in idx format."""

    title: str
    folder: str
    address: str
    sha256: dict[str, str]


MNIST = _Idx(
    "MNIST",
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
)
FASHION_MNIST = _Idx(
    "Fashion-MNIST",
    "fashion_mnist",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
)
CIFAR10 = "cifar-10-binary.tar.gz"
CIFAR10_ADDRESS = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_SHAPE = (3, 32, 32)  # of an image there: red, green, blue, each row by row
# What `numpy.load` and the arrays of its result raise for other files and damaged ones.
NOT_NPZ = (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error)


def digits(seed: int = 0, *, train: int = 200, validation: int = 300, test: int | None = None) -> Split:
    """1797 handwritten digits, 8×8 pixels (UCI "Optical Recognition of Handwritten Digits", test part).

    Args:
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training images.
      validation: number of validation images.
      test: number of test images; None takes all that remain.

    Returns:
      A `Split` of `Examples`: inputs float32 (n, 64) in [0, 1], row by row; targets int32 (n,) in 0..9.

    Raises:
      ImportError: without scikit-learn.
      JaxhpoError: a size that is not a positive integer, or parts that together need more than 1797 images.

    Example:
      >>> from jaxhpo.data import digits
      >>> parts = digits(seed=0, train=200, validation=300)
      >>> parts.train.inputs.shape, parts.test.targets.shape
      ((200, 64), (1297,))
    """
    with needs_extra("`jaxhpo.data.digits` needs scikit-learn", "demo"):
        from sklearn.datasets import load_digits
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    everything = Examples((pixels / 16).astype(np.float32), labels.astype(np.int32))
    return split(everything, seed, train=train, validation=validation, test=test)


def mnist(seed: int = 0, *, train: int = 10_000, validation: int = 10_000, test: int | None = None) -> Split:
    """Handwritten digits, 28×28 pixels: 60 000 images for training and validation, and 10 000 others for testing.

    Reads `<JAXHPO_DATA_DIR>/mnist/<file>` if that environment variable is set and the file exists. Otherwise it
    downloads the four archives (11 MB) once, into pooch's cache. Their sha256 is verified either way. The parts `train`
    and `validation` are drawn from the archives' training images, `test` from their test images.

    Args:
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training images.
      validation: number of validation images; with `train` at most 60 000.
      test: number of test images; None takes all 10 000.

    Returns:
      A `Split` of `Examples`: inputs float32 (n, 784) in [0, 1], row by row; targets int32 (n,) in 0..9.

    Raises:
      ImportError: a file must be downloaded, and pooch is not installed.
      JaxhpoError: a size that is not a positive integer, or too large; a failed download; a damaged archive.

    Example:
      >>> from jaxhpo.data import mnist
      >>> parts = mnist(seed=0, train=2000, validation=2000)  # doctest: +SKIP
      >>> parts.train.inputs.shape, parts.test.targets.shape  # doctest: +SKIP
      ((2000, 784), (10000,))

    References:
      LeCun, Bottou, Bengio, Haffner. Gradient-Based Learning Applied to Document Recognition. 1998.
    """
    return _from_idx(MNIST, seed, train, validation, test)


def fashion_mnist(seed: int = 0, *, train: int = 10_000, validation: int = 10_000, test: int | None = None) -> Split:
    """Articles of clothing in ten classes, 28×28 pixels, in the sizes and the format of `mnist`.

    Reads `<JAXHPO_DATA_DIR>/fashion_mnist/<file>` or downloads the four archives (30 MB) once, as `mnist` does.

    Args:
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training images.
      validation: number of validation images; with `train` at most 60 000.
      test: number of test images; None takes all 10 000.

    Returns:
      A `Split` of `Examples`: inputs float32 (n, 784) in [0, 1], row by row; targets int32 (n,) in 0..9.

    Raises:
      ImportError: a file must be downloaded, and pooch is not installed.
      JaxhpoError: a size that is not a positive integer, or too large; a failed download; a damaged archive.

    Example:
      >>> from jaxhpo.data import fashion_mnist
      >>> parts = fashion_mnist(seed=0, train=2000, validation=2000)  # doctest: +SKIP
      >>> parts.train.inputs.shape, parts.test.targets.shape  # doctest: +SKIP
      ((2000, 784), (10000,))

    References:
      Xiao, Rasul, Vollgraf. Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms. 2017.
      arXiv:1708.07747
    """
    return _from_idx(FASHION_MNIST, seed, train, validation, test)


def cifar10(
    seed: int = 0,
    *,
    train: int = 10_000,
    validation: int = 10_000,
    test: int | None = None,
    file: str | os.PathLike | None = None,
) -> Split:
    """Photographs in ten classes, 32×32 pixels in colour: 50 000 for training and validation, 10 000 for testing.

    Reads `<JAXHPO_DATA_DIR>/cifar10/cifar-10-binary.tar.gz`, or downloads that archive (170 MB) once, into pooch's
    cache. Its sha256 is verified either way. It holds bytes only, no pickles.

    Args:
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training images.
      validation: number of validation images; with `train` at most 50 000.
      test: number of test images; None takes all 10 000.
      file: a part of the data to take in place of the archive, an npz file with `x`, uint8 (n, 32, 32, 3), and `y`,
        uint8 (n,). All three parts are drawn from it; `test=None` takes all that remain.

    Returns:
      A `Split` of `Examples`: inputs float32 (n, 32, 32, 3) in [0, 1]; targets int32 (n,) in 0..9 for airplane,
      automobile, bird, cat, deer, dog, frog, horse, ship and truck.

    Raises:
      ImportError: the archive must be downloaded, and pooch is not installed.
      JaxhpoError: a size that is not a positive integer, or too large; a failed download; a damaged file.

    Example:
      >>> from jaxhpo.data import cifar10
      >>> parts = cifar10(seed=0, train=2000, validation=2000)  # doctest: +SKIP
      >>> parts.train.inputs.shape, parts.test.targets.shape  # doctest: +SKIP
      ((2000, 32, 32, 3), (10000,))

    References:
      Krizhevsky. Learning Multiple Layers of Features from Tiny Images. 2009.
    """
    check_sizes(seed, train, validation, test)
    if file is not None:
        parts = split(_npz(pathlib.Path(file)), seed, train=train, validation=validation, test=test)
        return Split(*map(_scaled, parts))
    for_training, for_testing = _cifar10_archive()
    return _draw(for_training, for_testing, seed, train, validation, test)


def _from_idx(source, seed, train, validation, test) -> Split:
    check_sizes(seed, train, validation, test)
    for_training, for_testing = (_idx_part(source, name) for name in ("train", "t10k"))
    return _draw(for_training, for_testing, seed, train, validation, test)


def _draw(for_training, for_testing, seed, train, validation, test) -> Split:
    """Random parts: two disjoint ones of the training images, one of the test images."""
    for what, size, part in (
        ("train + validation", train + validation, for_training),
        ("test", test or 0, for_testing),
    ):
        total = len(part.targets)
        if size > total:
            raise JaxhpoError(
                f"`{what}` got {size} images in all, but the archive holds {total}: write at most {total} in all."
            )
    rng = np.random.default_rng(seed)
    drawn = deal(for_training, rng, train, validation)
    return Split(*map(_scaled, drawn + deal(for_testing, rng, test or len(for_testing.targets))))


def _scaled(examples) -> Examples:
    """Bytes as float32 in [0, 1], with int32 labels."""
    x, y = examples
    return Examples((x / np.float32(255)).astype(np.float32), y.astype(np.int32))


def _idx_part(source, name) -> Examples:
    """Images, as bytes, and labels of one of the two parts upstream."""
    images, labels = (
        _read_idx(source, f"{name}-images-idx3-ubyte.gz", 3),
        _read_idx(source, f"{name}-labels-idx1-ubyte.gz", 1),
    )
    if len(images) != len(labels):
        raise JaxhpoError(
            f"The {source.title} files of `{name}` hold {len(images)} images but {len(labels)} labels: take both from "
            f"{source.address}."
        )
    return Examples(images.reshape(len(images), -1), labels)


def _read_idx(source, file, dimensions) -> np.ndarray:
    """Read the array of bytes in a gzipped idx file, of so many dimensions.

    The format is: the bytes 0, 0, 8 (the type) and the number of dimensions; the length of each dimension, in 4 bytes,
    big-endian; the entries.
    """
    path = fetch(source.folder, file, source.address + file, source.sha256[file])
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise JaxhpoError(f"{path} is not a complete gzip archive ({error}): download it again.") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise JaxhpoError(
            f"{path} begins with {list(content[:4])}, not with [0, 0, 8, {dimensions}], so it is not an idx file of "
            f"bytes in {dimensions} dimensions: take it from {source.address}."
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - head != math.prod(shape):
        raise JaxhpoError(f"{path} holds {len(content) - head} bytes, but its header says {shape}: download it again.")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _cifar10_archive() -> list[Examples]:
    """Images, as bytes, and labels of the training and test part.

    Each file is a sequence of records: a byte for the label, then the image.
    """
    path = fetch("cifar10", CIFAR10, CIFAR10_ADDRESS + CIFAR10, CIFAR10_SHA256)
    try:
        with tarfile.open(path, "r:gz") as archive:
            streams = {pathlib.PurePath(m.name).name: archive.extractfile(m) for m in archive if m.isfile()}
            files = {name: stream.read() for name, stream in streams.items() if stream and name.endswith(".bin")}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise JaxhpoError(f"{path} is not a complete gzipped tar archive ({error}): download it again.") from error
    names = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
    missing = [name for part in names for name in part if name not in files]
    if missing:
        raise JaxhpoError(f"{path} has no {', '.join(missing)}: take the binary version from {CIFAR10_ADDRESS}.")
    size = 1 + math.prod(CIFAR10_SHAPE)
    for name, content in files.items():
        if len(content) % size:
            raise JaxhpoError(f"{path}:{name} has {len(content)} bytes, no multiple of {size}: download it again.")

    def part(names):
        records = np.frombuffer(b"".join(files[name] for name in names), np.uint8).reshape(-1, size)
        images = records[:, 1:].reshape(-1, *CIFAR10_SHAPE).transpose(0, 2, 3, 1)
        return Examples(images, _classes(path, records[:, 0]))

    return [part(each) for each in names]


def _npz(path) -> Examples:
    """Images, as bytes, and labels of an npz file."""
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:
            x, y = arrays["x"], arrays["y"]
    except NOT_NPZ as error:
        raise JaxhpoError(f"{path} is not a complete npz file with `x` and `y` ({error}): write it anew.") from error
    if x.dtype != np.uint8 or x.shape[1:] != (32, 32, 3) or y.shape != x.shape[:1] or y.dtype != np.uint8:
        raise JaxhpoError(
            f"{path} holds x, {x.dtype} {x.shape}, and y, {y.dtype} {y.shape}: it must be uint8 (n, 32, 32, 3), and "
            "uint8 (n,)."
        )
    return Examples(x, _classes(path, y))


def _classes(path, labels):
    if len(labels) and labels.max() > 9:
        raise JaxhpoError(f"{path} has a label {labels.max()}, but there are ten classes, 0 to 9: download it again.")
    return labels
