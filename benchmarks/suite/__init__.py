"""Thirty bilevel problems that two cores run in seconds: the one home of the benchmarks' problems.

    from suite import NAMES, make

    for name in NAMES:
        problem = make(name)
        gradient = jax.grad(problem.make_outer_loss(jaxhpo.Unroll()))(problem.hparams)

`python -m suite`, in this folder's parent, measures them.
"""

import argparse
import pathlib

from suite import classification, graphs, language, networks, regression
from suite.problem import Problem

_PROBLEMS = {
    name: problem
    for kind in (regression, classification, networks, language, graphs)
    for name, problem in kind.PROBLEMS.items()
}
NAMES: tuple[str, ...] = tuple(_PROBLEMS)

__all__ = ["NAMES", "Problem", "chosen", "make"]


def make(name: str, seed: int = 0) -> Problem:
    """Make a problem; `seed` draws its data (or their split), its initial parameters and minibatches."""
    return _PROBLEMS[name](seed)._replace(name=name)


def chosen(description: str, arguments=None) -> tuple[pathlib.Path, tuple[str, ...]]:
    """Read the command line of a benchmark of the suite: the folder to write into, and the problems to take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results")
    parser.add_argument("--quick", action="store_true", help="two problems")
    parser.add_argument("--problems", nargs="+", choices=NAMES, metavar="NAME")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    return parsed.out, tuple(parsed.problems or (NAMES[:2] if parsed.quick else NAMES))
