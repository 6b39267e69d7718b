"""Stabilised bi-conjugate gradients."""

import dataclasses
import functools

from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.corrections import stabilised
from jaxhpo._linear.iteration import in_rounds
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class BiCGStab(LinearSolver):
    r"""Stabilised bi-conjugate gradients, for matrices that are not symmetric, in constant memory.

    The residual may rise on the way; the answer is the best iterate. Where the recurrence breaks down (a division by
    zero), reaches its rounding error, or finds no better iterate for 100 iterations, it restarts from the residual
    measured there. If a restart does not lower the residual, the solve ends with status STALLED. `GMRES` does not break
    down.

    **Cost and bias**: two products with the matrix an iteration; memory of eight copies of the parameters. Exact at
    convergence.

    Args:
      maxiter: largest number of iterations.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.BiCGStab())

    References:
      van der Vorst. Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG. 1992.
    """

    maxiter: int = 100
    tol: float | None = None

    def __post_init__(self):
        check_settings(self, maxiter="count", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        solve = functools.partial(in_rounds, stabilised, maxiter=self.maxiter, tol=self.tol)
        return solve_system(matvec, b, x0, solve)
