"""The truncated Neumann series."""

import dataclasses

import jax

from jaxhpo._core.tree import add_scaled, all_finite, scaled
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.report import relative_norm, report, residual_of, series_status


@dataclasses.dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""Truncated Neumann series for an inverse-Hessian-vector product.

    Replaces :math:`H^{-1} b` by :math:`\alpha \sum_{k=0}^{K-1} (I - \alpha H)^k b`, which converges for
    :math:`0 < \alpha < 2 / \lambda_{\max}(H)` and diverges beyond. At a solution of gradient descent with rate
    :math:`\alpha` it equals backpropagation through the last K steps. For `fixed_point` solvers take `step_size=1`: the
    sum is then :math:`\sum_k J^k b`, J the step's Jacobian.

    The residual is the first omitted term, so the report's status is CONVERGED where that is negligible, MAX_ITERATIONS
    while the terms shrink (stopping after K terms is legitimate), and STALLED where the last term did not.

    **Cost and bias**: `num_terms - 1` Hessian products of two to three gradients each; memory of one linearisation.
    The relative error in an eigendirection of curvature :math:`\lambda` is :math:`(1 - \alpha\lambda)^K`: biased
    towards zero, exact as K grows.

    Args:
      num_terms: K above; 1 gives `Identity(step_size)`.
      step_size: α above; the inner learning rate is the usual choice.

    Raises:
      JaxhpoError: K is not a positive integer, or α not a positive number.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.Neumann(num_terms=20, step_size=0.1))

    References:
      Lorraine, Vicol, Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation. 2020.
      arXiv:1911.02590
    """

    num_terms: int
    step_size: float

    def __post_init__(self):
        check_settings(self, num_terms="count", step_size="positive")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)`; the series starts from zero, so `x0` is not used."""

        # With α the step size, |1 − αλ| < 1 for every eigenvalue λ of A:
        #     A⁻¹ b = α Σ_k t_k,        t_0 = b,        t_{k+1} = (I − αA) t_k = t_k − α A t_k.
        def add_term(carry, _):
            term, total = carry
            term = add_scaled(term, -self.step_size, matvec(term))
            return (term, add_scaled(total, 1.0, term)), None

        (last, total), _ = jax.lax.scan(add_term, (b, b), length=self.num_terms - 1)
        x = scaled(self.step_size, total)
        residual = residual_of(matvec, x, b)  # b − A x = t_K: the sum telescopes
        ended = series_status(relative_norm(last, b), residual)
        return x, report(residual, self.num_terms - 1, ended, failed=~all_finite(x))
