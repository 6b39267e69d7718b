"""SOBA: one minibatch a step for parameters, linear system and hyperparameters."""

from __future__ import annotations

import dataclasses

import optax

from jaxhpo._core.types import Hypergradient, StatefulMethod
from jaxhpo.single_loop._loop import SingleLoop
from jaxhpo.single_loop._sums import FiniteSum


@dataclasses.dataclass(frozen=True)
class SOBA(StatefulMethod):
    r"""SOBA: parameters, linear system and hyperparameters each take one stochastic step an update.

    .. math:: \theta \leftarrow \theta - \rho \nabla_\theta L_i, \quad
              v \leftarrow v - \rho (H_i v + \partial_\theta F_j), \quad
              D_h = (\partial_h \nabla_\theta L_i)^\top v + \partial_h F_j,

    i and j minibatches of the train loss and the outer loss. With steps that fall as :math:`t^{-1/2}` (a schedule in
    the solver's optimiser and in that of `tune`) it converges; with constant ones it ends in a ball around the
    solution.

    **Cost and bias**: an update takes three to four gradients of the train loss on one minibatch and one of the outer
    loss on another; memory of v and its optimiser's state. Biased until θ and v arrive.

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
      ...     jaxhpo.single_loop.SOBA(train, validation), solver,
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
        method = SingleLoop(self.train, self.validation, linear=self.linear)
        return method.pair(solver, outer_loss, num_steps, warm_start)
