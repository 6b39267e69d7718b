"""A run that is disturbed in any way ends as the undisturbed one does, bit for bit: the short form."""

import random
import signal

import faults
import pytest


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The end of the undisturbed run, and how long it takes; what it compiled is there for all that follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        faults.undisturbed(tmp_path_factory.mktemp("first"))
        folder = tmp_path_factory.mktemp("undisturbed")
        seconds = faults.undisturbed(folder)
        yield faults.end(folder), seconds


def test_five_kills(reference):
    want, seconds = reference
    assert faults.chains(5, seconds, want, random.Random(0)) == (0, 0)


@pytest.mark.slow
def test_preempted_again_and_again(reference):
    want, seconds = reference
    assert faults.chains(5, seconds, want, random.Random(1), number=signal.SIGTERM) == (0, 0)


QUICK = {"sigterm", "full_disk"}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[] if f.__name__ in QUICK else pytest.mark.slow) for f in faults.FAULTS],
    ids=lambda fault: fault.__name__,
)
def test_fault(fault, reference):
    faults.survives(fault, reference[0], seed=0)
