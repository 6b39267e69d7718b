"""Trainings that differ a little from the user's, tried where a hypergradient foretells finite steps badly."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxhpo._core.processes import AnotherProcessError, agreed, whole
from jaxhpo._core.record import recording
from jaxhpo._core.trace import compilable
from jaxhpo._core.tree import add_scaled
from jaxhpo._core.types import InnerState
from jaxhpo._diagnostics.predictivity import Predictivity, retrain
from jaxhpo._inner.problem import Adjoint, Problem


def _half_as_long(problem: Problem) -> Problem:
    """The first half of the inner steps."""
    number = (problem.num_steps + 1) // 2
    return problem._replace(num_steps=number, xs=jax.tree.map(lambda x: x[:number], problem.xs))


def _half_as_fast(problem: Problem) -> Problem:
    """Steps that move the parameters half as far, which is half the learning rate for any optimiser."""
    solver: Any = problem.solver

    def halved(step: Any) -> Any:
        def half_step(state, *args):
            after = step(state, *args)
            # θ + (Φ(θ) − θ) / 2; the optimiser's own state takes its whole step
            return after._replace(params=add_scaled(state.params, 0.5, add_scaled(after.params, -1.0, state.params)))

        return step and half_step

    def rates(*args):
        alpha, momenta = solver.rates(*args)
        return jax.tree.map(lambda x: x / 2, alpha), momenta

    # Rules that run steps of their own ask the solver for them.
    slow = solver._replace(step=halved(solver.step), apply=halved(solver.apply), rates=solver.rates and rates)
    return problem._replace(advance=halved(problem.advance), solver=slow)


REMEDIES = {"half as many inner steps": _half_as_long, "half the inner rate": _half_as_fast}


@dataclasses.dataclass(frozen=True)
class Changed:
    """A rule on a changed problem."""

    rule: Adjoint
    change: Callable[[Problem], Problem]

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Takes the changed steps."""
        return self.rule.run(self._changed(problem))

    def _changed(self, problem):
        again = lambda *args: self._changed(problem.with_gradient(*args))  # noqa: E731
        return self.change(problem)._replace(with_gradient=again)


def try_remedies(
    value: Callable, value_and_grad: Callable, flat: jax.Array, step: float, step_key: jax.Array, key: jax.Array
) -> dict[str, Predictivity]:
    """Predictivity of the hypergradient of every changed training, along the same steps; without those that raise.

    Args:
      value: `(flat, key) -> outer loss`.
      value_and_grad: `(flat, key) -> (outer loss, hypergradient)`.
      flat: the hyperparameters.
      step: as for `retrain`.
      step_key: the key that was given to `retrain`.
      key: of the outer loss.
    """
    found = {}
    for name, change in REMEDIES.items():
        with warnings.catch_warnings(action="ignore"), recording(rule=functools.partial(Changed, change=change)):
            try:
                program, args = agreed(lambda: compilable(value_and_grad, flat, key))
            except AnotherProcessError:
                raise
            except Exception:  # whatever a rule refuses, such as `truncate` above the number of steps
                continue
            grad = np.asarray(whole(program(*args)[1]), float)
            (retrained,) = retrain(value, flat, (step,), step_key, key)
        found[name] = retrained.predictivity(grad)
    return found
