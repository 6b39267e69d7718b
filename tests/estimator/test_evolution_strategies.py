"""Evolution strategies are unbiased, need no derivative, and run in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, relative_error

import jaxhpo
import jaxhpo.testing
from jaxhpo import EvolutionStrategies, JaxhpoError, PersistentES, hypergradient

QUADRATIC = PROBLEMS["quadratic"]
METHODS = {"es": EvolutionStrategies, "pes": lambda num_pairs, sigma, t: PersistentES(num_pairs, sigma, 1, t)}


def of_problem(method, problem, num_steps, warm_start=True):
    """Return the pair of a method on a closed-form problem, hyperparameters and a first state."""
    solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(problem.step_size))
    pair = hypergradient(
        method, solver, lambda solution, h, batch: problem.val_loss(solution.params), num_steps=num_steps,
        warm_start=warm_start,
    )  # fmt: skip
    h = jnp.asarray(problem.hparams)
    return pair, h, pair.init(jnp.asarray(problem.params), h)


def of_map(method, forward, metric, num_steps=1):
    """Return the pair of a method where training gives `forward(h)`, and a scalar first state."""
    solver = jaxhpo.fixed_point(lambda p, h, batch: forward(h))
    pair = hypergradient(method, solver, lambda solution, h, batch: metric(solution.params), num_steps=num_steps)
    return pair, pair.init(jnp.zeros(()), jnp.ones(()))


def draws(pair, h, state, num_draws, num_updates=1):
    """Return hypergradients for many keys, of shape (draws, updates, m), at constant h."""

    def updates(key):
        def body(state, key):
            hypergrad, state, _ = pair.update(h, state, key=key)
            return state, hypergrad

        return jax.lax.scan(body, state, jax.random.split(key, num_updates))[1]

    return np.asarray(jax.jit(jax.vmap(updates))(jax.random.split(jax.random.key(0), num_draws)))


def standard_errors(got, want):
    """Return the largest distance of the mean over the first axis from `want`, in standard errors."""
    return np.max(np.abs(got.mean(axis=0) - want) / (got.std(axis=0) / np.sqrt(len(got))))


# --- direction ---


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.slow), False], ids=["1", "69"])
def test_direction(shared):
    """16 pairs at σ = 0.1, as in the thesis: cosine > 0 in at least 95 % of 200 repeats, in one dimension the sign.

    Of a linear function, ĝ = E g with E = (1/K) Σ ε εᵀ, so that cos² is about K/(K + m + 1): 0.43 for m = 69.
    """
    problem, K, steps = jaxhpo.testing.ridge(dim=69, num_train=200, num_val=100), 16, 20
    want = problem.unrolled(problem.hparams, problem.step_size, steps)
    pair, h, state = of_problem(EvolutionStrategies(K, 0.1), problem, steps)
    if shared:  # one log penalty for all weights: by the chain rule, the sum
        h0 = problem.hparams.mean()
        want = problem.unrolled(np.full(69, h0), problem.step_size, steps).sum(keepdims=True)
        one = problem._replace(train_loss=lambda w, h, b: problem.train_loss(w, h * jnp.ones(69), b))
        pair, h, state = of_problem(EvolutionStrategies(K, 0.1), one._replace(hparams=np.array([h0])), steps)
    got = draws(pair, h, state, 200)[:, 0]
    cosine = got @ want / np.linalg.norm(got, axis=1) / np.linalg.norm(want)
    assert np.mean(cosine > 0) >= 0.95
    if not shared:
        assert cosine.mean() == pytest.approx((K / (K + 70)) ** 0.5, abs=0.05)


# --- mean ---


@pytest.mark.slow
@pytest.mark.parametrize("antithetic", [True, False])
def test_unbiased(antithetic):
    """F is quadratic, so smoothing does not change its gradient: the mean of 4000 draws is the closed form."""
    pair, h, state = of_problem(EvolutionStrategies(4, 0.3, antithetic=antithetic, chunk_size=None), QUADRATIC, 15)
    got = draws(pair, h, state, 4000)[:, 0]
    want = QUADRATIC.unrolled(QUADRATIC.hparams, QUADRATIC.step_size, 15)
    assert standard_errors(got, want) < 5 and relative_error(got.mean(axis=0), want) < 0.05
    if antithetic:  # even terms cancel: E‖ĝ − g‖² = (m + 1)/K ‖g‖², exactly so for a quadratic F
        measured = np.mean(np.sum((got - want) ** 2, axis=1)) / np.sum(want**2)
        assert measured == pytest.approx((len(want) + 1) / 4, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["es", "pes"])
def test_transforms(name):
    """θ = log h, perturbed in u = log h: V = θ² = u² is quadratic, and dV/dh = 2 log(h)/h. (log(h + σε) may be NaN.)"""
    h = jnp.asarray(0.2)
    pair, state = of_map(METHODS[name](4, 0.5, jaxhpo.positive), jnp.log, lambda theta: theta**2)
    got = draws(pair, h, state, 2000)
    assert standard_errors(got, 2 * np.log(0.2) / 0.2) < 5


@pytest.mark.slow
def test_persistent_is_unbiased_where_truncated_is_not():
    """Three unrolls of 3 steps, then a fourth from the start: each is compared with its closed form.

    On the quadratic problem the outer loss is quadratic in all perturbations, so smoothing changes nothing: update
    i of PersistentES is the derivative through all 3 i steps, and a warm-started EvolutionStrategies the derivative
    through the last 3. Their ratio is (1 − ρ)/(1 − ρⁱ) with ρ = 0.8³.
    """
    T, lengths = 3, (3, 6, 9, 3)
    exact = np.stack([QUADRATIC.unrolled(QUADRATIC.hparams, 0.1, t) for t in lengths])
    pair, h, state = of_problem(PersistentES(4, 0.1, horizon=9), QUADRATIC, T)
    persistent = draws(pair, h, state, 4000, num_updates=4)
    assert standard_errors(persistent, exact) < 5
    assert standard_errors(persistent.sum(axis=1), exact.sum(axis=0)) < 5

    pair, h, state = of_problem(EvolutionStrategies(4, 0.1), QUADRATIC, T)
    truncated = draws(pair, h, state, 4000, num_updates=3)
    last = np.stack([QUADRATIC.unrolled(QUADRATIC.hparams, 0.1, t, truncate=T) for t in lengths[:3]])
    assert standard_errors(truncated, last) < 5
    assert standard_errors(truncated[:, 1:].mean(axis=1), exact[1:3].mean(axis=0)) > 20
    bias = np.linalg.norm(truncated[:, 2].mean(axis=0)) / np.linalg.norm(exact[2])
    assert bias == pytest.approx((1 - 0.8**3) / (1 - 0.8**9), abs=0.02)  # 0.564: not 1


@pytest.mark.slow
def test_persistent_of_one_unroll_is_evolution_strategies():
    """With horizon = num_steps every update restarts: the same draws, the same trainings."""
    hparams = {"rate": jnp.asarray(0.1), "target": jnp.ones(2)}
    solver = jaxhpo.from_optax(
        lambda p, h, b: jnp.sum((p - h["target"] * b) ** 2), lambda h: optax.sgd(h["rate"], momentum=0.5)
    )
    batches, transforms = jnp.linspace(0.5, 1.5, 6), {"rate": jaxhpo.positive, "target": None}
    results = []
    for method in (EvolutionStrategies(3, 0.1, transforms), PersistentES(3, 0.1, 6, transforms, chunk_size=2)):
        warm = isinstance(method, PersistentES)
        pair = hypergradient(method, solver, lambda s, h, b: jnp.sum(s.params**3), warm_start=warm)
        state = pair.init(jnp.zeros(2), hparams)
        for i in range(2):
            hypergrad, state, info = jax.jit(pair.update)(hparams, state, batches, None, jax.random.key(i))
            results.append((hypergrad, info.value))
    for es, pes in zip(results[:2], results[2:], strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), es, pes)


# --- no derivative ---


@pytest.mark.slow
def test_metric_without_derivative():
    """V(h) = [h < 0.3] has derivative 0 almost everywhere; smoothed, it has −φ((0.3 − h)/σ)/σ."""
    sigma, h = 0.5, 0.1
    pair, state = of_map(EvolutionStrategies(8, sigma), lambda h: h, lambda theta: jnp.mean(theta < 0.3))
    got = draws(pair, jnp.asarray(h), state, 2000)
    want = -np.exp(-(((0.3 - h) / sigma) ** 2) / 2) / np.sqrt(2 * np.pi) / sigma
    assert standard_errors(got, want) < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_tuning_an_error_rate(name):
    """Two features predict the training labels, but one of them is noise in validation: its penalty must rise.

    With both features the error is about arctan(1)/π = 25 %; with only the good one it is zero.
    """
    rng = np.random.default_rng(0)
    label, val_label = np.sign(rng.normal(size=(2, 500)))
    X = jnp.asarray(np.stack([label, label], axis=1) + 0.5 * rng.normal(size=(500, 2)))
    Xv = jnp.asarray(np.stack([val_label, 1.5 * rng.normal(size=500)], axis=1))
    solver = jaxhpo.fixed_point(
        lambda w, h, b: jnp.linalg.solve(X.T @ X / 500 + jnp.diag(h), X.T @ jnp.asarray(label) / 500)
    )
    pair = hypergradient(
        METHODS[name](8, 0.3, jaxhpo.positive),
        solver,
        lambda solution, h, b: jnp.mean(jnp.sign(Xv @ solution.params) != val_label),
        num_steps=1,
    )
    h = jnp.full(2, 0.1)
    result = jaxhpo.tune(
        None, h, optax.adam(0.2), num_steps=25, transforms=jaxhpo.positive, gradient=jaxhpo.from_pair(pair),
        carry=pair.init(jnp.zeros(2), h), progress=False,
    )  # fmt: skip
    errors = result.history["value"]
    assert errors[0] > 0.2 and errors[-1] < 0.5 * errors[0]
    assert result.hparams[1] > 10 * result.hparams[0]


# --- cost ---


@pytest.mark.codegen
@pytest.mark.parametrize("method", [EvolutionStrategies(2, 0.1), PersistentES(2, 0.1, 1000)], ids=["es", "pes"])
def test_memory_does_not_grow_with_steps(method):
    """From T = 10 to T = 1000 the memory grows only by the 990 step indices, 8 bytes each."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h * b) ** 2), optax.sgd(0.1, momentum=0.9))

    def memory(method, num_steps):
        pair = hypergradient(method, solver, lambda s, h, b: jnp.sum(s.params**2), num_steps=num_steps)
        h = jnp.asarray(1.0)
        state = pair.init(jnp.ones(10_000), h)
        update = jax.jit(lambda h, s, key: pair.update(h, s, lambda t: jnp.cos(t.astype(float)), key=key))
        sizes = update.lower(h, state, jax.random.key(0)).compile().memory_analysis()
        return sizes.temp_size_in_bytes + sizes.output_size_in_bytes

    small = memory(method, 10)
    assert small > 2 * 10_000 * 8  # the trainings themselves were counted
    assert memory(method, 1000) - small <= 1.1 * 990 * 8
    if isinstance(method, EvolutionStrategies):  # nor with the number of pairs, except for a few numbers per pair
        few, many = (EvolutionStrategies(pairs, 0.1, chunk_size=2) for pairs in (20, 200))
        assert memory(many, 10) - memory(few, 10) <= 180 * 8 * 8


# --- mistakes ---


@pytest.mark.parametrize("method", [EvolutionStrategies(2, 0.1), PersistentES(2, 0.1, 3)], ids=["es", "pes"])
def test_missing_key_raises(method):
    pair, h, state = of_problem(method, QUADRATIC, 3)
    with pytest.raises(JaxhpoError, match=r"got no key.*for a pair `update\(\.\.\., key=key\)`"):
        pair.update(h, state)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EvolutionStrategies(0, 0.1), r"num_pairs.*at least 1"),
        (lambda: EvolutionStrategies(4, 0.0), r"sigma.*above 0"),
        (lambda: EvolutionStrategies(4, 0.1, chunk_size=0), r"chunk_size.*at least 1"),
        (lambda: EvolutionStrategies(4, 0.1, antithetic=None), r"antithetic.*True or False"),
        (lambda: PersistentES(4, -1.0, 10), r"sigma.*above 0"),
        (lambda: PersistentES(4, 1.0, 0.5), r"horizon.*integer"),
        (
            lambda: of_problem(PersistentES(4, 1.0, 10), QUADRATIC, 4),
            r"horizon=10.*not a multiple of the 4.*`horizon=8`",
        ),
        (lambda: of_problem(PersistentES(4, 1.0, 8), QUADRATIC, 4, False), r"warm_start=False.*EvolutionStrategies"),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(JaxhpoError, match=match):
        make()


def test_equal_settings_compare_and_hash_equal():
    make = lambda: EvolutionStrategies(4, 0.1, {"penalty": jaxhpo.positive}, antithetic=False)  # noqa: E731
    assert make() == make() != EvolutionStrategies(4, 0.1) and hash(make()) == hash(make())
    names = {"EvolutionStrategies": EvolutionStrategies, "PersistentES": PersistentES, "positive": jaxhpo.positive}
    for method in (make(), PersistentES(2, 0.1, 30)):
        assert eval(repr(method), names) == method


@pytest.mark.slow
def test_bfloat16_mean_over_many_draws():
    """In bfloat16 a running sum of terms of one size stops growing at 256 of them."""
    solver = jaxhpo.fixed_point(lambda p, h, batch: h + 0 * p)
    method = EvolutionStrategies(num_pairs=4000, sigma=0.1, chunk_size=None)
    pair = hypergradient(method, solver, lambda solution, h, batch: jnp.sum(solution.params), num_steps=1)
    h = jnp.zeros(3, jnp.bfloat16)
    grad, _, _ = pair.update(h, pair.init(h, h), key=jax.random.key(0))
    # The gradient is 1, and the variance of an entry of the mean of ε εᵀ1 is (3 + 1)/K: 0.03; bfloat16 adds 0.4 %.
    np.testing.assert_allclose(np.asarray(grad, float), 1.0, atol=5 * (4 / 4000) ** 0.5 + 0.02)


@pytest.mark.slow
def test_persistent_restarts_before_passing_its_horizon():
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2) + 0 * jnp.sum(batch), optax.sgd(0.1))
    pair = hypergradient(PersistentES(2, 0.1, 14), solver, lambda s, h, batch: jnp.sum(s.params))
    h, counts, reached = jnp.ones(1), [], []
    state = pair.init(jnp.zeros(1), h)
    for steps in (7, 14, 7, 7, 7):
        _, state, _ = pair.update(h, state, jnp.zeros((steps, 1)), None, jax.random.key(0))
        counts.append(int(state.count))
        reached.append(float(state.centre.params[0]))
    assert counts == [7, 0, 7, 0, 7]
    np.testing.assert_allclose(reached, [1 - 0.8**t for t in (7, 14, 7, 14, 7)])  # θ ← θ − 0.2 (θ − 1) from 0


@pytest.mark.slow
@pytest.mark.parametrize("method", [PersistentES(3, 0.1, 4, chunk_size=2), EvolutionStrategies(5, 0.1, chunk_size=2)])
def test_empty_leaves(method):
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p["w"] - h["x"]) ** 2), optax.sgd(0.1))
    pair = hypergradient(method, solver, lambda s, h, batch: jnp.sum(s.params["w"]), num_steps=2)
    h, params = {"x": jnp.ones(2), "none": jnp.zeros(0)}, {"w": jnp.zeros(2), "none": jnp.zeros((0, 3))}
    grad, _, info = pair.update(h, pair.init(params, h), key=jax.random.key(0))
    assert grad["none"].shape == (0,) and (grad["x"] != 0).all() and jnp.isfinite(info.value)


@pytest.mark.parametrize("name", ["es", "pes"])
@pytest.mark.parametrize("transforms", [None, jaxhpo.positive], ids=["natural", "positive"])
def test_the_standard_error_is_the_spread_of_draws(name, transforms):
    """The mean of its square over 2000 draws is the mean square distance of draws from their mean."""
    h = jnp.asarray([0.4, 1.5])
    pair, state = of_map(METHODS[name](8, 0.2, transforms), lambda h: jnp.sum(jnp.log1p(h) * h), jnp.sin)

    def draw(key):
        hypergrad, _, info = pair.update(h, state, key=key)
        return hypergrad, info.standard_error**2

    got, squared = map(np.asarray, jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), 2000)))
    wanted = np.sum((got - got.mean(0)) ** 2, axis=1)
    # Six standard errors of the difference of two means.
    assert abs(squared.mean() - wanted.mean()) < 6 * np.hypot(squared.std(), wanted.std()) / len(got) ** 0.5
    assert wanted.std() / len(got) ** 0.5 < 0.1 * wanted.mean()
