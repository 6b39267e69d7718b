"""Evolution strategies on the solution map, with antithetic perturbations of the inputs."""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo._adjoint.pushforward import run_with_tangent, weighted_sum
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_settings
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class Smoothing:
    r"""Derivative of the solution map smoothed by a Gaussian, from pairs of trainings at perturbed inputs.

    .. math:: \theta_\sigma(h) = E\,\theta(h + \sigma\epsilon), \qquad \theta_\sigma'(h)\,\dot h = E\Big[
        \frac{\theta(h+\sigma\epsilon)-\theta(h-\sigma\epsilon)}{2\sigma}\, (\epsilon\cdot\dot h)\Big], \qquad
        \epsilon \sim N(0, I_m)

    The inner run is not differentiated, so it may be rough or chaotic, and may contain loops and integer decisions. The
    outer loss keeps its true derivative. (To smooth the outer loss too, as for an accuracy, see `EvolutionStrategies`.)

    **Cost and bias**: 1 + 2K trainings; memory of 2K copies of the inner state, for any T. Unbiased for the smoothed
    map; biased by O(σ²) for the map itself, with a variance of order m/K.

    Args:
      num_pairs: K above, the number of samples of ε.
      sigma: σ above, the standard deviation of the perturbation in units of the hyperparameters. It is the same for all
        of them, so give them similar scales.

    Raises:
      JaxhpoError: if a setting is out of its range, `solve` is given no `key`, or `tol` is given.

    Example:
      >>> adjoint = jaxhpo.Smoothing(num_pairs=16, sigma=0.1)

    References:
      Nesterov, Spokoiny. Random Gradient-Free Minimization of Convex Functions. 2017.
      Salimans et al. Evolution Strategies as a Scalable Alternative to Reinforcement Learning. 2017. arXiv:1703.03864
    """

    num_pairs: int
    sigma: float

    def __post_init__(self):
        check_settings(self, num_pairs="count", sigma="positive")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop and estimates its derivative from runs at perturbed inputs."""

        def tangent(fn, z, dz, key):
            # θ̇ = E[(Θ(z + σε) − Θ(z − σε)) / 2σ (ε·ż)]; the estimate is the mean over K samples of ε.
            noise = jax.random.normal(key, (self.num_pairs, z.size), z.dtype)

            def slope(e):
                pair = fn(z + self.sigma * e), fn(z - self.sigma * e)
                return jax.tree.map(lambda plus, minus: (plus - minus) / (2 * self.sigma), *pair)

            return weighted_sum(noise @ dz / self.num_pairs, jax.vmap(slope)(noise))

        return run_with_tangent(problem, self, tangent, random=True)
