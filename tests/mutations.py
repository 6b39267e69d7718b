"""Mutations of each derivative rule, and the quick tests that notice them: `python -m tests.mutations`, five minutes.

Each rule is broken in a copy of the package, in two ways: its hypergradient is multiplied by 1.001, and the sign of its
second term (the mixed product, or of several terms all but the first) is flipped. The quick tests of the rule run until
one fails. Prints a table; the exit code is the number of mutations that no test noticed.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]

# Appended to the package: `run` returns the same parameters, with 1.001 times their derivative.
FACTOR = """

def _mutate(rule, applies):
    run = rule.run
    scaled = jax.custom_jvp(lambda x: x)
    scaled.defjvp(lambda primals, tangents: (primals[0], (1.001 * tangents[0]).astype(tangents[0].dtype)))

    def mutated(self, problem):
        state, steps = run(self, problem)
        return (state._replace(params=jax.tree.map(scaled, state.params)) if applies(self) else state), steps

    rule.run = mutated


import jax
_mutate({rule}, lambda self: {condition})
"""


class Mutation(NamedTuple):
    """One rule, the tests about it, and both ways to break it.

    `condition` says of which settings (`self`) the factor is; `old` is found in one place of the package alone, and
    replaced by `new` for the other sign.
    """

    name: str
    tests: str
    rule: str
    condition: str
    old: str
    new: str


def implicit(solver: str, test: str = "test_rules") -> Mutation:
    """The factor for one linear solver; the sign is that of θ̇ = −H⁻¹ ∂g/∂h ḣ, which all share."""
    condition = f"type(self.linear_solver).__name__ == {solver!r}"
    return Mutation(f"Implicit({solver})", test, "Implicit", condition, "scaled(-1.0, rhs)", "rhs")


IN_MIXED_MODE = ("next(by_z) if p else None", "-next(by_z) if p else None")
OF_DIFFERENCES = ("jnp.subtract, jax.grad(slope)", "jnp.add, jax.grad(slope)")
MUTATIONS = [
    Mutation("Unroll()", "test_rules", "Unroll", "self == Unroll()", *IN_MIXED_MODE),
    Mutation("Unroll(truncate)", "test_rules", "Unroll", "self.truncate is not None", *IN_MIXED_MODE),
    Mutation(
        "Unroll('binomial')",
        "test_rules",
        "Unroll",
        "self.checkpoint == 'binomial'",
        "[g + more for g, more in zip(sums, by_shared, strict=True)]",
        "[g - more for g, more in zip(sums, by_shared, strict=True)]",
    ),
    Mutation(
        "Unroll(hvp_fraction)",
        "test_hvp_fraction",
        "Unroll",
        "self.hvp_fraction is not None",
        "losses[1](params, combine(z))[0]",
        "-losses[1](params, combine(z))[0]",
    ),
    Mutation("Forward()", "test_rules", "Forward", "True", "sum(dz, push(", "sum(dz.at[1:].multiply(-1), push("),
    Mutation(
        "Reversible()", "test_reversible", "Reversible", "True", "[a + b + c for a, b, c", "[a + b - c for a, b, c"
    ),
    Mutation("DrMAD()", "test_rules", "DrMAD", "True", "[s + length / points", "[s - length / points"),
    Mutation("FiniteDifference()", "test_rules", "FiniteDifference", "True", *OF_DIFFERENCES),
    Mutation("SAMA()", "test_rules", "SAMA", "True", *OF_DIFFERENCES),
    Mutation(
        "SAMA(), direct",
        "test_first_order_rules",
        "SAMA",
        "True",
        "jnp.add, mixed, upcast(direct)",
        "jnp.subtract, mixed, upcast(direct)",
    ),
    Mutation(
        "ForwardGradient()",
        "test_random_rules_and_curvatures",
        "ForwardGradient",
        "True",
        'weighted_sum(jnp.matmul(v, dz, precision="highest") * ',
        "weighted_sum(jnp.matmul(v, dz).at[1:].multiply(-1) * ",
    ),
    Mutation(
        "Smoothing()",
        "test_random_rules_and_curvatures",
        "Smoothing",
        "True",
        "(plus - minus) / (2 * self.sigma), *pair",
        "(plus + minus) / (2 * self.sigma), *pair",
    ),
    *map(implicit, ("CG", "Direct", "Neumann", "Identity", "Nystrom", "GMRES", "BiCGStab", "NormalCG")),
    Mutation(
        "Implicit(from_lineax)",
        "test_rules",
        "Implicit",
        "'lineax' in type(self.linear_solver).__name__.lower()",
        "scaled(-1.0, rhs)",
        "rhs",
    ),
    Mutation(
        "Implicit(curvature)",
        "test_random_rules_and_curvatures test_rules",
        "Implicit",
        "self.curvature != 'hessian'",
        "jax.linearize(lambda v: curvature(point, leaves, v), zeros_like(point))[1]",
        "jax.linearize(lambda v: curvature(point, leaves, scaled(-1.0, v)), zeros_like(point))[1]",
    ),
]


def copy(folder: pathlib.Path) -> None:
    """Copies the part of the repository that the tests need."""
    skip = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=skip, dirs_exist_ok=True)


def scale(folder, mutation: Mutation) -> None:
    """Multiplies the hypergradient by 1.001."""
    with open(folder / "jaxhpo" / "__init__.py", "a") as file:
        file.write(FACTOR.format(rule=mutation.rule, condition=mutation.condition))


def places(folder: pathlib.Path, mutation: Mutation) -> list[pathlib.Path]:
    """The file of each place of the package where the text to be replaced stands."""
    files = sorted((folder / "jaxhpo").rglob("*.py"))
    return [path for path in files for _ in range(path.read_text().count(mutation.old))]


def flip(folder, mutation: Mutation) -> None:
    """Flips the sign of the second term."""
    (file,) = places(folder, mutation)
    file.write_text(file.read_text().replace(mutation.old, mutation.new))


def first_failure(folder, stems: str) -> str | None:
    """Returns the quick test that fails first, or None if all pass."""
    files = [path for stem in stems.split() for path in sorted((folder / "tests").rglob(f"{stem}.py"))]
    if len(files) != len(stems.split()):
        raise SystemExit(f"not every file of {stems} is there once: {files}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *map(str, files)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    failed = re.search(r"^FAILED (\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return failed.group(1).rpartition("/")[2] if failed else None


def main() -> int:
    """Runs the mutations; returns how many went unnoticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose rule matches this expression")
    parsed = parser.parse_args()
    missed = 0
    signs: dict = {}  # several rules share one: it is tried once, by the tests of the first
    print(f"{'rule':24} {'mutation':10} noticed by")
    for mutation in MUTATIONS:
        if not re.search(parsed.only, mutation.name):
            continue
        for name, change in (("x 1.001", scale), ("sign", flip)):
            if change is flip and mutation.old in signs:
                failed = signs[mutation.old]
            else:
                with tempfile.TemporaryDirectory() as folder:
                    copy(pathlib.Path(folder))
                    change(pathlib.Path(folder), mutation)
                    failed = first_failure(pathlib.Path(folder), mutation.tests)
                missed += failed is None
            if change is flip:
                signs[mutation.old] = failed
            print(f"{mutation.name:24} {name:10} {failed or 'NONE'}", flush=True)
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
