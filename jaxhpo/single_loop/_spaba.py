"""SPABA: SOBA with the variance reduction of PAGE."""

from __future__ import annotations

import dataclasses

import optax

from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo._core.validate import check_settings
from jaxhpo.single_loop._loop import SingleLoop
from jaxhpo.single_loop._sums import FiniteSum, problem_of
from jaxhpo.single_loop._variance import PAGE


@dataclasses.dataclass(frozen=True)
class SPABA(StatefulMethod):
    r"""SPABA: `SOBA` with recursive differences (PAGE), so that constant steps converge in memory of two more points.

    A direction is corrected by the difference of two points on the same minibatch, and with probability 1/q taken anew
    from all minibatches. None for the period takes half the number of minibatches of both losses together, so that
    restarts take about half of the time.

    **Cost and bias**: on average twice `SOBA`'s, and the N of a restart over q, in a population those N at each update;
    memory of θ, v and h twice more. Biased until θ and v arrive.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      period: q; None takes half of the number of all minibatches.
      linear: optax transformation for v; None takes another copy of the solver's, which must not decay v.

    Raises:
      JaxhpoError: data that is no `FiniteSum`; a solver without a train loss; `num_steps` above 1; `warm_start=False`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (60, 3))
      >>> y = x @ jnp.array([1.0, -1.0, 0.5])
      >>> train, validation = (jaxhpo.single_loop.FiniteSum.of((x[s], y[s]), 10) for s in (slice(40), slice(40, 60)))
      >>> solver = jaxhpo.from_optax(
      ...     lambda w, h, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(h) * jnp.sum(w**2), optax.sgd(0.1)
      ... )
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.single_loop.SPABA(train, validation, period=8), solver,
      ...     lambda solution, h, b: jnp.mean((b[0] @ solution.params - b[1]) ** 2),
      ... )
      >>> h = jnp.array(0.0)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.sgd(0.3), num_steps=100, gradient=jaxhpo.from_pair(pair),
      ...     carry=pair.init(jnp.zeros(3), h), progress=False,
      ... )
      >>> bool(result.hparams < -1.0)  # the data have no noise: the best penalty is none, h = -∞
      True

    References:
      Chu, Xu, Yao, Zhang. SPABA: A Single-Loop and Probabilistic Stochastic Bilevel Algorithm Achieving Optimal Sample
      Complexity. 2024. arXiv:2405.18777
    """

    train: FiniteSum
    validation: FiniteSum
    period: int | None = None
    linear: optax.GradientTransformation | None = None

    def __post_init__(self):
        check_settings(self, period="count or None")

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        problem_of(self, solver, outer_loss, self.linear)
        period = self.period or max((self.train.num_batches + self.validation.num_batches) // 2, 1)
        method = SingleLoop(self.train, self.validation, PAGE(period), linear=self.linear)
        return method.pair(solver, outer_loss, num_steps, warm_start)
