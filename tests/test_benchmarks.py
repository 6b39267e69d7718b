"""Every benchmark starts: what it imports is there, and its options are told."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script):
    done = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout


def test_each_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    assert not [script.name for script in SCRIPTS if f"| `{script.name}` |" not in listed]
