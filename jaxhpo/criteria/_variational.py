"""Variational bounds with a diagonal Gaussian posterior, and pruning by it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import normal
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_count, describe


class Posterior(NamedTuple):
    r"""A diagonal Gaussian over parameters, :math:`\theta_i \sim N(\mu_i, s_i^2)`: itself parameters to train.

    Attributes:
      mean: μ, a pytree.
      log_scale: log s, a pytree like it.

    Example:
      >>> q = jaxhpo.criteria.Posterior(jnp.zeros(3), jnp.full(3, -2.0))
      >>> print(jaxhpo.criteria.draw(q, jax.random.key(0)).shape)
      (3,)
    """

    mean: PyTree
    log_scale: PyTree


def draw(posterior: Posterior, key: jax.Array) -> PyTree:
    r"""One sample :math:`\mu + s \epsilon`, differentiable with respect to the posterior.

    Args:
      posterior: of which to sample.
      key: a PRNG key.

    Returns:
      Parameters.

    Example:
      >>> q = jaxhpo.criteria.Posterior(jnp.ones(2), jnp.full(2, -20.0))
      >>> print(jaxhpo.criteria.draw(q, jax.random.key(0)))
      [1. 1.]
    """
    mean = jax.tree.map(lambda m: jnp.true_divide(m, 1), posterior.mean)  # of Python numbers, arrays of floats
    return jax.tree.map(lambda m, s, e: m + jnp.exp(s) * e, mean, posterior.log_scale, normal(key, mean))


def kl(posterior: Posterior, log_precision: PyTree, prior_mean: PyTree = None) -> jax.Array:
    r"""The divergence of the posterior from a diagonal Gaussian prior :math:`N(m_i, 1/\alpha_i)`, in closed form.

    .. math:: \tfrac12 \sum_i \big[\alpha_i (s_i^2 + (\mu_i - m_i)^2) - 1 - \log(\alpha_i s_i^2)\big]

    Args:
      posterior: q.
      log_precision: log α, a prefix tree of the parameters: a scalar for all, a number a leaf, or one a weight.
      prior_mean: m, likewise; None is 0.

    Returns:
      A scalar, in nats.

    Raises:
      JaxhpoError: a precision or mean that is no prefix tree of the parameters.

    Example:
      >>> q = jaxhpo.criteria.Posterior(jnp.zeros(2), jnp.zeros(2))
      >>> print(jaxhpo.criteria.kl(q, 0.0))
      0.0
    """
    prior_mean = 0.0 if prior_mean is None else prior_mean
    mean, scale = posterior
    log_precision, prior_mean = _spread("log_precision", log_precision, mean), _spread("prior_mean", prior_mean, mean)
    parts = jax.tree.map(
        lambda a, m, mu, s: 0.5 * jnp.sum(jnp.exp(a) * (jnp.exp(2 * s) + (mu - m) ** 2) - 1 - a - 2 * s),
        log_precision,
        prior_mean,
        mean,
        scale,
    )
    return jax.tree.reduce(jnp.add, parts)


def _spread(what: str, prefix: PyTree, like: PyTree) -> PyTree:
    """Each leaf of a prefix tree, broadcast to the leaves below it."""
    try:
        return jax.tree.map(
            lambda x, below: jax.tree.map(lambda leaf: jnp.broadcast_to(x, jnp.shape(leaf)), below), prefix, like
        )
    except ValueError:
        raise JaxhpoError(
            f"`{what}` got {jax.tree.map(describe, prefix)}, but the parameters are {jax.tree.map(describe, like)}: "
            "write one number for all, or a tree like theirs with a number for each leaf, or an array of its shape."
        ) from None


def negative_elbo(losses: Callable, *, num_samples: int = 1, local: bool = False) -> Callable[..., jax.Array]:
    r"""The negative evidence lower bound, :math:`E_q \sum_i \ell_i(\theta) + KL(q \| N(m, \alpha^{-1}))`.

    It is train loss and criterion at once: over q it is minimised by training, over the prior's hyperparameters by
    their gradient; so at the optimum of q the hypergradient is its partial derivative alone (L = −Q), and greedy rules
    are exact. The expectation is a mean over reparametrised samples.

    **Cost and bias**: `num_samples` evaluations of the losses. Unbiased; a bound of the evidence, tight where the
    posterior is a diagonal Gaussian.

    Args:
      losses: `(params, batch) -> (n,)`, or a scalar, their sum: negative log-likelihoods. With minibatches, scaled up
        to all examples. With `local`, `(params, example) -> scalar`.
      num_samples: draws of the parameters.
      local: draw parameters anew for each example of the batch, a pytree with a leading axis: the noise of examples is
        then independent and averages out, for n times the memory (`local_dense` draws outputs instead).

    Returns:
      `(posterior, prior, batch, key) -> scalar`, where `prior` is the log precision, or `(log precision, mean)`: prefix
      trees of the parameters, as for `kl`. Of parameters that are a tuple, write `(log precision, None)` for the first.

    Raises:
      JaxhpoError: a function of another signature, or no sample; a tuple in another form as prior.

    Example:
      >>> elbo = jaxhpo.criteria.negative_elbo(lambda w, batch: 0.5 * (w - batch) ** 2, num_samples=50)
      >>> solver = jaxhpo.from_optax(lambda q, log_precision, batch: elbo(q, log_precision, *batch), optax.adam(0.02))
      >>> start = solver.init(jaxhpo.criteria.Posterior(jnp.zeros(()), jnp.array(0.0)), 0.0)
      >>> batches = (jnp.ones(500), jax.random.split(jax.random.key(0), 500))  # data, and a key a step
      >>> q = jaxhpo.solve(solver, start, 0.0, batches).params
      >>> print(abs(float(q.mean) - 0.5) < 0.2)  # prior N(0, 1), one observation 1 of variance 1: N(1/2, 1/2)
      True

    References:
      Graves. Practical Variational Inference for Neural Networks. 2011.
      Kingma, Salimans, Welling. Variational Dropout and the Local Reparameterization Trick. 2015. arXiv:1506.02557
    """
    check_callable("losses", losses, "losses(params, batch)", 2)
    check_count("num_samples", num_samples)

    def expected(posterior, batch, key):
        if not local:
            return jnp.sum(losses(draw(posterior, key), batch))
        keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
        return jnp.sum(jax.vmap(lambda example, key: losses(draw(posterior, key), example))(batch, keys))

    def criterion(posterior, prior, batch, key):
        log_precision, mean = _pair(prior, posterior.mean)
        keys = jax.random.split(key, num_samples)
        fits = jax.vmap(lambda key: expected(posterior, batch, key))(keys)
        return fits.mean() + kl(posterior, log_precision, mean)

    return criterion


def _pair(prior: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    """(log precision, mean or None) of a prior. A tuple may be a tree like the parameters, where those are a tuple."""
    if type(prior) is not tuple:  # named tuples are trees
        return prior, None
    if len(prior) == 2 and (type(params) is not tuple or prior[1] is None or type(prior[0]) is tuple):
        return prior
    raise JaxhpoError(
        f"`prior` got a tuple of {len(prior)}, but a tuple is the pair `(log_precision, mean)`: write that, or the log "
        "precision alone; where the parameters are a tuple, too, `(log_precision, None)`, with a tuple like them."
    )


def closest_prior(posterior: Posterior, per: str = "weight", *, with_mean: bool = False) -> tuple[PyTree, PyTree]:
    r"""The prior of least divergence from the posterior: the best hyperparameters of `negative_elbo`, in closed form.

    :math:`1/\alpha = s^2 + (\mu - m)^2`, averaged over what shares a precision; m is the mean of μ, or 0.

    Args:
      posterior: q.
      per: what has a precision of its own: "weight", "leaf" or "all".
      with_mean: whether the prior's mean is free, too. Not with "weight", where the prior would become the posterior.

    Returns:
      `(log precision, mean)`, prefix trees of the parameters.

    Raises:
      JaxhpoError: another `per`; a free mean for each weight.

    Example:
      >>> q = jaxhpo.criteria.Posterior(jnp.array([3.0, 4.0]), jnp.full(2, -20.0))
      >>> log_precision, mean = jaxhpo.criteria.closest_prior(q, "leaf")
      >>> print(f"{jnp.exp(-log_precision):.2f}")  # (9 + 16) / 2
      12.50

    References:
      Graves. Practical Variational Inference for Neural Networks. 2011.
    """
    if per not in ("weight", "leaf", "all"):
        raise JaxhpoError(f"`per` got {per!r}: write 'weight', 'leaf' or 'all'.")
    if per == "weight" and with_mean:
        raise JaxhpoError(
            "a mean for each weight makes prior and posterior the same: write `with_mean=False`, or per='leaf'."
        )
    if per == "all":
        flat = [jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]) for tree in posterior]
        return closest_prior(Posterior(*flat), "leaf", with_mean=with_mean)
    average = jnp.mean if per == "leaf" else lambda x: x
    mean = jax.tree.map(lambda mu: average(mu) if with_mean else jnp.zeros_like(average(mu)), posterior.mean)
    log_precision = jax.tree.map(
        lambda mu, s, m: -jnp.log(average(jnp.exp(2 * s) + (mu - m) ** 2)), posterior.mean, posterior.log_scale, mean
    )
    return log_precision, mean


def local_dense(kernel: Posterior, bias: Posterior | None, x: jax.Array, key: jax.Array) -> jax.Array:
    r"""The outputs of a dense layer with random weights, drawn for each example on their own.

    Of independent Gaussian weights an output is Gaussian, of mean :math:`x\mu + b` and variance
    :math:`x^2 s^2 + s_b^2`: so it is drawn itself, and examples share no noise. Its variance in a gradient is smaller
    than with shared weights.

    Args:
      kernel: of shape (in, out).
      bias: of shape (out,), or None.
      x: shape (n, in).
      key: a PRNG key.

    Returns:
      Shape (n, out).

    Example:
      >>> kernel = jaxhpo.criteria.Posterior(jnp.ones((3, 2)), jnp.full((3, 2), -20.0))
      >>> print(jaxhpo.criteria.local_dense(kernel, None, jnp.ones((4, 3)), jax.random.key(0)).shape)
      (4, 2)

    References:
      Kingma, Salimans, Welling. Variational Dropout and the Local Reparameterization Trick. 2015. arXiv:1506.02557
    """
    mean, variance = x @ kernel.mean, x**2 @ jnp.exp(2 * kernel.log_scale)
    if bias is not None:
        mean, variance = mean + bias.mean[None], variance + jnp.exp(2 * bias.log_scale)[None]
    spread = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)  # of no input: no NaN
    return mean + spread * jax.random.normal(key, mean.shape, mean.dtype)


def density_at_zero(posterior: Posterior) -> PyTree:
    r"""The density of each weight at zero relative to that at its mean, :math:`e^{-\mu^2 / 2s^2}`: near 1, it may go.

    Args:
      posterior: q.

    Returns:
      A pytree like the parameters, of numbers in (0, 1].

    Example:
      >>> q = jaxhpo.criteria.Posterior(jnp.array([0.0, 5.0]), jnp.zeros(2))
      >>> print(jaxhpo.criteria.density_at_zero(q).round(3))
      [1. 0.]

    References:
      Graves. Practical Variational Inference for Neural Networks. 2011.
    """
    return jax.tree.map(lambda mu, s: jnp.exp(-0.5 * jnp.where(mu == 0, 0, mu * jnp.exp(-s)) ** 2), *posterior)


def pruned(posterior: Posterior, fraction: float) -> PyTree:
    """The mean of the posterior with a fraction of its weights set to zero: those of largest density at zero.

    Args:
      posterior: q.
      fraction: of all weights, from 0 to 1; rounded down to a whole number of them.

    Returns:
      Parameters.

    Raises:
      JaxhpoError: a fraction out of its range.

    Example:
      >>> q = jaxhpo.criteria.Posterior(jnp.array([0.1, 5.0, -3.0]), jnp.zeros(3))
      >>> print(jaxhpo.criteria.pruned(q, 0.34))
      [ 0.  5. -3.]

    References:
      Graves. Practical Variational Inference for Neural Networks. 2011.
    """
    if not isinstance(fraction, Tracer) and not 0 <= fraction <= 1:
        raise JaxhpoError(f"`fraction` got {fraction}: write a number from 0 to 1.")
    flat, unravel = ravel_pytree(posterior.mean)
    ratio = jnp.log(jnp.abs(flat)) - ravel_pytree(posterior.log_scale)[0]  # orders as the density does
    rank = jnp.argsort(jnp.argsort(ratio, stable=True))  # not the first so many of an order: `fraction` may be traced
    if isinstance(fraction, Tracer):
        count = jnp.floor(fraction * (1 + jnp.finfo(jnp.result_type(fraction, float)).eps) * flat.size)
    else:
        count = int(fraction * flat.size + 1e-9)
    return unravel(jnp.where(rank < count, 0, flat))
