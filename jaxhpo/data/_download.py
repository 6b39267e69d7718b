"""Upstream files: read from a local mirror or downloaded once, and verified."""

import hashlib
import os
import pathlib

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.extra import needs_extra

MIRROR = "JAXHPO_DATA_DIR"  # an environment variable


def fetch(folder: str, file: str, url: str, sha256: str) -> pathlib.Path:
    """Return the path of an upstream file: `<JAXHPO_DATA_DIR>/<folder>/<file>` if that exists, else in pooch's cache.

    Args:
      folder: of the data set.
      file: its name, upstream and in the mirror.
      url: the public address of the file.
      sha256: the expected checksum, in hexadecimal, of a file in the mirror or a download.

    Returns:
      The path of a readable file.

    Raises:
      ImportError: the file must be downloaded, and pooch is not installed.
      JaxhpoError: the download failed, or the checksum differs.
    """
    mirror = os.environ.get(MIRROR)
    local = pathlib.Path(mirror, folder, file) if mirror else None
    if local and local.is_file():
        _verify(local, sha256)
        return local
    manually = f"put the file into a folder `{folder}` and set {MIRROR} to the folder above it"
    missing = f" ({MIRROR} is set, but {local} does not exist)" if local else ""
    with needs_extra(f"`{file}` must be downloaded{missing} with pooch", "data", f"; or {manually}."):
        import pooch
    try:
        return pathlib.Path(pooch.retrieve(url, f"sha256:{sha256}", file, pooch.os_cache("jaxhpo") / folder))
    except (OSError, ValueError) as error:  # no network, or another sha256
        message = f"`{file}` could not be downloaded from {url}{missing}: {error}. Retry, or {manually}."
        raise JaxhpoError(message) from error


def _verify(path, sha256):
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise JaxhpoError(
            f"{path} is damaged or not the published file: its sha256 is {found}, not {sha256}. Remove or replace it."
        )
