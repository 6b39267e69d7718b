"""README, the pages of the documentation and the notebooks: their examples run, and print what they show."""

import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import types

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
        if page.name in pages.ELSEWHERE:
            assert page.name in (ROOT / pages.ELSEWHERE[page.name]).read_text()
        else:
            assert not pages.blocks(page) or page in PAGES


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


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("```python\nprint(1)\n```\n\n```text\n```\n", "it prints"),
        ("```python\nprint('``' + '`')\n```\n\n```text\n1\n```\n", "prints a fence"),
        ("# A\n\n- Do:\n\n  ```python\n  1 / 0\n  ```\n", "block at line 5 would not run"),
        ("``` python\n1 / 0\n```\n", "block at line 1 would not run"),
    ],
    ids=["empty", "fence", "indented", "space"],
)
def test_a_block_that_cannot_be_compared_is_found(page, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "page.md")])
    assert pages.main() == 1 and said in capsys.readouterr().err


def test_renewing_a_page_keeps_all_but_the_output(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    text = b"A\r\n\r\n```python\r\nprint(2)\r\n```\r\n\r\n```text\r\n%d\r\n```\r\n\r\nB\r\n"
    page.write_bytes(text % 1)
    monkeypatch.setattr(sys, "argv", ["run.py", str(page), "--write"])
    assert pages.main() == 0 and page.read_bytes() == text % 2


@pytest.mark.parametrize("script", ["run.py", "links.py"])
def test_scripts_of_the_documentation_say_what_is_not_there(script):
    out = subprocess.run([sys.executable, str(ROOT / "docs" / script), "nowhere"], capture_output=True, text=True)
    assert out.returncode == 2 and "`nowhere` is not a f" in out.stderr


def test_broken_links_of_the_site_are_found(tmp_path):
    (tmp_path / "odd.html").write_bytes(b'\xff<a href="#top"></a><a href="http://[x"></a>')
    assert links.broken(tmp_path) == (["odd.html: http://[x"], 1)
    (tmp_path / "odd.html").unlink()
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
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def notebooks():
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package)
    return load(ROOT / "notebooks" / "run.py")


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 5


@each_notebook
def test_notebook_holds_the_outputs_of_its_code(notebooks, path):
    notebook = notebooks.read(path)
    assert not notebooks.faults(notebook)
    stamp = notebook.metadata.get("jaxhpo", {}).get("full_run")
    assert stamp == notebooks.digest(notebook), f"code or outputs have changed: `python notebooks/run.py {path.stem}`"
    assert path.stat().st_size < 300_000
    # Below the title is the place of Colab's badge.
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


def test_faults_of_notebooks_are_found(notebooks):
    v4 = pytest.importorskip("nbformat").v4

    def faults(*outputs, number=1):
        return notebooks.faults(
            v4.new_notebook(cells=[v4.new_code_cell("f()", execution_count=number, outputs=list(outputs))])
        )

    assert not faults(v4.new_output("stream", text="1/2 of https://example.org/a/b, loss 0.5"))
    assert "warning" in faults(v4.new_output("stream", name="stderr", text="UserWarning: no"))[0]
    assert "error" in faults(v4.new_output("error", ename="ValueError", evalue="no"))[0]
    assert "/home/me" in faults(v4.new_output("stream", text="saved in /home/me"))[0]
    assert "path" in faults(v4.new_output("execute_result", data={"text/plain": "'C:\\\\Users'"}))[0]
    assert "None" in faults(number=None)[0]


def test_digest_is_of_code_and_outputs(notebooks):
    v4 = pytest.importorskip("nbformat").v4

    def digest(code="f()", text="1", title="# Title"):
        cell = v4.new_code_cell(code, outputs=[v4.new_output("stream", text=text)])
        return notebooks.digest(v4.new_notebook(cells=[v4.new_markdown_cell(title), cell]))

    assert digest() == digest(title="# Another title")
    assert len({digest(), digest(code="g()"), digest(text="2")}) == 3


def first_code(notebooks, path):
    return notebooks.code_cells(notebooks.read(path))[0].source


@pytest.mark.parametrize(
    "folder, installed, by_pip, commands",
    [
        ("elsewhere", {"jaxhpo": "0.2.0"}, {}, []),
        ("elsewhere", {"jax": "0.10.2"}, {}, ['-q "jaxhpo[demo]"']),
        ("clone", {}, {"jax": "0.10.2"}, ['-q ".[demo]"']),
        ("clone/notebooks", {}, {"jax": "0.10.2"}, ['-q "..[demo]"']),
        ("elsewhere", {"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2"}, {}, ['-q "jaxhpo[demo]"']),
        (
            "elsewhere",
            {"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2"},
            {"jax": "0.10.2"},
            ['-q "jaxhpo[demo]"', '-q "jax[cuda12]==0.10.2"'],
        ),
    ],
    ids=["installed", "no-clone", "clone", "notebooks-of-a-clone", "gpu", "gpu-and-a-newer-jax"],
)
def test_first_cell_installs_what_is_absent(notebooks, folder, installed, by_pip, commands, tmp_path, monkeypatch):
    """A notebook is opened in a clone, in its folder of notebooks, or without a clone, as on Colab."""
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager().transform_cell
    (tmp_path / "elsewhere").mkdir()
    for name in ("clone/notebooks", "clone/jaxhpo"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "clone" / "jaxhpo" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / folder)
    packages, given, names = dict(installed), [], {}

    def run_line_magic(magic, line):
        assert magic == "pip" and line.startswith("install ")
        given.append(line.removeprefix("install ").format(**names))  # IPython fills in {names}
        packages.update(by_pip)

    def distributions(name):
        return [types.SimpleNamespace(version=packages[name])] if name in packages else []

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    names["get_ipython"] = lambda: types.SimpleNamespace(run_line_magic=run_line_magic)
    exec(transform(first_code(notebooks, NOTEBOOKS[0])), names)
    assert given == commands


def test_first_cells_are_the_same_but_for_extras(notebooks):
    assert len({re.sub(r"\[demo[a-z,]*\]", "[]", first_code(notebooks, path)) for path in NOTEBOOKS}) == 1


@pytest.mark.slow
@each_notebook
def test_notebook_runs(notebooks, path):
    """In its short form; the full one has been run by `notebooks/run.py`."""
    if "link_prediction" in path.stem:
        try:
            jaxhpo.data.knowledge_graph("nations")
        except (ImportError, jaxhpo.JaxhpoError) as error:
            pytest.skip(str(error))
    assert not notebooks.faults(notebooks.execute(path, quick=True, env=cheap_environment()))
