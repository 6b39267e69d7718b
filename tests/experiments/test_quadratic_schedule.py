"""The expected loss is that of SGD; families are what they are called; the search keeps to its budget."""

import jax.numpy as jnp
import numpy as np
import pytest
import quadratic_schedule as script


def test_the_recursion_is_the_mean_of_simulated_runs():
    values, rates, noise, batch, runs = np.array([1.0, 0.3, 0.1]), np.array([0.5, 0.9, 0.2, 0.6]), 0.5, 2, 40_000
    rng, error = np.random.default_rng(0), np.ones((runs, 3))
    for rate in rates:
        x = rng.normal(size=(runs, batch, 3)) * values**0.5
        residual = np.einsum("nbk,nk->nb", x, error) - noise**0.5 * rng.normal(size=(runs, batch))
        error = error - rate * np.einsum("nbk,nb->nk", x, residual) / batch
    losses = 0.5 * error**2 @ values
    want = script.make_loss(noise, jnp.array(values), batch)(jnp.log(rates))
    sem = losses.std() / runs**0.5
    assert sem < 0.03 * want and abs(losses.mean() - want) < 4 * sem


def test_the_recursion_is_that_of_the_whole_matrix():
    values, rates = np.array([1.0, 0.3, 0.1]), np.array([0.5, 0.9])
    H, C, batch, noise = np.diag(values), np.eye(3), script.BATCH, 0.5
    for rate in rates:
        spread = (1 + 1 / batch) * H @ C @ H + (np.trace(H @ C) + noise) / batch * H
        C = C - rate * (H @ C + C @ H) + rate**2 * spread
    assert script.make_loss(noise, jnp.array(values))(jnp.log(rates)) == pytest.approx(0.5 * np.trace(H @ C), rel=1e-12)


def test_families_are_what_they_are_called():
    drawn = script.families(50, 200, np.random.default_rng(0))
    assert len(drawn) == 7
    for name, rates in drawn.items():
        assert rates.shape == (50, 200), name
        assert (rates > 0).all() and rates.max() <= 2, name
    assert np.ptp(drawn["constant"], 1).max() == 0
    changes = (np.diff(drawn["step"], axis=1) != 0).sum(1)
    assert (np.diff(drawn["step"], axis=1) <= 0).all() and changes.max() == 2
    for name in ("linear", "cosine", "power", "warm-up, stable, decay"):  # up, then down
        turns = np.diff(np.sign(np.round(np.diff(drawn[name], axis=1), 12)), axis=1)
        assert (turns <= 0).all(), name
    top = drawn["one cycle"].argmax(1)
    assert (0.04 * 200 <= top).all() and (top <= 0.61 * 200).all()


def test_the_search_keeps_to_its_budget_and_improves():
    loss = script.make_loss(0.5, script.eigenvalues(20))
    found = script.by_hypergradient(loss, 30, 20)
    assert found["trainings"] <= 30 < found["trainings"] + found["trainings a hypergradient"]
    assert len(found["spent"]) == len(found["found"]) and found["spent"][-1] == pytest.approx(found["trainings"])
    constants = len(script.CONSTANTS)
    assert found["found"][-1] == found["loss"] < found["found"][constants - 1]
    assert float(loss(jnp.log(jnp.array(found["rates"])))) == pytest.approx(found["loss"])
