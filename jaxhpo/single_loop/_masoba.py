"""MA-SOBA: SOBA with a moving average of the hypergradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo.single_loop._loop import SingleLoop
from jaxhpo.single_loop._sums import FiniteSum
from jaxhpo.single_loop._variance import Momentum, PerVariable


@dataclasses.dataclass(frozen=True)
class MASOBA(StatefulMethod):
    r"""MA-SOBA: `SOBA` whose hypergradients are a moving average, :math:`d \leftarrow (1 - \beta) d + \beta D_h`.

    With constant steps of the order of β it converges at SOBA's best rate without smoothness of higher order.

    **Cost and bias**: those of `SOBA`, and memory of one more copy of the hyperparameters for each of the two losses.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
      weight: β in (0, 1], a number or a function of the count of updates.
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
      ...     jaxhpo.single_loop.MASOBA(train, validation, weight=0.5), solver,
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
      Chen, Xiao, Balasubramanian. Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed Smoothness
      Conditions. 2023. arXiv:2306.12067
    """

    train: FiniteSum
    validation: FiniteSum
    weight: Any = 0.1
    linear: optax.GradientTransformation | None = None

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        averaged = PerVariable(hparams=Momentum(self.weight))
        method = SingleLoop(self.train, self.validation, averaged, linear=self.linear)
        return method.pair(solver, outer_loss, num_steps, warm_start)
