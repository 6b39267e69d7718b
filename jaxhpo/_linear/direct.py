"""The dense solve."""

import dataclasses

import jax.numpy as jnp

from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.corrections import factorised
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.report import epsilon
from jaxhpo._linear.system import solve_system

_ROUNDS = 10  # of refinement, at most; one is enough where products are as exact as the factors


@dataclasses.dataclass(frozen=True)
class Direct(LinearSolver):
    r"""Dense solve, :math:`x = (A + \delta I)^{-1} b`, by LU with partial pivoting.

    Needs no symmetry and no definiteness, so it also serves `fixed_point` solvers and saddle points. The answer is
    refined until :math:`\|b - (A + \delta I) x\|` is at its rounding error: products one at a time are more exact than
    those of all columns at once where an accelerator rounds the latter to fewer bits. A singular matrix gives
    infinite entries (status NOT_FINITE), or, where rounding hides it, a residual above :math:`\sqrt\epsilon` (STALLED);
    the solve has then failed. STALLED at a smaller residual: too ill-conditioned to be right within 1 %.

    **Cost and bias**: P Hessian products and one or two more, and :math:`2P^3/3` multiplications, for P parameters;
    memory :math:`P^2`. Exact for δ = 0. For P up to a few thousand, and as a reference for everything else.

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
        return solve_system(matvec, b, None, _solve, damping=self.damping)


def _solve(operator, b, x0):
    """Factorise A, and refine by the products themselves, whose rounding may be smaller than that of all at once."""
    x, info = in_rounds(factorised(operator, b), operator, b, None, _ROUNDS, None, refused=epsilon(b.dtype) ** 0.5)
    return x, info._replace(num_iterations=jnp.asarray(b.size, jnp.int32))
