"""Upstream files: from a local mirror, else downloaded once, and verified."""

from __future__ import annotations

import hashlib
import os
import pathlib

from jaxhpo._core.errors import JaxhpoError

MIRROR = "JAXHPO_DATA_DIR"  # an environment variable


def fetch(folder: str, file: str, url: str, sha256: str) -> pathlib.Path:
    """The path of an upstream file: `<JAXHPO_DATA_DIR>/<folder>/<file>` where that exists, else one in pooch's cache.

    Args:
      folder: of the data set.
      file: its name, upstream and in the mirror.
      url: the public address of the file.
      sha256: of the file, in hexadecimal; what is downloaded, or lies in the mirror, must have it.

    Returns:
      The path of a readable file.

    Raises:
      ImportError: the file must be downloaded, and pooch is not installed.
      JaxhpoError: it cannot be downloaded, or is not the file that it should be.
    """
    mirror = os.environ.get(MIRROR)
    local = pathlib.Path(mirror, folder, file) if mirror else None
    if local and local.is_file():
        _verify(local, sha256)
        return local
    by_hand = f"put the file into a folder `{folder}` and let {MIRROR} name the folder above it"
    looked = f" ({MIRROR} is set, but {local} does not exist)" if local else ""
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            f"`{file}` must be downloaded{looked}, but pooch cannot be imported ({error}). Install it: pip install "
            f"'jaxhpo[data]'; or {by_hand}."
        ) from error
    try:
        cache = pooch.os_cache("jaxhpo") / folder
        return pathlib.Path(pooch.retrieve(url, f"sha256:{sha256}", fname=file, path=cache))
    except (OSError, ValueError) as error:  # no network, and the wrong sha256
        raise JaxhpoError(f"`{file}` could not be had from {url}{looked}: {error}. Try again, or {by_hand}.") from error


def _verify(path, sha256):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise JaxhpoError(
            f"{path} is not the file that is published, but damaged or another: its sha256 is {found}, not {sha256}. "
            "Remove it, so that it is downloaded, or put the right one there."
        )
