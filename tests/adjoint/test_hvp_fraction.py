"""Hessian products on a random part of each minibatch: unbiased, cheaper, refused where no part will do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import Unroll

slow = pytest.mark.slow
BATCH, STEPS = 8, 5


def network(adjoint, reduce=jnp.mean, num_steps=STEPS):
    """Two layers, with weights of the examples, a decay of every weight and a rate of every step."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"in": jax.random.normal(keys[0], (3, 6)) / 2, "out": jax.random.normal(keys[1], (6,)) / 2}
    x = jax.random.normal(keys[2], (num_steps, BATCH, 3))
    y = jax.random.normal(keys[3], (num_steps, BATCH))

    def train_loss(p, h, batch):
        x, y, weights, _ = batch
        error = (jnp.tanh(x @ p["in"]) @ p["out"] - y) ** 2
        decay = sum(jnp.sum(jnp.exp(h["decay"]) * w**2) for w in jax.tree.leaves(p))
        return reduce(weights * error) + decay

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(lambda t: h["rate"][t], momentum=0.9))

    def outer(h, key):
        def batch(t):
            return x[t], y[t], jnp.exp(h["example"]), jnp.asarray(t)

        start = solver.init(params, h)
        sol = jaxhpo.solve(solver, start, h, batch, num_steps=num_steps, adjoint=adjoint, key=key)
        return jnp.sum(sol.params["in"] ** 2) + jnp.sum(sol.params["out"] ** 4)

    h = {"decay": jnp.array(-3.0), "rate": jnp.full(num_steps, 0.05), "example": jnp.zeros(BATCH)}
    return outer, h


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def exact_value_and_grad():
    outer, h = network(Unroll())
    return jax.jit(jax.value_and_grad(outer))(h, None)


@slow
@pytest.mark.parametrize("checkpoint", ["auto", None, 1, 2, "binomial"], ids=str)
def test_unbiased(checkpoint):
    """The mean of 2000 draws is the exact hypergradient within five standard errors, entry by entry; its value exact.

    Products of different steps are of independent parts, and the backward pass is linear in each of them.
    """
    outer, h = network(Unroll(checkpoint=checkpoint, hvp_fraction=0.25))
    keys = jax.random.split(jax.random.key(7), 2000)
    values, draws = jax.jit(jax.vmap(jax.value_and_grad(outer), in_axes=(None, 0)))(h, keys)
    value, exact = exact_value_and_grad()
    draws = np.concatenate([np.reshape(leaf, (2000, -1)) for leaf in jax.tree.leaves(draws)], axis=1)
    error, deviation = draws.mean(0) - flat(exact), draws.std(0, ddof=1)
    np.testing.assert_allclose(values, value, rtol=1e-12)
    # What acts in no Hessian product but the last step's rate is not random at all.
    assert (deviation > 1e-9).sum() >= draws.shape[1] - 2
    assert (np.abs(error) <= 5 * deviation / 2000**0.5 + 1e-12).all()


@pytest.mark.parametrize("checkpoint", [1, pytest.param("binomial", marks=slow)])
def test_the_whole_minibatch_is_exact(checkpoint):
    outer, h = network(Unroll(checkpoint=checkpoint, hvp_fraction=1.0))
    exact, _ = network(Unroll())
    got, want = (flat(jax.jit(jax.grad(f))(h, jax.random.key(0))) for f in (outer, exact))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "reduce",
    [
        jnp.sum,
        pytest.param(lambda e: jnp.mean(e) / (1 + jnp.std(e)), marks=slow),
        pytest.param(lambda e: jnp.max(e), marks=slow),
    ],
    ids=["sum", "normalised", "max"],
)
def test_what_is_no_mean_is_refused(reduce):
    outer, h = network(Unroll(hvp_fraction=0.5), reduce)
    assert jnp.isnan(jax.jit(outer)(h, jax.random.key(0)))


def test_weights_of_zero_hide_nothing():
    """At them, a loss that normalises over the batch is what a mean would be."""
    x = jax.random.normal(jax.random.key(0), (3, 8, 4))

    def normalising(p, h, b):
        b = (b - b.mean(0, keepdims=True)) / jnp.sqrt(b.var(0, keepdims=True) + 0.01)
        return jnp.mean(jnp.logaddexp(0, b @ p)) + h * jnp.sum(p**2)

    solver, h = jaxhpo.from_optax(normalising, optax.sgd(0.1)), jnp.ones(())
    rule, key = Unroll(hvp_fraction=0.5), jax.random.key(0)
    run = jax.jit(lambda h: jaxhpo.solve(solver, solver.init(jnp.zeros(4), h), h, x, adjoint=rule, key=key).params)
    assert jnp.isnan(run(h)).all()


@slow
def test_dropout():
    """One mask for the batch is another for half of it; a key for each example is a mean."""
    x, key = jax.random.normal(jax.random.key(0), (3, 8, 4)), jax.random.key(1)

    def loss(p, h, b):
        x, key = b
        if key.shape:
            mask = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(key)
        else:
            mask = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.mean(((x * mask) @ p - 1.0) ** 2)

    solver = jaxhpo.from_optax(loss, optax.sgd(0.1))

    @functools.partial(jax.jit, static_argnums=1)
    def run(batches, rule=Unroll(hvp_fraction=0.5)):  # noqa: B008 (frozen)
        start = solver.init(jnp.ones(4), None)
        return jaxhpo.solve(solver, start, None, batches, key=key, adjoint=rule).params

    assert jnp.isnan(run((x, jax.random.split(key, 3)))).all()
    assert jnp.isfinite(run((x, jax.random.split(key, (3, 8))))).all()
    assert jnp.isfinite(run((x, jax.random.split(key, 3)), Unroll(hvp_fraction=1.0))).all()


@slow
def test_a_loss_that_is_not_finite_is_told_as_such():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.mean(jnp.sqrt(b @ p)) + h * jnp.sum(p**2), optax.sgd(0.1))

    def outer(h):
        x = -jnp.ones((3, 4, 2))
        rule = Unroll(hvp_fraction=0.5)
        start = solver.init(jnp.ones(2), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, x, adjoint=rule, key=jax.random.key(0)).params)

    with pytest.raises(jaxhpo.NonFiniteError, match="not finite at inner step 0.*square root of -2"):
        jaxhpo.check_hypergradient(outer, jnp.ones(()))


@slow
def test_the_check_says_why():
    outer, h = network(Unroll(hvp_fraction=0.5), jnp.sum)
    with pytest.raises(jaxhpo.NonFiniteError, match=r"not a mean over the examples.*Write a mean"):
        jaxhpo.check_hypergradient(lambda h: outer(h, jax.random.key(0)), h)


def test_a_mean_in_low_precision_is_none_the_less_a_mean():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.mean((b @ p) ** 2).astype(jnp.float32), optax.sgd(0.1))
    x = jax.random.normal(jax.random.key(0), (3, 9, 4), jnp.bfloat16)
    start = solver.init(jnp.ones(4, jnp.bfloat16), None)
    rule, key = Unroll(hvp_fraction=0.5), jax.random.key(0)
    params = jax.jit(lambda x: jaxhpo.solve(solver, start, None, x, adjoint=rule, key=key).params)(x)
    assert jnp.isfinite(params).all()


def test_mistakes():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(p**2) * h, optax.sgd(0.1))
    start, h, rule = solver.init(jnp.ones(3), jnp.ones(())), jnp.ones(()), Unroll(hvp_fraction=0.5)
    run = functools.partial(jaxhpo.solve, solver, start, h, num_steps=3, adjoint=rule)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"got no key: write `solve\(\.\.\., key=key\)`"):
        run(jnp.ones((3, 4)))
    with pytest.raises(jaxhpo.JaxhpoError, match="`key` got 0"):
        run(jnp.ones((3, 4)), key=0)
    with pytest.raises(jaxhpo.JaxhpoError, match="hold no examples.*leading axis"):
        run(key=jax.random.key(0))
    with pytest.raises(jaxhpo.JaxhpoError, match=r"`batch\[0\]` has 4 examples and `batch\[1\]` has 5"):
        run((jnp.ones((3, 4)), jnp.ones((3, 5))), key=jax.random.key(0))
    fixed = jaxhpo.fixed_point(lambda p, h, b: p * h)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"Hessian products of a train loss, and `fixed_point` has none"):
        jaxhpo.solve(fixed, fixed.init(jnp.ones(3), h), h, num_steps=3, adjoint=rule, key=jax.random.key(0))
    for wrong in (0.0, 1.5, -1.0, True):
        with pytest.raises(jaxhpo.JaxhpoError, match="hvp_fraction"):
            Unroll(hvp_fraction=wrong)
