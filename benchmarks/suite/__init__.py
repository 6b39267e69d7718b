"""Thirty bilevel problems that two cores run in seconds: the one home of the benchmarks' problems.

    from suite import NAMES, make

    for name in NAMES:
        problem = make(name)
        gradient = jax.grad(problem.make_outer_loss(jaxhpo.Unroll()))(problem.hparams)

`python -m suite`, in this folder's parent, measures them.
"""

from suite import classification, graphs, language, networks, regression
from suite.problem import Problem

_PROBLEMS = {
    name: problem
    for kind in (regression, classification, networks, language, graphs)
    for name, problem in kind.PROBLEMS.items()
}
NAMES: tuple[str, ...] = tuple(_PROBLEMS)

__all__ = ["NAMES", "Problem", "make"]


def make(name: str, seed: int = 0) -> Problem:
    """Make a problem; `seed` draws its data (or their split), its initial parameters and minibatches."""
    return _PROBLEMS[name](seed)._replace(name=name)
