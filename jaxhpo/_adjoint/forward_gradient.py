"""Unbiased estimate of the hypergradient from random directions."""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo._adjoint.pushforward import push, run_with_tangent, weighted_sum
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_settings
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class ForwardGradient:
    r"""Forward mode along random directions: an unbiased estimate whose cost does not grow with the dimension m of h.

    With v the cotangent at the solution:

    .. math:: \hat g = \frac1K\sum_{k=1}^K \big(\theta'(h)\, v_k\big)^\top v\; v_k, \qquad v_k \sim N(0, I_m)

    :math:`E[\hat g]` is the exact hypergradient through the solve.

    **Cost and bias**: 2 + 1.35 K trainings (as `Forward`); memory of K copies of the inner state. Unbiased, with a
    variance of :math:`(m + 1)/K` times the squared norm: K must grow with m for the same error.

    Args:
      num_directions: K above.

    Raises:
      JaxhpoError: if K is not a positive integer, `solve` is given no `key`, or `tol` is given.

    Example:
      >>> adjoint = jaxhpo.ForwardGradient(num_directions=16)

    References:
      Baydin, Pearlmutter, Syme, Wood, Torr. Gradients without Backpropagation. 2022. arXiv:2202.08587
    """

    num_directions: int

    def __post_init__(self):
        check_settings(self, num_directions="count")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop and estimates its derivative from random directions."""

        def tangent(fn, z, dz, key):
            # θ̇ = Θ'(z) ż = E[Θ'(z) v (v·ż)], since E[v vᵀ] = I; the estimate is the mean over K samples of v.
            v = jax.random.normal(key, (self.num_directions, z.size), z.dtype)
            return weighted_sum(v @ dz / self.num_directions, push(fn, z, v, None))

        return run_with_tangent(problem, self, tangent, random=True)
