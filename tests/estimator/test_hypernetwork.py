"""Hypernetworks fit an affine best response exactly; self-tuning layers equal their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, relative_error

import jaxhpo
from jaxhpo import Hypernetwork, JaxhpoError, Perturbed, hypergradient, self_response
from jaxhpo.models import SelfTuningConv, SelfTuningDense, SelfTuningMLP

QUADRATIC = PROBLEMS["quadratic"]
H = jnp.asarray(QUADRATIC.hparams)


def of_quadratic(method, num_steps, warm_start=True, hparams=H):
    solver = jaxhpo.from_optax(QUADRATIC.train_loss, optax.sgd(0.1))
    pair = hypergradient(
        method, solver, lambda solution, h, batch: (QUADRATIC.val_loss(solution.params), solution.params),
        num_steps=num_steps, warm_start=warm_start,
    )  # fmt: skip
    return pair, pair.init(jnp.asarray(QUADRATIC.params), hparams)


# --- the affine best response ---


@pytest.mark.parametrize(
    "method",
    [
        Hypernetwork(optax.sgd(0.1), scale=1.0),
        pytest.param(
            Hypernetwork(optax.sgd(0.1), prior=lambda key: 0.5 + jax.random.normal(key, (3,))), marks=pytest.mark.slow
        ),
    ],
    ids=["local", "global"],
)
def test_exact_on_the_quadratic(method):
    """a*(h) = h is affine, and fitted without noise at every perturbation: the error falls geometrically.

    The hypergradient is then 2(h − c), at this h and, as the response is global, at every other. After 1000 steps only
    rounding remains.
    """
    pair, state = of_quadratic(method, 1000)
    hypergrad, state, info = jax.jit(pair.update)(H, state, key=jax.random.key(0))
    assert relative_error(hypergrad, QUADRATIC.hypergradient(QUADRATIC.hparams)) < 1e-12
    np.testing.assert_allclose(info.metrics, H, rtol=1e-12)
    np.testing.assert_allclose(state.inner.params.slope, np.eye(3), atol=1e-12)
    elsewhere = jaxhpo.affine_response.apply(state.inner.params, jnp.array([5.0, -3.0, 2.0]) - state.origin)
    np.testing.assert_allclose(elsewhere, [5.0, -3.0, 2.0], rtol=1e-11)


@pytest.mark.slow
def test_local_response_of_ridge():
    """On ridge the best response is curved: the affine fit has an error of O(s²), small at s = 0.05."""
    problem = PROBLEMS["ridge"]
    solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(0.1))
    rates = optax.sgd(optax.exponential_decay(10.0, 4000, 0.1), momentum=0.9)
    # The slope is learned from perturbations of size s: at rates of 1/s², but for the offset.
    tx = optax.multi_transform(
        {"offset": optax.sgd(problem.step_size * 0.5), "slope": rates}, jaxhpo.AffineResponse("offset", "slope")
    )
    pair = hypergradient(
        Hypernetwork(tx, scale=0.05), solver, lambda solution, h, b: problem.val_loss(solution.params), num_steps=20_000
    )
    h = jnp.asarray(problem.hparams)
    got, _, _ = jax.jit(pair.update)(h, pair.init(jnp.asarray(problem.params), h), key=jax.random.key(0))
    assert relative_error(got, problem.hypergradient(problem.hparams)) < 2 * 0.05**2


@pytest.mark.slow
@pytest.mark.parametrize("warm_start", [True, False])
def test_under_tune(warm_start):
    """The search ends at h = c, the minimiser of V(a*(h)) = ‖h − c‖²."""
    steps = 5 if warm_start else 200
    pair, state = of_quadratic(Hypernetwork(optax.sgd(0.1), scale=1.0), steps, warm_start)
    result = jaxhpo.tune(
        None, H, optax.sgd(0.1), num_steps=150, gradient=jaxhpo.from_pair(pair), carry=state, progress=False
    )
    target = QUADRATIC.hparams - QUADRATIC.hypergradient(QUADRATIC.hparams) / 2
    np.testing.assert_allclose(result.hparams, target, atol=1e-6)


@pytest.mark.slow
def test_transforms():
    """θ*(h) = log h is affine only in u = log h: dV/dh = 2(log h − 1)/h for V = (θ − 1)²."""
    solver = jaxhpo.from_optax(lambda p, h, b: (p - jnp.log(h)) ** 2, optax.sgd(0.1))
    method = Hypernetwork(optax.sgd(0.1), scale=1.0, transforms=jaxhpo.positive)
    pair = hypergradient(method, solver, lambda solution, h, b: (solution.params - 1.0) ** 2, num_steps=1000)
    h = jnp.asarray(0.2)
    hypergrad, _, _ = jax.jit(pair.update)(h, pair.init(jnp.zeros(()), h), key=jax.random.key(0))
    assert hypergrad == pytest.approx(2 * (np.log(0.2) - 1) / 0.2, rel=1e-9)


# --- the scale ---


@pytest.mark.slow
def test_tuned_scale_converges_to_its_equilibrium():
    """E V(h + sε) = ‖h − c‖² + Σ s²: with the bonus τ Σ log s each s converges to √(τ/2), without it s falls to 0."""
    target = QUADRATIC.hparams - QUADRATIC.hypergradient(QUADRATIC.hparams) / 2
    scales = {}
    for entropy in (0.0, 0.08):
        hparams = Perturbed(H, jnp.full(3, 0.5))
        pair, state = of_quadratic(Hypernetwork(optax.sgd(0.1), entropy=entropy), 2, hparams=hparams)
        result = jaxhpo.tune(
            None, hparams, optax.adam(optax.cosine_decay_schedule(0.03, 2000)), num_steps=2000,
            gradient=jaxhpo.from_pair(pair), carry=state, transforms=Perturbed(None, jaxhpo.positive), progress=False,
        )  # fmt: skip
        scales[entropy] = result.hparams.scale
        np.testing.assert_allclose(result.hparams.value, target, atol=0.05)
    np.testing.assert_allclose(scales[0.08], np.sqrt(0.04), rtol=0.1)
    assert np.all(scales[0.0] < 0.5 / 10)


@pytest.mark.slow
def test_gradient_of_the_scale():
    """At the exact response: E dV/ds = 2 s in each entry, less τ/s."""
    hparams, tau = Perturbed(H, jnp.full(3, 0.7)), 0.3
    pair, state = of_quadratic(Hypernetwork(optax.sgd(0.0), entropy=tau), 1, hparams=hparams)
    exact = jaxhpo.AffineResponse(H, jnp.eye(3))
    state = state._replace(inner=state.inner._replace(params=exact))
    keys = jax.random.split(jax.random.key(0), 4000)
    got, _, info = jax.jit(jax.vmap(lambda key: pair.update(hparams, state, key=key)))(keys)
    error = np.std(got.scale, axis=0) / np.sqrt(4000)
    assert np.all(np.abs(np.mean(got.scale, axis=0) - (1.4 - tau / 0.7)) < 5 * error)
    error = np.std(got.value, axis=0) / np.sqrt(4000)
    want = QUADRATIC.hypergradient(QUADRATIC.hparams)
    assert np.all(np.abs(np.mean(got.value, axis=0) - want) < 5 * error)
    # the value that is reported is the outer loss, without the bonus
    np.testing.assert_allclose(np.mean(info.value), np.sum((want / 2) ** 2) + 3 * 0.49, rtol=0.1)


# --- self-tuning models ---


def dense_of(params, x, h):
    """Compute the formula of the layer, one example at a time, in NumPy."""
    gate, rows = params["gate"], []
    for xi, hi in zip(x, h, strict=True):
        y = xi @ params["plain"]["kernel"] + params["plain"]["bias"]
        y = y + (hi @ gate["rows"]["kernel"]) * (xi @ params["response"]["kernel"])
        rows.append(y + (hi @ gate["bias_rows"]["kernel"]) * gate["bias"])
    return np.stack(rows)


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape), params)


def test_dense_layer():
    """The formula in NumPy, with the same h for all and one for each example; at U = 0 a dense layer."""
    rng = np.random.default_rng(1)
    x, h = rng.normal(size=(5, 4)), rng.normal(size=(5, 2))
    layer = SelfTuningDense(3)
    fresh = layer.init(jax.random.key(0), x, h)["params"]
    plain = x @ np.asarray(fresh["plain"]["kernel"]) + np.asarray(fresh["plain"]["bias"])
    np.testing.assert_allclose(layer.apply({"params": fresh}, x, h), plain, rtol=1e-12)

    params = random_like(fresh)
    np.testing.assert_allclose(layer.apply({"params": params}, x, h), dense_of(params, x, h), rtol=1e-12)
    shared = layer.apply({"params": params}, x, h[0])
    np.testing.assert_allclose(shared, dense_of(params, x, np.tile(h[0], (5, 1))), rtol=1e-12)
    # weights that respond: W(h) = W + W_h diag(Uh), in flax's orientation
    kernel = params["plain"]["kernel"] + params["response"]["kernel"] * (h[0] @ params["gate"]["rows"]["kernel"])
    bias = params["plain"]["bias"] + (h[0] @ params["gate"]["bias_rows"]["kernel"]) * params["gate"]["bias"]
    np.testing.assert_allclose(shared, x @ kernel + bias, rtol=1e-12)


def test_dense_layer_has_a_gradient_at_its_start():
    """At the start U and U_b have a gradient, though both are zero (the gates of which they are factors are not)."""
    x, h = np.ones((5, 4)), np.ones((5, 2))
    layer = SelfTuningDense(3)
    params = layer.init(jax.random.key(0), x, h)["params"]
    grad = jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, x, h)))(params)["gate"]
    assert np.all(grad["rows"]["kernel"] != 0) and np.all(grad["bias_rows"]["kernel"] != 0)


@pytest.mark.slow
def test_dense_layer_inner_axes():
    """h of shape (batch, m) belongs to the first axis of the inputs, with any number of axes after it."""
    rng = np.random.default_rng(1)
    x, h = rng.normal(size=(5, 7, 4)), rng.normal(size=(5, 2))
    layer = SelfTuningDense(3, use_bias=False)
    params = random_like(layer.init(jax.random.key(0), x, h)["params"])
    got = layer.apply({"params": params}, x, h)
    for t in range(7):
        np.testing.assert_allclose(got[:, t], layer.apply({"params": params}, x[:, t], h), rtol=1e-12)


@pytest.mark.slow
def test_convolution():
    """A convolution whose filters are W + (Uh)_c W_h, example by example; at U = 0 a convolution."""
    rng = np.random.default_rng(1)
    x, h = rng.normal(size=(3, 6, 6, 2)), rng.normal(size=(3, 2))
    layer = SelfTuningConv(4, (3, 3))
    fresh = jax.tree.map(lambda x: x.astype(float), layer.init(jax.random.key(0), x, h)["params"])
    dimensions = ("NHWC", "HWIO", "NHWC")

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=dimensions)

    plain = convolve(jnp.asarray(x), fresh["plain"]["kernel"])
    np.testing.assert_allclose(layer.apply({"params": fresh}, x, h), plain, atol=1e-12)
    params = random_like(fresh)
    gate, got = params["gate"], layer.apply({"params": params}, x, h)
    for i in range(3):
        kernel = params["plain"]["kernel"] + params["response"]["kernel"] * (h[i] @ gate["rows"]["kernel"])
        bias = params["plain"]["bias"] + (h[i] @ gate["bias_rows"]["kernel"]) * gate["bias"]
        np.testing.assert_allclose(got[i], convolve(jnp.asarray(x[i : i + 1]), kernel)[0] + bias.reshape(1, 1, 4))


@pytest.mark.slow
def test_mlp_is_its_layers():
    """Two layers of the formula with tanh between them, and hidden units that the third argument changes."""
    rng = np.random.default_rng(1)
    x, h = rng.normal(size=(5, 4)), rng.normal(size=(5, 2))
    model = SelfTuningMLP((6, 3))
    params = random_like(model.init(jax.random.key(0), x, h)["params"])
    first, second = params["SelfTuningDense_0"], params["SelfTuningDense_1"]
    hidden = np.tanh(dense_of(first, x, h))
    np.testing.assert_allclose(model.apply({"params": params}, x, h), dense_of(second, hidden, h), rtol=1e-12)
    got = model.apply({"params": params}, x, h, lambda i, hidden: hidden * (i + 2))
    np.testing.assert_allclose(got, dense_of(second, 2 * hidden, h), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True], ids=["fixed scale", "tuned scale"])
def test_self_tuning_layer_finds_the_best_response(tuned):
    """Of min_w E (w x − h x)² the best response w*(h) = h is affine: the layer learns it from one h per example.

    V = E (w*(h) − 2)² x², so that dV/dh is 2 (h − 2) E x²; with a tuned scale each example has its own h + sε.
    """
    layer = SelfTuningDense(1, use_bias=False)
    x, val = jnp.linspace(0.5, 1.5, 20).reshape(20, 1), jnp.linspace(0.5, 1.5, 8).reshape(8, 1)

    def predict(params, h, x):
        return layer.apply({"params": params}, x, h.reshape(-1, 1))

    solver = jaxhpo.from_optax(lambda w, h, x: jnp.mean((predict(w, h, x) - h.reshape(20, 1) * x) ** 2), optax.sgd(0.1))
    method = Hypernetwork(optax.sgd(0.05), None if tuned else 1.0, network=self_response, per_example=True)
    pair = hypergradient(
        method, solver, lambda solution, h, x: (jnp.mean((predict(solution.params, h, x) - 2.0 * x) ** 2), h),
        num_steps=3000,
    )  # fmt: skip
    h = Perturbed(jnp.asarray(0.7), jnp.asarray(0.5)) if tuned else jnp.asarray(0.7)
    params = jax.tree.map(lambda x: x.astype(float), layer.init(jax.random.key(0), x, jnp.zeros(1))["params"])
    update = jax.jit(lambda h, state: pair.update(h, state, lambda t: x, val, jax.random.key(1)))
    hypergrad, _, info = update(h, pair.init(params, h))
    drawn = np.asarray(info.metrics)
    slope = 2 * (drawn - 2.0) * np.asarray(val[:, 0] if tuned else jnp.sqrt(jnp.mean(val**2))) ** 2
    if tuned:
        assert drawn.shape == (8,) and hypergrad.value == pytest.approx(np.mean(slope), rel=1e-9)
        assert hypergrad.scale == pytest.approx(np.mean(slope * (drawn - 0.7) / 0.5), rel=1e-9)
    else:
        assert drawn == 0.7 and hypergrad == pytest.approx(slope, rel=1e-9)


# --- mistakes ---


def test_hyperparameter_outside_the_train_loss_warns():
    """The learning rate of the solver is not used by the hypernetwork, and its perturbation must not give noise."""
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h["x"]) ** 2), lambda h: optax.sgd(h["rate"]))
    method = Hypernetwork(optax.sgd(0.1), 1.0)
    pair = hypergradient(method, solver, lambda s, h, batch: jnp.sum(s.params) + 5.0 * h["rate"], num_steps=20)
    h = {"x": jnp.ones(2), "rate": jnp.array(0.1)}
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match=r"hparams\['rate'\] does not enter the train loss"):
        grad, _, _ = pair.update(h, pair.init(jnp.zeros(2), h), key=jax.random.key(0))
    assert grad["rate"] == 5.0  # of the outer loss itself
    assert (grad["x"] != 0).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Hypernetwork(0.1, scale=1.0), r"tx.*optax\.adam"),
        (lambda: Hypernetwork(optax.sgd(0.1), scale=0.0), r"scale.*above 0"),
        (
            lambda: Hypernetwork(optax.sgd(0.1), 1.0, prior=lambda key: key),
            r"given 2 of `scale`, a `prior`.*scale=0\.5",
        ),
        (lambda: Hypernetwork(optax.sgd(0.1), 1.0, network="affine"), r"network.*affine_response"),
        (lambda: Hypernetwork(optax.sgd(0.1), 1.0, per_example=True), r"per_example.*network=self_response"),
        (lambda: Hypernetwork(optax.sgd(0.1), 1.0, entropy=-1.0), r"entropy.*at least 0"),
        (lambda: of_quadratic(Hypernetwork(optax.sgd(0.1)), 3), r"given 0 of `scale`.*scale=0\.5"),
        (
            lambda: of_quadratic(Hypernetwork(optax.sgd(0.1), 1.0), 3, hparams=Perturbed(H, H)),
            r"given 2 of `scale`.*Perturbed",
        ),
        (lambda: of_quadratic(Hypernetwork(optax.sgd(0.1), 1.0, entropy=0.1), 3), r"entropy=0\.1.*not tuned"),
        (
            lambda: of_quadratic(Hypernetwork(optax.sgd(0.1)), 3, hparams=Perturbed(H, jnp.ones(2))),
            r"one scale for each leaf",
        ),
        (lambda: of_quadratic(Hypernetwork(optax.sgd(0.1)), 3, hparams=Perturbed(H, 0 * H)), r"not positive.*positive"),
        (
            lambda: hypergradient(
                Hypernetwork(optax.sgd(0.1), 1.0), jaxhpo.fixed_point(lambda p, h, b: h), lambda s, h, b: h
            ),
            r"no train loss.*from_optax",
        ),
        (
            lambda: hypergradient(
                Hypernetwork(optax.sgd(0.1), 1.0),
                jaxhpo.from_optax(lambda p, h, b, s: (jnp.sum(p), s), optax.sgd(0.1), has_state=True),
                lambda s, h, b: jnp.sum(s.params),
            ).init(jnp.ones(2), H, jnp.ones(1)),
            r"model state.*without one",
        ),
    ],
)
def test_mistakes(make, match):
    with pytest.raises(JaxhpoError, match=match):
        make()


def test_missing_key_raises():
    pair, state = of_quadratic(Hypernetwork(optax.sgd(0.1), 1.0), 3)
    with pytest.raises(JaxhpoError, match=r"got no key.*for a pair `update\(\.\.\., key=key\)`"):
        pair.update(H, state)


@pytest.mark.slow
def test_per_example_needs_one_number_of_examples():
    method = Hypernetwork(optax.sgd(0.1), 1.0, network=self_response, per_example=True)
    pair, state = of_quadratic(method, 3)
    with pytest.raises(JaxhpoError, match=r"per_example=True.*hold no examples: pass the data"):
        pair.update(H, state, key=jax.random.key(0))
    with pytest.raises(JaxhpoError, match=r"per_example=True.*`batch\[0\]` has 2 examples and `batch\[1\]` has 5"):
        pair.update(H, state, (jnp.ones((3, 2)), jnp.ones((3, 5))), key=jax.random.key(0))
