"""`check_hypergradient` accepts exact hypergradients and finds wrong ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, outer_loss

import jaxhpo
from jaxhpo import Identity, Implicit, Unroll
from jaxhpo._core.trace import flat_by

RIDGE = PROBLEMS["ridge"]
H = jnp.asarray(RIDGE.hparams)


def test_exact_rule_passes():
    check = jaxhpo.check_hypergradient(outer_loss(RIDGE, Unroll(), 30), H)
    assert check.relative_error < 1e-8 and check.cosine > 1 - 1e-12
    assert check.coordinates[2] == "hparams[2]"
    np.testing.assert_allclose(check.numeric, RIDGE.unrolled(RIDGE.hparams, RIDGE.step_size, 30), rtol=1e-7)
    assert "6 coordinates" in str(check) and "\n" not in str(check)


def test_progress_is_shown_after_a_while(monkeypatch, capsys):
    """Of the hypergradient, and of one coordinate."""
    loss = lambda h: h**3  # noqa: E731
    for delay, end in ((np.inf, ""), (0.0, "check_hypergradient 2/2\n")):
        monkeypatch.setattr("jaxhpo._diagnostics.check.EVERY", delay)
        jaxhpo.check_hypergradient(loss, jnp.asarray(1.0))
        shown = capsys.readouterr().err
        assert shown.endswith(end) and bool(shown) == bool(end)


def test_error_of_approximate_rule_is_measured():
    """T1–T2 on ridge: the measured error is that of its closed form."""
    exact = RIDGE.hypergradient(RIDGE.hparams)
    approximate = RIDGE.partial(RIDGE.hparams, lambda A: RIDGE.step_size * np.eye(len(A)))
    check = jaxhpo.check_hypergradient(outer_loss(RIDGE, Implicit(Identity(RIDGE.step_size)), 400), H)
    want = np.linalg.norm(approximate - exact) / np.linalg.norm(exact)
    assert check.relative_error == pytest.approx(want, rel=1e-6)
    assert check.norm_ratio == pytest.approx(np.linalg.norm(approximate) / np.linalg.norm(exact), rel=1e-6)
    assert "worst at hparams[" in str(check) and "bias" in str(check)


def test_random_directions():
    h = jnp.linspace(-1.0, 1.0, 100).reshape(20, 5)
    check = jaxhpo.check_hypergradient(lambda h: jnp.sum(jnp.sin(h)), h, num_directions=7, key=jax.random.key(2))
    assert check.coordinates is None and check.numeric.shape == (7,) and check.relative_error < 1e-9


def test_error_of_float32_differences_is_estimated():
    """The differences' own error is reported; here, where the true error is rounding, it is an upper bound."""
    check = jaxhpo.check_hypergradient(lambda h: jnp.sum(jnp.exp(h)), jnp.linspace(-1, 1, 5, dtype=jnp.float32))
    assert check.relative_error < 1e-3 and check.relative_error < 2 * check.numeric_error


def test_wrong_custom_vjp_is_found():
    @jax.custom_vjp
    def f(x):
        return jnp.sum(x**2)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (g * x,))  # half of the true derivative
    check = jaxhpo.check_hypergradient(f, jnp.arange(1.0, 4.0))
    assert check.relative_error == pytest.approx(0.5, rel=1e-9) and check.norm_ratio == pytest.approx(0.5, rel=1e-9)
    assert check.cosine == pytest.approx(1.0)


def test_leaf_without_effect_is_refused():
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['b'\].*Remove it"):
        jaxhpo.check_hypergradient(lambda h: h["a"] ** 2, {"a": 1.0, "b": 2.0})


X, LABELS = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.5, 2.0]]), jnp.array([1, 0, 0])
FLAT = {
    "argmax": lambda w: jnp.mean(jnp.argmax(X * w[None], 1) == LABELS),
    "gt": lambda w: jax.lax.scan(lambda c, x: (c + jnp.where(jnp.sum(x * w) > 1, 1.0, 0.0), None), 0.0, X)[0],
    "round": lambda w: jnp.round(jnp.sum(X @ w)),
    "sort": lambda w: jnp.sum(jnp.argsort(X @ w) * 1.0),
}


OPERATIONS = {
    # Of logits z, with the operations that alone make them piecewise constant; none where a derivative passes.
    "rank": (lambda z: jnp.mean(jnp.sum(z[:, None] > z[None], 1)), ["gt"]),
    "top k": (lambda z: jnp.sum(jax.lax.top_k(z, 2)[1]), ["top_k"]),
    "of the largest": (lambda z: jnp.sum(jax.lax.top_k(z, 2)[0]), []),
    "sorted": (lambda z: jnp.sort(z)[1], []),
    "sorted by": (lambda z: jax.lax.sort((z, LABELS * 1.0), num_keys=1)[1][0], ["sort"]),
    "precision at 1": (lambda z: LABELS[jnp.argsort(z)][-1] * 1.0, ["sort"]),
    "area under the curve": (lambda z: jnp.mean((z[:, None] >= z[None]) & (LABELS[:, None] > LABELS[None])), ["ge"]),
    "one hot": (lambda z: jax.nn.one_hot(jnp.argmax(z), 3)[0], ["argmax"]),
    "floor": (lambda z: jnp.sum(jnp.floor(z)), ["floor"]),
    "sign": (lambda z: jnp.sum(jnp.sign(z)), ["sign"]),
    "integers": (lambda z: jnp.sum(z.astype(int)) * 1.0, ["convert_element_type"]),
    "branch": (lambda z: jax.lax.cond(z[0] > 0, lambda: 1.0, lambda: 0.0), ["gt"]),
    "where": (lambda z: jnp.sum(jnp.where(z > 0, 1.0, 0.0)), ["gt"]),
    "hinge": (lambda z: jnp.sum(jnp.where(z > 0, z, 0.0)), []),
    "constant": (lambda z: jnp.sum(jax.lax.stop_gradient(z)), []),
}


def test_piecewise_constant_operations_are_told_from_others():
    for name, (fn, operations) in OPERATIONS.items():
        assert flat_by(lambda w, fn=fn: fn(X @ w), jnp.ones(2))[0] == operations, name


@pytest.mark.parametrize("name", FLAT)
def test_a_piecewise_constant_outer_loss_is_named(name):
    """JAX's derivative of an accuracy is zero, but the accuracy depends on the hyperparameters."""

    def outer_loss(h):
        # A train loss with comparisons and signs of its own, which are not at fault.
        solver = jaxhpo.from_optax(lambda w, h, batch: jnp.sum(jnp.abs(w - h) + jax.nn.relu(w * h)), optax.sgd(0.1))
        return FLAT[name](jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=2).params)

    words = f"piecewise constant in it, through `{name}` .*smooth loss.*`EvolutionStrategies`"
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=words):
        jaxhpo.check_hypergradient(outer_loss, jnp.ones(2))


@pytest.mark.parametrize("rule", [jaxhpo.Unroll(), jaxhpo.Unroll(truncate=1)], ids=["exact", "truncated"])
def test_advice_fits_the_rule(rule):
    def train_loss(w, h, batch):
        return jnp.sum((w - h) ** 2) + jnp.sum(jax.lax.stop_gradient(w) * w * h)

    def outer_loss(h):
        solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
        return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=3, adjoint=rule).params ** 2)

    text = str(jaxhpo.check_hypergradient(outer_loss, jnp.ones(2)))
    assert re.search(r"`stop_gradient` \(test_check_hypergradient.py:\d+, in [^;]*train_loss\)", text)
    assert ("truncated" in text) == (rule.truncate is not None)
    assert ("The rule is exact" in text) == (rule.truncate is None)
