"""Omniglot: drawings of characters, by alphabet."""

import io
import pathlib
import zipfile
import zlib

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.extra import needs_extra
from jaxhpo.data._download import fetch

FOLDER = "omniglot"
ADDRESS = "https://github.com/brendenlake/omniglot/raw/master/python/"
SHA256 = {
    "small1": "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "small2": "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
}
PIXELS, DRAWINGS = 105, 20  # a side of an image; people who drew each character


def omniglot(part: str = "small1", *, size: int = 28) -> dict[str, np.ndarray]:
    """Characters of five alphabets, each drawn once by 20 people; the two small background sets of Omniglot.

    Reads `<JAXHPO_DATA_DIR>/omniglot/images_background_<part>.zip` if that environment variable is set and the file
    exists. Otherwise it downloads the archive (1.3 or 1.6 MB) once, into pooch's cache. Its sha256 is verified either
    way. Drawings of 105×105 pixels are made smaller by the mean over the area of each new pixel.

    Args:
      part: "small1" has Balinese, Early_Aramaic, Greek, Korean and Latin, 136 characters. "small2" has Greek,
        Japanese_(katakana), Latin, Sanskrit and Tagalog, 156 characters; its Greek and Latin are those of "small1".
      size: pixels of a side, 1 to 105.

    Returns:
      For each alphabet, by name, float32 (characters, 20, size, size) in [0, 1], where ink is 1: characters in the
      order of the archive's folders, and of each its drawings, in the order of the people who made them.

    Raises:
      ImportError: without Pillow, or where the archive must be downloaded and pooch is not installed.
      JaxhpoError: another part or size; a failed download; a damaged archive.

    Example:
      >>> from jaxhpo.data import omniglot
      >>> alphabets = omniglot("small1")  # doctest: +SKIP
      >>> alphabets["Greek"].shape  # doctest: +SKIP
      (24, 20, 28, 28)

    References:
      Lake, Salakhutdinov, Tenenbaum. Human-level concept learning through probabilistic program induction. 2015.
    """
    if not isinstance(part, str) or part not in SHA256:
        raise JaxhpoError(f"`part` got {part!r}: write one of {', '.join(map(repr, SHA256))}.")
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 1 <= size <= PIXELS:
        raise JaxhpoError(f"`size` got {size!r}: write an integer from 1 to {PIXELS}.")
    file = f"images_background_{part}.zip"
    path = fetch(FOLDER, file, ADDRESS + file, SHA256[part])
    smaller = _areas(int(size))
    alphabets = {}
    for alphabet, characters in _drawings(path).items():
        images = np.stack([np.stack(drawings) for drawings in characters.values()]).astype(np.float64)
        alphabets[alphabet] = (smaller @ images @ smaller.T).astype(np.float32)
    return alphabets


def _drawings(path) -> dict[str, dict[str, list[np.ndarray]]]:
    """Images by alphabet and character, True where there is ink.

    A file is `<archive>/<alphabet>/character<number>/<character>_<person>.png`, black ink on white.
    """
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                where = pathlib.PurePosixPath(name)
                if where.suffix == ".png":
                    image = _image(f"{path}:{name}", archive.read(name))
                    alphabet, character = where.parts[-3:-1] if len(where.parts) > 2 else ("", "")
                    found.setdefault(alphabet, {}).setdefault(character, []).append(image)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise JaxhpoError(f"{path} is not a complete zip archive ({error}): download it again.") from error
    if not found:
        raise JaxhpoError(f"{path} has no PNG: take it from {ADDRESS}.")
    for alphabet, characters in found.items():
        for character, drawings in characters.items():
            if not alphabet or len(drawings) != DRAWINGS:
                raise JaxhpoError(
                    f"{path}:{alphabet}/{character} has {len(drawings)} drawings, not {DRAWINGS}: take it from "
                    f"{ADDRESS}."
                )
    return found


def _image(name, content) -> np.ndarray:
    with needs_extra("`jaxhpo.data.omniglot` reads PNGs with Pillow", "data"):
        from PIL import Image
    try:
        image = np.asarray(Image.open(io.BytesIO(content)).convert("1"))
    except (OSError, ValueError, SyntaxError) as error:  # the last of a broken PNG
        raise JaxhpoError(f"{name} is not a complete PNG ({error}): download the archive again.") from error
    if image.shape != (PIXELS, PIXELS):
        raise JaxhpoError(f"{name} has {image.shape} pixels, not {(PIXELS, PIXELS)}: take it from {ADDRESS}.")
    return ~image


def _areas(size) -> np.ndarray:
    """(size, 105): the share of each of 105 pixels of a line in each new one."""
    edges = np.linspace(0, PIXELS, size + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(PIXELS)
    overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
    return overlap * size / PIXELS
