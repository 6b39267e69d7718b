"""Laplace's approximation of the evidence."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_key, check_scalar, check_settings, describe
from jaxhpo._linear.cg import CG
from jaxhpo._linear.curvature import GaussNewton
from jaxhpo.criteria._validation import FIT, check_losses


@dataclasses.dataclass(frozen=True)
class StochasticDeterminant:
    r"""The log-determinant by products with the matrix alone: Lanczos quadrature at random vectors of signs.

    :math:`\log|H| = E\, z^\top (\log H) z`, of which `num_steps` of Lanczos give the quadrature; and its derivative is
    :math:`E\, z^\top H^{-1} (\partial H) z`, which takes one linear solve a vector, by `linear_solver`.

    **Cost and bias**: per vector `num_steps` products and reorthogonalisations, and one linear solve; memory of
    `num_steps` copies of the parameters. Unbiased but for Lanczos's and the solver's tolerances; the standard deviation
    falls as the root of the number of vectors. The same vectors are used at each call, so that an optimiser sees one
    smooth function.

    Args:
      num_vectors: random vectors.
      num_steps: of Lanczos, at most the number of parameters.
      linear_solver: for the derivative.
      key: of the random vectors; None is `jax.random.key(0)`.

    Raises:
      JaxhpoError: a setting out of its range.

    Example:
      >>> determinant = jaxhpo.criteria.StochasticDeterminant(num_vectors=16, num_steps=20)

    References:
      Ubaru, Chen, Saad. Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature. 2017.
    """

    num_vectors: int = 16
    num_steps: int = 30
    linear_solver: Any = CG(maxiter=200)
    key: Any = None

    def __post_init__(self):
        check_settings(self, num_vectors="count", num_steps="count")
        if self.key is not None:
            check_key(self.key)

    def __call__(self, product: Callable, like: jax.Array) -> jax.Array:
        """The log-determinant of a symmetric positive definite matrix.

        Args:
          product: v ↦ H v, of vectors like `like`.
          like: shape (P,).
        """
        key = jax.random.key(0) if self.key is None else self.key
        signs = jax.random.rademacher(key, (self.num_vectors, like.size), like.dtype)
        fixed = jax.lax.stop_gradient

        def one(z):
            value = fixed(_quadrature(lambda v: fixed(product(v)), z, min(self.num_steps, like.size)))
            solved = fixed(self.linear_solver(lambda v: fixed(product(v)), z)[0])
            slope = jnp.vdot(solved, product(z))  # its derivative is zᵀ H⁻¹ (∂H) z
            return value + slope - fixed(slope)

        return jnp.mean(jax.lax.map(one, signs))


def _quadrature(product: Callable, z: jax.Array, num_steps: int) -> jax.Array:
    """zᵀ (log H) z by Lanczos with full reorthogonalisation: |z|² e₁ᵀ (log T) e₁, T its tridiagonal matrix.

    H Q = Q T + r eᵀ with orthonormal columns Q, q₁ = z / |z|. Where the Krylov space is exhausted, r is zero: so is
    the next off-diagonal element, and what follows is decoupled from e₁; its diagonal is set to 1, for the logarithm.
    """
    size = jnp.linalg.norm(z)
    small = jnp.sqrt(jnp.finfo(z.dtype).eps)

    def step(carry, at):
        basis, q, alive = carry
        basis = basis.at[at].set(q)
        v = product(q)
        alpha = jnp.where(alive, jnp.vdot(q, v), 1.0)
        scale = jnp.linalg.norm(v)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            v = v - basis.T @ (basis @ v)
        beta = jnp.linalg.norm(v)
        going = alive & (beta > small * scale)
        return (basis, jnp.where(going, v / jnp.where(beta > 0, beta, 1), 0), going), (alpha, jnp.where(going, beta, 0))

    start = (jnp.zeros((num_steps, z.size), z.dtype), z / size, jnp.array(True))
    _, (diagonal, off) = jax.lax.scan(step, start, jnp.arange(num_steps))
    nodes, vectors = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1))
    return size**2 * jnp.sum(vectors[0] ** 2 * jnp.log(nodes))


def laplace_evidence(
    fit: Callable,
    losses: Callable,
    prior: Callable,
    weights: Any,
    *,
    curvature: str | GaussNewton = "exact",
    determinant: str | StochasticDeterminant = "dense",
) -> Callable[[PyTree], jax.Array]:
    r"""The negative log evidence by Laplace's approximation around the trained parameters.

    .. math:: -\log p(D \mid h) \approx S(\hat\theta, h) + \tfrac12 \log|\nabla^2_\theta S(\hat\theta, h)| -
       \tfrac P2 \log 2\pi, \qquad S = \sum_i w_i \ell_i(\theta, h) + R(\theta, h)

    S is the negative log joint density, normalisers included: losses are negative log-likelihoods of examples, R the
    negative log density of the prior. Nothing is held out, and many hyperparameters are penalised by the volume that
    they leave to the posterior. It is differentiated as written, so also through :math:`\hat\theta(h)` in the
    determinant.

    **Cost and bias**: one training, and for the dense determinant P products with the Hessian and P³; then about three
    times that in reverse. Exact where the joint density is Gaussian in θ, as of linear regression. Where the Hessian is
    not positive definite it is NaN.

    Args:
      fit: `(hparams, weights) -> params`, the minimiser of S; as for `cross_validation`.
      losses: `(params, hparams) -> (n,)`, the negative log-likelihood of each example, with its normaliser.
      prior: `(params, hparams) -> scalar`, the negative log density of the prior, with its normaliser.
      weights: shape (n,), what `fit` and S take: ones.
      curvature: "exact", or `gauss_newton(predict, output_loss, regulariser)` or `outer_product(...)`, called with the
        batch None: a positive semi-definite matrix in the Hessian's place. They make up S, as sums.
      determinant: "dense" forms the matrix; "diagonal" takes its diagonal alone, as if the posterior factorised;
        `StochasticDeterminant(...)` takes products.

    Returns:
      A function of the hyperparameters.

    Raises:
      JaxhpoError: a function of another signature or that returns other shapes, or another setting.

    Example:
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 2.0])
      >>> losses = lambda w, h: 0.5 * (x @ w - y) ** 2 + 0.5 * jnp.log(2 * jnp.pi)
      >>> prior = lambda w, h: 0.5 * jnp.exp(h) * w @ w - 0.5 * h + 0.5 * jnp.log(2 * jnp.pi)
      >>> fit = lambda h, weights: jnp.linalg.solve(x.T @ x + jnp.exp(h) * jnp.eye(1), x.T @ y)
      >>> evidence = jaxhpo.criteria.laplace_evidence(fit, losses, prior, jnp.ones(2))
      >>> print(evidence(0.0).round(4))  # y ~ N(0, I + x xᵀ)
      3.1504

    References:
      MacKay. Bayesian Interpolation. 1992.
    """
    check_callable("fit", fit, FIT, 2)
    check_callable("losses", losses, "losses(params, hparams)", 2)
    check_callable("prior", prior, "prior(params, hparams)", 2)
    if curvature != "exact" and not isinstance(curvature, GaussNewton):
        raise JaxhpoError(
            f"`curvature` got {describe(curvature)}: write 'exact', or what `jaxhpo.gauss_newton` or "
            "`jaxhpo.outer_product` returns."
        )
    if determinant not in ("dense", "diagonal") and not isinstance(determinant, StochasticDeterminant):
        raise JaxhpoError(
            f"`determinant` got {describe(determinant)}: write 'dense', 'diagonal' or `StochasticDeterminant()`."
        )

    def negative_log_joint(params, hparams):
        values = check_losses(losses(params, hparams), weights)
        return jnp.vdot(jnp.asarray(weights), values) + check_scalar(jnp.asarray(prior(params, hparams)), "prior")

    def criterion(hparams):
        params = upcast(jax.tree.map(jnp.asarray, fit(hparams, jnp.asarray(weights))))  # no Cholesky in bfloat16
        flat, unravel = ravel_pytree(params)
        if curvature == "exact":
            gradient = jax.grad(lambda p: negative_log_joint(unravel(p), hparams))
            _, product = jax.linearize(gradient, flat)
        else:
            linear = curvature.linearise(params, hparams, None)

            def product(v):
                return ravel_pytree(linear(unravel(v)))[0]

        volume = _log_determinant(product, flat, determinant)
        return negative_log_joint(params, hparams) + 0.5 * volume - 0.5 * flat.size * math.log(2 * math.pi)

    return criterion


def _log_determinant(product: Callable, flat: jax.Array, determinant) -> jax.Array:
    if isinstance(determinant, StochasticDeterminant):
        return determinant(product, flat)
    if determinant == "diagonal":  # one product at a time: no matrix
        diagonal = jax.lax.map(lambda i: product(jnp.zeros_like(flat).at[i].set(1))[i], jnp.arange(flat.size))
        return jnp.sum(jnp.log(diagonal))
    matrix = jax.vmap(product)(jnp.eye(flat.size, dtype=flat.dtype))
    return 2 * jnp.sum(jnp.log(jnp.diag(jnp.linalg.cholesky(matrix))))
