"""The pieces of the experiment on attribution: margins, batches, weights, datamodels."""

import attribution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attribution import CHOSEN, Problem


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 6)), rng.integers(0, 10, 100)
    return Problem([(x, y), (x[:20] + 1.0, y[:20])], CHOSEN, 4)


@pytest.fixture(autouse=True)
def promotion():
    """As a script runs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_margins_are_log_odds(problem):
    p = {"in": jnp.ones((6, 32)) / 6, "hidden": jnp.zeros(32), "out": jnp.eye(32, 10), "bias": jnp.arange(10.0)}
    probability = jax.nn.softmax(problem.logits(p, problem.x_test[:10]))[jnp.arange(10), problem.y_test[:10]]
    np.testing.assert_allclose(problem.margins(p), jnp.log(probability / (1 - probability)), rtol=1e-6)


@pytest.mark.slow
def test_an_example_of_weight_zero_is_not_trained_on(problem):
    key, kept = jax.random.key(0), jnp.ones(100).at[7].set(0.0)
    other = Problem([(problem.x.at[7].add(3.0), problem.y), (problem.x_test, problem.y_test)], CHOSEN, 4)
    np.testing.assert_allclose(*(p.margins(p.train(kept, key)) for p in (problem, other)), rtol=1e-12)
    with_it = (p.margins(p.train(jnp.ones(100), key)) for p in (problem, other))
    assert not np.allclose(*with_it)  # four batches of 50 of 100: all are seen


def test_datamodels_recover_a_linear_training():
    class Linear:
        n = 20
        true = jnp.asarray(np.random.default_rng(1).normal(size=(3, 20)))

        def train(self, weights, key):
            return self.true.astype(weights.dtype) @ weights

        def margins(self, trained):
            return trained

    linear = Linear()
    found = attribution.datamodels(linear, [10, 200], jax.random.key(0), 0)
    assert found[10].shape == (3, 20)
    # Each training is without as many, so that what all examples share is not in the data.
    off = {count: scores - linear.true for count, scores in found.items()}
    off = {count: np.abs(error - error.mean(axis=1, keepdims=True)).max() for count, error in off.items()}
    assert off[200] < 0.01 and off[10] > 0.1


def test_means_over_seeds():
    rows = [{"methods": {"a": {"lds": {d: value for d in ("0.01", "0.05", "0.2")}}}} for value in (0.5, 0.7)]
    found = attribution.over_seeds(rows, "methods", "lds")["a"]["0.2"]
    assert found["mean"] == pytest.approx(0.6) and found["error"] == pytest.approx(0.1)
