"""The folder of a run: what others did to it, and what of theirs must stay as it is."""

import array
import contextlib
import hashlib
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import threading
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo._cli.main import main
from jaxhpo._tune import run_dir
from jaxhpo._tune.checkpoint import HEADER, Header, to_npz
from jaxhpo._tune.run_dir import in_use

STEPS = 3  # of the run that each test is given


def run(folder, num_steps=STEPS + 1, **settings):
    settings = {"num_steps": num_steps, "run_dir": folder, "save_every": 1, "progress": False} | settings
    return jaxhpo.tune(lambda h: jnp.sum((h - 1) ** 2), jnp.zeros(2), optax.adam(0.1), **settings)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Returns the folder of a run whose checkpoints hold no row of the history."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_dir, "TAIL", 0)
        run(folder, STEPS)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "run"))


def other_line_ends(text):
    return text.replace(b"\n", b"\r\n")


def one_bit(text):
    return text[:30] + bytes([text[30] ^ 1]) + text[31:]


def other_order(text):
    return b"".join(sorted(text.splitlines(keepends=True), reverse=True))


def nothing_of_it(text):
    del text
    return b"of the user's own\n"


@pytest.mark.parametrize(
    ("change", "lost"),
    [(other_line_ends, []), (other_order, []), (one_bit, [0]), (nothing_of_it, [0, 1, 2]), (None, [0, 1, 2])],
)
def test_a_checkpoint_suffices_where_its_history_was_changed(folder, change, lost):
    """Rows that are proven are kept under their numbers, the others are NaN; what was there is renamed."""
    path = folder / "history.jsonl"
    was, changed = path.read_bytes(), change and change(path.read_bytes())
    path.write_bytes(changed) if change else path.unlink()
    result = run(folder)
    assert f"after {STEPS} outer steps" in result.message
    assert ("history.jsonl was changed or removed" if change else "0-2 are lost, and NaN") in result.message
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(result.history["value"])), lost)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == sorted({0, 1, 2, 3} - {*lost})
    assert [kept.read_bytes() for kept in folder.glob("history.damaged-*.jsonl")] == ([changed] if change else [])
    np.testing.assert_array_equal(jaxhpo.history_table(folder)["value"], result.history["value"])
    if lost == [0]:  # what is found again is proven again
        path.write_bytes(was)
        assert not np.isnan(run(folder, STEPS + 2).history["value"]).any()


@pytest.mark.parametrize("members", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_load(members, tmp_path):
    """Bit for bit what `tune` returned, with dictionaries and lists for containers."""

    def loss(h, carry, key):
        value = sum(jnp.sum((x - 1.0).astype(float) ** 2) for x in jax.tree.leaves(h))
        return value, carry * 2, {"rate": h["rate"][0]}

    start = {"rate": (jnp.full(2, 0.5), jnp.asarray(0.1, jnp.bfloat16)), "it's": {3: jnp.zeros((2, 2))}}
    lead = () if members is None else (members,)
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, lead + x.shape), start)
    transforms = {"rate": jaxhpo.positive, "it's": None}
    carry, settings = jnp.ones(lead), {"num_steps": STEPS, "run_dir": tmp_path, "patience": 2, "progress": False}
    running = []
    result = jaxhpo.tune(
        loss,
        start,
        optax.sgd(0.01),
        carry=carry,
        transforms=transforms,
        population=members,
        save_every=1,
        callbacks=[lambda step: running.append(jaxhpo.load(tmp_path) if step.step == 2 else None)],
        **settings,
    )
    found, during = jaxhpo.load(tmp_path), running[-1]
    for name in ("hparams", "best_hparams", "carry", "history"):
        got, want = (jax.tree.leaves(getattr(x, name)) for x in (found, result))
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(x, float), np.asarray(y, float))
            assert name == "history" or x.dtype == y.dtype
    assert found.hparams.keys() == start.keys() and isinstance(found.hparams["rate"], list)
    assert (found.status, found.members) == (result.status, result.members)
    np.testing.assert_array_equal(found.best_value, result.best_value)
    assert during.status == "running" and len(during.history["value"]) == 2 and float(np.max(during.carry)) == 2.0**2


def test_the_last_rows_are_in_the_checkpoint(tmp_path):
    whole = run(tmp_path, STEPS)
    (tmp_path / "history.jsonl").unlink()
    with pytest.warns(RuntimeWarning, match="had ended before"):
        again = run(tmp_path, STEPS)
    jax.tree.map(np.testing.assert_array_equal, again.history, whole.history)


def test_files_of_others_stay(folder):
    """Also one that is named like a checkpoint, a lock and a status, and a log without checkpoints."""
    names = ["state-best.npz", "state-99999999.npz", "state-00000009-copy.npz", "lock", "status.json", "state.tmp"]
    for path in folder.glob("state-*"):
        path.unlink()
    log = (folder / "history.jsonl").read_bytes()
    for name in names:
        (folder / name).write_text("of the user's own")
    with pytest.warns(RuntimeWarning, match="belongs to no checkpoint.*kept as history.damaged-1.jsonl"):
        with pytest.warns(RuntimeWarning, match="status.json is not that of a run"):
            assert run(folder).message.startswith("4 outer steps")
    assert {(folder / name).read_text() for name in names} == {"of the user's own"}
    assert (folder / "history.damaged-1.jsonl").read_bytes() == log
    assert len([*folder.glob("state-????????-*.npz")]) == run_dir.KEPT + 1


def test_a_disk_that_is_full_from_the_start(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.warns(RuntimeWarning, match="could not be saved"):
            result = run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.status == "finished"


def test_what_cannot_be_closed_is_a_warning(tmp_path, monkeypatch):
    close = run_dir.RunDir._close_history

    def closing(self):
        close(self)
        raise OSError("no space left")

    monkeypatch.setattr(run_dir.RunDir, "_close_history", closing)
    with pytest.warns(RuntimeWarning, match="could not be closed .no space left"):
        assert run(tmp_path).status == "finished"


@pytest.mark.parametrize("name", ["lock", "history.jsonl", "status.json", "jaxhpo.tmp"])
def test_links_are_not_followed(name, tmp_path):
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir()
    target.write_text("precious")
    (folder / name).symlink_to(target)
    with warnings.catch_warnings(), contextlib.suppress(jaxhpo.JaxhpoError):
        warnings.simplefilter("ignore")
        run(folder)
    assert target.read_text() == "precious"


@pytest.mark.parametrize("make", [pathlib.Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
@pytest.mark.parametrize("history", [False, True])
def test_what_is_no_file_at_the_temporary_name_stays_and_the_run_is_saved(make, history, tmp_path):
    """Also where the history has to be written anew, because a folder lies at its name."""
    run(tmp_path, num_steps=2)
    make(tmp_path / "jaxhpo.tmp")
    kind = (tmp_path / "jaxhpo.tmp").lstat().st_mode
    if history:
        (tmp_path / "history.jsonl").unlink()
        (tmp_path / "history.jsonl").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(tmp_path)
    assert (tmp_path / "jaxhpo.tmp").lstat().st_mode == kind
    assert jaxhpo.load(tmp_path).status == "finished"
    assert not [path for path in tmp_path.glob("*jaxhpo.tmp") if path.name != "jaxhpo.tmp"]


def packed(members):
    """256 MiB of zeros, which take 1 MiB in the file."""
    file = io.BytesIO(npz(members))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as found:
        with found.open("99.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**28,)})
            for _ in range(2**28 // 2**26):
                member.write(bytes(2**26))
    return file.getvalue()


def npz(members):
    file = io.BytesIO()
    np.savez(file, **members)
    return file.getvalue()


def text(value):
    return np.frombuffer(value, np.uint8)


FORGERIES = {
    "packed": packed,
    "objects": lambda members: npz(members | {"0": np.array([{}], object)}),
    "another shape": lambda members: npz(members | {"0": np.zeros(10**6)}),
    "other shapes": lambda members: npz({name: members[name] if name in HEADER else np.zeros(9) for name in members}),
    "one entry more": lambda members: npz(members | {"of others": np.zeros(1)}),
    "one entry less": lambda members: npz({name: x for name, x in members.items() if name != "0"}),
    "settings": lambda members: npz(members | {"settings": text(b"[1]")}),
    "no settings": lambda members: npz(members | {"settings": text(b"{}")}),
    "schema": lambda members: npz(members | {"schema": text(b"abc")}),
    "sums": lambda members: npz(members | {"sums": text(b"x")}),
    "nested": lambda members: npz(members | {"names": text(b"[" * 10**5)}),
    "no archive": lambda members: b"\x93NUMPY" + bytes(100),
}


QUICK = {"packed", "objects", "other shapes"}


@pytest.mark.parametrize("forgery", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FORGERIES])
def test_a_strangers_checkpoint_is_damaged(forgery, folder):
    """Nothing of it is unpacked, and the older one is taken."""
    newest = max(folder.glob("state-*"))
    with np.load(newest) as file:
        raw = FORGERIES[forgery]({name: file[name] for name in file.files})
    newest.unlink()
    (folder / f"state-{STEPS:08d}-{hashlib.sha256(raw).hexdigest()}.npz").write_bytes(raw)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best_step = jaxhpo.load(folder).best_step
    message = run(folder).message
    assert f"after {STEPS - 1} outer steps; state-00000003.npz is damaged" in message, message
    assert best_step in (STEPS - 2, STEPS - 1)  # the newer one, where only a run knows the shapes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 * 1024  # kibibytes


class Payload:
    """What makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "x")


def of_several_processes(folder, members, arrays):
    """Writes a checkpoint as several processes do, with a valid seal."""
    pieces = {f"{i}, {json.dumps([[0, n] for n in x.shape])}": x for i, x in enumerate(arrays)}
    raw = npz(pieces)
    seal = {
        "header": {name: members[name].tobytes().decode() for name in HEADER},
        "leaves": [["float64", list(x.shape)] for x in arrays],
        "files": {"part-0.npz": hashlib.sha256(raw).hexdigest()},
    }
    text = json.dumps(seal).encode()
    path = folder / f"state-{STEPS:08d}.parts"
    path.mkdir()
    (path / "part-0.npz").write_bytes(raw)
    (path / f"sealed-{hashlib.sha256(text).hexdigest()}.json").write_bytes(text)


@pytest.mark.parametrize("place", ["an array", "the header", "an entry", "the file", "a part of several processes"])
def test_nothing_is_unpickled(place, folder, tmp_path):
    """SECURITY.md says so. The checkpoint has a valid checksum and a payload in the place of one of its parts."""
    mark = tmp_path / "mark"
    payload = np.array([Payload(mark)], object)
    newest = max(folder.glob("state-*"))
    with np.load(newest) as file:
        members = {name: file[name] for name in file.files}
    raw = pickle.dumps(payload)
    if place in ("an array", "the header"):
        raw = npz(members | {"0" if place == "an array" else "settings": payload})
    elif place == "an entry":
        archive = io.BytesIO(npz({name: x for name, x in members.items() if name != "0"}))
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("0.npy", raw)
        raw = archive.getvalue()
    newest.unlink()
    if place.startswith("a part"):
        number = len(members) - len(HEADER)
        of_several_processes(folder, members, [payload, *(members[str(i)] for i in range(1, number))])
    else:
        (folder / f"state-{STEPS:08d}-{hashlib.sha256(raw).hexdigest()}.npz").write_bytes(raw)

    assert jaxhpo.load(folder).status == "finished"
    assert main(["show", str(folder)]) == main(["plot", str(folder)]) == 0
    assert "is damaged" in run(folder).message
    assert not mark.exists()
    pickle.loads(pickle.dumps(payload))[0].close()
    assert mark.exists()  # so it would have been seen


def test_escape_sequences_of_files_are_not_printed(folder, capsys):
    (folder / "status.json").write_text(json.dumps({"status": "\x1b[2J", "message": "\x1b]0;owned\x07"}))
    with open(folder / "history.jsonl", "a") as file:
        row = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])
        file.write(json.dumps(row | {"step": STEPS, "\x1b[2J": 1.0}) + "\n")
    main(["show", str(folder)])
    assert "\x1b" not in "".join(capsys.readouterr())


def test_the_users_handler_of_sigterm_is_called(tmp_path):
    """Also by a run inside of a run: both end."""
    called, inner = [], []

    def strike(step):
        if step.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def nest(step):
        inner.append(run(tmp_path / "inner", callbacks=[strike]))

    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        result = run(tmp_path / "outer", callbacks=[nest])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [x.status for x in (result, *inner)] == ["preempted"] * 2 and called == [signal.SIGTERM]
    assert result.exit_code == 128 + signal.SIGTERM


def test_runs_that_begin_inside_of_a_preempted_one_end_without_a_step(tmp_path):
    """With a folder or without, in a population too: a loop over seeds in a callback, say."""
    inner = []

    def nest(step):
        os.kill(os.getpid(), signal.SIGTERM)
        for more in ({}, {"run_dir": tmp_path / "inner"}, {"population": 2, "record": "hypergradient", "patience": 2}):
            start, settings = jnp.ones((2, 2)), {"num_steps": 3, "progress": False, **more}
            inner.append(jaxhpo.tune(jnp.sum, start if "population" in more else start[0], optax.sgd(0.1), **settings))

    before = signal.getsignal(signal.SIGTERM)
    result = run(tmp_path / "outer", callbacks=[nest])
    assert [x.status for x in (result, *inner)] == ["preempted"] * 4 and signal.getsignal(signal.SIGTERM) is before
    for x in inner:
        assert len(x.history["value"]) == 0 and "after 0 outer steps" in x.message and x.hparams.shape[-1] == 2
        assert x.history["hparams"].shape == (0, *x.hparams.shape)
    assert [x.num_steps for x in inner[-1].members] == [0, 0]


@pytest.mark.parametrize("stops", [False, True])
def test_sigterm_in_the_last_step_is_told(stops, tmp_path):
    """Or a loop over seeds would begin the next run. The run has ended nevertheless, by its steps or a callback."""

    def strike(step):
        if step.step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            return stops

    result = run(tmp_path, STEPS, callbacks=[strike])
    assert (result.status, result.exit_code) == ("preempted", 143)
    assert result.message.startswith("SIGTERM came; a callback" if stops else f"SIGTERM came; {STEPS} outer steps")
    with pytest.warns(RuntimeWarning, match="had ended before"):
        assert run(tmp_path, STEPS).exit_code == 0


def test_an_ignored_sigterm_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        result = run(tmp_path, callbacks=[lambda step: os.kill(os.getpid(), signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.status == "finished"


@pytest.mark.filterwarnings("ignore")  # JAX warns of each fork
def test_a_forked_child_neither_frees_nor_keeps_the_lock(tmp_path):
    folder, (read, write) = run_dir.RunDir(tmp_path), os.pipe()
    if not (first := os.fork()):
        folder.close()  # as where an exception ends the child
        os._exit(0)
    os.waitpid(first, 0)
    assert in_use(tmp_path).startswith(f"{os.getpid()} on ")
    if not (second := os.fork()):
        os.read(read, 1)
        os._exit(0)
    folder.close()
    assert not in_use(tmp_path)
    os.write(write, b".")
    os.waitpid(second, 0)


def test_a_folder_is_that_of_the_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("run", "~/at_home"):
        run(name, callbacks=[lambda step: os.chdir("/")])
        os.chdir(tmp_path)
    assert {*map(str, pathlib.Path().iterdir())} == {"run", "at_home"}
    assert [len([*path.glob("state-*")]) for path in tmp_path.iterdir()] == [2, 2]


def test_show_keeps_no_run_from_starting(folder):
    """A process asks all the time who holds the folder."""
    ended = threading.Event()

    def ask():
        while not ended.is_set():
            in_use(folder)

    (folder / "lock").touch()
    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        for _ in range(20):
            run_dir.RunDir(folder).close()
    finally:
        ended.set()
        for thread in asking:
            thread.join()


def test_a_folder_that_another_run_took(tmp_path):
    """Replaced while the run went on, and in use since: nothing is written there, and the result is not lost."""
    others = []

    def strike(step):
        if step.step == 1:
            shutil.rmtree(tmp_path)
            others.append(run_dir.RunDir(tmp_path))

    with pytest.warns(RuntimeWarning, match="could not be saved .*in use by process"):
        result = run(tmp_path, callbacks=[strike])
    others[0].close()
    assert result.status == "finished" and {path.name for path in tmp_path.iterdir()} == {"lock", "history.jsonl"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the zip file, when it is collected
def test_ctrl_c_while_a_member_of_a_checkpoint_is_open_is_ctrl_c(monkeypatch):
    """Not the error of a zip file that is closed before its member."""

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile._ZipWriteFile, "close", interrupted)
    header = Header(["a"], ["float64[3]"], array.array("I"), "", {})
    with pytest.raises(KeyboardInterrupt):
        to_npz(io.BytesIO(), header, [np.ones(3)])
