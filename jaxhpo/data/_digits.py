"""Handwritten digits: those of scikit-learn without a download, and MNIST, read from its archives in idx format."""

import gzip
import math
import zlib

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.extra import needs_extra
from jaxhpo.data._download import fetch
from jaxhpo.data._split import Examples, Split, check_sizes, deal, split

ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


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
    check_sizes(seed, train, validation, test)
    rng = np.random.default_rng(seed)
    for_training, for_testing = _archive("train"), _archive("t10k")
    train_part, validation_part = _draw(rng, for_training, "train + validation", train, validation)
    (test_part,) = _draw(rng, for_testing, "test", test or len(for_testing.targets))
    return Split(train_part, validation_part, test_part)


def _archive(name: str) -> Examples:
    """Images, as bytes, and labels of one of the two parts upstream."""
    images, labels = _read(f"{name}-images-idx3-ubyte.gz", 3), _read(f"{name}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise JaxhpoError(
            f"The MNIST files of `{name}` hold {len(images)} images but {len(labels)} labels: take both from {ADDRESS}."
        )
    return Examples(images.reshape(len(images), -1), labels)


def _draw(rng, examples, what, *sizes) -> list[Examples]:
    """Random disjoint parts of the given sizes, as float32 in [0, 1] with int32 labels."""
    total = len(examples.targets)
    if sum(sizes) > total:
        raise JaxhpoError(
            f"`{what}` got {sum(sizes)} images in all, but the archive holds {total}: write at most {total} in all."
        )
    return [
        Examples((x / np.float32(255)).astype(np.float32), y.astype(np.int32)) for x, y in deal(examples, rng, *sizes)
    ]


def _read(file: str, dimensions: int) -> np.ndarray:
    """Read the array of bytes in a gzipped idx file, of so many dimensions.

    The format is: the bytes 0, 0, 8 (the type) and the number of dimensions; the length of each dimension, in 4 bytes,
    big-endian; the entries.
    """
    path = fetch("mnist", file, ADDRESS + file, SHA256[file])
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise JaxhpoError(f"{path} is not a complete gzip archive ({error}): download it again.") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes([0, 0, 8, dimensions]):
        raise JaxhpoError(
            f"{path} begins with {list(content[:4])}, not with [0, 0, 8, {dimensions}], so it is not an idx file of "
            f"bytes in {dimensions} dimensions: take it from {ADDRESS}."
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - head != math.prod(shape):
        raise JaxhpoError(f"{path} holds {len(content) - head} bytes, but its header says {shape}: download it again.")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
