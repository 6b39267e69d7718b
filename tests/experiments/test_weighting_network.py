"""A weighting network: the long tail, its weights at first, and its hypergradient through one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weighting_network as script

import jaxhpo


def test_the_tail_falls_from_most_to_least():
    counts = script.counts()
    assert (counts[0], counts[-1]) == (script.MOST, script.LEAST) and (np.diff(counts) < 0).all()
    labels = np.array([2, 0, 1, 0, 2, 0])
    np.testing.assert_array_equal(script.first_of_each(labels, [2, 0, 1]), [1, 3, 0])


def test_balanced_weights_give_each_label_the_same():
    labels = np.repeat(np.arange(10), script.counts())
    sums = np.bincount(labels, np.asarray(script.balanced(labels)))
    np.testing.assert_allclose(sums, 1, rtol=1e-4)


def test_untrained_networks_weigh_alike():
    _, network = script.initial(0)
    np.testing.assert_allclose(script.weigh(network, jnp.linspace(0, 8, 5)), 0.5)


def test_accuracies_are_of_each_class():
    params, _ = script.initial(0)
    zero = jax.tree.map(jnp.zeros_like, params)  # says class 0 of everything
    images = jnp.zeros((20, 784)), jnp.arange(20) % 10
    np.testing.assert_allclose(script.accuracies(zero, images), [100] + [0] * 9)


@pytest.mark.slow
def test_one_step_has_the_derivative_of_its_formula():
    """dV/dh = −rate · ∂/∂h (∇L · ∇V(w′)) with w′ = w − rate ∇L; the losses that are weighed are constants."""
    params, network = script.initial(0)
    network = network | {"out": jax.random.normal(jax.random.key(1), (script.UNITS,))}
    x, meta_x = jax.random.normal(jax.random.key(2), (2, 12, 784)) / 10
    images, meta = (x, jnp.arange(12) % 10), (meta_x, jnp.arange(12) % 10)
    solver = jaxhpo.from_optax(script.network_loss, script.OPTIMISER)
    loss = lambda solution, network, images: script.cross_entropies(solution.params, images).mean()  # noqa: E731
    pair = jaxhpo.hypergradient(jaxhpo.Unroll(), solver, loss, num_steps=1)
    state = pair.init(params, network)
    found, _, _ = pair.update(network, state, jax.tree.map(lambda part: part[None], images), meta)

    slope = jax.grad(script.network_loss)(params, network, images)
    moved = jax.tree.map(lambda w, g: w - script.RATE * g, params, slope)
    outer = jax.grad(lambda w: script.cross_entropies(w, meta).mean())(moved)

    def product(network):
        inner = jax.grad(script.network_loss)(params, network, images)
        return -script.RATE * sum(jax.tree.leaves(jax.tree.map(jnp.vdot, inner, outer)))

    expected = jax.grad(product)(network)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-7), found, expected)
