"""`attribution`, `lds` and `drop_curves`, against closed forms of weighted ridge regression and exact retraining."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jaxhpo
from jaxhpo import CG, Attribution, Implicit, JaxhpoError, NonFiniteError, Unroll, ZeroHypergradientError, attribution
from jaxhpo._diagnostics.attribution.retraining import _rank_correlations

N, M = 30, 4
X, NEW = np.random.default_rng(0).normal(size=(N, 3)), np.random.default_rng(1).normal(size=(M, 3))
Y = X.sum(axis=1) + np.random.default_rng(2).normal(size=N)
PENALTY = 0.5


def train(weights):
    """Ridge regression, in closed form."""
    gram = X.T @ (weights[:, None] * X) + PENALTY * jnp.eye(3)
    return jnp.linalg.solve(gram, X.T @ (weights * Y))


def measure(theta):
    return NEW @ theta


def closed_form(weights):
    """dθ/dw_i = A⁻¹ x_i (y_i − x_iᵀ θ), with A = Xᵀ W X + penalty."""
    theta = np.asarray(train(jnp.asarray(weights)))
    return NEW @ np.linalg.solve(X.T @ (weights[:, None] * X) + PENALTY * np.eye(3), X.T * (Y - X @ theta))


def noisy(weights, key):
    """A training with a seed of its own, that adds the same to all trainings with its key."""
    return train(weights) + jax.random.normal(key, (3,))


def quiet(train, measure, num_examples, **settings):
    return attribution(train, measure, num_examples, **{"checks": 0, "progress": False, **settings})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_the_derivative(batch_size):
    found = quiet(train, measure, N, batch_size=batch_size)
    np.testing.assert_allclose(found.scores, closed_form(np.ones(N)), rtol=1e-9)
    np.testing.assert_allclose(found.base, measure(train(jnp.ones(N))), rtol=1e-12)
    assert found.foretells is None and found.trainings > 1


@pytest.mark.parametrize("rule", [Unroll(), Implicit(CG())])
def test_any_solver_and_rule(rule):
    def loss(theta, w, batch):
        return jnp.sum(w * (X @ theta - Y) ** 2) + PENALTY * jnp.sum(theta**2)

    solver = jaxhpo.from_optax(loss, optax.sgd(0.01))

    def trained(w):
        return jaxhpo.solve(solver, solver.init(jnp.zeros(3), w), w, num_steps=300, adjoint=rule).params

    found = quiet(trained, measure, N)
    np.testing.assert_allclose(found.scores, closed_form(np.ones(N)), rtol=1e-6, atol=1e-9)


def test_the_mean_over_subsets():
    """Scores are the mean of those of subsets, and `base` is what they foretell of all examples."""
    found = quiet(train, measure, N, repeats=3, drop=0.2)
    calls = []

    def spied(weights):
        jax.debug.callback(lambda w: calls.append(np.asarray(w)), weights)
        return train(weights)

    quiet(spied, measure, N, repeats=3, drop=0.2)
    kept = np.unique(np.round(calls), axis=0)
    assert kept.shape == (3, N) and set(np.unique(kept)) == {0, 1} and (kept.sum(1) == 24).all()
    each = [(closed_form(w), np.asarray(measure(train(jnp.asarray(w))))) for w in kept]
    np.testing.assert_allclose(found.scores, np.mean([slopes for slopes, _ in each], axis=0), rtol=1e-9)
    whole = [values + slopes @ (1 - w) for (slopes, values), w in zip(each, kept, strict=True)]
    np.testing.assert_allclose(found.base, np.mean(whole, axis=0), rtol=1e-9)


def test_keys():
    """The training of number 0 has the key that was given; `new_seeds` gives each repeat one of its own."""
    key = jax.random.key(5)
    found = quiet(noisy, measure, N, key=key)
    np.testing.assert_allclose(found.base, measure(noisy(jnp.ones(N), key)), rtol=1e-12)
    same, other = (quiet(noisy, measure, N, key=key, repeats=2, new_seeds=new).base for new in (False, True))
    np.testing.assert_allclose(same - found.base, 0, atol=0.3)  # that of subsets, to first order
    assert np.abs(other - found.base).max() > 0.3
    with pytest.raises(JaxhpoError, match=re.escape("`train(weights, key)`")):
        quiet(train, measure, N, repeats=2, new_seeds=True)


def test_a_scalar_measurement_and_text():
    x = X.copy()
    found = attribution(lambda w: jnp.sum(jnp.append(w[:-1], 0.0) * x[:, 0]), lambda sum: sum, N, checks=4)
    assert found.scores.shape == (1, N) and found.foretells == pytest.approx(1)
    assert str(found).startswith("Scores of 30 examples for 1 measurement. They cost as much as")
    assert "correlation 1.00" in str(found) and "1 of the examples have scores of exactly zero" in str(found)


def test_predict_and_top():
    found = Attribution(np.array([[1.0, -3.0, 0.0], [0.0, 2.0, 5.0]]), np.array([1.0, 2.0]))
    np.testing.assert_array_equal(found.predict([1, 1, 1]), [1, 2])
    np.testing.assert_array_equal(found.predict(np.array([[True, False, True], [0, 1, 1]])), [[4, 0], [0, 2]])
    np.testing.assert_array_equal(found.top(2), [[0, 2], [2, 1]])
    np.testing.assert_array_equal(found.top(1, lowest=True), [[1], [0]])
    with pytest.raises(JaxhpoError, match="there are 3 examples"):
        found.predict([1, 0])


def test_a_measurement_that_no_example_moves_does_not_spoil_the_check():
    found = quiet(train, lambda theta: jnp.append(NEW @ theta, 1.0), N, checks=5)
    alone = quiet(train, measure, N, checks=5)
    assert found.foretells == alone.foretells > 0.9 and not found.scores[-1].any()


def test_a_rough_training_is_warned_of():
    def rough(w):
        return jnp.sin(1e4 * jnp.sum(w * jnp.arange(1.0, N + 1) ** 0.5))

    with pytest.warns(RuntimeWarning, match=r"with correlation .*, below 0.9.*cosine.*L2.*relu.*eps_root.*repeats=8"):
        found = attribution(rough, lambda x: x, N)
    assert found.foretells is not None and found.foretells < 0.9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quiet(lambda w: jnp.ones(3), measure, N), ZeroHypergradientError, "no measurement depends on"),
        (lambda: quiet(train, lambda p: jnp.round(NEW @ p), N), ZeroHypergradientError, "through `round`.*a margin"),
        (lambda: quiet(lambda w: jnp.log(-w), lambda p: p, 5), NonFiniteError, "Measurement 0.*`log`"),
        (lambda: quiet(train, lambda p: p[:, None], N), JaxhpoError, r"\[3, 1\].*shape \(m,\)"),
        (lambda: quiet(train, lambda p: p > 0, N), JaxhpoError, "bool.*margins"),
        (lambda: quiet(lambda: 0, measure, N), JaxhpoError, r"train\(weights\)"),
        (lambda: quiet(train, measure, 30.0), JaxhpoError, "num_examples"),
        (lambda: quiet(train, measure, N, drop=1.0), JaxhpoError, "below 1"),
        (lambda: quiet(train, measure, N, repeats=2, drop=0.0), JaxhpoError, "repeat one derivative"),
        (lambda: quiet(train, measure, N, checks=2), JaxhpoError, "3 or more"),
        (lambda: jaxhpo.lds(train, measure, np.ones(N)), JaxhpoError, r"shape \(m, n\)"),
        (lambda: jaxhpo.lds(train, measure, {"a": np.ones((2, N))}, drops=[0.1]), JaxhpoError, "2 rows, but .* 4"),
        (lambda: jaxhpo.lds(train, measure, {"a": np.ones((2, 3)), "b": np.ones((2, 4))}), JaxhpoError, "one shape"),
        (lambda: jaxhpo.lds(train, measure, np.ones((M, N)), seeds=2), JaxhpoError, "takes a key"),
        (lambda: jaxhpo.drop_curves(train, measure, np.ones((M, N)), drops=0.1), JaxhpoError, r"\[0.01, 0.2\]"),
    ],
)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_lds_is_the_rank_correlation_with_retraining():
    exact, rng = quiet(train, measure, N), np.random.default_rng(0)
    calls = []

    def spied(theta):
        jax.debug.callback(lambda t: calls.append(np.asarray(t)), theta)
        return measure(theta)

    scores = {"exact": exact, "noisy": exact.scores + 0.1 * rng.normal(size=(M, N)), "random": rng.normal(size=(M, N))}
    found = jaxhpo.lds(train, spied, scores, drops=[0.05, 0.2], draws=12, batch_size=5, progress=False)
    assert found.ceiling is None and found.correlations["exact"].shape == (2, M) and len(calls) == 24
    assert (found.mean("exact") > 0.95).all() and (np.abs(found.mean("random")) < 0.6).all()
    assert (found.mean("exact") > found.mean("noisy")).all()
    np.testing.assert_allclose(found.error("noisy"), scipy.stats.sem(found.correlations["noisy"], axis=1))
    assert re.match(r"dropped +5 % +20 %\n-+\nexact +0\.9\d\d ± 0\.\d+", str(found))


def test_ranks_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (20, 3)).astype(float), rng.normal(size=(20, 3))
    expected = [scipy.stats.spearmanr(x, y)[0] for x, y in zip(a.T, b.T, strict=True)]
    np.testing.assert_allclose(_rank_correlations(a, b), expected, rtol=1e-12)
    np.testing.assert_array_equal(_rank_correlations(np.ones((20, 3)), b), 0)


def test_the_ceiling_is_that_of_other_seeds():
    """What all seeds share has a ceiling of 1; what no two share has one near 0, which a seed's own scores exceed."""
    exact = quiet(train, measure, N)
    found = jaxhpo.lds(noisy, measure, exact, drops=[0.2], draws=10, progress=False)
    np.testing.assert_allclose(found.ceiling, 1)
    np.testing.assert_allclose(found.mean("ceiling"), 1)

    def own(weights, key):  # effects with signs of the seed's own
        return jax.random.normal(key, (M, N)) @ weights

    key = jax.random.key(3)
    scores = quiet(own, lambda x: x, N, key=key)
    found = jaxhpo.lds(own, lambda x: x, scores, drops=[0.2], draws=30, key=key, progress=False)
    np.testing.assert_allclose(found.mean(), 1)
    assert np.abs(found.mean("ceiling")) < 0.5
    averaged = jaxhpo.lds(own, lambda x: x, scores, drops=[0.2], draws=30, seeds=4, key=key, progress=False)
    assert 0 < averaged.mean()[0] < 0.9  # one of the four: correlation 1/2


def test_drop_curves_of_a_linear_training():
    """Measurements that are sums change by the sums of what is left out."""
    scores = np.random.default_rng(0).normal(size=(M, N))
    curves = jaxhpo.drop_curves(lambda w: w, lambda w: scores @ w, scores, drops=[0.1, 0.4], draws=5, progress=False)
    ordered = np.sort(scores, axis=1)
    for f, count in enumerate((3, 12)):
        np.testing.assert_allclose(curves.base - curves.highest[f], ordered[:, -count:].sum(1), rtol=1e-9)
        np.testing.assert_allclose(curves.base - curves.lowest[f], ordered[:, :count].sum(1), rtol=1e-9)
    between = (curves.highest < curves.random) & (curves.random < curves.lowest)
    assert between.all() and curves.random.shape == (2, M)
    assert re.match(r"changes without +10 % +40 %\n-+\nhighest scores +-\d", str(curves))
