"""The value-function method, on problems whose inner optimal value has a formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import enable_x64

import jaxhpo
import jaxhpo.search
from jaxhpo.search._gaussian_process import gaussian_process

RHO, TARGET = 0.5, 0.8  # f = ½ |w − h|² + ½ ρ |w|², F = ½ |w − c|²: φ(h) = ½ ρ / (1 + ρ) |h|², h* = (1 + ρ) c, w* = c
DESIGN = jnp.linspace(-2.0, 2.0, 10)[:, None]
QUICK = {"num_steps": 14, "inner_steps": 200, "progress": False}


def train_loss(w, h):
    return 0.5 * jnp.sum((w - h) ** 2) + 0.5 * RHO * jnp.sum(w**2)


def val_loss(w):
    return 0.5 * jnp.sum((w - TARGET) ** 2)


def fit(h):
    return h / (1 + RHO)


def search(design=DESIGN, **settings):
    optimizer = settings.pop("optimizer", optax.adam(0.05))
    return jaxhpo.search.value_function(train_loss, val_loss, fit, design, optimizer, **QUICK | settings)


@pytest.mark.parametrize("kernel", ["rbf", pytest.param("matern52", marks=pytest.mark.slow)])
def test_the_optimum_and_the_value_function(kernel):
    """Within 1e-3, the issue's figure, of the formulas."""
    rate = optax.cosine_decay_schedule(0.05, 500)
    result = search(optimizer=optax.adam(rate), inner_steps=500, num_steps=18, kernel=kernel, tol=1e-5)
    assert result.status == "converged"
    np.testing.assert_allclose(result.best_hparams, [(1 + RHO) * TARGET], atol=1e-3)
    np.testing.assert_allclose(result.carry.best_params, [TARGET], atol=1e-3)
    info = result.history["info"]
    np.testing.assert_allclose(
        info["inner_loss"], 0.5 * RHO / (1 + RHO) * result.history["hparams"][:, 0] ** 2, atol=1e-3
    )
    np.testing.assert_allclose(info["predicted"][13:], info["inner_loss"][13:], atol=1e-3)
    assert np.isnan(info["predicted"][:10]).all() and np.isfinite(info["predicted"][10:]).all()
    assert (info["gap"] >= 0).all() and (np.diff(info["multiplier"]) >= 0).all()


def test_of_many_inner_minima_it_takes_the_best():
    """f = (w₁ − h)² leaves w₂ free, F = (w₁ − 1)² + (w₂ − 3)²: h = 1, w = (1, 3) is the optimum."""

    def train_loss(w, h, batch=None):
        return (w[0] - h) ** 2

    def val_loss(w):
        return (w[0] - 1.0) ** 2 + (w[1] - 3.0) ** 2

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.3))

    def trained(h, adjoint=None):
        rule = adjoint or jaxhpo.Unroll()
        return jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=30, adjoint=rule).params

    result = jaxhpo.search.value_function(
        train_loss, val_loss, trained, jnp.linspace(-2.0, 2.0, 8), optax.adam(0.05), num_steps=16, progress=False
    )
    assert result.status == "converged"
    np.testing.assert_allclose(result.best_hparams, 1.0, atol=1e-2)
    np.testing.assert_allclose(result.carry.best_params, [1.0, 3.0], atol=1e-2)
    # What the start implies: w₂ = 0.
    unrolled = jaxhpo.tune(lambda h: val_loss(trained(h)), 0.0, optax.adam(0.1), num_steps=100, progress=False)
    np.testing.assert_allclose(trained(unrolled.best_hparams), [1.0, 0.0], atol=1e-2)
    # The Hessian is singular, and the right-hand side (∂F/∂w₂ ≠ 0) is not in its range.
    assert np.isnan(jax.grad(lambda h: val_loss(trained(h, jaxhpo.Implicit())))(0.0))


@pytest.mark.slow
def test_a_run_goes_on(tmp_path):
    design = {"a": jnp.linspace(-2.0, 2.0, 6), "b": {"c": jnp.linspace(2.0, -2.0, 6)}}

    def run(**settings):
        return jaxhpo.search.value_function(
            lambda w, h: train_loss(w, jnp.stack([h["a"], h["b"]["c"]])),
            lambda w: val_loss(w * jnp.array([1.0, -1.0])),
            lambda h: fit(jnp.stack([h["a"], h["b"]["c"]])),
            design,
            optax.adam(0.05),
            inner_steps=50,
            progress=False,
            **settings,
        )

    run(num_steps=8, run_dir=tmp_path)
    resumed, whole = run(num_steps=10, run_dir=tmp_path), run(num_steps=10)
    jax.tree.map(np.testing.assert_array_equal, resumed.hparams, whole.hparams)
    jax.tree.map(np.testing.assert_array_equal, resumed.carry, whole.carry)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_the_model_in_two_dimensions(kernel):
    """Of a function on a 5 × 5 grid, flat in the second coordinate: within 2 % between the points, in float32."""
    with enable_x64(False):
        one = jnp.linspace(0.0, 1.0, 5)
        points = jnp.stack([x.ravel() for x in jnp.meshgrid(one, one)], axis=1)
        points = jnp.concatenate([points, jnp.full((8, 2), -3.0)])  # places without a value
        model = gaussian_process(points, jnp.exp(points[:, 0]), jnp.asarray(25), kernel)
        between = jnp.stack([jnp.linspace(0.1, 0.9, 7), jnp.linspace(0.8, 0.3, 7)], axis=1)
        means, deviations = jax.vmap(model)(between)
        np.testing.assert_allclose(means, jnp.exp(between[:, 0]), rtol=0.02)
        np.testing.assert_allclose([model(x)[0] for x in points[:3]], jnp.exp(points[:3, 0]), rtol=0.01)
        assert (deviations > 0).all() and deviations.max() < model(jnp.array([2.0, 2.0]))[1]


@pytest.mark.slow
def test_float32_and_the_bounds_of_the_design():
    """The optimum, 1.2, lies outside of the design: h stays at its end."""
    with enable_x64(False):
        result = search(jnp.linspace(-2.0, 1.0, 5, dtype=jnp.float32)[:, None], num_steps=8)
        assert result.hparams.dtype == jnp.float32 and result.carry.values.dtype == jnp.float32
        assert (result.history["hparams"] <= 1.0).all()
        np.testing.assert_allclose(result.best_hparams, 1.0, atol=1e-2)
        assert "edge of the design" in result.message


@pytest.mark.slow
@pytest.mark.parametrize("params", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("hparams", ["float32", "float64", "bfloat16"])
def test_types_of_parameters_and_of_the_design(params, hparams):
    result = jaxhpo.search.value_function(
        lambda w, h: jnp.sum((w - h.astype(w.dtype)) ** 2),
        lambda w: jnp.sum((w - 1) ** 2),
        lambda h: h.astype(params),
        jnp.linspace(-2, 2, 5)[:, None].astype(hparams),
        optax.adam(0.05),
        num_steps=8,
        inner_steps=100,
        progress=False,
    )
    assert result.carry.best_params.dtype == params
    np.testing.assert_allclose(result.best_hparams, 1.0, atol=0.05 if "bfloat16" in (params, hparams) else 0.01)


@pytest.mark.slow
def test_a_search_whose_moves_end_nowhere_says_so():
    """The optimum is beyond the design, and the constraint weighs nothing, so that the parameters leave it behind."""
    result = search(jnp.linspace(-2.0, 0.0, 10)[:, None], multiplier=1e-9, penalty=1e-9, growth=1.0)
    assert "no move was feasible (`tol=0.001`), so that the best is a training of the design" in result.message


def test_what_cannot_be_used_is_said():
    def run(val_loss=val_loss, fit=fit):
        return jaxhpo.search.value_function(train_loss, val_loss, fit, DESIGN, optax.adam(0.05), **QUICK)

    with pytest.raises(jaxhpo.JaxhpoError, match="val_loss"):
        run(val_loss=lambda w: (w - TARGET) ** 2)
    with pytest.raises(jaxhpo.JaxhpoError, match="fit"):
        run(fit=lambda h: jnp.zeros(1, int))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_steps": 10}, "of which 10 are the trainings of the design: write a number from 11"),
        ({"design": jnp.ones((4, 1)), "num_steps": 6}, "one value only of 1 of 1"),
        ({"design": jnp.array([[0.0], [1.0], [0.0]]), "num_steps": 6}, "the same hyperparameters twice"),
        ({"design": jnp.asarray(1.0)}, "leading axis of the same number"),
        ({"design": {"a": jnp.ones(3), "b": jnp.ones(4)}}, "leading axis of the same number"),
        ({"kernel": "linear"}, "write 'matern52' or 'rbf'"),
        ({"growth": 0}, "`growth` got 0"),
        ({"inner_steps": 1.5}, "`inner_steps`"),
        ({"carry": 1.0, "monitor": len}, r"got \['carry', 'monitor'\], which it sets itself"),
    ],
    ids=lambda x: None if isinstance(x, dict) else "",
)
def test_settings_are_checked(settings, said):
    with pytest.raises(jaxhpo.JaxhpoError, match=said):
        search(**settings)
