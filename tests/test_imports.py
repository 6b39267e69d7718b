"""Imports run one way, and `import jaxhpo` stays light."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import jaxhpo

PACKAGE = pathlib.Path(jaxhpo.__file__).parent

# A room imports from earlier rows only; rooms of one row do not import each other.
LAYERS = [
    ["_core"],
    ["_inner", "_linear"],
    ["_adjoint"],
    ["_solve"],
    ["_diagnostics"],
    ["_estimator", "_tune"],
    ["__init__"],  # the public names: what follows may `import jaxhpo`, as a user does
    ["criteria", "search", "single_loop", "models", "data", "plot", "testing"],
    ["sklearn", "_cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# In these packages a file is a method, or a family of methods, and files know nothing of each other, except for what
# they share.
METHODS = {"_linear", "_adjoint", "_estimator"}
SHARED = {
    f"jaxhpo.{m}"
    for m in (
        "_linear.corrections",
        "_linear.iteration",
        "_linear.report",
        "_linear.system",
        "_adjoint.binomial",
        "_adjoint.checkpointing",
        "_adjoint.exact_arithmetic",
        "_adjoint.fraction",
        "_adjoint.implicit_function",
        "_adjoint.model_state",
        "_adjoint.pullback",
        "_estimator.implicit_product",
        "_estimator.pair",
    )
}

CORE = {"jax", "jaxlib", "numpy", "scipy", "chex"}
OPTAX = ("_core.tree", "_inner.solver", "_tune", "_estimator", "search", "single_loop", "_cli", "testing")
FLAX = ("models",)
# Optional extras are imported inside functions, or at the top of the namespace that is about nothing else.
EXTRAS = {
    "sklearn",
    "matplotlib",
    "tqdm",
    "pandas",
    "lineax",
    "optimistix",
    "optuna",
    "sqlalchemy",
    "tinygp",
    "PIL",
    "pooch",
    "IPython",
}
EXTRAS_AT_TOP = {
    "sklearn": {"sklearn"},
    "search": {"optuna", "sqlalchemy"},
    "plot": {"matplotlib"},
    "_cli": {"matplotlib"},
}


def modules() -> dict[str, str]:
    """Full name of each module (packages as `jaxhpo.data.__init__`) and its source."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(("jaxhpo", *file.relative_to(PACKAGE).with_suffix("").parts)): file.read_text() for file in files}


def imported(module: str, source: str, known) -> list[tuple[str, bool]]:
    """Full names of what a module imports, each with whether that happens inside a function."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((resolve(alias.name, known), inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join(package + ([node.module] if node.module else []))
            found.extend((resolve(f"{base}.{alias.name}", known), inside) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(source), False)
    return found


def resolve(name: str, known) -> str:
    """The module of a dotted name: `jaxhpo._core.tree` for `jaxhpo._core.tree.norm`, `jaxhpo` for `jaxhpo.solve`."""
    if name.split(".")[0] != "jaxhpo":
        return name
    while name not in known and f"{name}.__init__" not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else f"{name}.__init__"


def part(module: str) -> str:
    """The room: `_linear` for `jaxhpo._linear.cg`."""
    return module.split(".")[1]


def violations(module: str, source: str, known) -> list[str]:
    own = part(module)
    if own not in LEVEL:
        return [f"{module} is in no layer: add `{own}` to LAYERS"]
    found = []
    for target, inside in imported(module, source, known):
        top = target.split(".")[0]
        if top == "jaxhpo":
            found += _internal(module, own, target, inside)
        elif top in EXTRAS:
            if not inside and top not in EXTRAS_AT_TOP.get(own, ()):
                found.append(f"{module} imports the optional extra {top} at its top")
        elif inside:
            found.append(f"{module} imports {target} inside a function")
        elif top in ("optax", "flax"):
            if not module.removeprefix("jaxhpo.").startswith(OPTAX if top == "optax" else FLAX):
                found.append(f"{module} imports {top}")
        elif top == "jax" and "_src" in target:
            found.append(f"{module} imports {target}, which is private")
        elif top not in CORE and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {top}, which is no dependency")
    return found


def _internal(module, own, target, inside):
    theirs = part(target)
    if inside:
        return [f"{module} imports {target} inside a function"]
    if theirs not in LEVEL:
        return [f"{module} imports {target}, which is in no layer"]
    if theirs == own:
        sibling = own in METHODS and not module.endswith("__init__") and target not in SHARED
        return [f"{module} imports its sibling {target}"] if sibling else []
    if own == "__init__":  # re-exports; the tests below keep it light and free of cycles
        return []
    if LEVEL[theirs] >= LEVEL[own]:
        return [f"{module} imports {target}, which is not below it"]
    return []


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of a circular import, or nothing."""
    graph = {module: set(targets) for module, targets in graph.items()}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    return sorted(graph)


def test_imports_run_one_way():
    sources = modules()
    assert len(sources) > 60 and {"jaxhpo.__init__", "jaxhpo.testing"} <= set(sources)  # the search finds them
    found = [line for module, source in sources.items() for line in violations(module, source, sources)]
    assert not found, "\n".join(found)


def test_no_circular_imports():
    sources = modules()
    assert not cycle({m: {target for target, _ in imported(m, source, sources)} for m, source in sources.items()})


KNOWN = {
    f"jaxhpo.{m}" for m in ("__init__", "_solve", "_inner.solver", "_inner.loop", "testing", "plot", "data.__init__")
}
KNOWN |= {f"jaxhpo.{m}" for m in ("_core.tree", "_linear.cg", "_linear.direct", "_linear.report", "data.__init__")}


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("_core.tree", "from jaxhpo._solve import solve", "not below"),
        ("_core.tree", "from .. import _solve", "not below"),
        ("_core.tree", "from .._solve import solve", "not below"),
        ("_core.tree", "import jaxhpo._solve", "not below"),
        ("_solve", "import jaxhpo", "not below"),
        ("_solve", "from jaxhpo import CG", "not below"),
        ("_inner.loop", "from jaxhpo._linear.cg import CG", "not below"),
        ("plot", "from jaxhpo import testing", "not below"),
        ("_linear.cg", "from jaxhpo._linear.direct import Direct", "sibling"),
        ("_linear.cg", "from .direct import Direct", "sibling"),
        ("_solve", "def f():\n    from jaxhpo._core.tree import norm", "inside a function"),
        ("_solve", "class A:\n    def f(self):\n        import math", "inside a function"),
        ("_solve", "if True:\n    import optax", "imports optax"),
        ("_cli.demo", "import flax.linen as nn", "imports flax"),
        ("_solve", "from optax.losses import l2_loss", "imports optax"),
        ("_diagnostics.check.check", "import matplotlib.pyplot", "optional extra"),
        ("_solve", "import torch", "no dependency"),
        ("_solve", "from jax._src import core", "private"),
        ("_novel", "import math", "in no layer"),
    ],
)
def test_the_checker_complains(module, source, complaint):
    (line,) = violations(f"jaxhpo.{module}", source, KNOWN)
    assert complaint in line


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("_solve", "import jax.numpy as jnp\nfrom jaxhpo._core.tree import norm\nfrom jaxhpo._core import tree"),
        ("_inner.solver", "import optax"),
        ("_inner.solver", "from jaxhpo._inner.loop import scan_steps"),
        ("models._layers", "from flax import linen"),
        ("testing", "import jaxhpo"),
        ("__init__", "from jaxhpo import testing as testing"),
        ("_linear.cg", "from jaxhpo._linear.report import report"),
        ("_linear.__init__", "from jaxhpo._linear import cg"),
        ("data._images", "def f():\n    from sklearn.datasets import load_digits"),
        ("_cli.main", "from jaxhpo import data\nfrom jaxhpo._cli import demo"),
    ],
)
def test_the_checker_accepts(module, source):
    assert violations(f"jaxhpo.{module}", source, KNOWN | {"jaxhpo._cli.demo"}) == []


def test_the_cycle_finder_finds():
    assert cycle({"a": {"b"}, "b": {"c", "x"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
    assert cycle({"a": {"b"}, "b": {"c"}}) == []


def test_importing_the_library_is_light():
    heavy = ["flax", "matplotlib", "sklearn", "optuna", "torch", "pandas", "lineax", "tqdm"]
    code = f"import sys, json, jaxhpo; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == []


def test_a_cuda_plugin_that_was_left_behind_is_told(tmp_path):
    """By JAX: a jaxlib that was replaced without its plugin would run on the processor, and nobody would know."""
    plugin = tmp_path / "jax_cuda12_plugin"
    plugin.mkdir()
    for name, text in {"__init__": "", "_linalg": "", "version": "__version__ = '0.0.1'"}.items():
        (plugin / f"{name}.py").write_text(text)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jaxhpo"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "plugin jax_cuda12_plugin version 0.0.1 is installed, but it is not compatible with" in run.stderr


@pytest.mark.slow
def test_modules_are_imported_where_they_are_used():
    code = """if True:
        import sys, jaxhpo
        assert not {"matplotlib", "flax", "jaxhpo.plot", "jaxhpo.models"} & sys.modules.keys()
        assert {"plot", "models", "data", "testing", "solve"} <= set(dir(jaxhpo))
        jaxhpo.plot.run, jaxhpo.testing.ridge, jaxhpo.data.digits
        assert "matplotlib" not in sys.modules and "flax" not in sys.modules
        jaxhpo.models.MLP
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=300)
    with pytest.raises(AttributeError, match="'jaxhpo' has no attribute 'sovle'"):
        _ = jaxhpo.sovle


def test_all_public_names_are_exported():
    """`__all__` is made of the imports in `__init__`, which all are `from ... import name as name`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert sorted(jaxhpo.__all__) == sorted(alias.asname for node in imports for alias in node.names)
