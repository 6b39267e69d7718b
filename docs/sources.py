"""Pages of the documentation that are made from the package, the notebooks and files of the repository."""

import base64
import importlib
import inspect
import json
import os
import pathlib
import re
import shutil

import jaxhpo

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent

MODULES = {
    "jaxhpo.criteria": "Outer objectives that select a model: cross-validation, evidence, variational bounds.",
    "jaxhpo.data": "Data sets, downloaded once and checked, or read from `$JAXHPO_DATA_DIR`.",
    "jaxhpo.models": "Models for examples and benchmarks, as pure functions.",
    "jaxhpo.plot": "Pictures of runs and comparisons. They need matplotlib.",
    "jaxhpo.search": "Searches, most with Optuna. They need `pip install 'jaxhpo[search]'`.",
    "jaxhpo.single_loop": "Stochastic methods that tune hyperparameters during one training.",
    "jaxhpo.sklearn": "Estimators of scikit-learn's style that choose their penalties. They need scikit-learn.",
    "jaxhpo.testing": "Problems with hypergradients in closed form, to test a rule of your own against.",
}
# Files of the repository that are pages here.
PAGES = {
    "benchmarks/README.md": "repository/benchmarks",
    "CHANGELOG.md": "repository/changelog",
    "CONTRIBUTING.md": "repository/contributing",
    "ARCHITECTURE.md": "repository/architecture",
    "README.md": "index",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)((?:#[^)\s]*)?)\)")


def write(repository: str) -> None:
    """Make all of them.

    Args:
      repository: address of the repository, for links to its files; "" while it has none.
    """
    write_api(DOCS / "api")
    copy_notebooks(DOCS / "notebooks")
    folder = _new(DOCS / "repository")
    for source, name in PAGES.items():
        if name.startswith("repository/"):
            (folder.parent / f"{name}.md").write_text(relinked(ROOT / source, name, repository))


def _new(folder: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# --- API reference ----------------------------------------------------------------------------------------------------


def write_api(folder: pathlib.Path) -> None:
    """Write one page for each group of names in the docstring of `jaxhpo`, one for each module, and an index."""
    _new(folder)
    pages = [(title, "", [("jaxhpo", name) for name in names]) for title, names in groups().items()]
    pages += [(module, text, list(public_names(module))) for module, text in MODULES.items()]
    index, stems = ["# API reference", "", "Every public name, by what it is for."], []
    for title, text, names in pages:
        stems.append(re.sub(r"\W+", "_", title.lower()).strip("_"))
        (folder / f"{stems[-1]}.rst").write_text(_page(title, text, names))
        index += ["", f"## {title}", "", text, "", "| name | |", "|---|---|"]
        for owner, name in names:
            shown = f"{owner}.{name}".removeprefix("jaxhpo.")
            index.append(f"| [`{shown}`](#{owner}.{name}) | {_summary(_value(owner, name))} |")
    index += ["", "```{toctree}", ":hidden:", "", *stems, "```", ""]
    (folder / "index.md").write_text("\n".join(index))


def groups() -> dict[str, list[str]]:
    """The names of the package by what they are for, from its docstring."""
    listed = jaxhpo.__doc__.partition("what they are for:\n")[2].partition("\nModules,")[0]
    found = {}
    for title, lines in re.findall(r"^([A-Z].*)\n((?:    .+\n)+)", listed, re.MULTILINE):
        names = " ".join(re.findall(r"((?:\w+,\s+)*\w+):", lines))
        found[title.replace("`", "")] = re.findall(r"\w+", names)
    return found


def public_names(module: str):
    """Yields the public names that a module and its public submodules define, each with the module that defines it."""
    loaded = importlib.import_module(module)
    for name, value in vars(loaded).items():
        if not (name.startswith("_") or inspect.ismodule(value)):
            if (getattr(value, "__module__", None) or "").startswith(module):
                yield module, name
    for path in getattr(loaded, "__path__", []):
        for entry in sorted(pathlib.Path(path).glob("[a-z]*")):
            if entry.suffix == ".py" or (entry / "__init__.py").exists():
                yield from public_names(f"{module}.{entry.stem}")


def _value(owner: str, name: str):
    return getattr(importlib.import_module(owner), name)


def _summary(value) -> str:
    """The first line of a docstring, in Markdown."""
    line = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return re.sub(r":math:`([^`]*)`", r"$\1$", line).replace("|", r"\|")


def _page(title: str, text: str, names: list[tuple[str, str]]) -> str:
    lines = [title, "=" * len(title), "", text, ""]
    for owner, name in names:
        value = _value(owner, name)
        kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
        options = ["   :members:"] * (kind == "class")
        if owner == "jaxhpo.sklearn":  # `fit` is that of a common base
            options.append("   :inherited-members: BaseEstimator")
        lines += [f".. auto{kind}:: {owner}.{name}", *options, ""]
    return "\n".join(lines)


# --- notebooks and files of the repository ----------------------------------------------------------------------------


def copy_notebooks(folder: pathlib.Path) -> None:
    """Copy the notebooks with their outputs, and of each the first picture, for the gallery."""
    _new(folder)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(path, folder)
        outputs = [out for cell in json.loads(path.read_text())["cells"] for out in cell.get("outputs", [])]
        pictures = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
        if pictures:
            (folder / f"{path.stem}.png").write_bytes(base64.b64decode("".join(pictures[0])))


def relinked(source: pathlib.Path, page: str, repository: str, text: str | None = None) -> str:
    """The text of a file whose relative links lead to pages of the site, or into the repository.

    Args:
      source: the file.
      page: the page that it becomes, such as "recipes/equinox".
      repository: address of the repository; without one, a link to a file that is no page becomes its name.
      text: the file's text, if it has been read.
    """
    here = (DOCS / page).parent

    def link(match: re.Match) -> str:
        mark, label, target, anchor = match.groups()
        path = pathlib.Path(os.path.normpath(source.parent / target))
        if re.match(r"[a-z]+:", target) or not target or not path.exists():
            return match[0]  # an address, or what Sphinx reports
        name = path.relative_to(ROOT).as_posix()
        if mark or path.is_relative_to(DOCS):
            place = path
        elif name in PAGES:
            place = DOCS / f"{PAGES[name]}.md"
        elif path.suffix == ".ipynb":
            place = DOCS / "notebooks" / path.name
        else:
            return f"[{label}]({repository}/blob/main/{name}{anchor})" if repository else label
        return f"{mark}[{label}]({os.path.relpath(place, here)}{anchor})"

    text = source.read_text() if text is None else text
    return LINK.sub(link, text)
