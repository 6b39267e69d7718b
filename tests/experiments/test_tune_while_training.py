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


def test_what_is_tuned_is_compared_with_the_start_on_all_images_seed_by_seed():
    names = ("T1-T2", "T1-T2, retrained", "real time", "real time, retrained", "start's values")
    scores = [{name: [1.0, 2.0 + i + seed, 0.5] for i, name in enumerate(names)} for seed in range(3)]
    on_all = [{"start's values": [0.0, 1.0 - seed, 0.75]} for seed in range(3)]
    rows = [{"scores": one, "on all": every} for one, every in zip(scores, on_all, strict=True)]
    found = script.compared(rows, dict.fromkeys(names, 1.0))
    less = found["less the start's values on all"]
    want = np.array([2.0 - 1, 3.0 - 0, 4.0 + 1])  # of test losses
    error = want.std(ddof=1) / 3**0.5
    assert less["T1-T2"]["test"] == {"mean": 3.0, "error": pytest.approx(error), "n": 3, "lower in": 0}
    assert less["start's values, on all"]["accuracy"]["mean"] == 0
    assert found["summary"]["start's values"]["accuracy, on all"]["mean"] == 0.75
    assert "test, on all" not in found["summary"]["T1-T2"]
    above = np.mean([100 * (2 / 3 - 1), 100 * (3 / 4 - 1), 100 * (4 / 5 - 1)])
    assert found["above retraining, %"]["T1-T2"]["test"]["mean"] == pytest.approx(above)


@pytest.mark.slow
def test_training_on_all_images_takes_the_validation_images_too(parts):
    key = jax.random.key(1)
    _, on_all, _ = script.everything(key, parts, NUM_STEPS)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), parts.train, parts.validation)
    want = script.scores(script.train(script.start(), key, parts._replace(train=both), NUM_STEPS), parts)
    np.testing.assert_allclose(on_all["start's values"], want, rtol=1e-5)
    assert set(on_all) == {"T1-T2, retrained", "real time, retrained", "start's values", "best of 10 random"}
