"""Splits are disjoint, seeded and checked; digits and MNIST have the documented contents."""

import builtins
import gzip
import sys

import numpy as np
import pytest

import jaxhpo
from jaxhpo.data import Examples, _download, digits, mnist, split


def rows(part):
    return {tuple(row) for row in part.inputs.tolist()}


def test_digits_have_the_documented_shapes_and_ranges():
    parts = digits(0, train=200, validation=300)
    assert [part.inputs.shape for part in parts] == [(200, 64), (300, 64), (1297, 64)]  # 1797 images in all
    for part in parts:
        assert part.inputs.dtype == np.float32 and part.targets.dtype == np.int32
        assert part.inputs.min() >= 0 and part.inputs.max() <= 1
        assert set(part.targets.tolist()) == set(range(10))


def test_parts_are_disjoint():
    # No two of the 1797 images are equal, so an image identifies its index.
    parts = digits(3, train=100, validation=100, test=500)
    assert [len(part.targets) for part in parts] == [100, 100, 500]
    assert len(set.union(*map(rows, parts))) == sum(len(rows(part)) for part in parts) == 700


def test_seed_determines_the_split():
    first, again, other = digits(1), digits(1), digits(2)
    np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
    assert rows(first.train) != rows(other.train)


def test_inputs_stay_with_their_targets():
    parts = split(Examples(np.arange(50) * 10, np.arange(50)), seed=5, train=20, validation=20)
    for inputs, targets in parts:
        np.testing.assert_array_equal(inputs, targets * 10)
    assert sorted(np.concatenate([part.targets for part in parts])) == list(range(50))


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"train": 0}, ["train", "at least 1"]),
        ({"train": 2.5}, ["train", "integer"]),
        ({"validation": "300"}, ["validation", "integer"]),
        ({"seed": -1}, ["seed", "at least 0"]),
        ({"test": 0}, ["test", "at least 1"]),
        ({"train": 1500, "validation": 297}, ["1797", "disjoint"]),
        ({"train": 200, "validation": 300, "test": 1298}, ["test=1298", "1797"]),
    ],
)
def test_invalid_sizes_are_named(arguments, names):
    with pytest.raises(jaxhpo.JaxhpoError) as error:
        digits(**arguments)
    assert all(name in str(error.value) for name in names)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxhpo\[demo\]'"):
        digits()


# --- MNIST, from synthetic archives of the same layout; from the published ones if they are available ---


def write_idx(path, array):
    """Write the bytes 0, 0, 8 (the type), the number of dimensions; each length, big-endian; the entries."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Forty training and ten test images of 2 × 3 pixels; the first pixel is the number, the label that mod 10."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, numbers in (("train", np.arange(40)), ("t10k", np.arange(100, 110))):
        images = np.full((len(numbers), 2, 3), 255)
        images[:, 0, 0] = numbers
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", numbers % 10)
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(_download, "_verify", lambda path, sha256: None)  # these files are not the published ones
    return folder


def numbers_of(part):
    return np.round(part.inputs[:, 0] * 255).astype(int)


def test_reads_mnist_archives(mirror):
    parts = mnist(3, train=20, validation=15, test=4)
    assert [part.inputs.shape for part in parts] == [(20, 6), (15, 6), (4, 6)]
    for part in parts:
        assert part.inputs.dtype == np.float32 and part.targets.dtype == np.int32
        np.testing.assert_array_equal(part.targets, numbers_of(part) % 10)
        np.testing.assert_array_equal(part.inputs[:, 1:], 1.0)
    trained = np.concatenate([numbers_of(parts.train), numbers_of(parts.validation)])
    assert len(set(trained)) == 35 and trained.max() < 40  # disjoint, and from the training archive
    assert numbers_of(parts.test).min() >= 100


def test_seed_determines_the_mnist_split(mirror):
    first, again, other = (mnist(seed, train=20, validation=15) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train.inputs, again.train.inputs)
    assert set(numbers_of(first.train)) != set(numbers_of(other.train))
    assert sorted(numbers_of(first.test)) == list(range(100, 110))  # all


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.write_bytes(b"<html>"), "is not a complete gzip archive"),
        (lambda f: f.write_bytes(f.read_bytes()[:-20]), "is not a complete gzip archive.*download it again"),
        (lambda f: write_idx(f, np.zeros((40, 6))), r"begins with \[0, 0, 8, 2\], not with \[0, 0, 8, 3\]"),
        (
            lambda f: f.write_bytes(gzip.compress(gzip.decompress(f.read_bytes())[:-1])),
            r"its header says \(40, 2, 3",
        ),
        (lambda f: write_idx(f, np.zeros((39, 2, 3))), "39 images but 40 labels"),
    ],
    ids=["not gzip", "truncated", "other dimensions", "too short", "other labels"],
)
def test_damaged_mnist_archive_is_named(mirror, damage, says):
    damage(mirror / "train-images-idx3-ubyte.gz")
    with pytest.raises(jaxhpo.JaxhpoError, match=f"train.*{says}"):
        mnist(train=20, validation=10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"train": 0}, "`train` got 0.*at least 1"),
        ({"train": 30, "validation": 11}, r"`train \+ validation` got 41.*holds 40.*at most 40"),
        ({"train": 20, "validation": 10, "test": 11}, "`test` got 11.*holds 10"),
        ({"train": 20, "validation": 10, "seed": -1}, "`seed`.*at least 0"),
    ],
)
def test_invalid_mnist_sizes_are_named(mirror, arguments, says):
    with pytest.raises(jaxhpo.JaxhpoError, match=says):
        mnist(**arguments)


def test_files_missing_in_the_mirror_are_downloaded_and_verified(mirror, monkeypatch, tmp_path):
    pooch = pytest.importorskip("pooch")
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path / "elsewhere"))
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        return str(mirror / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert mnist(train=20, validation=10).train.inputs.shape == (20, 6)
    assert len(asked) == 4 and all(url.startswith("https://") and url.endswith(".gz") for url, _ in asked)
    assert all(known.startswith("sha256:") and len(known) == 7 + 64 for _, known in asked)

    def offline(*args, **more):
        raise OSError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(
        jaxhpo.JaxhpoError, match="could not be downloaded from https://.*elsewhere.*no route.*JAXHPO_DATA_DIR"
    ):
        mnist(train=20, validation=10)


def test_without_pooch_the_message_says_what_to_install(monkeypatch):
    monkeypatch.delenv("JAXHPO_DATA_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxhpo\[data\]'.*JAXHPO_DATA_DIR"):
        mnist()


@pytest.mark.slow
def test_published_mnist():
    try:
        parts = mnist(0, train=50_000, validation=10_000)
    except (ImportError, jaxhpo.JaxhpoError) as error:
        pytest.skip(str(error))
    assert [part.inputs.shape for part in parts] == [(50_000, 784), (10_000, 784), (10_000, 784)]
    # The published counts of the test labels.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(parts.test.targets), counts)
    assert parts.train.inputs.min() == 0 and parts.train.inputs.max() == 1
    # The digits are centred: the border is dark, the middle is not.
    mean = parts.train.inputs.mean(0).reshape(28, 28)
    assert mean[14].max() > 0.3 and mean[0].max() < 0.01 and mean[:, 0].max() < 0.01
