"""Antithetic finite perturbations of the inputs: evolution strategies on the solution map."""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo._adjoint.pushforward import run_with_tangent, weighted_sum
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_count, check_positive
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class Smoothing:
    r"""The derivative of the solution map smoothed by a Gaussian, from pairs of perturbed trainings.

    :math:`\theta_\sigma(h) = E\,\theta(h + \sigma\epsilon)` has
    :math:`\theta_\sigma'(h)\,\dot h = E\big[\tfrac{\theta(h+\sigma\epsilon)-\theta(h-\sigma\epsilon)}{2\sigma}
    (\epsilon\cdot\dot h)\big]`: no derivative of the inner run is taken, so it may be rough, chaotic, or hold loops and
    integer decisions. The outer loss keeps its true derivative. (To smooth the outer loss too, as for an accuracy, see
    evolution strategies.)

    **Cost and bias**: 1 + 2K trainings; memory of 2K copies of the inner state, whatever T. Unbiased for the smoothed
    map; biased by O(σ²) for the map itself, with a variance of order m/K.

    Args:
      num_pairs: K above.
      sigma: standard deviation of the perturbation, in units of the hyperparameters: the same for all, so scale them.

    Raises:
      JaxhpoError: a setting out of its range; no `key` was given to `solve`; `tol`.

    Example:
      >>> adjoint = jaxhpo.Smoothing(num_pairs=16, sigma=0.1)

    References:
      Nesterov, Spokoiny. Random Gradient-Free Minimization of Convex Functions. 2017.
      Salimans et al. Evolution Strategies as a Scalable Alternative to Reinforcement Learning. 2017. arXiv:1703.03864
    """

    num_pairs: int
    sigma: float

    def __post_init__(self):
        check_count("Smoothing(num_pairs=...)", self.num_pairs)
        check_positive("Smoothing(sigma=...)", self.sigma)

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the derivative comes from perturbed runs."""
        refuse_tol(problem, self)
        key = problem.require_key(self)

        def tangent(fn, z, dz, key):
            noise = jax.random.normal(key, (self.num_pairs, z.size), z.dtype)

            def slope(e):
                pair = fn(z + self.sigma * e), fn(z - self.sigma * e)
                return jax.tree.map(lambda plus, minus: (plus - minus) / (2 * self.sigma), *pair)

            return weighted_sum(noise @ dz / self.num_pairs, jax.vmap(slope)(noise))

        return run_with_tangent(problem, tangent, key)
