"""Conjugate gradients."""

import dataclasses
import functools
from typing import ClassVar

from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.iteration import conjugate_gradients
from jaxhpo._linear.system import damped, solve_system


@dataclasses.dataclass(frozen=True)
class CG(LinearSolver):
    r"""Conjugate gradients on :math:`(H + \delta I) x = b`, for symmetric positive definite H.

    Stops at ‖b − (H + δI)x‖ ≤ `tol` ‖b‖, or after `maxiter` products; the hypergradient is then that of the iterate
    reached (stopping after K iterations is legitimate). On a direction of non-positive curvature it stops with status
    INDEFINITE at the iterate reached (b itself if that is the first direction): raise `damping`, or train the inner
    problem further. Where the residual is down to the rounding error of x, or the matrix is singular, it stops with
    status STALLED at the best iterate; if no `tol` was given, a residual up to :math:`\sqrt\epsilon` then passes for
    convergence. `check_hypergradient` prints the status of its linear solves.

    **Cost and bias**: one Hessian product (two to three gradients) per iteration; memory of five copies of the
    parameters and one linearisation. Exact at convergence with δ = 0; error ∝ the residual otherwise.

    Args:
      maxiter: largest number of products with H.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision (6e-6 in float32,
        2e-12 in float64).
      damping: δ above, ≥ 0.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.CG(maxiter=20, damping=1e-3))

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
      Rajeswaran, Finn, Kakade, Levine. Meta-Learning with Implicit Gradients. 2019. arXiv:1909.04630
    """

    maxiter: int = 100
    tol: float | None = None
    damping: float = 0.0
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, maxiter="count", damping="nonnegative", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        solve = functools.partial(conjugate_gradients, maxiter=self.maxiter, tol=self.tol)
        return solve_system(damped(matvec, self.damping), b, x0, solve, symmetric=True)
