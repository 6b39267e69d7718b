"""Conjugate gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_callable, check_settings
from jaxhpo._linear.iteration import conjugate_gradients, in_turn
from jaxhpo._linear.report import judged
from jaxhpo._linear.system import solve_system


@dataclasses.dataclass(frozen=True)
class CG(LinearSolver):
    r"""Conjugate gradients on :math:`(H + \delta I) x = b`, for symmetric positive definite H.

    Stops at ‖b − (H + δI)x‖ ≤ `tol` ‖b‖, or after `maxiter` products; the hypergradient is then that of the iterate
    reached (stopping after K iterations is legitimate). On a direction of non-positive curvature it stops with status
    INDEFINITE at the iterate reached (b itself if that is the first direction), and has failed: raise `damping`, train
    the inner problem further, or give a `fallback`. Where the residual is down to the rounding error of x, or the
    matrix is singular, it stops with status STALLED at the best iterate. If no `tol` was given, a residual up to
    :math:`\sqrt\epsilon` then passes for convergence, but never an answer whose error may be above 1 %, by the least
    curvature met, and in float32 by a rough solve for the residual too. `check_hypergradient` prints the status of its
    linear solves.

    **Cost and bias**: one Hessian product (two to three gradients) per iteration, and in float32, where the status is
    read, half as many again; memory of five copies of the parameters and one linearisation. Exact at convergence with
    δ = 0; error ∝ the residual otherwise.

    Args:
      maxiter: largest number of products with H.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision (6e-6 in float32,
        2e-12 in float64).
      damping: δ above, ≥ 0.
      fallback: the linear solver that takes over where this one fails, in the same program, for `General()` say; None
        for none.

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
    fallback: Callable | None = None
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self, maxiter="count", damping="nonnegative", tol="positive or None")
        if self.fallback is not None:
            check_callable("CG(fallback=...)", self.fallback, "fallback(matvec, b, x0=None)", 2)

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""
        solve = functools.partial(conjugate_gradients, maxiter=self.maxiter, tol=self.tol)
        if self.fallback is not None:
            fallback = self.fallback
            second = judged(lambda operator, b, x0: fallback(operator, b), "CG(fallback=...)")
            solve = in_turn(solve, second, lambda info: info.failed)
        return solve_system(matvec, b, x0, solve, symmetric=True, damping=self.damping)
