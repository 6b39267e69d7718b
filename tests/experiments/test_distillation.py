"""Distillation: the trainings end where they should, and what is learned lowers the loss on real images."""

import distillation
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo
from jaxhpo.data import Examples


@pytest.fixture
def blobs():
    """Ten classes in twelve dimensions, 30 points each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 30)
    x = rng.normal(size=(10, 12))[labels] + rng.normal(size=(300, 12))
    return Examples(x, labels.astype(np.int32))


def test_training_to_the_optimum_is_softmax_regression():
    """The mean of ten losses + p w² is a tenth of their sum + ½ (20 p) w²."""
    h = {"images": jax.random.normal(jax.random.key(0), (10, 12)), "log_penalty": jnp.log(0.05)}
    found = distillation.train(h, distillation.RECIPES["implicit"], num_steps=2000).params
    optimum = jaxhpo.models.regression.logistic_regression(h["images"], jnp.arange(10), 20 * 0.05, num_classes=10)
    np.testing.assert_allclose(found["weights"], optimum.weights, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unrolled", "implicit"])
def test_learned_images_lower_the_loss_on_real_ones(blobs, name):
    result = distillation.learn(name, blobs, 0, 12)
    assert result.history["value"][0] > 2  # ten classes, and images of noise: about log 10
    assert result.best_value < 0.7 * result.history["value"][0]
    w = distillation.trained(result.best_hparams, name)
    assert distillation.accuracy(w, blobs) > 0.4


@pytest.mark.slow
def test_the_penalty_of_a_control_is_that_of_the_lowest_loss(blobs):
    means = np.stack([blobs.inputs[blobs.targets == k].mean(0) for k in range(10)])
    row = distillation.control(jnp.asarray(means)[None], blobs, blobs)
    losses = {}
    for name in distillation.RECIPES:
        for p in distillation.PENALTIES:
            w = distillation.trained({"images": means, "log_penalty": jnp.log(p)}, name)
            losses[name, p] = float(distillation.loss(w, *blobs))
    assert (row["training"], row["penalty"]) == min(losses, key=losses.get)


def test_mosaic_puts_images_side_by_side():
    images = np.zeros((2, 10, 784))
    images[1, 3, 28 * 5 + 7] = 4.0
    picture = distillation.mosaic(np.where(images == 0, 1e-9, images))
    assert picture.shape == (60, 300, 3)
    assert (picture[30 + 1 + 5, 90 + 1 + 7] == 1).all()
