"""Relaxed discrete choices against the categorical distribution, quadrature, and enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxhpo import JaxhpoError, criteria

LOG_WEIGHTS = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))


def samples(temperature, n=20_000, **how):
    keys = jax.random.split(jax.random.key(0), n)
    return jax.vmap(lambda key: criteria.concrete(key, LOG_WEIGHTS, temperature, **how))(keys)


@pytest.mark.parametrize("how", [{"temperature": 1e-3}, {"temperature": 1.0, "hard": True}], ids=["cold", "hard"])
def test_samples_are_those_of_the_categorical_distribution(how):
    """χ² of counts, whose p-value would be below .001 once in a thousand fixed seeds; other weights are told apart."""
    drawn = samples(**how)
    assert np.mean(np.asarray(drawn.max(-1)) > 0.99) > 0.97  # one-hot, or nearly
    counts = np.bincount(np.asarray(drawn.argmax(-1)), minlength=4)
    expected = np.exp(LOG_WEIGHTS) * counts.sum()
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
    assert scipy.stats.chisquare(counts, np.array([0.48, 0.32, 0.15, 0.05]) * counts.sum()).pvalue < 1e-3


def test_hot_samples_are_the_centre_of_the_simplex():
    np.testing.assert_allclose(samples(1e4, 100), 0.25, atol=1e-2)


@pytest.mark.slow
def test_density_is_that_of_the_samples():
    """Of two choices: it integrates to one, and its distribution function is that of the samples (Kolmogorov)."""
    log_weights, t = jnp.array([0.4, -0.3]), 0.7
    x = 1 / (1 + np.exp(-np.linspace(-40, 40, 400_001)))  # quadrature in the logit, where the tails are smooth
    inside = (x > 0) & (x < 1)
    x = x[inside]
    logs = criteria.concrete_log_density(np.stack([x, 1 - x], 1), log_weights[None], t)
    step = 80 / 400_000
    np.testing.assert_allclose(np.sum(np.exp(logs) * x * (1 - x)) * step, 1, rtol=1e-6)
    keys = jax.random.split(jax.random.key(1), 5000)
    drawn = np.asarray(jax.vmap(lambda key: criteria.concrete(key, log_weights, t))(keys)[:, 0])
    cdf = np.interp(np.sort(drawn), x, np.cumsum(np.exp(logs) * x * (1 - x)) * step)
    assert np.abs(cdf - (np.arange(5000) + 0.5) / 5000).max() < 1.95 / 5000**0.5  # the .1 % point of Kolmogorov's law


def test_the_density_of_three_choices_is_the_papers():
    """Maddison et al., eq. 10, entry by entry; at the centre, for equal weights and t = 1, 2! 3⁶ / 9³ = 2."""
    a, g, t = np.array([0.2, 1.5, 0.7]), np.array([0.2, 0.5, 0.3]), 0.6
    expected = np.log(2 * t**2 * np.prod(a * g ** (-t - 1)) / np.sum(a * g**-t) ** 3)
    np.testing.assert_allclose(criteria.concrete_log_density(g, np.log(a), t), expected, rtol=1e-12)
    np.testing.assert_allclose(
        criteria.concrete_log_density(np.full(3, 1 / 3), np.zeros(3), 1.0), np.log(2), rtol=1e-12
    )


@pytest.mark.slow
def test_gradient_is_near_enumeration():
    """Of E f(one-hot) = Σ pₖ cₖ, whose gradient is p ∘ (c − p·c); as t falls, the bias of the relaxed one goes."""
    costs = jnp.array([1.0, -2.0, 0.5, 3.0])
    p = jnp.exp(LOG_WEIGHTS)
    exact = p * (costs - p @ costs)
    keys = jax.random.split(jax.random.key(2), 40_000)
    bias = {}
    for t in (2.0, 0.5, 0.1):

        def loss(log_weights, key, t=t):
            return jnp.sum(criteria.concrete(key, log_weights, t) * costs)

        each = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(LOG_WEIGHTS, keys))
        error = np.linalg.norm(each.std(0)) / 40_000**0.5
        bias[t] = np.linalg.norm(each.mean(0) - exact), error
    assert bias[2.0][0] > bias[0.5][0] > bias[0.1][0]
    assert bias[0.1][0] < 0.02 * np.linalg.norm(exact) + 3 * bias[0.1][1]
    assert bias[0.1][1] > bias[2.0][1]  # variance grows


@pytest.mark.slow
def test_straight_through_has_the_soft_gradient():
    costs = jnp.array([1.0, -2.0, 0.5, 3.0])
    key = jax.random.key(3)
    soft, hard = (jax.grad(lambda w, h=h: criteria.concrete(key, w, 0.5, hard=h) @ costs)(LOG_WEIGHTS) for h in (0, 1))
    np.testing.assert_allclose(hard, soft, rtol=1e-12)


def test_width_mask_counts_units():
    np.testing.assert_allclose(criteria.width_mask(3.0, 5, 1e-3), [1, 1, 1, 0, 0], atol=1e-12)
    assert jax.grad(lambda w: criteria.width_mask(w, 5, 0.5).sum())(3.0) > 0
    # each unit more is a unit more in the sum, away from the ends
    total = [criteria.width_mask(w, 40, 0.5).sum() for w in (15.0, 16.0)]
    np.testing.assert_allclose(total[1] - total[0], 1, atol=1e-9)


def test_the_gap_is_between_one_hot_and_mixture():
    weights = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([[2.0, 0.0], [0.0, 3.0]])}

    def loss(w):
        return jnp.sum(w["a"] * jnp.array([1.0, 5.0])) + jnp.sum(w["b"] ** 2)

    soft = loss(jax.tree.map(jax.nn.softmax, weights))
    np.testing.assert_allclose(criteria.discretisation_gap(loss, weights), 5.0 + 2.0 - soft, rtol=1e-12)
    with pytest.raises(JaxhpoError, match="loss"):
        criteria.discretisation_gap(lambda: 0.0, weights)


def test_integer_weights_are_floats():
    key, whole = jax.random.key(0), [0, 1, 2]
    np.testing.assert_array_equal(criteria.concrete(key, whole, 1), criteria.concrete(key, jnp.arange(3.0), 1.0))
    sample = jnp.array([0.2, 0.3, 0.5])
    np.testing.assert_array_equal(
        criteria.concrete_log_density(sample, whole, 2), criteria.concrete_log_density(sample, jnp.arange(3.0), 2.0)
    )
    jax.jit(criteria.concrete)(key, jnp.arange(3), 0.5)  # a temperature that is traced is not looked at
