"""Disturbs a tuning run in each way that a machine knows, lets it go on, and compares the end with the undisturbed one.

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
    """Warm-started, and noisy: a run that goes on with another state or another key ends elsewhere."""
    state, ballast = carry
    sol = jaxhpo.solve(SOLVER, jax.lax.stop_gradient(state), h, num_steps=3)
    noise = 0.1 * jax.random.normal(key, (3,))
    return jnp.sum((sol.params - 1.5 + noise) ** 2), (sol.state, ballast + 1), {"optimality": sol.info.optimality}


def tune(folder, steps=STEPS, pause=0.0, **settings):
    """The run, with a checkpoint after every step."""
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
        progress=False,
        **settings,
    )


def end(folder) -> dict:
    """State, key and history of the newest checkpoint, without times."""
    newest = sorted(pathlib.Path(folder).glob("state-*.npz"))[-1]
    with np.load(newest) as file:
        found: dict = {name: file[name].tobytes() for name in file.files if name != "history"}
    found["settings"] = {name: x for name, x in json.loads(found["settings"]).items() if name not in TIMES}
    for i, line in enumerate((pathlib.Path(folder) / "history.jsonl").read_text().splitlines()):
        found[f"row {i}"] = {name: value for name, value in json.loads(line).items() if name not in TIMES}
    return found


def unreadable(folder) -> int:
    """Checkpoints whose bytes are not those that their names promise."""
    files = pathlib.Path(folder).glob("state-*.npz")
    return sum(hashlib.sha256(file.read_bytes()).hexdigest() not in file.name for file in files)


def start(folder, pause) -> subprocess.Popen:
    """The run in a process of its own."""
    command = [sys.executable, __file__, folder, "--pause", pause]
    environment = {**os.environ, "JAX_ENABLE_X64": str(jax.config.jax_enable_x64)}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def undisturbed(folder) -> float:
    """Runs to the end; seconds."""
    begun = time.perf_counter()
    process = start(folder, PAUSE)
    out, _ = process.communicate()
    if process.returncode:
        raise AssertionError(out)
    return time.perf_counter() - begun


def killed(folder, kills, within, rng, number) -> tuple[int, int]:
    """Strikes the run at random moments until it has ended, at most so often; (strikes, unreadable files)."""
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
    """Strikes so often in all, in as many runs as that takes; (runs that ended otherwise, unreadable files)."""
    struck = lost = bad = runs = 0
    while struck < kills:
        with tempfile.TemporaryDirectory() as folder:
            more, unread = killed(folder, kills - struck, seconds, rng, number)
            struck, bad, runs, lost = struck + more, bad + unread, runs + 1, lost + (end(folder) != want)
        told(f"{number.name}: {struck} of {kills}, in {runs} runs; {lost} ended otherwise; {bad} unreadable files")
    return lost, bad


def done(folder) -> bool:
    """Whether the newest checkpoint is that of the last step."""
    return bool(list(pathlib.Path(folder).glob(f"state-{STEPS:08d}*.npz")))


# --- the other faults: each disturbs a run in `folder`, and says what was not as it should be -------------------------


def sigterm(folder, rng) -> None:
    """Saves, restores the handler, returns: the process exits by itself."""
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
    """Wherever it strikes, the partial result is returned; before the first step there is none."""
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
    """No file may grow beyond so many bytes: the run warns, goes on, and ends; what was saved before remains."""
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
    assert unreadable(folder) == 0 and not (pathlib.Path(folder) / "state.tmp").exists()


def read_only(folder, rng) -> None:
    """Where nothing can be written, a run is refused at once."""
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
    """The newest checkpoint is not what it was: the one before is taken, and that is said."""
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
    """Cut off anywhere."""
    damaged(folder, rng, "truncated")


def garbled(folder, rng) -> None:
    """A bit is another."""
    damaged(folder, rng, "garbled")


def lost_history(folder, rng) -> None:
    """The history lost its last line, which the newest checkpoint counts on."""
    tune(folder, steps=rng.randrange(2, STEPS))
    path = pathlib.Path(folder) / "history.jsonl"
    path.write_bytes(path.read_bytes()[: -rng.randrange(1, 50)])
    assert "history.jsonl is not the one" in tune(folder).message


def two_processes(folder, rng) -> None:
    """While one has the folder, another is refused; and when that one is gone, it is not."""
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
    """What a callback of the user's raises."""


def callback_raises(folder, rng) -> None:
    """It is the user's to see, and the step that was taken is saved."""
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


FAULTS = [sigterm, ctrl_c, full_disk, read_only, truncated, garbled, lost_history, two_processes, callback_raises]


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
