"""AmIGO: some steps of training, some of the linear system, then one of the hyperparameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxhpo._core.tree import add_scaled
from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo._core.validate import check_settings
from jaxhpo.single_loop._loop import check_several_steps, check_update, report, start
from jaxhpo.single_loop._sums import FiniteSum, Point, problem_of


@dataclasses.dataclass(frozen=True)
class AmIGO(StatefulMethod):
    r"""AmIGO: `num_steps` stochastic steps of the parameters, as many of the linear system, then a hypergradient.

    .. math:: \theta \leftarrow \theta - \rho \nabla_\theta L_i, \qquad
              v \leftarrow v - \rho (H_i v + \partial_\theta F_j), \qquad
              D_h = (\partial_h \nabla_\theta L_i)^\top v + \partial_h F_j,

    each with a fresh i, and one j in an update; θ and v go on from where they were. As the number of steps grows it is
    the implicit hypergradient by a linear solve.

    **Cost and bias**: with T steps, T gradients and T + 1 Hessian products on minibatches of the train loss, and a
    gradient of the outer loss; memory of two more copies of the parameters. The bias falls with T.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      linear: optax transformation for v; None takes another copy of the solver's, which must not decay v.
      linear_steps: steps of v; None takes as many as of θ.

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
      ...     jaxhpo.single_loop.AmIGO(train, validation), solver,
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
      Arbel, Mairal. Amortized Implicit Differentiation for Stochastic Bilevel Optimization. 2022. arXiv:2111.14580
    """

    train: FiniteSum
    validation: FiniteSum
    linear: Any = None
    linear_steps: int | None = None

    def __post_init__(self):
        check_settings(self, linear_steps="count or None")

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        num_steps = check_several_steps(self, num_steps, warm_start)
        problem = problem_of(self, solver, outer_loss, self.linear)
        num_products = self.linear_steps or num_steps

        def update(hparams, state, batches, outer_batch, key):
            check_update(state, self, batches, outer_batch)
            own = problem._replace(model_state=state.inner.model_state)
            i, (j,) = state.draws.take(own, key, num_steps + num_products + 1, 1)
            inner = own.train_on(state.inner, hparams, i[:num_steps])
            own = own._replace(model_state=inner.model_state)
            point = Point(inner.params, None, hparams)
            (value, metrics), (by_params, direct) = own.evaluate(point, j)

            def step(v, index):
                product = own.product(point, v.params, index)[0]
                return own.step_auxiliary(v, hparams, index, add_scaled(product, 1.0, by_params), self.linear), None

            v, _ = jax.lax.scan(step, state.auxiliary, i[num_steps:-1])
            grad = add_scaled(own.product(point, v.params, i[-1])[1], 1.0, direct)
            after = state.after(inner, v, num_steps + num_products + 1, 1)
            return grad, after, report(own, inner, hparams, i[-1], num_steps, value, metrics)

        return Hypergradient(start(problem, self.linear), update)
