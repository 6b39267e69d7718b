"""Omniglot, from synthetic archives of the same layout, and from the published ones if they are available."""

import io
import sys
import zipfile

import numpy as np
import pytest

import jaxhpo
from jaxhpo.data import _download, omniglot

Image = pytest.importorskip("PIL.Image")


def png(ink):
    """Black ink on white, one bit a pixel."""
    stream = io.BytesIO()
    Image.fromarray(~np.asarray(ink, bool)).convert("1").save(stream, "png")
    return stream.getvalue()


def ink(alphabet, character, person):
    """As many lines from the top as the person's number, and a column of the character's number."""
    image = np.zeros((105, 105), bool)
    image[:person] = True
    image[:, 50 * alphabet + character] = True
    return image


FILES = {
    f"images_background_small1/{name}/character0{c}/0{a}0{c}_{p:02}.png": png(ink(a, c, p))
    for a, (name, count) in enumerate((("Futurama", 2), ("Angelic", 1)))
    for c in range(1, count + 1)
    for p in range(1, 21)
}
LAST = list(FILES)[-1]


def write(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("images_background_small1/Futurama")
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    (tmp_path / "omniglot").mkdir()
    path = tmp_path / "omniglot" / "images_background_small1.zip"
    write(path, dict(reversed(FILES.items())))
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(_download, "_verify", lambda path, sha256: None)  # this file is not the published one
    return path


def test_characters_and_drawings_are_in_order_and_ink_is_one(archive):
    found = omniglot("small1", size=105)
    assert {name: images.shape for name, images in found.items()} == {
        "Angelic": (1, 20, 105, 105),
        "Futurama": (2, 20, 105, 105),
    }
    for a, name in enumerate(("Futurama", "Angelic")):
        expected = [[ink(a, c, p) for p in range(1, 21)] for c in range(1, len(found[name]) + 1)]
        np.testing.assert_array_equal(found[name], np.array(expected, np.float32))
        assert found[name].dtype == np.float32


@pytest.mark.parametrize("size", [28, 21, 1])
def test_smaller_images_are_means_over_areas(archive, size):
    found = omniglot(size=size)["Angelic"]
    assert found.shape == (1, 20, size, size)
    # Each pixel as `size` × `size` of its own, then means over squares of 105 × 105 of these.
    large = np.kron(ink(1, 1, 7), np.ones((size, size), np.float32))
    np.testing.assert_allclose(found[0, 6], large.reshape(size, 105, size, 105).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: f.write_bytes(b"<html>"), "is not a complete zip archive.*download it again"),
        (lambda f: f.write_bytes(f.read_bytes()[:-50]), "is not a complete zip archive"),
        (lambda f: f.write_bytes(f.read_bytes()[:200] + b"x" * 40 + f.read_bytes()[240:]), "is not a complete zip"),
        (lambda f: write(f, {}), "has no PNG: take it from https://"),
        (lambda f: write(f, {k: v for k, v in FILES.items() if k != LAST}), "Angelic/character01 has 19 drawings"),
        (lambda f: write(f, {"0101_01.png": FILES[LAST]}), "has 1 drawings, not 20: take it from"),
        (lambda f: write(f, FILES | {LAST: b"<html>"}), f"{LAST} is not a complete PNG"),
        (lambda f: write(f, FILES | {LAST: FILES[LAST][:-30]}), f"{LAST} is not a complete PNG"),
        (lambda f: write(f, FILES | {LAST: png(np.zeros((105, 28)))}), r"has \(105, 28\) pixels, not \(105, 105\)"),
    ],
    ids=["not zip", "truncated", "damaged", "empty", "a drawing missing", "no folders", "no PNG", "half", "shape"],
)
def test_damaged_archive_is_named(archive, damage, says):
    damage(archive)
    with pytest.raises(jaxhpo.JaxhpoError, match=f"images_background_small1.zip.*{says}"):
        omniglot()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"part": "small3"}, "`part` got 'small3'.*'small1', 'small2'"),
        ({"part": ["small1"]}, "`part` got"),
        ({"size": 0}, "`size` got 0.*1 to 105"),
        ({"size": 106}, "`size` got 106"),
        ({"size": 14.0}, "`size` got 14.0.*an integer"),
        ({"size": True}, "`size` got True"),
    ],
)
def test_invalid_arguments_are_named(arguments, says):
    with pytest.raises(jaxhpo.JaxhpoError, match=says):
        omniglot(**arguments)


def test_without_pillow_the_message_says_what_to_install(archive, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"Pillow.*pip install 'jaxhpo\[data\]'"):
        omniglot()


def test_another_file_than_the_published_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    (tmp_path / "omniglot").mkdir()
    write(tmp_path / "omniglot" / "images_background_small2.zip", FILES)
    with pytest.raises(jaxhpo.JaxhpoError, match="small2.zip is damaged or not the published file: its sha256"):
        omniglot("small2")


@pytest.mark.slow
def test_published_omniglot():
    try:
        first, second = (omniglot(part, size=14) for part in ("small1", "small2"))
    except (ImportError, jaxhpo.JaxhpoError) as error:
        pytest.skip(str(error))
    # The characters of each alphabet, as published.
    counts = {"Balinese": 24, "Early_Aramaic": 22, "Greek": 24, "Korean": 40, "Latin": 26}
    assert {name: len(images) for name, images in first.items()} == counts
    counts = {"Greek": 24, "Japanese_(katakana)": 47, "Latin": 26, "Sanskrit": 42, "Tagalog": 17}
    assert {name: len(images) for name, images in second.items()} == counts
    for name in ("Greek", "Latin"):
        np.testing.assert_array_equal(first[name], second[name])
    for images in (first | second).values():
        assert images.shape[1:] == (20, 14, 14) and images.min() == 0 and images.max() <= 1
        assert 0.02 < images.mean() < 0.1  # thin strokes
        assert images[..., 5:9, 5:9].mean() > 2 * images[..., 0, :].mean()
