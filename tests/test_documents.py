"""The examples of README and the notebooks run, and print what they show."""

import pathlib
import re
import subprocess
import sys

import pytest
from helpers import cheap_environment, default_environment

import jaxhpo
import jaxhpo.data

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_example_runs_as_printed():
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 16
    out = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, env=default_environment(), check=True
    ).stdout
    before, after = map(float, re.search(r"validation loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before
    error = float(re.search(r"relative error ([\d.e+-]+)", out).group(1))
    assert error < 1e-4  # exact tangents in float32


@pytest.mark.slow
def test_readme_fragments_run():
    """The two shorter pieces of code, in the setting that the text around them describes."""
    _, flax_model, warm_start, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    setting = """
import flax.linen, jax, jax.numpy as jnp, optax, jaxhpo
key = jax.random.key(0)
images, labels = jax.random.normal(key, (100, 8)), jnp.arange(100) % 10
"""
    use = """
params0 = net.init(key, images[:1])["params"]
minibatches = lambda key: jax.tree.map(lambda x: x[None], batches(0))
validation_loss = lambda params: train_loss(params, h, {"image": images, "label": labels})
"""
    code = setting + flax_model + use + warm_start.replace("num_steps=500", "num_steps=3")
    subprocess.run(
        [sys.executable, "-c", code + "assert result.status == 'finished'"], env=cheap_environment(), check=True
    )


@pytest.mark.slow
def test_readme_examples_of_methods_run(tmp_path):
    """They go on from the first example."""
    first, _, _, _, comparing, planning, pair = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = "\n".join([first, comparing, planning, pair, "assert result.status == 'finished'"])
    command = [sys.executable, "-c", code]
    out = subprocess.run(
        command, capture_output=True, text=True, env=cheap_environment(), check=True, cwd=tmp_path
    ).stdout
    assert "Unroll()" in out and "binomial checkpointing" in out and (tmp_path / "comparison.png").exists()


@pytest.mark.slow
def test_cross_validation_runs():
    """All solves converge, and the loss falls."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cross_validation.md").read_text(), re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", block + "assert penalty.shape == (D,)"]
    out = subprocess.run(command, capture_output=True, text=True, env=cheap_environment(), check=True).stdout
    before, after = map(float, re.search(r"cross-validation ([\d.]+) -> ([\d.]+)", out).groups())
    assert after < before and "ended before" not in out


@pytest.mark.slow
def test_flax_nnx_page_runs():
    """Without a warning: its batch norm is differentiable. The wrong labels lose weight."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "flax_nnx.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 40
    code = f"{block}\nassert result.hparams[:60].mean() < 0.6 * result.hparams[60:].mean()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=cheap_environment(), check=True)


@pytest.mark.slow
def test_errors_page_runs_as_printed():
    page = (ROOT / "docs" / "errors.md").read_text()
    blocks, printed = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "text"))
    assert len(blocks) == len(printed) == 2
    shown = "\n".join(printed)
    command = [sys.executable, "-c", "\n".join(blocks)]
    out = subprocess.run(command, capture_output=True, text=True, env=cheap_environment(), check=True).stdout
    numbers = r"\d+(?:\.\d+)?"
    assert re.sub(numbers, "#", " ".join(out.split())) == re.sub(numbers, "#", " ".join(shown.split()))
    for figure in (r"differs by (\d+) %", r"± [\d.]+ \(([\d.]+)%\)"):
        got, want = (float(re.search(figure, text).group(1)) for text in (out, shown))
        assert abs(got - want) <= 2  # rounding differs between machines


def test_readme_names_only_what_exists():
    named = set(re.findall(r"jaxhpo\.([A-Za-z_]+)\(", README))
    assert named >= {"solve", "from_optax", "tune", "compare"}  # the search finds them
    assert not {name for name in named if not hasattr(jaxhpo, name)}


def test_links_lead_somewhere():
    links = {
        (page.name, target)
        for page in ROOT.glob("*.md")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    }
    assert ("README.md", "CONTRIBUTING.md") in links  # the search finds them
    assert not {(page, target) for page, target in links if not (ROOT / target).exists()}


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.codegen
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    if "link_prediction" in path.stem:
        try:
            jaxhpo.data.knowledge_graph("nations")
        except (ImportError, jaxhpo.JaxhpoError) as error:
            pytest.skip(str(error))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env=default_environment())
