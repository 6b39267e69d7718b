"""Thirty bilevel problems that two cores run in seconds: the one home of the benchmarks' problems.

    from suite import NAMES, make

    for name in NAMES:
        problem = make(name)
        gradient = jax.grad(problem.make_outer_loss(jaxhpo.Unroll()))(problem.hparams)

`python -m suite`, in this folder's parent, measures them.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import jax

from suite import classification, graphs, language, networks, regression
from suite.problem import Problem

_PROBLEMS = {
    name: problem
    for kind in (regression, classification, networks, language, graphs)
    for name, problem in kind.PROBLEMS.items()
}
NAMES: tuple[str, ...] = tuple(_PROBLEMS)

__all__ = ["NAMES", "Problem", "make", "run"]


def make(name: str, seed: int = 0) -> Problem:
    """Make a problem; `seed` draws its data (or their split), its initial parameters and minibatches."""
    return _PROBLEMS[name](seed)._replace(name=name)


def run(description, arguments, report: str, measure: Callable, summary: Callable, draw: Callable) -> None:
    """Run a benchmark of the suite: its command line, and what it writes.

    Args:
      description: of the benchmark.
      arguments: of the command line; None takes the process's.
      report: the name of its files, without a suffix.
      measure: `name -> rows`, of a problem.
      summary: `rows -> dict`.
      draw: `(rows, path)`, of the picture.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parents[1] / "results")
    parser.add_argument("--quick", action="store_true", help="two problems")
    parser.add_argument("--problems", nargs="+", choices=NAMES, metavar="NAME")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows: list = []
    for name in parsed.problems or (NAMES[:2] if parsed.quick else NAMES):
        rows += measure(name)  # what is measured is kept, also of a run that is stopped
        text = json.dumps({"summary": summary(rows), "rows": rows}, indent=1)
        (parsed.out / f"{report}.json").write_text(text + "\n")
        jax.clear_caches()
    print(json.dumps(summary(rows), indent=1))
    draw(rows, parsed.out / f"{report}.png")
