"""F2SA: hypergradients of a penalty, from first derivatives alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import add_scaled, scaled
from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo._core.validate import check_settings, check_traceable_number
from jaxhpo.single_loop._loop import check_several_steps, check_update, report, start
from jaxhpo.single_loop._sums import FiniteSum, Point, problem_of


@dataclasses.dataclass(frozen=True)
class F2SA(StatefulMethod):
    r"""F2SA: a second copy of the parameters gives way to the outer loss; no second derivatives.

    .. math:: \theta \leftarrow \theta - \rho \nabla_\theta L_i(\theta), \qquad
              y \leftarrow y - \rho_y (\lambda \nabla_\theta L_{i'}(y) + \partial_\theta F_j(y)),

    `num_steps` of each, then

    .. math:: D_h = \partial_h F(y) + \lambda (\partial_h L(y) - \partial_h L(\theta)), \qquad
              \lambda \leftarrow \lambda + \delta_t.

    At the ends of both trainings it is the implicit hypergradient up to an error of order 1/λ. λ should grow: y takes
    λ ∇L along, so `linear` must have a rate below that of θ by λ, or one that falls.

    **Cost and bias**: with T steps, 2 T + 3 gradients of the train loss and T + 1 of the outer loss, which is evaluated
    once more, at θ, to be reported; memory of two more copies of the parameters. Biased by O(1/λ) and while θ and y are
    on their way; and noisy: a difference of two losses on different minibatches, times λ.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      linear: optax transformation for y; None takes another copy of the solver's.
      multiplier: λ at the start.
      growth: δ_t, a number or a function of the count of updates, of which :math:`\propto t^{-1/7}` is the paper's.

    Raises:
      JaxhpoError: data that is no `FiniteSum`; a solver without a train loss; a setting out of its range;
        `hypergradient` without `num_steps`; `warm_start=False`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (60, 3))
      >>> y = x @ jnp.array([1.0, -1.0, 0.5])
      >>> train, validation = (jaxhpo.single_loop.FiniteSum.of((x[s], y[s]), 10) for s in (slice(40), slice(40, 60)))
      >>> solver = jaxhpo.from_optax(
      ...     lambda w, h, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(h) * jnp.sum(w**2), optax.sgd(0.1)
      ... )
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.single_loop.F2SA(train, validation, optax.sgd(0.02)), solver,
      ...     lambda solution, h, b: jnp.mean((b[0] @ solution.params - b[1]) ** 2), num_steps=5,
      ... )
      >>> h = jnp.array(0.0)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.sgd(0.3), num_steps=100, gradient=jaxhpo.from_pair(pair),
      ...     carry=pair.init(jnp.zeros(3), h), progress=False,
      ... )
      >>> bool(result.hparams < -1.0)  # the data have no noise: the best penalty is none, h = -∞
      True

    References:
      Kwon, Kwon, Wright, Nowak. A Fully First-Order Method for Stochastic Bilevel Optimization. 2023. arXiv:2301.10945
    """

    train: FiniteSum
    validation: FiniteSum
    linear: Any = None
    multiplier: float = 1.0
    growth: Any = 0.1

    def __post_init__(self):
        check_settings(self, multiplier="positive")
        if not callable(self.growth):
            check_traceable_number("F2SA(growth=...)", self.growth)

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        num_steps = check_several_steps(self, num_steps, warm_start)
        problem = problem_of(self, solver, outer_loss, self.linear)

        def init(params, hparams, model_state=None):
            state = start(problem, self.linear)(params, hparams, model_state)
            auxiliary = state.auxiliary._replace(params=state.inner.params)
            return state._replace(auxiliary=auxiliary, memories=(jnp.asarray(float(self.multiplier)),))

        def update(hparams, state, batches, outer_batch, key):
            check_update(state, self, batches, outer_batch)
            own, (weight,) = problem._replace(model_state=state.inner.model_state), state.memories
            i, j = state.draws.take(own, key, 2 * num_steps + 2, num_steps + 1)
            i = i.reshape(-1, 2)

            def step(states, indices):
                (inner, y), (i, j) = states, indices
                now = own._replace(model_state=inner.model_state)
                grad = scaled(weight, now.train_gradient(y.params, hparams, i[0])[1])
                _, (by_params, _) = now.evaluate(Point(y.params, None, hparams), j)
                y = now.step_auxiliary(y, hparams, i[0], add_scaled(grad, 1.0, by_params), self.linear)
                return (now.step(inner, hparams, i[1]), y), None

            (inner, y), _ = jax.lax.scan(step, (state.inner, state.auxiliary), (i[:-1], j[:-1]))
            own = own._replace(model_state=inner.model_state)
            # Of the trained parameters: y, which the outer loss pulls, has a lower one.
            value, metrics = own.evaluate(Point(inner.params, None, hparams), j[-1])[0]
            direct = own.evaluate(Point(y.params, None, hparams), j[-1])[1][1]
            at_y = own.by_hparams(y.params, hparams, i[-1, 0])
            at_params = own.by_hparams(inner.params, hparams, i[-1, 1])
            grad = add_scaled(direct, weight, add_scaled(at_y, -1.0, at_params))
            after = state.after(inner, y, 2 * num_steps + 2, num_steps + 1)
            weight = weight + (self.growth(state.count) if callable(self.growth) else self.growth)
            after = after._replace(memories=(jnp.asarray(weight, state.memories[0].dtype),))
            return grad, after, report(own, inner, hparams, i[-1, 1], num_steps, value, metrics)

        return Hypergradient(init, update)
