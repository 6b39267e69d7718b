"""Persistent evolution strategies: short unrolls of perturbed trainings, without truncation bias."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import add_scaled, map_in_chunks, scaled, zeros_like
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree, StatefulMethod
from jaxhpo._core.validate import check_settings, require_key
from jaxhpo._estimator.pair import check_pair_state, check_warm_start, inner_start
from jaxhpo._estimator.perturbation import in_natural_units, normal
from jaxhpo._inner.inputs import check_steps
from jaxhpo._solve import solve


class PersistentState(NamedTuple):
    """The state of `PersistentES`.

    Attributes:
      start: where every training starts.
      centre: the training at the unperturbed hyperparameters.
      particles: the perturbed trainings, leaves of shape (K, 2, ...).
      perturbations: ξ, the sum of the perturbations of the first particle of each pair, in unconstrained units, leaves
        of shape (K, ...); the second particle has −ξ.
      count: inner steps since the start, int32.
    """

    start: InnerState
    centre: InnerState
    particles: InnerState
    perturbations: PyTree
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class PersistentES(StatefulMethod):
    r"""Evolution strategies on short unrolls, whose particles keep their states from update to update.

    In each update, each of 2K particles, in pairs of opposite sign, trains for `num_steps` further steps at
    :math:`u \pm \sigma\epsilon_k`, with a new :math:`\epsilon_k`, and adds its perturbation to a sum,
    :math:`\xi_k \leftarrow \xi_k + \sigma\epsilon_k`. With :math:`L_k^\pm` the outer losses after the unroll:

    .. math:: g_u = \frac{1}{2 \sigma^2 K} \sum_{k \le K} \xi_k (L_k^+ - L_k^-), \qquad g_h = (du/dh)^\top g_u

    After `horizon` steps all particles restart, with :math:`\xi = 0`.

    **Cost and bias**: (1 + 2K) · `num_steps` gradients per update, so that h moves many times in a training; memory of
    2 + 2K copies of the inner state, whatever the horizon. With h constant, the i-th update after a start is unbiased
    for the derivative of its outer loss through *all* steps since the start (of the smoothed loss; of the loss itself
    where that is quadratic in h), and the sum of the updates of a horizon for that of the sum of their losses. While h
    is tuned, this holds up to its movement within a horizon. `EvolutionStrategies` with a warm start sees only the last
    unroll. The price is a variance that grows with i.

    Args:
      num_pairs: K above.
      sigma: standard deviation of the perturbation, in unconstrained units: the same for all hyperparameters.
      horizon: inner steps of a whole training, a multiple of the steps of an update.
      transforms: the same as in `tune`: the perturbation then stays inside the domain. With None, h itself is
        perturbed. The hypergradient is with respect to h in both cases.
      chunk_size: pairs trained at the same time; None for all.

    Raises:
      JaxhpoError: a setting out of its range; no `key` was given to `update`; `warm_start=False`.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.PersistentES(num_pairs=16, sigma=0.1, horizon=40),
      ...     solver, lambda solution, h, batch: jnp.sum((solution.params - 3.0) ** 2), num_steps=10,
      ... )
      >>> h = jnp.ones(2)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.adam(0.1), num_steps=160, gradient=jaxhpo.from_pair(pair),
      ...     carry=pair.init(jnp.zeros(2), h), progress=False,
      ... )
      >>> print(bool(jnp.all(result.hparams > 2.0)))
      True

    References:
      Vicol, Metz, Sohl-Dickstein. Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
      Strategies. 2021. arXiv:2112.13835
    """

    num_pairs: int
    sigma: float
    horizon: int
    transforms: PyTree = dataclasses.field(default=None, hash=False)
    chunk_size: int | None = 8

    def __post_init__(self):
        check_settings(self, num_pairs="count", sigma="positive", horizon="count", chunk_size="count or None")

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        check_warm_start(warm_start, self, "EvolutionStrategies(num_pairs, sigma)")
        if num_steps is not None:
            self._check_horizon(num_steps)

        def init(params, hparams, model_state=None):
            start = solver.init(params, hparams, model_state)
            particles = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_pairs, 2, *x.shape)), start)
            point = to_unconstrained(self.transforms, hparams)
            perturbations = jax.tree.map(lambda u: jnp.zeros((self.num_pairs, *u.shape), u.dtype), point)
            return PersistentState(start, start, particles, perturbations, jnp.zeros((), jnp.int32))

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, PersistentState, self)
            require_key(key, self)
            steps = check_steps(batches, num_steps)
            self._check_horizon(steps)
            # An update of another length than the last might pass the horizon: then all particles restart before it.
            anew = (state.count == 0) | (state.count + steps > self.horizon)
            point = to_unconstrained(self.transforms, hparams)

            def train(hparams, inner):
                start = optax.tree.where(anew, inner_start(solver, state.start, hparams, warm_start=False), inner)
                solution = solve(solver, start, hparams, batches, num_steps=num_steps)
                return solution, *outer_loss(solution, hparams, outer_batch)

            def advance(x):
                key, past, inner = x
                noise = scaled(self.sigma, normal(key, point))  # σ ε_k, this update's perturbation

                def particle(sign, inner):
                    hparams = to_natural(self.transforms, add_scaled(point, sign, noise))
                    solution, value, _ = train(hparams, inner)
                    return value, solution.state

                (plus, minus), inner = jax.vmap(particle)(jnp.array([1.0, -1.0], jnp.float32), inner)
                total = add_scaled(noise, 1.0, optax.tree.where(anew, zeros_like(past), past))  # ξ_k ← ξ_k + σ ε_k
                return total, inner, (plus - minus) / (2 * self.sigma**2)

            # With h_i the hyperparameters of update i, all equal to h, L is a function of (h_1, …, h_n) and
            # dL/dh = Σ_i ∂L/∂h_i. Smoothed by independent σ ε_i, ∂L/∂h_i is E (σ ε_i) L / σ²; the sum over i is
            # E ξ L / σ² with ξ = Σ_i σ ε_i, which is all that a particle needs to keep of its past.
            solution, value, metrics = train(hparams, state.centre)
            each = jax.random.split(key, self.num_pairs), state.perturbations, state.particles
            total, particles, slopes = map_in_chunks(advance, each, self.chunk_size)
            grad = jax.tree.map(lambda xi: jnp.tensordot(slopes.astype(xi.dtype), xi, axes=1) / self.num_pairs, total)
            count = (jnp.where(anew, 0, state.count) + steps) % self.horizon
            after = PersistentState(state.start, solution.state, particles, total, count)
            info = HypergradientInfo(value, metrics, solution.info)
            return in_natural_units(self.transforms, hparams, grad), after, info

        return Hypergradient(init, update)

    def _check_horizon(self, num_steps):
        if self.horizon % num_steps:
            raise JaxhpoError(
                f"`horizon={self.horizon}` is not a multiple of the {num_steps} inner steps of an update, so the last "
                f"one would pass it: write `horizon={max(1, self.horizon // num_steps) * num_steps}`, say."
            )
