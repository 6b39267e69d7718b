"""A penalty per weight: the curvature's lower bound, and that 2 is where gradient descent diverges."""

import jax
import jax.numpy as jnp
import numpy as np
import penalty_per_weight as script
import pytest


def problem(log_penalty):
    images = jax.random.normal(jax.random.key(0), (20, 3)), jax.random.randint(jax.random.key(1), (20,), 0, 4)
    w = jax.random.normal(jax.random.key(2), (3, 4))
    hessian = jax.hessian(lambda w: script.train_loss(w, jnp.exp(log_penalty), images))(w).reshape(12, 12)
    return w, images, float(np.linalg.eigvalsh(hessian)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("largest", [-4.0, 3.0])
def test_the_monitor_is_near_the_largest_curvature_and_not_above(largest):
    log_penalty = jnp.full((3, 4), -4.0).at[1, 2].set(largest)
    w, images, exact = problem(log_penalty)
    found = float(script.largest_curvature(w, log_penalty, images))
    assert 0.9 * exact < found <= exact * (1 + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("at_rate", [1.9, 2.1])
def test_gradient_descent_diverges_above_two(at_rate):
    w, images, _ = problem(jnp.zeros((3, 4)))
    log_penalty = jnp.full((3, 4), 5.0)  # far above the curvature of the data
    rate = at_rate / float(script.largest_curvature(w, log_penalty, images))
    slope = jax.jit(jax.grad(lambda w: script.train_loss(w, jnp.exp(log_penalty), images)))
    for _ in range(300):
        w = w - rate * slope(w)
    assert (float(jnp.abs(w).max()) < 1) == (at_rate < 2)


def test_at_the_bound_a_step_takes_a_weight_to_its_optimum_at_once():
    assert script.RATE * np.exp(script.BOUND) == pytest.approx(1)


def test_steps_are_summarised():
    assert script.first([False, True, True]) == 1 and script.first([False]) is None
    assert [script.span(steps) for steps in ([3, 5], [4, 4], [None], [3, None])] == [
        "3 to 5",
        "4",
        "never",
        "3 (never in 1)",
    ]
    lead = {"monitor above 2 at": [10, 12, None], "not finite at": [15, 13, None]}
    assert "foretold 1 to 5 steps ahead" in script.warning(lead)
