"""The dense solve."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.report import epsilon, report, residual_of
from jaxhpo._linear.system import damped


@dataclasses.dataclass(frozen=True)
class Direct(LinearSolver):
    r"""Dense solve, :math:`x = (A + \delta I)^{-1} b`, by LU with partial pivoting.

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
        check_settings(self, damping="nonnegative")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`; `x0` is not used."""
        flat, unravel = ravel_pytree(b)
        matvec = damped(matvec, self.damping)
        basis = cast_varying(jnp.eye(flat.size, dtype=flat.dtype), varying_axes(b))
        matrix = jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0], out_axes=1)(basis)  # column i is A eᵢ
        x = unravel(jnp.linalg.solve(matrix, flat))
        residual = residual_of(matvec, x, b)
        return x, report(residual, flat.size, LinearStatus.STALLED, threshold=epsilon(flat.dtype) ** 0.5)
