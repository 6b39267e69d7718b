"""A stateful method of a user's: a running mean of `jax.grad` through one step of a plain loop."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxhpo
from jaxhpo import Hypergradient, HypergradientInfo, InnerState, Solver, StatefulMethod


class MeanState(NamedTuple):
    """The inner state, and the mean of the hypergradients so far."""

    inner: InnerState
    mean: Any


@dataclasses.dataclass(frozen=True)
class RunningMean(StatefulMethod):
    """The mean of the exact hypergradients, with weight `schedule` for the new one; odd names for the other fields."""

    schedule: float
    curvature: str = "none"
    thins: bool = True
    state_type: str = "none"

    def pair(self, solver: Solver, outer_loss: Callable, num_steps: int | None, warm_start: bool) -> Hypergradient:
        def init(params, hparams, model_state=None):
            return MeanState(solver.init(params, hparams, model_state), jax.tree.map(jnp.zeros_like, hparams))

        def update(hparams, state, batches, outer_batch, key):
            def loss(hparams):
                solution = jaxhpo.solve(solver, state.inner, hparams, batches, num_steps=num_steps)
                value, metrics = outer_loss(solution, hparams, outer_batch)
                return value, (solution, metrics)

            (value, (solution, metrics)), grad = jax.value_and_grad(loss, has_aux=True)(hparams)
            mean = jax.tree.map(lambda m, g: m + self.schedule * (g - m), state.mean, grad)
            after = MeanState(solution.state if warm_start else state.inner, mean)
            return mean, after, HypergradientInfo(value, metrics, solution.info)

        return Hypergradient(init, update)
