"""The unbiased random-direction estimate of the hypergradient."""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo._adjoint.pushforward import push, run_with_tangent, weighted_sum
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_count
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class ForwardGradient:
    r"""Forward mode along random directions: an unbiased estimate, at a cost that does not grow with m.

    :math:`\hat g = \frac1K\sum_k (\theta'(h) v_k)^\top v\; v_k` with :math:`v_k \sim N(0, I_m)`, so
    :math:`E[\hat g]` is the exact hypergradient through the solve.

    **Cost and bias**: 2 + 1.35 K trainings (as `Forward`); memory of K copies of the inner state. Unbiased; the
    variance is
    :math:`(m + 1)/K` times the squared norm, so K must grow with m for the same error.

    Args:
      num_directions: K above.

    Raises:
      JaxhpoError: K is no positive integer; no `key` was given to `solve`; `tol`.

    Example:
      >>> adjoint = jaxhpo.ForwardGradient(num_directions=16)

    References:
      Baydin, Pearlmutter, Syme, Wood, Torr. Gradients without Backpropagation. 2022. arXiv:2202.08587
    """

    num_directions: int

    def __post_init__(self):
        check_count("ForwardGradient(num_directions=...)", self.num_directions)

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the derivative is estimated along random directions."""
        refuse_tol(problem, self)
        key = problem.require_key(self)

        def tangent(fn, z, dz, key):
            v = jax.random.normal(key, (self.num_directions, z.size), z.dtype)
            # E[v vᵀ] = I, so the mean of (v·dz) times the derivative along v is the derivative along dz.
            return weighted_sum(v @ dz / self.num_directions, push(fn, z, v, None))

        return run_with_tangent(problem, tangent, key)
