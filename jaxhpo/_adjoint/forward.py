"""Exact forward-mode differentiation of the inner run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.pushforward import push, run_with_tangent, weighted_sum
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_count
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class Forward:
    r"""Exact forward mode: the Jacobian of the state with respect to the hyperparameters is carried along.

    :math:`Z_{t+1} = \partial_\theta \Phi_t\, Z_t + \partial_h \Phi_t`, and the result's derivative is
    :math:`\dot\theta_T = Z_T \dot h`, which reverse mode transposes: `jax.grad`, `jax.jvp`, `jax.jacfwd` and Hessians
    all work. Only the inputs that are being differentiated get a column.

    **Cost and bias**: 2 + 1.35 m trainings for m differentiated numbers (operations counted on an MLP
    784-256-256-10, T = 20); memory of m copies of the inner state, whatever T. Exact for the T-step map, as `Unroll()`
    is. Cheaper than it for a single hyperparameter; otherwise for T so long that nothing else fits.

    Args:
      chunk_size: columns carried at once; None takes all. Smaller needs less memory, and repeats the forward run.

    Raises:
      JaxhpoError: a setting out of its range, or `tol` (the loop's length must be fixed).

    Example:
      >>> adjoint = jaxhpo.Forward(chunk_size=8)

    References:
      Franceschi, Donini, Frasconi, Pontil. Forward and Reverse Gradient-Based Hyperparameter Optimization. 2017.
      arXiv:1703.01785
    """

    chunk_size: int | None = None

    def __post_init__(self):
        if self.chunk_size is not None:
            check_count("Forward(chunk_size=...)", self.chunk_size)

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the result's derivative is carried forward."""
        refuse_tol(problem, self)

        def tangent(fn, z, dz, key):
            del key
            return weighted_sum(dz, push(fn, z, jnp.eye(z.size, dtype=z.dtype), self.chunk_size))

        return run_with_tangent(problem, tangent)
