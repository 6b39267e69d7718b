"""Positive semi-definite stand-ins for the Hessian of the train loss in an implicit rule."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import add_scaled
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """The generalised Gauss-Newton matrix; made by `gauss_newton` and `outer_product`."""

    predict: Callable
    output_loss: Callable
    regulariser: Callable | None

    def linearise(self, params: PyTree, hparams: PyTree, batch: PyTree) -> Callable[[PyTree], PyTree]:
        """Return v ↦ Jᵀ ∇²ℓ J v + ∇²R v at `params`, each part linearised once."""
        outputs, push = jax.linearize(lambda p: self.predict(p, hparams, batch), params)  # v ↦ J v
        pull = jax.linear_transpose(push, params)  # u ↦ Jᵀ u
        _, output_hessian = jax.linearize(jax.grad(lambda o: self.output_loss(o, batch)), outputs)  # u ↦ ∇²ℓ u
        regulariser = self.regulariser
        if regulariser is None:
            return lambda v: pull(output_hessian(push(v)))[0]
        _, penalty = jax.linearize(jax.grad(lambda p: jnp.asarray(regulariser(p, hparams))), params)  # v ↦ ∇²R v
        return lambda v: add_scaled(pull(output_hessian(push(v)))[0], 1.0, penalty(v))


def gauss_newton(predict: Callable, output_loss: Callable, regulariser: Callable | None = None) -> GaussNewton:
    r"""The generalised Gauss-Newton matrix :math:`J^\top \nabla^2\ell\, J + \nabla^2 R` in place of the Hessian.

    Positive semi-definite when the loss is convex in the outputs, whatever the model, so that `CG` applies where the
    Hessian of a network is indefinite. Equal to the Hessian where the model is linear, or fits exactly.

    **Cost and bias**: a product costs about as much as one with the Hessian. Biased by the curvature of the model times
    the residuals.

    Args:
      predict: `(params, hparams, batch) -> outputs`.
      output_loss: `(outputs, batch) -> scalar`; with the regulariser it makes up the train loss.
      regulariser: `(params, hparams) -> scalar`; its exact Hessian is added.

    Returns:
      A value for `Implicit(curvature=...)`.

    Raises:
      JaxhpoError: a function of another signature.

    Example:
      >>> curvature = jaxhpo.gauss_newton(
      ...     lambda w, h, batch: batch[0] @ w,
      ...     lambda outputs, batch: jnp.mean((outputs - batch[1]) ** 2),
      ...     lambda w, h: jnp.exp(h) * jnp.sum(w**2),
      ... )
      >>> adjoint = jaxhpo.Implicit(jaxhpo.CG(), curvature=curvature)

    References:
      Schraudolph. Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent. 2002.
      Larsen, Svarer, Andersen, Hansen. Adaptive Regularization in Neural Network Modeling. 1998.
    """
    check_callable("predict", predict, "predict(params, hparams, batch)", 3)
    check_callable("output_loss", output_loss, "output_loss(outputs, batch)", 2)
    if regulariser is not None:
        check_callable("regulariser", regulariser, "regulariser(params, hparams)", 2)
    return GaussNewton(predict, output_loss, regulariser)


def outer_product(example_loss: Callable, regulariser: Callable | None = None) -> GaussNewton:
    r"""The outer-product matrix :math:`\tfrac1n\sum_i g_i g_i^\top + \nabla^2 R` in place of the Hessian.

    g_i is the gradient of one example's loss: the empirical Fisher matrix, Larsen's original choice. Positive
    semi-definite. Near the Hessian where the loss is a log-likelihood, the model is right and n is large; otherwise
    not.

    **Cost and bias**: a product costs about two gradients; no gradient of a single example is formed. Biased by the
    difference from the Hessian.

    Args:
      example_loss: `(params, hparams, batch) -> one loss per example`; the train loss is their mean plus the
        regulariser.
      regulariser: `(params, hparams) -> scalar`; its exact Hessian is added.

    Returns:
      A value for `Implicit(curvature=...)`.

    Raises:
      JaxhpoError: a function of another signature.

    Example:
      >>> curvature = jaxhpo.outer_product(lambda w, h, batch: (batch[0] @ w - batch[1]) ** 2)
      >>> adjoint = jaxhpo.Implicit(jaxhpo.Direct(damping=1e-3), curvature=curvature)

    References:
      Larsen, Hansen, Svarer, Ohlsson. Design and Regularization of Neural Networks: The Optimal Use of a Validation
      Set. 1996.
    """
    check_callable("example_loss", example_loss, "example_loss(params, hparams, batch)", 3)
    # The rows of J are the g_i when the outputs are the losses z, and ℓ(z) = Σ z_i² / (2n) has the Hessian I / n.
    return gauss_newton(example_loss, _half_mean_square, regulariser)


def _half_mean_square(losses, batch):
    return 0.5 * jnp.mean(losses**2)
