"""Evolution strategies: hypergradients from perturbed trainings, without any derivative."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import add_scaled, map_in_chunks
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree, StatefulMethod
from jaxhpo._core.validate import check_settings, require_key
from jaxhpo._estimator.pair import check_pair_state, inner_start
from jaxhpo._estimator.perturbation import in_natural_units, mean_of_normals, normal
from jaxhpo._solve import solve


class EvolutionState(NamedTuple):
    """The state of `EvolutionStrategies`.

    Attributes:
      inner: where the next inner runs start.
    """

    inner: InnerState


@dataclasses.dataclass(frozen=True)
class EvolutionStrategies(StatefulMethod):
    r"""The gradient of the smoothed outer loss, from pairs of trainings at perturbed hyperparameters.

    With F(u) the outer loss after a whole training at h = forward(u), and
    :math:`\epsilon_k \sim N(0, I)`:

    .. math:: g_u = \frac{1}{2 \sigma K} \sum_{k \le K} \epsilon_k \big(F(u + \sigma\epsilon_k) -
       F(u - \sigma\epsilon_k)\big), \qquad g_h = (du/dh)^\top g_u

    Nothing is differentiated, so the outer loss may be an accuracy, and the training may contain loops, branches and
    rounding. The two trainings of a pair see the same data, so their common noise cancels. (The form without pairs or
    baseline, :math:`\frac{1}{\sigma K}\sum_k \epsilon_k F(u + \sigma\epsilon_k)`, has an additional variance of
    :math:`F^2/(\sigma^2 K)` per entry.)

    **Cost and bias**: 1 + 2K trainings, all from the same state; memory of 2 `chunk_size` copies of the inner state,
    whatever T and K. Unbiased for the gradient of E F(u + σε), which equals that of F where F is quadratic and differs
    by O(σ²) elsewhere. The variance is about (m + 1)/K times the squared gradient, for m hyperparameters. With a warm
    start the influence of h on the carried state is omitted, as in any truncated method: see `PersistentES`.

    Args:
      num_pairs: K above.
      sigma: standard deviation of the perturbation, in unconstrained units: the same for all hyperparameters.
      transforms: the same as in `tune`: the perturbation then stays inside the domain (for a penalty under `positive`,
        the logarithm is perturbed). With None, h itself is perturbed, and may leave the domain. The hypergradient is
        with respect to h in both cases.
      antithetic: pairs of opposite perturbations; otherwise 2K single ones, with F(u) subtracted as a baseline.
      chunk_size: pairs trained at the same time; None for all.

    Raises:
      JaxhpoError: a setting out of its range; no `key` was given to `update`.

    Example:
      >>> solver = jaxhpo.fixed_point(lambda p, h, batch: h + 0 * p)
      >>> def errors(solution, h, batch):  # the share of 100 thresholds above the parameter: no derivative
      ...     return jnp.mean(solution.params < jnp.linspace(0, 1, 100))
      >>> method = jaxhpo.EvolutionStrategies(num_pairs=400, sigma=0.1)
      >>> pair = jaxhpo.hypergradient(method, solver, errors, num_steps=1)
      >>> h = jnp.array(0.5)
      >>> hypergrad, state, info = pair.update(h, pair.init(jnp.array(0.0), h), key=jax.random.key(0))
      >>> print(round(float(hypergrad), 1))  # the share falls by one as h goes from 0 to 1
      -1.0

    References:
      Salimans et al. Evolution Strategies as a Scalable Alternative to Reinforcement Learning. 2017. arXiv:1703.03864
      Nesterov, Spokoiny. Random Gradient-Free Minimization of Convex Functions. 2017.
    """

    num_pairs: int
    sigma: float
    transforms: PyTree = dataclasses.field(default=None, hash=False)
    antithetic: bool = True
    chunk_size: int | None = 8

    def __post_init__(self):
        check_settings(self, num_pairs="count", sigma="positive", antithetic="switch", chunk_size="count or None")

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""

        def init(params, hparams, model_state=None):
            return EvolutionState(solver.init(params, hparams, model_state))

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, EvolutionState, self)
            require_key(key, self)
            point = to_unconstrained(self.transforms, hparams)

            def train(hparams):
                start = inner_start(solver, state.inner, hparams, warm_start)
                solution = solve(solver, start, hparams, batches, num_steps=num_steps)
                return solution, *outer_loss(solution, hparams, outer_batch)

            solution, value, metrics = train(hparams)
            grad = self._estimate(lambda u: train(to_natural(self.transforms, u))[1], point, value, key)
            after = EvolutionState(solution.state) if warm_start else state
            info = HypergradientInfo(value, metrics, solution.info)
            return in_natural_units(self.transforms, hparams, grad), after, info

        return Hypergradient(init, update)

    def _estimate(self, loss, point, value, key):
        """Return the estimated gradient of E F(u + σε) at `point`, for F = `loss`, where F is `value`."""
        # ∇_u E F(u + σε) = E ε F(u + σε) / σ, by parts under the normal density. As E ε = 0, F may have any constant
        # subtracted, such as F(u); and as −ε is distributed as ε, half the difference of F(u ± σε) has the same mean.

        def slope(key):
            noise = normal(key, point)
            if not self.antithetic:
                return (loss(add_scaled(point, self.sigma, noise)) - value) / self.sigma
            signed = jnp.array([self.sigma, -self.sigma], value.dtype)
            plus, minus = jax.vmap(lambda scale: loss(add_scaled(point, scale, noise)))(signed)
            return (plus - minus) / (2 * self.sigma)

        draws_per_pair = 1 if self.antithetic else 2
        keys = jax.random.split(key, draws_per_pair * self.num_pairs)
        chunk = None if self.chunk_size is None else draws_per_pair * self.chunk_size
        return mean_of_normals(map_in_chunks(slope, keys, chunk), keys, point)
