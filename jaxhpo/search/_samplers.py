"""Samplers of trials: points of a grid, random ones, and what samplers of Optuna say."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from optuna.trial import TrialState

from jaxhpo.search._gaussian_process import gaussian_process
from jaxhpo.search._space import Space

LARGE = 100  # hyperparameters: above, a covariance matrix of all of them would fill the storage
STARTUP = 10  # trials before the first model
CANDIDATES, CLIMBS, CLIMB_STEPS = 512, 8, 30  # of the expected improvement

Make = Callable[[int, int], optuna.samplers.BaseSampler]


class Sampler(optuna.samplers.BaseSampler):
    """The start, and then what a sampler says that is made anew for each trial.

    So a trial depends on its index, and on those that have ended, but not on the process that asks.

    Args:
      space: of the search.
      make: index and seed of a trial to its sampler.
      seed: of the search.

    Attributes:
      index: of the trial that is sampled next.
    """

    def __init__(self, space: Space, make: Make, seed: int):
        self.space, self.make, self.seed, self.index = space, make, seed, 0

    def infer_relative_search_space(self, study, trial):
        """The whole space."""
        return self.space.distributions

    def sample_relative(self, study, trial, search_space):
        """All parameters, or none where the sampler has no opinion yet."""
        seed = np.random.SeedSequence([self.seed, self.index]).generate_state(1)[0]
        self.inner = self.make(self.index, int(seed))
        self.inner.before_trial(study, trial)
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        """One parameter, of a sampler without an opinion."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)


class Point(optuna.samplers.BaseSampler):
    """One point.

    Args:
      params: of the point.
    """

    def __init__(self, params: dict[str, float]):
        self.params = params

    def infer_relative_search_space(self, study, trial):
        """That of the point."""
        return trial.distributions

    def sample_relative(self, study, trial, search_space):
        """The point."""
        return self.params

    def sample_independent(self, study, trial, param_name, param_distribution):
        """Its parameter."""
        return self.params[param_name]


def grid(space: Space, resolution: int) -> Make:
    """The grid's points by their number, the last hyperparameter changing fastest."""
    shape = (resolution,) * len(space.distributions)

    def make(index, seed):
        return Point(space.from_unit(np.array(np.unravel_index(index, shape)) / (resolution - 1)))

    return make


def from_start(space: Space, make: Make) -> Make:
    """The start is the first trial."""
    return lambda index, seed: make(index, seed) if index else Point(space.start)


def random(space: Space) -> Make:
    """Uniform points."""
    return lambda index, seed: _uniform(space, seed)


def _uniform(space: Space, seed: int) -> Point:
    return Point(space.from_unit(np.random.default_rng(seed).random(len(space.distributions))))


def tpe(space: Space) -> Make:
    """Tree-structured Parzen estimators."""
    return lambda index, seed: optuna.samplers.TPESampler(seed=seed)


def cmaes(space: Space) -> Make:
    """Evolution of a normal distribution; of its variances alone where there are many hyperparameters."""
    separable = len(space.distributions) > LARGE
    return lambda index, seed: optuna.samplers.CmaEsSampler(seed=seed, use_separable_cma=separable)


def gp(space: Space) -> Make:
    """The point of largest expected improvement, by a Gaussian process; random ones at first."""
    return lambda index, seed: GaussianProcess(space, seed)


class GaussianProcess(Point):
    """The point of largest expected improvement on the trials so far, by a Gaussian process of them.

    Values far above the median say no more than that they are; those of trials that have not ended count as the median,
    so that the next one lies elsewhere.

    Args:
      space: of the search.
      seed: of the trial.
    """

    def __init__(self, space: Space, seed: int):
        super().__init__(_uniform(space, seed).params)
        self.space, self.seed = space, seed

    def sample_relative(self, study, trial, search_space):
        """The point."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.params.keys() == search_space.keys()]
        ended = [t for t in trials if t.state == TrialState.COMPLETE]
        if len(ended) < STARTUP:
            return self.params
        values = np.array([t.value for t in ended])
        median = np.median(values)
        values = np.minimum(values, 3 * median - 2 * values.min())
        running = [t for t in trials if t.state == TrialState.RUNNING]
        count = len(ended) + len(running)
        room = max(32, 2 ** math.ceil(math.log2(count)))  # few shapes, few programs
        points = np.zeros((room, len(search_space)))
        points[:count] = [self.space.to_unit(t.params) for t in ended + running]
        values = np.concatenate([values, np.full(len(running), median), np.zeros(room - count)])
        return self.space.from_unit(_most_promising(points, values, count, jax.random.key(self.seed)))


@jax.jit
def _most_promising(points: jax.Array, values: jax.Array, count: jax.Array, key: jax.Array) -> jax.Array:
    """The point of the unit cube of the largest expected improvement on the least of the first `count` values."""
    points, values = (jnp.asarray(x, float) for x in (points, values))
    model = gaussian_process(points, values, count, "matern52")
    known = jnp.where(jnp.arange(len(values)) < count, values, jnp.inf)

    def log_improvement(x):
        # log E max(0, least − y) = log σ + log(φ(z) + z Φ(z)) with z = (least − mean) / σ
        mean, deviation = model(x)
        z = (known.min() - mean) / deviation
        log_density = jax.scipy.stats.norm.logpdf(z)
        near = jnp.exp(log_density) + z * jax.scipy.stats.norm.cdf(z)
        far = z < -5  # there the two cancel, and φ(z) / z² is what remains
        tail = log_density - 2 * jnp.log(jnp.where(far, -z, 1.0))
        return jnp.log(deviation) + jnp.where(far, tail, jnp.log(jnp.where(far, 1.0, near)))

    anywhere, near = jax.random.split(key)
    best = points[known.argmin()]
    widths = 10.0 ** -jnp.linspace(0.5, 3.0, CANDIDATES)[:, None]
    around = jnp.clip(best[None] + widths * jax.random.normal(near, (CANDIDATES, len(best))), 0.0, 1.0)
    candidates = jnp.concatenate([jax.random.uniform(anywhere, around.shape), around])
    starts = candidates[jax.lax.top_k(jax.vmap(log_improvement)(candidates), CLIMBS)[1]]
    optimizer = optax.adam(0.01)

    def climb(x):
        def body(loop, _):
            x, state = loop
            updates, state = optimizer.update(-jax.grad(log_improvement)(x), state)
            return (jnp.clip(x + updates, 0.0, 1.0), state), None

        return jax.lax.scan(body, (x, optimizer.init(x)), length=CLIMB_STEPS)[0][0]

    ends = jnp.concatenate([starts, jax.vmap(climb)(starts)])
    return ends[jnp.nanargmax(jax.vmap(log_improvement)(ends))]
