"""Configuration of the documentation: python -m sphinx -W -b html docs docs/_build/html."""

import pathlib
import re
import sys
import tomllib

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]  # document the package of the tree that these pages lie in

import sources  # noqa: E402

import jaxhpo  # noqa: E402

META = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())
NAME = META["tool"]["jaxhpo"]["repository"]  # "OWNER/NAME", or "" while there is none
REPOSITORY = f"https://github.com/{NAME}" if NAME else ""

project = "jaxhpo"
author = copyright = "The jaxhpo authors"
version = release = jaxhpo.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs; examples of pages are run by docs/run.py
default_role = "public"
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give types and shapes
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
html_theme = "furo"
html_title = f"jaxhpo {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_math_renderer = "mathml"  # drawn by the browser itself, without a script from elsewhere
if REPOSITORY:
    html_theme_options = {
        "source_repository": REPOSITORY,
        "source_branch": "main",
        "source_directory": "docs/",
        "footer_icons": [{"name": "Repository", "url": REPOSITORY, "html": "Repository", "class": ""}],
    }


def link_files(app, docname, content) -> None:
    """Make links between pages and to files of the repository lead somewhere on the site."""
    source = DOCS / f"{docname}.md"
    if source.exists() and not docname.startswith(("api/", "repository/")):
        content[0] = sources.relinked(source, docname, REPOSITORY, content[0])


def link_papers(app, what, name, obj, options, lines) -> None:
    """Make arXiv numbers and DOIs of docstrings links."""
    for at, line in enumerate(lines):
        line = re.sub(r"\barXiv:(\d{4}\.\d{4,5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line)
        lines[at] = re.sub(r"\bdoi:(10\.\S+[^\s.,)])", r"`doi:\1 <https://doi.org/\1>`__", line)


def skip_fields(app, what, name, obj, skip, options) -> bool | None:
    """Leave out the fields of NamedTuples, which `Attributes:` describes, and what scikit-learn's classes add."""
    field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if field or (getattr(obj, "__module__", None) or "").startswith("sklearn.") else None


def public(name, rawtext, text, lineno, inliner, options=None, content=()):
    """Role of single backticks in docstrings: code, with a link where it begins with a public name."""
    found = re.match(r"(?:jaxhpo\.)?(\w+)(?=$|\()", text)
    code = nodes.literal(rawtext, text)
    if not found or found[1] not in jaxhpo.__all__:
        return [code], []
    target = {"refdomain": "py", "reftype": "obj", "reftarget": f"jaxhpo.{found[1]}", "refexplicit": True}
    return [pending_xref(rawtext, code, **target)], []


def visit_math(self, node) -> None:
    """Write a formula as MathML."""
    self.body.append(convert(node.astext(), display="block" if node.tagname == "math_block" else "inline"))
    raise nodes.SkipNode


def setup(app) -> None:
    """Make the pages that are made, and register what is above."""
    sources.write(REPOSITORY)
    app.add_role("public", public)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", link_papers)
    app.connect("autodoc-skip-member", skip_fields)
