"""Hyperparameters that stand still train as constants do; cost and draws are as said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tune_while_training as script

from jaxhpo.data import digits

NUM_STEPS = 20


@pytest.fixture(scope="module")
def parts():
    return jax.tree.map(jnp.asarray, digits(0, train=60, validation=60, test=40))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(script.METHODS))
def test_hyperparameters_that_stand_still_train_as_constants_do(parts, name):
    key = jax.random.key(1)
    weights, h, path = script.tune_while_training(script.METHODS[name], script.start(), key, parts, NUM_STEPS, 0.0)
    for leaf, first in zip(jax.tree.leaves(h), jax.tree.leaves(script.start()), strict=True):
        np.testing.assert_array_equal(leaf, first)
    assert path["log_penalty"].shape == (NUM_STEPS // script.EVERY, 2)
    want = script.train(script.start(), key, parts, NUM_STEPS)
    for got, leaf in zip(jax.tree.leaves(weights), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_hyperparameters_move_and_retraining_differs(parts):
    key = jax.random.key(1)
    weights, h, _ = script.tune_while_training(script.METHODS["T1-T2"], script.start(), key, parts, NUM_STEPS, 0.1)
    assert np.abs(h["log_penalty"] - script.start()["log_penalty"]).min() > 1e-3
    assert not np.allclose(weights["in"], script.train(h, key, parts, NUM_STEPS)["in"], rtol=1e-6)


def test_random_draws_are_in_their_ranges():
    drawn = script.random_draws(jax.random.key(0), 200)
    for name, (low, high) in script.RANGES.items():
        values = np.exp(np.asarray(drawn[name], float))
        assert low <= values.min() < 2 * low and high / 2 < values.max() <= high * 1.000001, name


@pytest.mark.slow
def test_cost_is_counted_from_the_programs(parts):
    found = script.costs(parts, NUM_STEPS)
    assert 1 < found["T1-T2"] < found["real time"]
    assert found["real time, retrained"] == 1 + found["real time"]
