"""Restarted GMRES."""

import dataclasses
import functools

from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.corrections import minimal_residual
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class GMRES(LinearSolver):
    r"""Restarted GMRES, for matrices that need be neither symmetric nor definite.

    Serves `fixed_point` solvers and saddle points, where `CG` cannot. The residual never rises. If it falls by less
    than a fraction :math:`\sqrt\epsilon` between two restarts, the solve ends with status STALLED: the matrix is
    singular, `restart` is too small, or the residual is at its rounding error.

    **Cost and bias**: up to `maxiter * (restart + 1)` products with the matrix; memory of `restart` copies of the
    parameters. Exact at convergence.

    Args:
      maxiter: restarts.
      restart: dimension of the Krylov space between restarts.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.GMRES(restart=10))

    References:
      Saad, Schultz. GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear Systems. 1986.
    """

    maxiter: int = 10
    restart: int = 20
    tol: float | None = None

    def __post_init__(self):
        check_settings(self, maxiter="count", restart="count", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        correct = functools.partial(minimal_residual, self.restart)
        solve = functools.partial(in_rounds, correct, maxiter=self.maxiter, tol=self.tol)
        return solve_system(matvec, b, x0, solve)
