"""A run of two processes, whose hyperparameters are sharded over both, is saved and resumed, bit for bit."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import processes
import pytest

import jaxhpo

SCENARIOS = [
    "undisturbed",
    "closed_over",
    "disagreeing",
    "struck",
    "examined",
    "unshared",
    "grown",
    "continued",
    "damaged",
    "stopped",
    "refused",
    "local",
    "documented",
]


def start(folder, *scenarios) -> list[subprocess.Popen]:
    """Starts two processes, which connect at a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]  # each has two of its own
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    environment |= {"JAX_ENABLE_X64": "1", "PYTHONWARNINGS": "error::RuntimeWarning"}
    running = []
    for i in range(2):
        command = [sys.executable, processes.__file__, i, port, folder, *scenarios]
        with open(folder / f"output-{i}", "w") as out, open(folder / f"errors-{i}", "w") as errors:
            running.append(subprocess.Popen(list(map(str, command)), stdout=out, stderr=errors, env=environment))
    return running


def kill(running) -> None:
    for process in running:
        process.kill()
        process.wait()


def finish(running, folder, seconds=600) -> dict[str, list]:
    """Waits; returns the ends of each scenario's runs, which are the same for both processes."""
    deadline = time.monotonic() + seconds
    # Where one has failed, the other would wait for it.
    while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    failed = [p.poll() for p in running] != [0, 0]
    kill(running)
    assert not failed, "\n".join((folder / f"errors-{i}").read_text()[-3000:] for i in range(2))
    lines = [(folder / f"output-{i}").read_text().splitlines() for i in range(2)]
    # Gloo prints on its own.
    first, second = ([json.loads(line) for line in told if line.startswith("{")] for told in lines)
    assert first == second
    return {name: [told for told in first if told["scenario"] == name] for name in {told["scenario"] for told in first}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ended(folder):
    """Runs all scenarios but the kill in two processes."""
    processes.tune(folder / "grown", 3)
    return finish(start(folder, *SCENARIOS), folder)


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in pathlib.Path(folder).glob("state-*"))


@pytest.mark.slow
def test_resume_is_bit_identical(ended, folder):
    (whole,), (stopped, more) = ended["undisturbed"], ended["continued"]
    assert whole["spread"] and more["spread"]
    assert "resumed" in more["message"] and "after 3 outer steps; num_steps is 6, was 3" in more["message"]
    assert more["end"] == whole["end"] != stopped["end"]
    assert checkpoints(folder / "continued") == ["state-00000005.parts", "state-00000006.parts"]
    assert len((folder / "continued" / "history.jsonl").read_text().splitlines()) == processes.STEPS


@pytest.mark.slow
def test_data_closed_over_are_spread_over_processes(ended):
    told, diverged = (told["refusal"] for told in ended["closed_over"])
    *values, checked, compared, num_rows = json.loads(told)
    make_outer_loss = processes.regression(jnp.asarray)
    alone = processes.search(make_outer_loss)
    comparison = jaxhpo.compare(make_outer_loss, alone.hparams, [jaxhpo.Implicit()], repeats=1, progress=False)
    # Sums over devices are rounded in another order: a few units in the last place.
    np.testing.assert_allclose(values, alone.history["value"], rtol=1e-13)
    np.testing.assert_allclose(compared, comparison.rows[0].relative_error, rtol=1e-8)
    assert checked < 1e-8 and num_rows == 5  # the differences' error; the schedules of a `MemoryPlan`
    assert "The inner run diverges" in diverged


@pytest.mark.slow
def test_processes_that_disagree_are_refused(ended):
    start, key_and_steps, rate, data = (told["refusal"] for told in ended["disagreeing"])
    assert "were given different `hparams`, so" in start
    assert "were given different `key`, `num_steps`, so" in key_and_steps
    assert "were given different `optimizer`, so" in rate
    # Σ (h − data)² at h = 1, with three entries: 0 on process 0, whose data are 1, and 3 on process 1.
    assert data.startswith("The outer loss of the first step is [0.0, 3.0] on processes 0 to 1")


@pytest.mark.slow
def test_an_exception_or_interrupt_of_one_process_ends_all(ended):
    *told, interrupted, more = ended["struck"]
    argument, *others = (told["refusal"] for told in told)
    assert argument.startswith("none: `num_steps` got 0.5")
    assert others == ["raised: no more"] * 4  # a trace, a monitor, a callback, a checkpoint
    assert interrupted["status"] == "interrupted"
    assert more["status"] == "finished" and more["end"] == ended["undisturbed"][0]["end"]


@pytest.mark.slow
def test_an_exception_of_one_process_ends_a_check_on_all(ended):
    *told, compared = (told["refusal"] for told in ended["examined"])
    assert told == ["no more"] * 4
    errors, reference, why = json.loads(compared)
    # One rule alone, which is the reference, costs no more than that rule.
    assert errors == [None, None] and reference == "tangents" and "MemoryError: no more" in why


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(ended, folder):
    *told, linked = ended["unshared"]
    another, missing, file, left = (told["refusal"] for told in told)
    place = folder / "unshared"
    assert another.startswith(f"`run_dir`: what process 1 writes in {place}/another does not appear in {place}/own on")
    assert missing.startswith(f"`run_dir`: process 1 cannot write in {place}/missing (No such file or directory), but")
    assert file.startswith(f"`run_dir`: process 1 cannot write in {place}/file (Not a directory), but")
    assert left == "[]" and linked["end"] == ended["undisturbed"][0]["end"]


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(ended, folder):
    (grown,) = ended["grown"]
    assert grown["spread"] and "after 3 outer steps" in grown["message"]
    whole = [np.frombuffer(bytes.fromhex(x)) for x in (grown["end"][0], ended["undisturbed"][0]["end"][0])]
    np.testing.assert_allclose(*whole, rtol=1e-13)  # as below
    assert checkpoints(folder / "grown") == ["state-00000005.parts", "state-00000006.parts"]


@pytest.mark.slow
def test_what_each_process_holds_alone_is_saved_once(ended):
    (told,) = ended["local"]
    assert "after 2 outer steps" in told["refusal"] and "damaged" not in told["refusal"]


@pytest.mark.slow
def test_damaged_checkpoints_are_skipped(ended, folder):
    _, garbled, lost, unsealed = ended["damaged"]
    assert "after 2 outer steps; state-00000003.parts is damaged (the checksum of " in garbled["message"]
    assert "after 3 outer steps; state-00000004.parts is damaged ([Errno 2] No such file" in lost["message"]
    # A checkpoint without a seal was interrupted while it was written; no note mentions it.
    assert "after 4 outer steps" in unsealed["message"] and "is damaged" not in unsealed["message"]
    assert unsealed["end"] == ended["undisturbed"][0]["end"]


@pytest.mark.slow
def test_a_signal_or_clock_of_one_process_stops_all(ended):
    timed, preempted, *_ = ended["stopped"]
    assert timed["status"] == "budget" and "after 1 outer steps" in preempted["message"]
    assert preempted["status"] == "preempted" and preempted["message"].endswith("stopped after 4 outer steps")


@pytest.mark.slow
def test_full_disk_of_any_process(ended):
    *_, result, part, seal, again = ended["stopped"]
    assert "after 4 outer steps" in result["message"]
    assert result["end"] == again["end"] == ended["undisturbed"][0]["end"]
    assert re.search(r"after 5 .* \(process 1: No space left\).* on disk it is at step 4", part["refusal"])
    assert re.search(r"after 6 .* \(No space left\).* on disk it is at step 4", seal["refusal"])
    assert "after 4 outer steps" in again["message"]


@pytest.mark.slow
def test_all_processes_refuse(ended):
    start, use, alone = (told["refusal"] for told in ended["refused"])
    assert "began with another value of ['hparams']['goal']" in start
    assert "is in use by process" in use
    assert "holds no readable checkpoint: state-00000001.npz is damaged (its checksum" in alone


@pytest.mark.slow
def test_resume_after_a_kill_is_bit_identical(ended, folder):
    running = start(folder, "killed")
    deadline = time.monotonic() + 300
    while not checkpoints(folder / "killed")[1:] and time.monotonic() < deadline:
        time.sleep(0.05)
        assert not any(process.poll() for process in running)
    kill(running)
    (more,) = finish(start(folder, "killed"), folder)["killed"]
    assert "resumed" in more["message"]
    assert more["end"] == ended["undisturbed"][0]["end"]


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(ended, folder):
    """One process with eight devices resumes from the state that two processes with four devices saved."""
    steps = processes.STEPS
    copy = shutil.copytree(folder / "continued", folder / "copied")  # which other tests look at
    result = processes.tune(copy, steps + 1)
    assert f"after {steps} outer steps" in result.message and len(result.history["value"]) == steps + 1
    alone = processes.tune(None, steps + 1)
    # Sums over devices are rounded in another order: a few units in the last place of 1, over seven steps.
    np.testing.assert_allclose(result.hparams["goal"], alone.hparams["goal"], rtol=1e-13)
    assert len(result.hparams["goal"].sharding.device_set) == 8


@pytest.mark.slow
def test_the_script_of_the_documentation_runs(ended, folder):
    """That of several_hosts.md."""
    (told,) = ended["documented"]
    assert told["refusal"] == "ended with 0"
    assert len(jaxhpo.load(folder / "documented").history["value"]) == 3
