"""Cleaning: how labels are spoilt and flags are counted, and that only ratios of weights matter."""

import cleaning
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo


def test_half_of_the_labels_are_drawn_and_a_tenth_of_these_stay_right():
    labels = np.arange(10_000) % 10
    noisy, wrong = cleaning.corrupt(labels, seed=0)
    np.testing.assert_array_equal(wrong, noisy != labels)
    assert abs(wrong.mean() - 0.45) < 0.01  # of 5000 drawn ones 4500 ± 21
    assert not np.array_equal(noisy, cleaning.corrupt(labels, seed=1)[0])


def test_flags_are_counted():
    flags, wrong = np.array([1, 1, 1, 0, 0], bool), np.array([1, 1, 0, 1, 0], bool)
    found = cleaning.flagged(flags, wrong)
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3})
    assert cleaning.flagged(~wrong, wrong)["F1"] == 0


def images(seed, number):
    x = jax.random.normal(jax.random.key(seed), (number, 784)) / 10
    return x, jax.random.randint(jax.random.key(seed + 1), (number,), 0, 10)


@pytest.mark.slow
def test_the_hypergradient_is_orthogonal_to_the_weights():
    """The train loss is of degree 0 in them, so Euler's identity gives Σ w dV/dw = 0."""
    pair = jaxhpo.hypergradient(
        jaxhpo.Implicit(jaxhpo.CG(maxiter=60, tol=1e-6)), cleaning.SOLVER, cleaning.clean_loss, num_steps=300
    )
    weights = jax.random.uniform(jax.random.key(9), (30,), minval=0.2)
    noisy, clean = images(0, 30), images(5, 20)
    slope, _, _ = pair.update(weights, pair.init(cleaning.initial(), weights), lambda t: (noisy, 0.01), clean)
    assert jnp.abs(jnp.vdot(slope, weights)) < 1e-3 * jnp.linalg.norm(slope) * jnp.linalg.norm(weights)


@pytest.mark.slow
def test_the_weights_of_wrong_labels_fall():
    """Two far-apart kinds of images, of which the clean ones tell which label is right."""
    x = jnp.repeat(jnp.eye(2, 784) * 3, 20, axis=0)
    y = jnp.repeat(jnp.arange(2), 20)
    wrong = np.arange(40) % 20 < 6
    learned, losses = cleaning.learn_weights((x, jnp.where(wrong, 1 - y, y)), (x, y), 0.01, 10)
    assert learned[wrong].max() < 0.5 < learned[~wrong].min()
    assert losses[-1] < losses[0]


def test_the_sentence_says_who_wins():
    def less(mean, error):
        return {"mean": mean, "error": error}

    names = ("clean alone", "noisy + clean", "agreeing labels + clean")
    found = {"cleaned less": dict(zip(names, (less(2.0, 0.5), less(0.5, 0.5), less(-2.0, 0.5)), strict=True))}
    said = cleaning.sentence(50, found)
    assert "beats training on them alone (2.00 ± 0.50 points)" in said
    assert "no better or worse than all images alike" in said and "loses to keeping labels" in said
