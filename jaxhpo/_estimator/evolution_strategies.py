"""Evolution strategies, without any derivative: from whole perturbed trainings, or from short unrolls of them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import add_scaled, cast_like, map_in_chunks, norm, normal, scaled, upcast, where, zeros_like
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree, StatefulMethod
from jaxhpo._core.validate import check_hparams, check_settings, require_key
from jaxhpo._estimator.pair import check_pair_state, check_warm_start, inner_start
from jaxhpo._inner.inputs import check_steps
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
            in_natural_units = _natural_units(self.transforms, hparams)
            loss = lambda u: train(to_natural(self.transforms, u))[1]  # noqa: E731
            grad, error = self._estimate(loss, point, value, key, in_natural_units)
            after = EvolutionState(solution.state) if warm_start else state
            return grad, after, HypergradientInfo(value, metrics, solution.info, standard_error=error)

        return Hypergradient(init, update)

    def _estimate(self, loss, point, value, key, in_natural_units):
        """Return the estimated gradient of E F(u + σε) at `point`, and its error, for F = `loss` with value `value`."""
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
        slopes = map_in_chunks(slope, keys, chunk)

        def add(total, x):  # each ε is drawn again, so that only one is in memory
            slope, key = x
            noise = normal(key, point)
            return add_scaled(total, slope / len(keys), noise), slope * _length(in_natural_units(noise), slope)

        # The sum is in float32 at least: in bfloat16 a long sum stops growing.
        total, lengths = jax.lax.scan(add, upcast(zeros_like(point)), (slopes, keys))
        grad = in_natural_units(cast_like(total, point))
        return grad, _standard_error(lengths, grad)


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
            point = to_unconstrained(self.transforms, check_hparams(hparams))
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
                start = where(anew, inner_start(solver, state.start, hparams, warm_start=False), inner)
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
                total = add_scaled(noise, 1.0, where(anew, zeros_like(past), past))  # ξ_k ← ξ_k + σ ε_k
                return total, inner, (plus - minus) / (2 * self.sigma**2)

            # With h_i the hyperparameters of update i, all equal to h, L is a function of (h_1, …, h_n) and
            # dL/dh = Σ_i ∂L/∂h_i. Smoothed by independent σ ε_i, ∂L/∂h_i is E (σ ε_i) L / σ²; the sum over i is
            # E ξ L / σ² with ξ = Σ_i σ ε_i, which is all that a particle needs to keep of its past.
            solution, value, metrics = train(hparams, state.centre)
            each = jax.random.split(key, self.num_pairs), state.perturbations, state.particles
            total, particles, slopes = map_in_chunks(advance, each, self.chunk_size)

            def mean(xi):
                return jnp.tensordot(slopes.astype(xi.dtype), xi, axes=1, precision="highest") / self.num_pairs

            in_natural_units = _natural_units(self.transforms, hparams)
            grad = in_natural_units(jax.tree.map(mean, total))
            lengths = jax.lax.map(lambda x: x[0] * _length(in_natural_units(x[1]), x[0]), (slopes, total))
            count = (jnp.where(anew, 0, state.count) + steps) % self.horizon
            after = PersistentState(state.start, solution.state, particles, total, count)
            error = _standard_error(lengths, grad)
            return grad, after, HypergradientInfo(value, metrics, solution.info, standard_error=error)

        return Hypergradient(init, update)

    def _check_horizon(self, num_steps):
        if self.horizon % num_steps:
            raise JaxhpoError(
                f"`horizon={self.horizon}` is not a multiple of the {num_steps} inner steps of an update, so the last "
                f"one would pass it: write `horizon={max(1, self.horizon // num_steps) * num_steps}`, say."
            )


def _natural_units(transforms, hparams):
    """Return what converts gradients with respect to unconstrained u into those with respect to h, (du/dh)ᵀ g_u."""
    pullback = jax.vjp(lambda h: to_unconstrained(transforms, h), hparams)[1]
    return lambda gradient: pullback(gradient)[0]


def _standard_error(lengths, mean):
    """Return the standard error, a length, of the mean of K independent vectors, of which the lengths are given.

    Its square is Σ ‖x_k − x̄‖² / (K (K − 1)) = (Σ ‖x_k‖² / K − ‖x̄‖²) / (K − 1); NaN for K = 1.
    """
    number = len(lengths)
    if number == 1:
        return jnp.full((), jnp.nan, lengths.dtype)
    return jnp.sqrt(jnp.maximum(jnp.mean(lengths**2) - _length(mean, lengths) ** 2, 0) / (number - 1))


def _length(tree, like):
    """Return the norm of a tree, squares in float32 at least, in the type of another array."""
    return jnp.asarray(norm(upcast(tree))).astype(like.dtype)
