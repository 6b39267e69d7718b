"""Small knowledge graphs in folders and archives, shared by several tests."""

import io
import tarfile

import pytest

from jaxhpo.data import _download

TRAIN = "b\tlikes\ta\na\tlikes\tb\nb\tis\tb\n"
VALID = "a\tis\tb\n"
TEST = "a\tis\ta\nb\tlikes\tb\n"


def write_folder(folder, train=TRAIN, valid=VALID, test=TEST):
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        if text is not None:
            (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder of archives that are not the published ones."""
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(_download, "_verify", lambda path, sha256: None)
    return tmp_path


def write_archive(path, train=TRAIN, valid=VALID, test=TEST, inside=""):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("train", train), ("valid", valid), ("test", test)):
            if text is not None:
                member = tarfile.TarInfo(f"{inside}{name}.txt")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
