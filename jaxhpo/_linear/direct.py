"""The dense solve."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import add_scaled
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_nonnegative
from jaxhpo._linear.report import report, residual_of


@dataclasses.dataclass(frozen=True)
class Direct(LinearSolver):
    r"""Forms the matrix and solves with it, :math:`x = (A + \delta I)^{-1} b`, by LU with partial pivoting.

    Needs no symmetry and no definiteness, so it also serves `fixed_point` solvers and saddle points. A singular matrix
    gives infinite entries (status NOT_FINITE), or, where rounding hides it, a residual above :math:`\sqrt\epsilon`
    (STALLED).

    **Cost and bias**: P Hessian products and :math:`2P^3/3` multiplications for P parameters; memory :math:`P^2`.
    Exact for δ = 0. For P up to a few thousand, and as a reference for everything else.

    Args:
      damping: δ above, ≥ 0.

    Raises:
      JaxhpoError: the damping is negative or not a number.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.Direct())

    References:
      Bengio. Gradient-Based Optimization of Hyperparameters. Neural Computation 12(8), 2000.
    """

    damping: float = 0.0

    def __post_init__(self):
        check_nonnegative("Direct(damping=...)", self.damping)

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`; `x0` is not needed."""
        del x0
        flat, unravel = ravel_pytree(b)
        basis = cast_varying(jnp.eye(flat.size, dtype=flat.dtype), varying_axes(b))
        damped = lambda v: add_scaled(matvec(v), self.damping, v)  # noqa: E731
        matrix = jax.vmap(lambda v: ravel_pytree(damped(unravel(v)))[0], out_axes=1)(basis)
        x = unravel(jnp.linalg.solve(matrix, flat))
        eps = float(jnp.finfo(flat.dtype).eps)
        return x, report(residual_of(damped, x, b), flat.size, LinearStatus.STALLED, threshold=eps**0.5)
