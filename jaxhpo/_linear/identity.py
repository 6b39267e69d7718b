"""H⁻¹ replaced by a multiple of the identity: T1–T2, one-step differentiation."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxhpo._core.tree import scaled
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_positive
from jaxhpo._linear.report import of_series, report, residual_of


@dataclasses.dataclass(frozen=True)
class Identity(LinearSolver):
    r"""Replaces the inverse Hessian by a multiple of the identity, :math:`H^{-1} b \approx s\, b`.

    With the inner learning rate as scale this is the T1-T2 rule, and at a solution of gradient descent it equals
    backpropagation through the last step.

    **Cost and bias**: no Hessian product at all; memory of the parameters. Exact only for :math:`H = I/s`; the error
    in an eigendirection of curvature :math:`\lambda` is :math:`1 - s\lambda`. The report, at one Hessian product where
    it is asked for, has status MAX_ITERATIONS as a rule, and STALLED where the residual is no smaller than b: the scale
    is above 2 / curvature.

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
        check_positive("Identity(scale=...)", self.scale)

    def __call__(self, matvec, b, x0=None):
        """Returns `(scale * b, LinearInfo)`; `x0` is not needed."""
        del x0
        x = scaled(self.scale, b)
        residual = residual_of(matvec, x, b)
        return x, report(residual, 0, of_series(jnp.ones_like(residual), residual))
