"""Splits are disjoint, seeded and checked; digits, MNIST, Fashion-MNIST and CIFAR-10 have the documented contents."""

import builtins
import gzip
import io
import os
import pathlib
import sys
import tarfile

import numpy as np
import pytest

import jaxhpo
from jaxhpo.data import Examples, _download, cifar10, digits, fashion_mnist, mnist, split


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


# --- Fashion-MNIST: as MNIST, from a folder of its own ---


def test_fashion_mnist_is_read_as_mnist_from_its_own_folder(mirror):
    digits_there = mnist(3, train=20, validation=15, test=4)
    mirror.rename(mirror.parent / "fashion_mnist")
    parts = fashion_mnist(3, train=20, validation=15, test=4)
    for part, same in zip(parts, digits_there, strict=True):
        np.testing.assert_array_equal(part.inputs, same.inputs)
        np.testing.assert_array_equal(part.targets, same.targets)
    write_idx(mirror.parent / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz", np.zeros(3))
    with pytest.raises(jaxhpo.JaxhpoError, match="Fashion-MNIST files of `t10k` hold 10 images but 3 labels.*zaland"):
        fashion_mnist(train=20, validation=15)


def test_another_file_than_the_published_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    for load, folder, file in (
        (fashion_mnist, "fashion_mnist", "train-images-idx3-ubyte.gz"),
        (cifar10, "cifar10", "cifar-10-binary.tar.gz"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(b"<html>")
        with pytest.raises(jaxhpo.JaxhpoError, match=f"{file} is damaged or not the published file: its sha256"):
            load()


# --- CIFAR-10, from synthetic archives of the same layout, and from npz files ---


def cifar_images(numbers):
    """The pixel of row 1, column 2 is red by the number; all others are 255."""
    images = np.full((len(numbers), 32, 32, 3), 255, np.uint8)
    images[:, 1, 2, 0] = numbers
    return images


def write_cifar(path, contents):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def records(numbers):
    """Of each image the label, its number mod 10, then the reds row by row, the greens, the blues."""
    labels = (numbers % 10).astype(np.uint8)[:, None]
    planes = [cifar_images(numbers)[..., colour].reshape(len(numbers), -1) for colour in range(3)]
    return np.concatenate([labels, *planes], 1).tobytes()


BATCHES = {f"data_batch_{i}.bin": records(np.arange(6 * i, 6 * i + 6)) for i in range(1, 6)}
BATCHES |= {"test_batch.bin": records(np.arange(100, 104)), "readme.html": b"<html>"}


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """An archive of thirty training and four test images."""
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    write_cifar(path, BATCHES)
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(_download, "_verify", lambda path, sha256: None)  # this file is not the published one
    return path


def check_cifar(parts, sizes):
    for part, size in zip(parts, sizes, strict=True):
        assert part.inputs.shape == (size, 32, 32, 3)
        assert part.inputs.dtype == np.float32 and part.targets.dtype == np.int32
        numbers = np.round(part.inputs[:, 1, 2, 0] * 255).astype(int)
        np.testing.assert_array_equal(part.targets, numbers % 10)
        np.testing.assert_array_equal(part.inputs, cifar_images(numbers) / np.float32(255))
    return [set(np.round(part.inputs[:, 1, 2, 0] * 255).astype(int).tolist()) for part in parts]


def test_reads_the_cifar_archive(cifar):
    train, validation, test = check_cifar(cifar10(1, train=17, validation=13), (17, 13, 4))
    assert train | validation == set(range(6, 36)) and test == set(range(100, 104))
    with pytest.raises(jaxhpo.JaxhpoError, match=r"`train \+ validation` got 31.*holds 30"):
        cifar10(train=18, validation=13)


def test_reads_a_part_of_cifar(tmp_path):
    np.savez(tmp_path / "part.npz", x=cifar_images(np.arange(40)), y=np.arange(40, dtype=np.uint8) % 10)
    parts = check_cifar(cifar10(1, train=20, validation=12, file=tmp_path / "part.npz"), (20, 12, 8))
    assert set.union(*parts) == set(range(40))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-20]), "is not a complete gzipped tar archive.*download it again"),
        (lambda f: f.write_bytes(b"<html>"), "is not a complete gzipped tar archive"),
        (lambda f: write_cifar(f, {**BATCHES, "data_batch_3.bin": b"1" * 3072}), "data_batch_3.bin has 3072 bytes"),
        (lambda f: write_cifar(f, {"data_batch_1.bin": b""}), "has no data_batch_2.bin, .*, test_batch.bin: take the"),
        (lambda f: write_cifar(f, {**BATCHES, "test_batch.bin": bytes([10] * 3073)}), "has a label 10, but"),
    ],
    ids=["truncated", "not gzip", "too short", "files missing", "labels"],
)
def test_damaged_cifar_archive_is_named(cifar, damage, says):
    damage(cifar)
    with pytest.raises(jaxhpo.JaxhpoError, match=f"cifar-10-binary.*{says}"):
        cifar10(train=20, validation=10)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.write_bytes(b"<html>"), "is not a complete npz file"),
        (lambda f: f.write_bytes(f.read_bytes()[:-400]), "is not a complete npz file.*write it anew"),
        (lambda f: f.unlink(), "is not a complete npz file.*No such file"),
        (
            lambda f: np.savez(f, x=np.zeros((2, 3072), np.uint8), y=np.zeros(2, np.uint8)),
            r"uint8 \(2, 3072\).*must be",
        ),
        (lambda f: np.savez(f, images=np.zeros(2)), "is not a complete npz file with `x` and `y`"),
    ],
    ids=["not zip", "truncated", "missing", "other shape", "other names"],
)
def test_damaged_part_of_cifar_is_named(tmp_path, damage, says):
    path = tmp_path / "part.npz"
    np.savez(path, x=cifar_images(np.arange(4)), y=np.arange(4, dtype=np.uint8))
    damage(path)
    with pytest.raises(jaxhpo.JaxhpoError, match=f"part.npz.*{says}"):
        cifar10(train=1, validation=1, file=path)


@pytest.mark.slow
def test_published_part_of_cifar():
    path = pathlib.Path(os.environ.get("JAXHPO_DATA_DIR", ""), "cifar10", "cifar10_train_first4000_lossless.npz")
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    parts = cifar10(0, train=600, validation=400, file=path)
    assert [len(part.targets) for part in parts] == [600, 400, 3000]
    # Ten classes in about equal numbers: a binomial count of 3000 draws at 1/10 has deviation 16.
    assert (abs(np.bincount(parts.test.targets) - 300) < 5 * 16).all()
    assert 0.4 < parts.train.inputs.mean() < 0.55  # of all images it is 0.473
