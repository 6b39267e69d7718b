"""Lines for streams of any kind, and progress that never ends a run."""

import ast
import io
import os
import pathlib
import sys

import pytest

import jaxhpo
from jaxhpo._core import progress


class Refusing(io.StringIO):
    """A terminal that takes some writes, and fails from then on."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def isatty(self):
        return True

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise OSError(28, "No space left on device")
        return super().write(text)


class Bare:
    """Has neither `isatty` nor an encoding."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "bare": Bare,
    "full device": lambda: open("/dev/full", "w", buffering=1),
    "broken pipe": broken_pipe,
    "full at once": lambda: Refusing(0),
    "full later": lambda: Refusing(3),
}


@pytest.mark.parametrize("name", STREAMS)
def test_no_stream_ends_the_work(name, monkeypatch):
    if name == "full device" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    stream = STREAMS[name]()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.Progress(3) as bar:
        bar.note("compiling ...")
        for _ in range(3):
            bar.update("a value")
    assert bar.done == 3
    if isinstance(stream, Bare):
        assert stream.text.splitlines() == ["step 0/3: compiling ...", "step 3/3: a value"]
    if isinstance(stream, io.TextIOWrapper):
        with pytest.raises(OSError):  # what it holds could not be written
            stream.close()


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_a_line_is_written_in_any_encoding(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    progress.write("0.1 ± 0.2 of '学' and 'a\udcff'", stream)
    text = raw.getvalue().decode(encoding)
    sign, name = {"ascii": r"\xb1"}.get(encoding, "±"), {"utf-8": "学"}.get(encoding, r"\u5b66")
    assert text == rf"0.1 {sign} 0.2 of '{name}' and 'a\udcff'" + os.linesep


def test_the_librarys_own_words_are_in_every_western_encoding():
    """All that is printed or is a part of a message, so that `print(comparison)` works on any console."""
    found, root = [], pathlib.Path(jaxhpo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                for encoding in ("latin-1", "cp1252"):
                    if node.value.encode(encoding, "replace").decode(encoding) != node.value:
                        found.append(f"{path.relative_to(root)}:{node.lineno}: {node.value!r}")
    assert not found


def test_the_estimate_leaves_out_the_compilation(monkeypatch, capsys):
    """Ten steps: the first, which compiles, takes 100 s, the others 3 s each."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with progress.Progress(10) as bar:
        bar.note("compiling ...")
        for seconds in (100, 3, 3, 3, 3, 3, 3, 3, 3, 3):
            now[0] += seconds
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 0/10: compiling ...",
        "step 1/10",
        "step 3/10 (about 21 s left)",
        "step 5/10 (about 15 s left)",
        "step 7/10 (about 9 s left)",
        "step 9/10 (about 3 s left)",
        "step 10/10",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "about 1 s"), (89, "about 89 s"), (100, "about 2 min"), (7200, "about 2 h")]
)
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


def test_the_bar_shows_the_estimate(monkeypatch):
    """A terminal, with tqdm."""
    pytest.importorskip("tqdm")
    stream = Refusing(10**6)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.Progress(3, "outer step") as bar:
        bar.note("compiling ...")
        bar.update("loss 1")
        bar.update("loss 2")
        bar.bar.refresh()
    text = stream.getvalue()
    assert "outer step:   0%" in text and "compiling ..." in text and "left, loss 2" in text
