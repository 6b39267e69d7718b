"""Learned augmentation: the warp is the affine map that it is said to be."""

import augmentation
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(0), (3, 64))


def square(images):
    return np.asarray(images).reshape(-1, 8, 8)


def test_no_change_is_no_warp(images):
    np.testing.assert_allclose(augmentation.warp(images, jnp.zeros((3, 6))), images, atol=1e-12)


def test_shifts_move_by_whole_and_half_pixels(images):
    down = jnp.zeros((3, 6)).at[:, 4].set(2 / augmentation.SHIFT)  # each place shows what is two rows further down
    found = square(augmentation.warp(images, down))
    np.testing.assert_allclose(found[:, :6], square(images)[:, 2:], atol=1e-12)
    np.testing.assert_allclose(found[:, 6:], 0, atol=1e-12)
    half = jnp.zeros((3, 6)).at[:, 5].set(0.5 / augmentation.SHIFT)
    expected = (square(images)[..., :-1] + square(images)[..., 1:]) / 2
    np.testing.assert_allclose(square(augmentation.warp(images, half))[..., :-1], expected, atol=1e-12)


def test_a_quarter_turn_is_one(images):
    turn = jnp.array([[-1.0, -1.0, 1.0, -1.0, 0.0, 0.0]])  # I + this is a rotation by 90°
    found = square(augmentation.warp(images, jnp.tile(turn, (3, 1))))
    np.testing.assert_allclose(found, np.rot90(square(images), -1, (1, 2)), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["strengths", "network"])
def test_the_hypergradient_is_exact(kind, monkeypatch):
    monkeypatch.setattr(augmentation, "STEPS", 5)
    parts = jaxhpo.data.digits(100, train=20, validation=20)
    h = augmentation.begin(kind, jax.random.key(0))

    def outer_loss(h):
        w = augmentation.train(h, 1e-3, parts.train, jax.random.key(1))
        return augmentation.cross_entropy(w, *parts.validation)

    assert jaxhpo.check_hypergradient(outer_loss, h).verdict == "agrees"
