"""A search by several processes, which are killed at random: `python killed.py FOLDER URL --kills 50`.

The processes are forked from one that has imported everything, and started no device: each is there within moments.
Prints, as JSON, what became of the trials.
"""

import argparse
import glob
import json
import os
import pathlib
import random
import signal
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optuna

import jaxhpo.search
from jaxhpo.search import _storage, _trials

BATCH, CALLS, PAUSE = 6, 12, 0.01


def outer_loss(h, w, key):
    """A noisy step towards h; slow enough to be killed between any two."""
    jax.debug.callback(lambda _: time.sleep(PAUSE), w)
    w = w - 0.3 * (w - h) + 0.01 * jax.random.normal(key, ())
    return jnp.abs(w), w, {"w": w}


def search(trials, **more):
    return jaxhpo.search.random(
        outer_loss,
        0.5,
        carry=0.0,
        num_trials=trials,
        low=-1.0,
        high=1.0,
        max_calls=CALLS,
        batch=BATCH,
        progress=False,
        **more,
    )


def storage(url):
    """As of an address, but of processes that count as dead after two seconds, and may be killed at any time."""
    found = jaxhpo.search.open_storage(url)
    found.heartbeat_interval, found.grace_period = 1, 2
    found.heartbeat_stale_trial_callback = optuna.storages.RetryHeartbeatStaleTrialCallback(
        inherit_intermediate_values=True
    )
    return found


def work(folder, url, trials):
    """A process that takes part; notes from which call each trial went on."""
    taken = _trials.Search._take_up

    def noted(self, slot, path):
        taken(self, slot, path)
        with open(folder / f"taken-{os.getpid()}", "a") as file:
            print(slot.trial.number, slot.index, slot.calls, file=file)

    _trials.Search._take_up, _trials.PAUSE = noted, 0.2
    search(trials, storage=storage(url), run_dir=folder, save_every=1)


def undisturbed(folder, trials):
    """The same by one process, in memory."""
    np.save(folder / "undisturbed.npy", search(trials).history["value"])


def start(function, *args) -> int:
    """Returns the number of a new process."""
    child = os.fork()
    if child:
        return child
    try:
        function(*args)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def finish(child, options=0) -> bool:
    """Returns whether a process has ended."""
    ended, status = os.waitpid(child, options)
    if ended and status:
        raise SystemExit(f"a process ended with {status}")
    return bool(ended)


def held(folder, child) -> list:
    """The folders of trials that a process has in hand."""
    taken = folder / f"taken-{child}"
    indices = [line.split()[1] for line in taken.read_text().splitlines()] if taken.exists() else []
    return [path for index in indices[-BATCH:] if (path := folder / "trials" / index).exists()]


def killed(study) -> list:
    """The trials that came to no end."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state.name == "FAIL" and _storage.EXCESS not in t.user_attrs]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("url")
    parser.add_argument("--kills", type=int, default=50, help="trials to be killed (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--workers", type=int, default=4)
    parsed = parser.parse_args()
    folder, args = parsed.folder, (parsed.folder, parsed.url, parsed.trials)
    warnings.simplefilter("ignore")
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))  # filled by the first process
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    rng, begun, processes, study = random.Random(0), time.monotonic(), 0, None
    own = storage(parsed.url)  # imports, and makes the tables
    own.remove_session()
    own.engine.dispose()
    finish(start(undisturbed, folder, parsed.trials))
    alive = {start(work, *args) for _ in range(parsed.workers)}
    while alive:
        time.sleep(rng.uniform(0.05, 0.5))
        alive = {child for child in alive if not finish(child, os.WNOHANG)}
        busy = [child for child in sorted(alive) if any(held(folder, child))]
        if busy and study is None:
            study = optuna.load_study(study_name="search", storage=own)
        # Most are struck after their first checkpoint, some at any time.
        saved = [child for child in busy if any(glob.glob(f"{path}/state-*") for path in held(folder, child))]
        if (victims := saved or busy * (rng.random() < 0.1)) and len(killed(study)) < parsed.kills:
            victim = rng.choice(victims)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            alive ^= {victim, start(work, *args)}
            processes += 1
    trials = study.get_trials(deepcopy=False)
    states = [t.state.name for t in trials]
    lines = "".join(path.read_text() for path in folder.glob("taken-*")).splitlines()
    calls = {int(number): int(calls) for number, _, calls in map(str.split, lines)}
    retries = [t.number for t in trials if t.system_attrs.get("retry_history") and t.number in calls]
    values = search(parsed.trials, storage=own).history["value"]  # nothing is left to do
    told = {
        "processes killed": processes,
        "trials killed": len(killed(study)),
        "lost": parsed.trials - len(values),
        "left running": states.count("RUNNING") + states.count("WAITING"),
        "begun again": len(retries),
        "from a checkpoint": sum(calls[number] > 0 for number in retries),
        "other results": int(np.sum(values != np.load(folder / "undisturbed.npy"))),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
