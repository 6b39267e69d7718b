"""README, the pages of the documentation and the notebooks: their examples run, and print what they show."""

import importlib.util
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


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


pages = load(ROOT / "docs" / "run.py")
links = load(ROOT / "docs" / "links.py")


def test_readme_is_one_page():
    assert len(README.split()) <= 450  # the limit, code included
    assert len(re.findall(r"```python", README)) == 1
    for extra, command in (("demo", ".venv/bin/jaxhpo demo"), ("test", ".venv/bin/python -m pytest -q")):
        assert f"python3 -m venv .venv && .venv/bin/pip install -q -e '.[{extra}]' && {command}" in README


def test_readme_example_runs_as_printed():
    out = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "run.py"), str(ROOT / "README.md")],
        capture_output=True,
        text=True,
        env=default_environment(),
    )
    assert out.returncode == 0, out.stderr


PAGES = [page for page in pages.pages() if page.name != "README.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_as_printed(page):
    """Every example, in a new process, with warnings as errors."""
    command = [sys.executable, str(ROOT / "docs" / "run.py"), str(page)]
    out = subprocess.run(command, capture_output=True, text=True, env=cheap_environment())
    assert out.returncode == 0, out.stderr


def test_every_example_is_run():
    """No Python block is outside of what `docs/run.py` finds, and what it leaves out a test runs."""
    for page in pages.written():
        blocks = re.findall(r"^ *(?:```|:::)+ *(?:\{.*\} *)?(?:python|py|pycon)", page.read_text(), re.MULTILINE)
        if page.name in pages.ELSEWHERE:
            assert page.name in (ROOT / pages.ELSEWHERE[page.name]).read_text()
        else:
            assert len(blocks) == len(pages.BLOCK.findall(page.read_text())), page
            assert not blocks or page in PAGES


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("loss 1.18 in 3.2 s", True),
        ("loss\n  1.19 in 70 s", True),
        ("loss 1.40 in 3.2 s", False),
        ("cost 1.18 in 3.2 s", False),
        ("loss 1.18 in 3.2 s and more", False),
        ("", False),
    ],
)
def test_a_page_that_differs_from_what_it_prints_is_found(printed, same):
    assert (pages.difference("loss 1.18 in 3.2 s", printed) is None) == same


def test_a_page_whose_example_raises_or_warns_is_found(tmp_path):
    for code in ("raise ValueError", "import warnings; warnings.warn('x')"):
        (tmp_path / "page.md").write_text(f"# Page\n\n```python\n{code}\n```\n")
        command = [sys.executable, str(ROOT / "docs" / "run.py"), str(tmp_path / "page.md")]
        assert subprocess.run(command, capture_output=True).returncode == 1


def test_broken_links_of_the_site_are_found(tmp_path):
    (tmp_path / "index.html").write_text('<a id="top" href="other.html#there"></a><img src="no.png"><a href="#no"></a>')
    (tmp_path / "other.html").write_text('<h1 id="there"></h1><a href="index.html#top"><a href="https://x.y/z">')
    found, count = links.broken(tmp_path)
    assert found == ["index.html: no.png", "index.html: #no"] and count == 4


def test_pages_name_only_what_exists():
    names = set()
    for page in [ROOT / "README.md", *PAGES]:
        names |= set(re.findall(r"\bjaxhpo\.([A-Za-z_]+)\(", page.read_text()))
    assert names >= {"solve", "from_optax", "tune", "compare"}  # the search finds them
    assert not {name for name in names if not hasattr(jaxhpo, name)}


def test_links_lead_somewhere():
    """Relative links between files of the repository; those of the built site are checked by `docs/links.py`."""
    found = {
        (page, target)
        for page in [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *pages.written()]
        for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", page.read_text())
    }
    assert (ROOT / "README.md", "CONTRIBUTING.md") in found  # the search finds them
    assert not [(page.name, target) for page, target in found if not (page.parent / target).exists()]


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
