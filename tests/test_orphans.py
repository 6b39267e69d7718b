"""Ending pytest leaves no process of the tests alive."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tests/orphans.py reads /proc")
CONFTEST = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).with_name("conftest.py").parent)!r})
import orphans

def pytest_configure(config):
    orphans.watch()

def pytest_unconfigure(config):
    orphans.end()
"""
TEST = """
import os, pathlib, subprocess, sys, time

def test():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
    os.rename("pids.part", "pids")
"""
# What a shell's background job ignores, its children would too.
PYTEST = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main())"
LONG = 120  # seconds: one or two are usual
ENDINGS = {
    "by itself": ("", None),
    "crash": ("os._exit(3)", None),
    "Ctrl-C": ("time.sleep(600)", signal.SIGINT),
    "SIGTERM": ("time.sleep(600)", signal.SIGTERM),
    "SIGKILL": ("time.sleep(600)", signal.SIGKILL),
}


def alive(pid) -> bool:
    """A process that has ended and that nobody has asked about is none."""
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition) -> bool:
    end = time.monotonic() + LONG
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


@pytest.mark.parametrize("ending", [pytest.param(e, marks=[] if e == "SIGTERM" else pytest.mark.slow) for e in ENDINGS])
def test_no_child_is_left(ending, tmp_path):
    last, number = ENDINGS[ending]
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST + f"    {last}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", PYTEST, "-p", "xdist", "-n", "1", "--maxfail=1"]
    with open(tmp_path / "output", "w") as out:
        run = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=out)
    try:
        assert wait_for((tmp_path / "pids").exists), (tmp_path / "output").read_text()
        worker, child = map(int, (tmp_path / "pids").read_text().split())
        if number:
            assert alive(child)
            run.send_signal(number)
        run.wait(LONG)
        assert wait_for(lambda: not alive(worker) and not alive(child))
    finally:
        run.kill()
        run.wait()
