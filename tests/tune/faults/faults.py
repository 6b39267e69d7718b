"""Injects faults into a tuning run, resumes it, and compares its end with that of an undisturbed run.

As a script, the run itself: `python faults.py FOLDER [--pause SECONDS]`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo

STEPS = 40
PAUSE = 0.02  # seconds after a step, so that a strike finds the run between any two
TIMES = {"seconds", "peak_bytes"}  # what differs from run to run
BIG = 30_000  # entries of the carry: a checkpoint of some 240 kB is written in more than one go
SOLVER = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h["goal"]) ** 2), lambda h: optax.sgd(h["rate"], momentum=0.9))
START = {"goal": jnp.full(3, 0.1), "rate": jnp.asarray(0.02)}


def outer_loss(h, carry, key):
    """Warm-started and noisy: a run that is resumed with a wrong state or key ends elsewhere."""
    state, ballast = carry
    sol = jaxhpo.solve(SOLVER, jax.lax.stop_gradient(state), h, num_steps=3)
    noise = 0.1 * jax.random.normal(key, (3,))
    return jnp.sum((sol.params - 1.5 + noise) ** 2), (sol.state, ballast + 1), {"optimality": sol.info.optimality}


def tune(folder, steps=STEPS, pause=0.0, **settings):
    """Runs `tune` with a checkpoint after every step."""
    callbacks = [lambda step: time.sleep(pause), *settings.pop("callbacks", [])]
    return jaxhpo.tune(
        outer_loss,
        START,
        optax.adam(0.1),
        num_steps=steps,
        transforms={"goal": None, "rate": jaxhpo.box(0.0, 0.4)},
        carry=(SOLVER.init(jnp.zeros(3), START), jnp.zeros(BIG)),
        run_dir=folder,
        save_every=1,
        callbacks=callbacks,
        resume="continue",  # also of a run that had finished before the fault
        progress=False,
        **settings,
    )


def end(folder) -> dict:
    """Returns state, key and history of the newest checkpoint, without times."""
    newest = sorted(pathlib.Path(folder).glob("state-*.npz"))[-1]
    with np.load(newest) as file:
        found: dict = {name: file[name].tobytes() for name in file.files if name not in ("sums", "tail")}
    found["settings"] = {name: x for name, x in json.loads(found["settings"]).items() if name not in TIMES}
    for i, line in enumerate((pathlib.Path(folder) / "history.jsonl").read_text().splitlines()):
        found[f"row {i}"] = {name: value for name, value in json.loads(line).items() if name not in TIMES}
    return found


def unreadable(folder) -> int:
    """Counts the checkpoints whose checksum does not match their name."""
    files = pathlib.Path(folder).glob("state-*.npz")
    return sum(hashlib.sha256(file.read_bytes()).hexdigest() not in file.name for file in files)


def start(folder, pause) -> subprocess.Popen:
    """Starts the run in a new process."""
    command = [sys.executable, __file__, folder, "--pause", pause]
    environment = {**os.environ, "JAX_ENABLE_X64": str(jax.config.jax_enable_x64)}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def undisturbed(folder) -> float:
    """Runs to the end; returns the seconds."""
    begun = time.perf_counter()
    process = start(folder, PAUSE)
    out, _ = process.communicate()
    if process.returncode:
        raise AssertionError(out)
    return time.perf_counter() - begun


def killed(folder, kills, within, rng, number) -> tuple[int, int]:
    """Sends signals at random moments until the run has ended; returns the numbers of signals and unreadable files."""
    struck = bad = 0
    while struck < kills and not done(folder):
        process = start(folder, PAUSE)
        try:
            out, _ = process.communicate(timeout=rng.uniform(0, within))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            out, _ = process.communicate()
            # Before the run has begun, SIGTERM ends the process by itself; struck late, it has finished.
            if number == signal.SIGTERM and process.returncode not in (143, -signal.SIGTERM, 0):
                raise AssertionError(f"ended with {process.returncode}: {out}") from None
            struck += 1
            bad += unreadable(folder)
            continue
        if process.returncode:
            raise AssertionError(out)
    undisturbed(folder)
    return struck, bad


def chains(kills, seconds, want, rng, number=signal.SIGKILL, told=print) -> tuple[int, int]:
    """Sends `kills` signals to consecutive runs; returns the numbers of runs with another end and unreadable files."""
    struck = lost = bad = runs = 0
    while struck < kills:
        with tempfile.TemporaryDirectory() as folder:
            more, unread = killed(folder, kills - struck, seconds, rng, number)
            struck, bad, runs, lost = struck + more, bad + unread, runs + 1, lost + (end(folder) != want)
        told(f"{number.name}: {struck} of {kills}, in {runs} runs; {lost} ended otherwise; {bad} unreadable files")
    return lost, bad


def done(folder) -> bool:
    """Returns whether there is a checkpoint of the last step."""
    return bool(list(pathlib.Path(folder).glob(f"state-{STEPS:08d}*.npz")))


# --- the other faults: each disturbs a run in `folder`, and asserts what must hold -------------------------


def sigterm(folder, rng) -> None:
    """SIGTERM: the run saves, restores the handler and returns."""
    begun, at = [], rng.randrange(1, STEPS)
    before = signal.getsignal(signal.SIGTERM)

    def strike(step):
        begun.append(step)
        if step.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    result = tune(folder, callbacks=[strike])
    assert result.status == "preempted" and len(result.history["value"]) == at + 1
    assert signal.getsignal(signal.SIGTERM) is before


def ctrl_c(folder, rng) -> None:
    """Ctrl-C at any moment after the first step returns the partial result."""
    at = rng.uniform(0.0, 0.5)

    def strike():
        time.sleep(at)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    first = threading.Event()
    striker = threading.Thread(target=lambda: (first.wait(), strike()))
    striker.start()
    with contextlib.suppress(KeyboardInterrupt):
        result = tune(folder, pause=0.05, callbacks=[lambda step: first.set()])
        assert result.status == "interrupted" and 0 < len(result.history["value"]) < STEPS
    striker.join()


def full_disk(folder, rng) -> None:
    """Files cannot grow beyond a limit: the run warns and finishes; earlier checkpoints remain."""
    small = rng.randrange(1, 100_000)  # less than the carry takes, in 32 bits too
    at = rng.randrange(1, STEPS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = []

    def strike(step):
        if step.step == at:
            before.append(sorted(p.name for p in pathlib.Path(folder).glob("state-*.npz")))
            resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = tune(folder, callbacks=[strike])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.status == "finished" and len(result.history["value"]) == STEPS
    told = [str(w.message) for w in caught if "could not be saved" in str(w.message)]
    assert at == STEPS - 1 or told, "nobody said that the disk was full"
    assert unreadable(folder) == 0 and not list(pathlib.Path(folder).glob("*.tmp"))


def read_only(folder, rng) -> None:
    """A folder that cannot be written is refused before the first step."""
    tune(folder, steps=rng.randrange(1, STEPS))
    paths = [pathlib.Path(folder), *pathlib.Path(folder).iterdir()]
    modes = [path.stat().st_mode for path in paths]
    for path in paths:
        path.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # the superuser may write anywhere
        os.seteuid(65534)
    try:
        tune(folder)
    except jaxhpo.JaxhpoError as error:
        assert "where no file can be written" in str(error), error
    else:
        raise AssertionError("written nevertheless")
    finally:
        os.seteuid(user)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def damaged(folder, rng, how) -> None:
    """Damages the newest checkpoint: the run resumes from the one before, and says so."""
    tune(folder, steps=rng.randrange(2, STEPS))
    newest = sorted(pathlib.Path(folder).glob("state-*.npz"))[-1]
    data = bytearray(newest.read_bytes())
    if how == "truncated":
        data = data[: rng.randrange(len(data))]
    else:
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
    newest.write_bytes(data)
    result = tune(folder)
    assert "is damaged (its checksum does not match)" in result.message, result.message


def truncated(folder, rng) -> None:
    """The newest checkpoint is truncated at a random byte."""
    damaged(folder, rng, "truncated")


def garbled(folder, rng) -> None:
    """One bit of the newest checkpoint is flipped."""
    damaged(folder, rng, "garbled")


def lost_history(folder, rng) -> None:
    """The history loses its last line: the newest checkpoint holds it, too, and no step is taken again."""
    steps = rng.randrange(2, STEPS)
    tune(folder, steps=steps)
    path = pathlib.Path(folder) / "history.jsonl"
    path.write_bytes(path.read_bytes()[: -rng.randrange(1, 50)])
    message = tune(folder).message
    assert f"after {steps} outer steps" in message and "history.jsonl was changed" in message, message


def two_processes(folder, rng) -> None:
    """A second run in the same folder is refused while the first one holds it."""
    at = rng.randrange(STEPS)

    def strike(step):
        if step.step == at:
            try:
                tune(folder)
            except jaxhpo.JaxhpoError as error:
                assert f"in use by process {os.getpid()}" in str(error)
            else:
                raise AssertionError("two runs in one folder")

    tune(folder, callbacks=[strike])


class Mishap(Exception):
    """Raised by a callback."""


def callback_raises(folder, rng) -> None:
    """An exception of a callback reaches the user, and the step is saved."""
    at = rng.randrange(STEPS)

    def strike(step):
        if step.step == at:
            raise Mishap

    try:
        tune(folder, callbacks=[strike])
    except Mishap:
        assert sorted(pathlib.Path(folder).glob("state-*.npz"))[-1].name.startswith(f"state-{at + 1:08d}")
    else:
        raise AssertionError("the exception was lost")


def full_from_the_start(folder, rng) -> None:
    """No file may have a byte, as on a full disk: the run warns and finishes, and its result is not lost."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            result = tune(folder, steps=rng.randrange(1, STEPS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.status == "finished"


def own_files(folder, rng) -> None:
    """Files of the user's own are left as they are, whatever their names."""
    at, words = rng.randrange(STEPS - 1), f"the user's own, {rng.random()}"
    names = [
        "state-best.npz",
        "state-99999999.npz",
        "state-00000001.npz.bak",
        "state.tmp",
        "history.json",
        "state-1.npz",
    ]
    early = ["lock", "status.json"] if rng.random() < 0.5 else []
    paths = [pathlib.Path(folder) / name for name in names + early]

    def strike(step):
        if step.step == at:
            for path in paths[: len(names)]:
                path.write_text(words)

    for path in paths[len(names) :]:
        path.write_text(words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tune(folder, steps=rng.randrange(at + 1, STEPS), callbacks=[strike])
        tune(folder)
    assert {path.read_text() for path in paths} == {words}
    assert not early or "is not that of a run" in str(caught[0].message)
    for path in paths:
        path.unlink()


def damage(path, rng) -> str:
    """Changes a history in a random way; returns which."""
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(data))
    ways = {
        "one bit": data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :],
        "CRLF": data.replace(b"\n", b"\r\n"),
        "a mark at the start": b"\xef\xbb\xbf" + data,
        "lines shuffled": b"".join(rng.sample(lines, len(lines))),
        "a part": data[: rng.randrange(len(data))],
        "something else": rng.randbytes(rng.randrange(1, 3000)),
        "lost": None,
    }
    way = rng.choice(list(ways))
    path.unlink() if ways[way] is None else path.write_bytes(ways[way])
    return way


def garbled_history(folder, rng) -> None:
    """The history is damaged between two calls: the newest checkpoint suffices, and mends it."""
    steps = rng.randrange(2, STEPS)
    tune(folder, steps=steps)
    way = damage(pathlib.Path(folder) / "history.jsonl", rng)
    assert f"after {steps} outer steps" in tune(folder).message, way


def replaced_history(folder, rng) -> None:
    """The history is damaged, or replaced as an editor does, while the run is going on."""
    path, at = pathlib.Path(folder) / "history.jsonl", rng.randrange(1, STEPS - 1)

    def strike(step):
        if step.step == at:
            if rng.random() < 0.5:
                (path.parent / "copy").write_bytes(path.read_bytes())
                os.replace(path.parent / "copy", path)
            with contextlib.suppress(ValueError):  # an empty one
                damage(path, rng)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tune(folder, callbacks=[strike])


def removed_folder(folder, rng) -> None:
    """The folder is removed while the run is going on, and in one case of two made again."""
    at = rng.randrange(STEPS)

    def strike(step):
        if step.step == at:
            shutil.rmtree(folder)
            if rng.random() < 0.5:
                os.mkdir(folder)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tune(folder, callbacks=[strike]).status == "finished"
    assert done(folder)


FAULTS = [sigterm, ctrl_c, full_disk, read_only, truncated, garbled, lost_history, two_processes, callback_raises]
FAULTS += [full_from_the_start, own_files, garbled_history, replaced_history, removed_folder]


def survives(fault, reference, seed) -> None:
    """Disturbs a run, lets it end, and compares with `end` of the undisturbed one."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        fault(folder, random.Random(seed))
        tune(folder)
        assert end(folder) == reference, f"{fault.__name__}, seed {seed}: another end"
        assert unreadable(folder) == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--pause", type=float, default=0.0)
    parsed = parser.parse_args()
    raise SystemExit(tune(parsed.folder, pause=parsed.pause).exit_code)
