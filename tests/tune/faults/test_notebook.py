"""Ctrl-C in a notebook: the cell returns the partial result, and the next one resumes the run."""

import pathlib
import random
import time

import pytest

SETTING = f"""
import sys, time
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import faults, jax, numpy as np

def tune(folder, **settings):
    return faults.tune(folder, pause=0.05, **settings)
"""
TIMEOUT = 300  # seconds, of a cell: far above what one takes, so that a kernel that hangs fails the test


@pytest.fixture
def kernel():
    """Starts a kernel; yields its manager, which can interrupt it, and a client."""
    manager_of = pytest.importorskip("jupyter_client.manager", reason="a notebook needs jupyter_client")
    pytest.importorskip("ipykernel", reason="a notebook needs ipykernel")
    manager, client = manager_of.start_new_kernel(startup_timeout=TIMEOUT)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def begin(client, code) -> str:
    """Sends a cell to the kernel; returns its number."""
    return client.execute(code, store_history=True)


def finish(client, cell) -> str:
    """Waits for the cell; returns the value that it shows, or raises its exception."""
    shown = ""
    while True:
        message = client.get_iopub_msg(timeout=TIMEOUT)
        if message["parent_header"].get("msg_id") != cell:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "error":
            raise AssertionError("\n".join(content["traceback"]))
        if kind == "execute_result":
            shown = content["data"]["text/plain"]
        if kind == "status" and content["execution_state"] == "idle":
            return shown


def steps(folder) -> int:
    """Counts the outer steps on disk."""
    history = folder / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.exists() else 0


def wait_for(condition):
    """Waits until the condition holds."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "the cell takes no steps"
        time.sleep(0.01)


@pytest.mark.slow
def test_resume_after_interrupts_is_bit_identical(kernel, tmp_path):
    """A run interrupted five times at random moments ends as an undisturbed one."""
    manager, client = kernel
    rng, disturbed, whole = random.Random(0), tmp_path / "disturbed", tmp_path / "whole"
    finish(client, begin(client, SETTING))
    before = 0
    for _ in range(5):
        cell = begin(client, f"result = tune({str(disturbed)!r}); result")
        wait_for(lambda: steps(disturbed) >= before + 2)  # noqa: B023
        time.sleep(rng.uniform(0, 0.1))  # within a step, or between two
        manager.interrupt_kernel()
        shown = finish(client, cell)
        assert "status='interrupted'" in shown, shown
        taken = int(finish(client, begin(client, "len(result.history['value'])")))
        assert before < taken < 40
        assert float(finish(client, begin(client, "result.best_value"))) > 0
        before = taken
    finish(client, begin(client, f"ended = tune({str(disturbed)!r})"))
    assert finish(client, begin(client, "ended.status, len(ended.history['value'])")) == "('finished', 40)"
    same = f"""
whole = faults.tune({str(whole)!r})
for got, want in zip(jax.tree.leaves(ended.hparams), jax.tree.leaves(whole.hparams), strict=True):
    np.testing.assert_array_equal(got, want)
faults.end({str(disturbed)!r}) == faults.end({str(whole)!r})
"""
    assert finish(client, begin(client, same)) == "True"
