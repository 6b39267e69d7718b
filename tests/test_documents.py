"""What README and the notebooks show runs as printed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_example_runs_as_printed():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    statements = [line for line in block.splitlines() if line.strip()]
    assert len(statements) <= 25
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    out = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, env=env, check=True).stdout
    before, after = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before
    error = float(re.search(r"relative error ([\d.e+-]+)", out).group(1))
    assert error < 1e-2  # central differences in float32


def test_readme_names_every_rule_and_only_what_exists():
    import jaxhpo

    for name in ("Unroll", "Implicit", "CG", "Neumann", "Identity", "Direct"):
        assert f"`{name}" in README or f"({name}(" in README
    for name in re.findall(r"jaxhpo\.([A-Za-z_]+)\(", README):
        assert hasattr(jaxhpo, name), name


def test_links_lead_somewhere():
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
