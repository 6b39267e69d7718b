"""StocBiO: some steps of training, then a hypergradient by a series of minibatches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from jaxhpo._core.tree import add_scaled
from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo._core.validate import check_settings, check_traceable_number, require_key
from jaxhpo.single_loop._loop import check_several_steps, check_update, report, start
from jaxhpo.single_loop._sums import FiniteSum, Point, check_random_length, problem_of, series_of


@dataclasses.dataclass(frozen=True)
class StocBiO(StatefulMethod):
    r"""StocBiO: `num_steps` stochastic steps of the parameters, then a hypergradient by a stochastic Neumann series.

    .. math:: D_h = \partial_h F_j - (\partial_h \nabla_\theta L_i)^\top
              \alpha \sum_{k=0}^{K} \prod_{l<k} (I - \alpha H_{i_l})\, \partial_\theta F_j,

    with a fresh minibatch in each term. With one minibatch it is `Implicit(Neumann(K + 1, α))`. With a random length,
    one term by chance stands for the sum of the first K, K times as large: this is BSA, and with `num_steps=1` TTSA.

    **Cost and bias**: with T steps, T gradients and K + 1 Hessian products on minibatches of the train loss, and a
    gradient of the outer loss; memory of two more copies of the parameters. In a direction of curvature λ the series is
    short by the factor :math:`(1 - \alpha\lambda)^{K+1}`, and diverges where :math:`\alpha\lambda > 2`. A random length
    takes half of the products, and has more noise.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      step_size: α; the inner learning rate is the usual choice.
      num_terms: K.
      random_length: whether one term of the series, by chance, stands for its sum.

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
      ...     jaxhpo.single_loop.StocBiO(train, validation, step_size=0.1), solver,
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
      Ji, Yang, Liang. Bilevel Optimization: Convergence Analysis and Enhanced Design. 2021. arXiv:2010.07962
      Ghadimi, Wang. Approximation Methods for Bilevel Programming. 2018. arXiv:1802.02246
      Hong, Wai, Wang, Yang. A Two-Timescale Framework for Bilevel Optimization: Complexity Analysis and Application to
      Actor-Critic. 2020. arXiv:2007.05170
    """

    train: FiniteSum
    validation: FiniteSum
    step_size: Any
    num_terms: int = 10
    random_length: bool = False

    def __post_init__(self):
        check_random_length("StocBiO", self.random_length)
        check_settings(self, num_terms="count")
        check_traceable_number("StocBiO(step_size=...)", self.step_size)
        if isinstance(self.step_size, int | float):
            check_settings(self, step_size="positive")

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        num_steps = check_several_steps(self, num_steps, warm_start)
        problem = problem_of(self, solver, outer_loss)
        num_drawn = num_steps + self.num_terms + (0 if self.random_length else 1)

        def update(hparams, state, batches, outer_batch, key):
            check_update(state, self, batches, outer_batch)
            own = problem._replace(model_state=state.inner.model_state)
            i, (j,) = state.draws.take(own, key, num_drawn, 1)
            inner = own.train_on(state.inner, hparams, i[:num_steps])
            own = own._replace(model_state=inner.model_state)
            point = Point(inner.params, None, hparams)
            (value, metrics), (by_params, direct) = own.evaluate(point, j)
            chance = jax.random.fold_in(require_key(key, self), 4) if self.random_length else None
            v = series_of(own, point, by_params, i[num_steps:-1], self.step_size, chance)
            grad = add_scaled(direct, -1.0, own.product(point, v, i[-1])[1])
            after = state.after(inner, state.auxiliary, num_drawn, 1)
            return grad, after, report(own, inner, hparams, i[-1], num_steps, value, metrics)

        return Hypergradient(start(problem, optax.identity()), update)
