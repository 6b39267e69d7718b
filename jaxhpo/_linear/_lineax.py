"""Any solver of the lineax library."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxhpo._errors import JaxhpoError
from jaxhpo._linear._report import report
from jaxhpo._linear._system import solve_system


@dataclasses.dataclass(frozen=True)
class FromLineax:
    """A lineax solver in the form of ours; made by `from_lineax`."""

    solver: Any

    @property
    def needs_symmetry(self) -> bool:
        """Whether the solver takes symmetric positive definite matrices only."""
        return type(self.solver).__name__ in ("CG", "Cholesky")

    def __call__(self, matvec, b, x0=None):
        """Returns `(x, LinearInfo)`; a failure is reported, not raised."""
        import lineax

        tags = lineax.positive_semidefinite_tag if self.needs_symmetry else ()

        def solve(operator, b, x0):
            wrapped = lineax.FunctionLinearOperator(operator, jax.eval_shape(lambda: b), tags)
            options = {} if x0 is None else {"y0": x0}
            solution = lineax.linear_solve(wrapped, b, self.solver, options=options, throw=False)
            return solution.value, report(operator, solution.value, b, solution.stats.get("num_steps", 0))

        return solve_system(matvec, b, x0, solve, symmetric=self.needs_symmetry)


def from_lineax(solver: Any) -> FromLineax:
    """Lets a lineax solver solve for the implicit derivative.

    Matrices are given by their products, so solvers that need entries (`LU`, `QR`) build them, P products. `CG` is told
    that the matrix is positive definite.

    **Cost and bias**: the solver's.

    Args:
      solver: a lineax solver such as `lineax.GMRES(rtol=1e-6, atol=1e-6)`.

    Returns:
      A linear solver for `Implicit`.

    Raises:
      JaxhpoError: this is no lineax solver.

    Example:
      >>> import lineax
      >>> adjoint = jaxhpo.Implicit(jaxhpo.from_lineax(lineax.GMRES(rtol=1e-6, atol=1e-6)))

    References:
      Rader, Lyons, Kidger. Lineax: unified linear solves and linear least-squares in JAX and Equinox. 2023.
      arXiv:2311.17283
    """
    if isinstance(solver, type) or not hasattr(solver, "compute"):
        raise JaxhpoError(
            f"`from_lineax` got {solver!r}, which is no lineax solver: write `from_lineax(lineax.CG(rtol=1e-6, "
            "atol=1e-6))`."
        )
    return FromLineax(solver)
