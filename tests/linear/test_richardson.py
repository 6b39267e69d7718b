"""Richardson's iteration, which goes on from where it stood, and the batch on which a pair's linear system stands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import HOAG, Implicit, LinearStatus, Neumann, Richardson

A = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]])
B = jnp.array([1.0, -2.0, 0.5])


def product(v):
    return A @ v


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_from_zero_it_is_the_series_of_neumann(num_steps):
    x, info = Richardson(0.4, num_steps)(product, B)
    y, series = Neumann(num_steps, 0.4)(product, B)
    np.testing.assert_allclose(x, y, rtol=1e-13)
    np.testing.assert_allclose(info.residual, series.residual, rtol=1e-12)
    assert (info.num_iterations, info.status) == (series.num_iterations, series.status)


def test_steps_in_several_calls_are_those_of_one():
    once, _ = Richardson(0.4, 6)(product, B, jnp.ones(3))
    x = jnp.ones(3)
    for _ in range(3):
        x, info = Richardson(0.4, 2)(product, B, x)
    np.testing.assert_allclose(x, once, rtol=1e-13)
    assert info.num_iterations == 2
    error = np.linalg.matrix_power(np.eye(3) - 0.4 * A, 6) @ (1 - np.linalg.solve(A, B))
    np.testing.assert_allclose(x - jnp.linalg.solve(A, B), error, rtol=1e-12)


def test_its_status_says_whether_the_residual_fell():
    assert Richardson(0.4, 200)(product, B)[1].status == LinearStatus.CONVERGED
    assert Richardson(0.4)(product, B, jnp.ones(3))[1].status == LinearStatus.MAX_ITERATIONS
    grown = Richardson(1.5)(product, B, jnp.ones(3))[1]  # above 2 / λ_max, .97
    assert grown.status == LinearStatus.STALLED and not grown.failed
    lost = Richardson(0.4)(lambda v: v * jnp.nan, B, jnp.ones(3))[1]
    assert lost.status == LinearStatus.NOT_FINITE and lost.failed


DATA = jax.random.normal(jax.random.key(0), (8, 5, 3))
SOLVER = jaxhpo.from_optax(lambda w, h, x: jnp.mean((x @ w - 1) ** 2) + jnp.exp(h) * jnp.sum(w**2), optax.sgd(0.1))


def outer_loss(solution, h, batch):
    return jnp.sum((solution.params - 1) ** 2)


def update_of(method, condition_batch, key=None):
    pair = jaxhpo.hypergradient(method, SOLVER, outer_loss, num_steps=3, condition_batch=condition_batch)
    h = jnp.array(-1.0)
    return pair.update(h, pair.init(jnp.zeros(3), h), DATA[:3], key=key)


@pytest.mark.slow
def test_with_one_step_of_each_theta_and_v_move_together():
    pair = jaxhpo.hypergradient(
        Implicit(Richardson(0.1)), SOLVER, outer_loss, num_steps=1, condition_batch=DATA.reshape(-1, 3)
    )
    h = jnp.array(-1.0)
    w, q, state = jnp.zeros(3), jnp.zeros(3), pair.init(jnp.zeros(3), h)
    for t in range(4):
        grad, state, _ = pair.update(h, state, DATA[t : t + 1])
        # Written out: a step of w on its minibatch, one of q on the whole data, and the implicit formula with that q.
        x, whole = DATA[t], DATA.reshape(-1, 3)
        w = w - 0.1 * (2 * x.T @ (x @ w - 1) / len(x) + 2 * jnp.exp(h) * w)
        hessian = 2 * (whole.T @ whole / len(whole) + jnp.exp(h) * jnp.eye(3))
        q = q + 0.1 * (2 * (w - 1) - hessian @ q)
        np.testing.assert_allclose(state.inner.params, w, rtol=1e-12)
        np.testing.assert_allclose(state.linear_solution, q, rtol=1e-12)
        np.testing.assert_allclose(grad, -2 * jnp.exp(h) * w @ q, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Implicit(jaxhpo.Direct()), HOAG(tolerance="exact")], ids=["Implicit", "HOAG"])
def test_the_linear_system_stands_on_the_batch_that_is_given(method):
    h, whole = jnp.array(-1.0), DATA.reshape(-1, 3)
    got, after, _ = update_of(method, whole)
    w = after.inner.params
    hessian = 2 * (whole.T @ whole / len(whole) + jnp.exp(h) * jnp.eye(3))
    want = -2 * jnp.exp(h) * w @ jnp.linalg.solve(hessian, 2 * (w - 1))
    np.testing.assert_allclose(got, want, rtol=1e-9)  # CG to 2e-12 of a matrix of condition 3
    assert abs(update_of(method, None)[0] / want - 1) > 1e-3  # that of the last step's minibatch is another


@pytest.mark.slow
def test_a_batch_is_drawn_by_the_key_of_the_update():
    draw = lambda key: DATA[jax.random.randint(key, (), 0, 8)]  # noqa: E731
    method, keys = Implicit(jaxhpo.Direct()), jax.random.split(jax.random.key(1), 6)
    every = [float(update_of(method, DATA[i])[0]) for i in range(8)]
    drawn = [float(update_of(method, draw, key)[0]) for key in keys]
    assert all(np.isclose(x, every, rtol=1e-12).any() for x in drawn)
    assert len({round(x, 9) for x in drawn}) > 1
    with pytest.raises(jaxhpo.JaxhpoError, match="key"):
        update_of(method, draw)


@pytest.mark.parametrize("method", [jaxhpo.Unroll(), jaxhpo.RealTime(), jaxhpo.single_loop.Online()])
def test_methods_without_a_linear_system_refuse_a_batch_for_it(method):
    with pytest.raises(jaxhpo.JaxhpoError, match="omit it, or write `Implicit"):
        jaxhpo.hypergradient(method, SOLVER, outer_loss, num_steps=3, condition_batch=DATA[0])


def test_a_batch_of_another_structure_is_named():
    with pytest.raises(jaxhpo.JaxhpoError, match="condition_batch"):
        update_of(Implicit(), (DATA[0], DATA[0]))


def test_functions_that_draw_no_batch_are_named():
    with pytest.raises(jaxhpo.JaxhpoError, match=r"write it as `condition_batch\(key\)`"):
        update_of(Implicit(), lambda: DATA[0])
    with pytest.raises(jaxhpo.JaxhpoError, match="'condition_batch' draws random numbers"):
        update_of(Implicit(), lambda key: DATA[0])
    with pytest.raises(jaxhpo.JaxhpoError, match="`condition_batch.key.` returned None"):  # not the last step's
        update_of(Implicit(), lambda key: None, jax.random.key(0))
