"""The linear solver for any invertible matrix."""

import dataclasses
import functools

from jaxhpo._core.types import LinearSolver, LinearStatus
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.corrections import factorised, normal_equations, stabilised
from jaxhpo._linear.iteration import in_rounds, in_turn
from jaxhpo._linear.report import epsilon
from jaxhpo._linear.system import solve_system

_TINY, _SMALL = 100, 1000  # parameters up to which the matrix is made at once, or at last


@dataclasses.dataclass(frozen=True)
class General(LinearSolver):
    r"""A linear solver for any invertible matrix: right, or failed. The default of `implicit`.

    The matrix need be neither symmetric nor definite: roots written with either sign, saddle points, KKT conditions
    with multipliers, maximisation, fixed points. For P parameters, each where the one before it does not solve the
    system,

    - P > 100: `BiCGStab`.
    - P ≤ 1000: `Direct`.
    - conjugate gradients on the normal equations, which take up to as many iterations as the condition number, but do
      not stall. They also solve a singular system that has a solution, by the one nearest to zero: that of a minimum
      with a direction in which nothing changes, as the sum of a softmax's intercepts.

    Each is refined until the measured residual is within the tolerance, and the estimated error within 1 %, as far as
    rounding allows. The solve has failed where the residual is above :math:`\sqrt\epsilon` in the end: a system without
    a solution, or one too ill-conditioned for `maxiter`.

    **Cost and bias**: two products an iteration and memory of eight copies of the parameters; for `Direct`, P products,
    100 at once, and :math:`P^2`. Exact at convergence.

    Args:
      maxiter: largest number of iterations of each method.
      tol: relative residual to reach; None takes :math:`\epsilon^{3/4}` of the working precision.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.General())

    References:
      van der Vorst. Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG. 1992.
      Hestenes, Stiefel. Methods of Conjugate Gradients for Solving Linear Systems. 1952.
    """

    maxiter: int = 1000
    tol: float | None = None

    def __post_init__(self):
        check_settings(self, maxiter="count", tol="positive or None")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`, starting from `x0` (zeros when None)."""

        def solve(operator, b, x0):
            def refined(correct):
                return functools.partial(
                    in_rounds, correct, maxiter=self.maxiter, tol=self.tol, refused=epsilon(b.dtype) ** 0.5
                )

            def dense(operator, b, x0):
                x, info = refined(factorised(operator, b, _TINY))(operator, b, x0)
                return x, info._replace(num_iterations=info.num_iterations + b.size)

            last = refined(normal_equations)
            if b.size <= _SMALL:
                last = in_turn(dense, last, lambda info: info.failed)
            if b.size > _TINY:
                last = in_turn(refined(stabilised), last, lambda info: info.status != LinearStatus.CONVERGED)
            return last(operator, b, x0)

        return solve_system(matvec, b, x0, solve)
