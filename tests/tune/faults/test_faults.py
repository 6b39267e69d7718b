"""A disturbed run ends as an undisturbed one, bit for bit: the short form."""

import random
import signal

import faults
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Returns the end of the undisturbed run and its seconds; later runs reuse what it compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # whether there is one is asked once
        faults.undisturbed(tmp_path_factory.mktemp("first"))
        folder = tmp_path_factory.mktemp("undisturbed")
        seconds = faults.undisturbed(folder)
        yield faults.end(folder), seconds
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


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
