"""Shared layers: the matrices mean what they are said to mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_layers

import jaxhpo


@pytest.fixture
def small(monkeypatch):
    """Two tasks of three characters, four pixels."""
    for name, value in {"TASKS": 2, "CHARACTERS": 3, "WIDTHS": (4, 5, 4, 3), "STEPS": 6, "RATE": 0.1}.items():
        monkeypatch.setattr(shared_layers, name, value)
    images = jax.random.normal(jax.random.key(0), (2, 3, 12, 4))
    z = [jax.random.normal(jax.random.key(i), (2, m + 1, n)) for i, (m, n) in enumerate([(4, 5), (5, 4), (4, 3)])]
    return images, z


@pytest.mark.slow
def test_separate_tasks_do_not_notice_each_other(small):
    images, z = small
    eye = jnp.stack([jnp.eye(2)] * 3)
    both = shared_layers.train(eye, images, z)
    other = shared_layers.train(eye, images.at[1].set(0.0), z)
    for layer, same in zip(both, other, strict=True):
        np.testing.assert_allclose(layer[0], same[0], rtol=1e-10)
        assert abs(layer[1] - same[1]).max() > 1e-3


def test_a_tied_layer_is_one_layer(small):
    images, z = small
    mix = jnp.stack([jnp.full((2, 2), 0.5), jnp.eye(2), jnp.eye(2)])
    first, second, _ = shared_layers.train(mix, images, z)
    np.testing.assert_allclose(first[0], first[1], rtol=1e-12)
    assert abs(second[0] - second[1]).max() > 1e-3


def test_loss_is_the_mean_over_tasks(small):
    images, z = small
    alone = [shared_layers.cross_entropy([w[i : i + 1] for w in z], images[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(shared_layers.cross_entropy(z, images), np.mean(alone), rtol=1e-10)


@pytest.mark.slow
def test_the_hypergradient_of_the_matrices_is_exact(small):
    images, z = small
    mix = jnp.stack([0.5 * jnp.eye(2) + 0.25] * 3)

    def outer_loss(mix):
        return shared_layers.cross_entropy(shared_layers.train(mix, images[:, :, 2:], z), images[:, :, :2])

    assert jaxhpo.check_hypergradient(outer_loss, mix).verdict == "agrees"
