"""SABA: SOBA with the variance reduction of SAGA."""

from __future__ import annotations

import dataclasses

import optax

from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo.single_loop._loop import SingleLoop
from jaxhpo.single_loop._sums import FiniteSum
from jaxhpo.single_loop._variance import SAGA


@dataclasses.dataclass(frozen=True)
class SABA(StatefulMethod):
    r"""SABA: `SOBA` with a table of each minibatch's last directions (SAGA), so that constant steps converge.

    Each of the three directions d is replaced by :math:`d_i - m_i + \bar m`, with :math:`m_i` what it was when
    minibatch i was last seen. Where the inner problem is strongly convex it converges as fast as full gradients do.

    **Cost and bias**: the time of `SOBA`; memory of a copy of θ, v and h for each minibatch of the train loss, and of v
    and h for each of the outer loss: for small models, or large minibatches. Biased until θ and v arrive.

    Args:
      train: the minibatches of the train loss.
      validation: those of the outer loss.
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
      ...     jaxhpo.single_loop.SABA(train, validation), solver,
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
      Dagréou, Ablin, Vaiter, Moreau. A framework for bilevel optimization that enables stochastic and global variance
      reduction algorithms. 2022. arXiv:2201.13409
    """

    train: FiniteSum
    validation: FiniteSum
    linear: optax.GradientTransformation | None = None

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        method = SingleLoop(self.train, self.validation, SAGA(), linear=self.linear)
        return method.pair(solver, outer_loss, num_steps, warm_start)
