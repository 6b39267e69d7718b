"""A multiple of the identity in place of H⁻¹: T1–T2, one-step differentiation."""

import dataclasses

import jax.numpy as jnp

from jaxhpo._core.tree import all_finite, scaled
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.report import report, residual_of, series_status


@dataclasses.dataclass(frozen=True)
class Identity(LinearSolver):
    r"""A multiple of the identity in place of the inverse Hessian, :math:`H^{-1} b \approx s\, b`.

    With the inner learning rate as scale this is the T1-T2 rule, and at a solution of gradient descent it equals
    backpropagation through the last step.

    **Cost and bias**: no Hessian product; memory of the parameters. Exact only for :math:`H = I/s`; the error in an
    eigendirection of curvature :math:`\lambda` is :math:`1 - s\lambda`. The report costs one Hessian product where it
    is used. Its status is MAX_ITERATIONS as a rule, and STALLED where the residual is no smaller than b: the scale is
    above 2 / curvature.

    Args:
      scale: s above, a positive number in units of a learning rate.

    Raises:
      JaxhpoError: the scale is not a positive number.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.Identity(0.1))

    References:
      Luketina, Berglund, Greff, Raiko. Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters.
      2016. arXiv:1511.06727
    """

    scale: float

    def __post_init__(self):
        check_settings(self, scale="positive")

    def __call__(self, matvec, b, x0=None):
        """Return `(scale * b, LinearInfo)`; `x0` is not used."""
        x = scaled(self.scale, b)
        residual = residual_of(matvec, x, b)
        return x, report(residual, 0, series_status(jnp.ones_like(residual), residual), failed=~all_finite(x))
