"""No process that a test began outlives pytest, however that ends: by itself, by a signal, or by a crash.

Each pytest process, a worker of xdist too, marks its environment, which its children inherit, and has a watchman: a
process of its own that waits for its end and then kills what bears the mark. Linux only: it reads /proc.
"""

import os
import subprocess
import sys
import time

NAME = "JAXHPO_TEST_PROCESS"
WATCHMAN = r"""
import os, select, signal, sys

mark, parent = sys.argv[1].encode() + b"\0", int(sys.argv[2])

def marked():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read():
                    yield int(pid)
        except OSError:  # it has ended, or is another user's
            pass

try:
    select.select([0, os.pidfd_open(parent)], [], [])  # the input is closed, or the process has ended
except ProcessLookupError:
    pass
while found := list(marked()):  # again, as one may have begun another meanwhile
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""

_watchman: subprocess.Popen | None = None


def watch() -> None:
    """From now on."""
    global _watchman
    if not sys.platform.startswith("linux"):
        return
    unmarked = {name: value for name, value in os.environ.items() if name != NAME}  # it is nobody's to kill
    os.environ[NAME] = f"{os.getpid()}-{time.time_ns()}"
    command = [sys.executable, "-S", "-E", "-c", WATCHMAN, f"{NAME}={os.environ[NAME]}", str(os.getpid())]
    quiet = subprocess.DEVNULL
    _watchman = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=unmarked, start_new_session=True
    )


def end() -> None:
    """Kills the children that are left before it returns."""
    if _watchman is not None and _watchman.stdin is not None:
        _watchman.stdin.close()
        _watchman.wait()
