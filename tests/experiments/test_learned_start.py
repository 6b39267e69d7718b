"""A learned start: windows, tasks, the three hypergradients, and memory."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import learned_start
import numpy as np
import pytest
from learned_start import SINUSOIDS

import jaxhpo


def half_square(outputs, targets):
    return 0.5 * jnp.sum((outputs - targets) ** 2)


# A task's example is (nothing, a target t): its loss is ½ ‖w - t‖².
KIND = learned_start.Kind(
    lambda w, x: w, half_square, half_square, rate=0.1, steps=3, pull=2.0, long=400, pace=(0.1, 0.5), tasks=2
)
SUPPORT, QUERY = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[0.0, 1.0], [1.0, -1.0]])
TASKS = (jnp.zeros(2), SUPPORT), (jnp.zeros(2), QUERY)


@pytest.mark.parametrize(
    ("method", "kept", "through"),
    [
        # MAML ends at t + .9³ (start - t), whose derivative is .9³; first-order MAML takes 1 for it.
        ("MAML", 0.9**3, 0.9**3),
        ("first-order", 0.9**3, 1.0),
        # iMAML ends at (t + λ start) / (1 + λ).
        ("iMAML", 2 / 3, 2 / 3),
    ],
)
def test_hypergradients_of_quadratic_tasks_have_closed_forms(method, kept, through):
    start = jnp.array([4.0, -1.0])
    value, gradient = jax.value_and_grad(functools.partial(learned_start.meta_loss, KIND, method))(start, TASKS)
    apart = SUPPORT + kept * (start[None] - SUPPORT) - QUERY
    np.testing.assert_allclose(value, 0.5 * jnp.sum(apart**2, 1).mean(), rtol=1e-8)
    np.testing.assert_allclose(gradient, through * apart.mean(0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["MAML", "iMAML"])
def test_hypergradients_of_sinusoids_agree_with_exact_tangents(method):
    start = learned_start.dense(jax.random.key(0), 1, 8, 1)
    tasks = jax.vmap(learned_start.draw_sinusoid)(jax.random.split(jax.random.key(1), 2))
    steps, exact = (None, None) if method == "MAML" else (learned_start.CONVERGED, jaxhpo.Implicit())
    outer_loss = functools.partial(learned_start.meta_loss, SINUSOIDS, method, tasks=tasks, steps=steps, exact=exact)
    assert jaxhpo.check_hypergradient(outer_loss, start).verdict == "agrees"


def test_windows_are_those_of_the_image_and_each_quarter_is_one_of_the_second_layer():
    image = np.arange(14 * 14).reshape(14, 14)
    found = learned_start.windows(image.reshape(1, -1))[0]
    corners = [(0, 0), (0, 3), (3, 0), (3, 3), (0, 6), (0, 9), (3, 6), (3, 9)]  # of the upper half
    for window, (row, column) in zip(found, corners, strict=False):
        np.testing.assert_array_equal(window.reshape(5, 5), image[row : row + 5, column : column + 5])
    assert len(found) == 16 and len({tuple(w) for w in found.tolist()}) == 16


def test_support_and_query_of_a_task_share_characters_and_no_drawing():
    images = jnp.arange(9 * 20)[:, None] + jnp.zeros(4)[None]  # of character c the drawing d is 20 c + d
    images = images.reshape(9, 20, 4)
    (x, y), (new, labels) = learned_start.draw_characters(images, jax.random.key(0), lambda x: x)
    which = np.asarray(x[:, 0]) // 20
    assert len(set(which)) == 5 and y.tolist() == list(range(5))
    np.testing.assert_array_equal(np.asarray(new[:, 0]) // 20, which[np.asarray(labels)])
    assert len({*np.asarray(new[:, 0]), *np.asarray(x[:, 0])}) == 30


def test_nearest_neighbours():
    task = (jnp.eye(2), jnp.arange(2)), (jnp.array([[0.9, 0.2], [0.1, 0.8], [0.7, 0.6]]), jnp.array([0, 1, 1]))
    np.testing.assert_allclose(learned_start.nearest(task, learned_start.minus_distance), 1 / 3)


@pytest.mark.codegen
def test_memory_of_imaml_does_not_depend_on_the_number_of_inner_steps():
    start = learned_start.dense(jax.random.key(0), 1, 8, 1)
    tasks = jax.vmap(learned_start.draw_sinusoid)(jax.random.split(jax.random.key(1), 4))

    def allocated(method, steps):
        program = jax.jit(jax.grad(lambda w, tasks: learned_start.meta_loss(SINUSOIDS, method, w, tasks, steps)))
        return program.lower(start, tasks).compile().memory_analysis().temp_size_in_bytes

    assert allocated("iMAML", 64) <= 1.02 * allocated("iMAML", 8)
    assert allocated("MAML", 64) > 2 * allocated("MAML", 8)
