"""A derivative rule of a user's: the last steps alone."""

import dataclasses
from typing import Any

import jax

from jaxhpo import Adjoint, InnerState, Problem


@dataclasses.dataclass(frozen=True)
class LastSteps(Adjoint):
    """Differentiates the last `schedule` inner steps; the other fields have names that once were looked for."""

    schedule: int
    curvature: str = "none"
    thins: bool = True
    pair: tuple[str, str] = ("a", "b")
    state_type: str = "none"
    needs_key: bool = True

    def run(self, problem: Problem) -> tuple[InnerState, Any]:
        early = problem.num_steps - self.schedule
        head, tail = (jax.tree.map(lambda x: x[part], problem.xs) for part in (slice(early), slice(early, None)))  # noqa: B023
        state, constants, head = jax.lax.stop_gradient((problem.state, problem.inputs, head))
        state, _ = jax.lax.scan(lambda s, x: (problem.advance(s, constants, x), None), state, head)
        state, _ = jax.lax.scan(lambda s, x: (problem.advance(s, problem.inputs, x), None), state, tail)
        return state, problem.num_steps
