"""What a release says of itself agrees: addresses, version, date, supported Pythons, workflows."""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import jaxhpo

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ELSEWHERE = ("https://", "http://", "mailto:", "#")


@pytest.fixture
def tree(tmp_path):
    """A copy of the repository."""
    skipped = (".git", ".venv*", ".*cache", ".hypothesis", "__pycache__", "*.egg-info", "_build", "build", "dist")
    return shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(*skipped))


def texts(tree) -> dict[str, str]:
    files = [*tree.glob("[!.]*.*"), *tree.glob("docs/*.*"), *tree.glob("notebooks/*.ipynb")]
    return {path.relative_to(tree).as_posix(): path.read_text() for path in files}


def write_addresses(tree, repository=None):
    """Writes what `docs/addresses.py` writes, after the constant is set."""
    if repository is not None:
        project = (tree / "pyproject.toml").read_text()
        changed, times = re.subn(r'^(repository = )".*"$', rf'\1"{repository}"', project, flags=re.MULTILINE)
        assert times == 1
        (tree / "pyproject.toml").write_text(changed)
    command = [sys.executable, tree / "docs" / "addresses.py"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def links(text: str) -> list[str]:
    text = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)  # code
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_addresses_are_as_they_are_written(tree):
    before = texts(tree)
    assert {"README.md", "CITATION.cff", "docs/errors.md", "notebooks/01_quickstart.ipynb"} <= set(before)
    assert write_addresses(tree) == "" and texts(tree) == before


def test_addresses_follow_from_one_constant(tree):
    """Set, they are absolute everywhere; another replaces it; set back, every file is what it was."""
    write_addresses(tree, "")
    with open(tree / "README.md", "a") as readme:
        readme.write("[![e](benchmarks/results/demo.png)](ARCHITECTURE.md#the-map), [tests](tests/)\n")
    before = texts(tree)

    write_addresses(tree, "a-b/c.d")
    after, at = texts(tree), "https://github.com/a-b/c.d"
    assert write_addresses(tree) == ""
    assert [link for link in links(after["README.md"]) if not link.startswith(ELSEWHERE)] == []
    raw = "https://raw.githubusercontent.com/a-b/c.d/main"
    picture, page = f"{raw}/benchmarks/results/demo.png", f"{at}/blob/main/ARCHITECTURE.md#the-map"
    assert after["README.md"].endswith(f"[![e]({picture})]({page}), [tests]({at}/tree/main/tests/)\n")
    assert after["README.md"].splitlines()[2].startswith(f"[![tests]({at}/actions/workflows/tests.yml/badge.svg)]")
    for file, text in after.items():
        if file.endswith(".ipynb"):
            badge = "".join(json.loads(text)["cells"][0]["source"]).splitlines()[2]
            assert badge.endswith(f"(https://colab.research.google.com/github/a-b/c.d/blob/main/{file})")
    assert tomllib.loads(after["pyproject.toml"])["project"]["urls"]["Repository"] == at
    assert f"repository-code: {at}\n" in after["CITATION.cff"]

    write_addresses(tree, "d/e")
    for file, text in texts(tree).items():
        assert text == after[file].replace("a-b.github.io/c.d", "d.github.io/e").replace("a-b/c.d", "d/e")
    write_addresses(tree, "")
    assert texts(tree) == before


def test_pages_of_the_site_lead_to_the_repository():
    """With an address, links to what the site has no page for are absolute; pictures are copied into it."""
    spec = importlib.util.spec_from_file_location("sources", ROOT / "docs" / "sources.py")
    spec.loader.exec_module(sources := importlib.util.module_from_spec(spec))
    text = "[a](../tests/helpers.py#L1) [b](../CHANGELOG.md) [c](errors.md#x) ![d](../benchmarks/results/demo.png)"
    assert sources.relinked(ROOT / "docs" / "of_the_test.md", "of_the_test", "https://github.com/a-b/c.d", text) == (
        "[a](https://github.com/a-b/c.d/blob/main/tests/helpers.py#L1) [b](repository/changelog.md) [c](errors.md#x) "
        "![d](../benchmarks/results/demo.png)"
    )


def test_a_repository_that_is_none_is_refused(tree):
    with pytest.raises(subprocess.CalledProcessError) as error:
        write_addresses(tree, "https://github.com/a/b")
    assert "write 'OWNER/NAME'" in error.value.stderr


def test_version_date_and_licence_agree():
    """`__version__` is the only place where the version is written by hand."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[(.*)\](?: - (.*))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "") and headings[1][0] == jaxhpo.__version__
    assert (citation["version"], citation["date-released"].isoformat()) == headings[1]
    assert citation["license"] == PROJECT["project"]["license"]
    assert "version" not in PROJECT["project"] and "version" in PROJECT["project"]["dynamic"]


def test_workflows_test_the_pythons_that_are_named():
    yaml = pytest.importorskip("yaml")
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    read = {file.name: yaml.safe_load(file.read_text()) for file in files}
    assert {"tests.yml", "docs.yml", "release.yml", "bug_report.yml", ".pre-commit-config.yaml"} <= set(read)
    matrix = read["tests.yml"]["jobs"]["quick"]["strategy"]["matrix"]
    named = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c]
    assert matrix["python"] == named == ["3.11", "3.12", "3.13"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"
    hooks = [hook["entry"] for repo in read[".pre-commit-config.yaml"]["repos"] for hook in repo["hooks"]]
    lint = (ROOT / ".ci" / "run").read_text()
    assert hooks and all(f".venv/bin/{hook.removeprefix('.venv/bin/')}" in lint for hook in hooks)
