"""Persistent evolution strategies: short unrolls of perturbed trainings, without the bias of truncation."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import add_scaled, scaled, zeros_like
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree
from jaxhpo._core.validate import check_count, check_positive, require_key
from jaxhpo._estimator.pair import check_pair_state
from jaxhpo._estimator.perturbation import in_natural_units, normal
from jaxhpo._inner.inputs import check_steps
from jaxhpo._inner.loop import map_in_chunks
from jaxhpo._solve import solve


class PersistentState(NamedTuple):
    """What persistent evolution strategies carry.

    Attributes:
      start: where every training starts.
      centre: the training at the unperturbed hyperparameters.
      particles: the perturbed trainings, leaves of shape (K, 2, ...).
      perturbations: what the first of each pair has been perturbed by in sum, in unconstrained units, (K, ...); the
        second has the opposite.
      count: inner steps since the start, int32.
    """

    start: InnerState
    centre: InnerState
    particles: InnerState
    perturbations: PyTree
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class PersistentES:
    r"""Evolution strategies on short unrolls, whose particles go on with their own states from update to update.

    Each of 2K particles, in pairs of opposite sign, trains on for `num_steps` steps an update at its own
    :math:`u \pm \sigma\epsilon_k`, :math:`\epsilon_k` drawn anew, and remembers the sum of its perturbations,
    :math:`\xi_k \leftarrow \xi_k + \sigma\epsilon_k`. With :math:`L_k^\pm` the outer losses after the unroll:

    .. math:: g_u = \frac{1}{2 \sigma^2 K} \sum_{k \le K} \xi_k (L_k^+ - L_k^-), \qquad g_h = (du/dh)^\top g_u

    After `horizon` steps all particles start again, with :math:`\xi = 0`.

    **Cost and bias**: (1 + 2K) · `num_steps` gradients an update, so that h moves many times in a training; memory of
    2 + 2K copies of the inner state, whatever the horizon. The i-th update after a start is unbiased for the derivative
    of its outer loss through *all* steps since the start (of the smoothed loss; of the loss itself where that is
    quadratic in h), and the updates of a horizon in sum for that of the sum of their losses: so while h rests, and up
    to the movement of h within a horizon while it is tuned. `EvolutionStrategies` with a warm start sees the last
    unroll alone. The price is a variance that grows with i.

    Args:
      num_pairs: K above.
      sigma: standard deviation of the perturbation, in unconstrained units: the same for all hyperparameters.
      horizon: inner steps of a whole training, a multiple of the steps an update takes.
      transforms: what `tune` is given too: the perturbation then stays inside the domain. With None, h itself is
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
        check_count("PersistentES(num_pairs=...)", self.num_pairs)
        check_positive("PersistentES(sigma=...)", self.sigma)
        check_count("PersistentES(horizon=...)", self.horizon)
        if self.chunk_size is not None:
            check_count("PersistentES(chunk_size=...)", self.chunk_size)

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """The two functions of the method."""
        if not warm_start:
            raise JaxhpoError(
                f"`warm_start=False` with {self!r}: its particles go on from update to update, which is the method. "
                "Drop it (they start again after `horizon` steps), or take `EvolutionStrategies(num_pairs, sigma)`."
            )
        if num_steps is not None:
            self._check_horizon(num_steps)

        def init(params, hparams, model_state=None):
            start = solver.init(params, hparams, model_state)
            particles = _repeat(_repeat(start, 2), self.num_pairs)
            perturbations = _repeat(zeros_like(to_unconstrained(self.transforms, hparams)), self.num_pairs)
            return PersistentState(start, start, particles, perturbations, jnp.zeros((), jnp.int32))

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, PersistentState, self)
            require_key(key, self)
            steps = check_steps(batches, num_steps)
            self._check_horizon(steps)
            # Updates of another length than before may not end at the horizon: none goes past it.
            anew = (state.count == 0) | (state.count + steps > self.horizon)
            point = to_unconstrained(self.transforms, hparams)

            def train(hparams, inner):
                # At these hyperparameters: the first optimiser state may depend on them.
                start = solver.init(state.start.params, hparams, state.start.model_state)
                solution = solve(solver, _choose(anew, start, inner), hparams, batches, num_steps=num_steps)
                return solution, *outer_loss(solution, hparams, outer_batch)

            def advance(x):
                key, past, inner = x
                noise = scaled(self.sigma, normal(key, point))

                def particle(sign, inner):
                    hparams = to_natural(self.transforms, add_scaled(point, sign, noise))
                    solution, value, _ = train(hparams, inner)
                    return value, solution.state

                (plus, minus), inner = jax.vmap(particle)(jnp.array([1.0, -1.0], jnp.float32), inner)
                total = add_scaled(noise, 1.0, _choose(anew, zeros_like(past), past))
                return total, inner, (plus - minus) / (2 * self.sigma**2)

            solution, value, metrics = train(hparams, state.centre)
            keys = jax.random.split(key, self.num_pairs)
            each = keys, state.perturbations, state.particles
            total, particles, slopes = map_in_chunks(advance, each, self.chunk_size)
            grad = jax.tree.map(lambda x: jnp.tensordot(slopes.astype(x.dtype), x, axes=1) / self.num_pairs, total)
            count = (jnp.where(anew, 0, state.count) + steps) % self.horizon
            after = PersistentState(state.start, solution.state, particles, total, count)
            info = HypergradientInfo(value, metrics, solution.info)
            return in_natural_units(self.transforms, hparams, grad), after, info

        return Hypergradient(init, update)

    def _check_horizon(self, num_steps):
        if self.horizon % num_steps:
            raise JaxhpoError(
                f"`horizon={self.horizon}` is no multiple of the {num_steps} inner steps that an update takes, so the "
                f"last one would go past it: write `horizon={max(1, self.horizon // num_steps) * num_steps}`, say."
            )


def _repeat(tree: PyTree, times: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)


def _choose(condition, left: PyTree, right: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), left, right)
