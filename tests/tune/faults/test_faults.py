"""A disturbed run ends as an undisturbed one, bit for bit: the short form."""

import random
import signal

import faults
import pytest


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compiled_once):
    """Returns the end of the undisturbed run and its seconds; later runs reuse what it compiled."""
    faults.undisturbed(tmp_path_factory.mktemp("first"))
    folder = tmp_path_factory.mktemp("undisturbed")
    seconds = faults.undisturbed(folder)
    return faults.end(folder), seconds


def test_resume_after_five_kills_is_bit_identical(reference):
    want, seconds = reference
    assert faults.chains(5, seconds, want, random.Random(0)) == (0, 0)


@pytest.mark.slow
def test_resume_after_five_preemptions_is_bit_identical(reference):
    want, seconds = reference
    assert faults.chains(5, seconds, want, random.Random(1), number=signal.SIGTERM) == (0, 0)


QUICK = {"sigterm", "full_disk"}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[] if f.__name__ in QUICK else pytest.mark.slow) for f in faults.FAULTS],
    ids=lambda fault: fault.__name__,
)
def test_resume_after_a_fault_is_bit_identical(fault, reference):
    faults.survives(fault, reference[0], seed=0)
