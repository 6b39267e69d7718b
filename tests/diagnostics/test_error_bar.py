"""`error_bar`: a hypergradient with an estimate of its own error, against closed forms and exact derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import jaxhpo
from jaxhpo import CG, SAMA, FiniteDifference, ForwardGradient, Identity, Implicit, Neumann, Smoothing, Unroll
from jaxhpo._core.cost import count_arithmetic
from jaxhpo._core.validate import short_name
from jaxhpo._diagnostics.error_bar import OPTIMUM, SMOOTHED, STEPS
from jaxhpo._diagnostics.tangents import length_factor, orthogonal

RIDGE = jaxhpo.testing.ridge(dim=12)
SOLVER = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(RIDGE.step_size))
POINT = jnp.asarray(RIDGE.hparams)
STEP = RIDGE.step_size
CONTINUED = [
    Implicit(),
    Implicit(CG(maxiter=3)),
    Implicit(Neumann(5, STEP)),
    Implicit(Identity(0.1)),
    SAMA(),
    FiniteDifference(step_size=STEP),
]


def ridge(rule, num_steps=50, key=None):
    def outer_loss(h):
        start = SOLVER.init(jnp.asarray(RIDGE.params), h)
        key_ = jax.random.key(0) if key is None else key
        sol = jaxhpo.solve(SOLVER, start, h, num_steps=num_steps, adjoint=rule, key=key_)
        return RIDGE.val_loss(sol.params)

    return outer_loss


def off(bar, reference):
    return float(jnp.linalg.norm(bar.hypergradient - reference))


@pytest.mark.parametrize(
    ("rule", "num_steps"),
    [
        pytest.param(rule, n, id=f"{short_name(rule)}-{n}", marks=[pytest.mark.slow] if (i, n) != (0, 10) else [])
        for i, rule in enumerate(CONTINUED)
        for n in (10, 50)
    ],
)
def test_implicit_rules_know_their_error_at_the_optimum(rule, num_steps):
    outer_loss = ridge(rule, num_steps)
    bar = jax.jit(jaxhpo.error_bar(outer_loss))(POINT)
    np.testing.assert_allclose(bar.hypergradient, jax.grad(outer_loss)(POINT), rtol=1e-9, atol=1e-14)  # the rule's own
    assert bar.reference == OPTIMUM and bar.known
    true = off(bar, RIDGE.hypergradient(RIDGE.hparams))
    floor = 1e-8 * float(bar.norm)  # √ε of float64: below that the error bar is a rounding error
    assert true / 2 - floor <= bar.error <= 2 * true + floor


def test_a_geometric_tail_is_known_exactly():
    # One mode: w ← w − r (w − h), so that the contribution of step t from the end is r (1 − r)^t, and K steps leave
    # (1 − r)^K − (1 − r)^T of the derivative 1 − (1 − r)^T of the whole.
    rate, last, total = 0.25, 16, 60
    solver = jaxhpo.from_optax(lambda w, h, batch: 0.5 * jnp.sum((w - h) ** 2), optax.sgd(rate))

    def outer_loss(h):
        start = solver.init(jnp.zeros(2), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, num_steps=total, adjoint=Unroll(truncate=last)).params)

    bar = jaxhpo.error_bar(outer_loss)(jnp.ones(2))
    assert bar.known and bar.reference == STEPS
    left = (1 - rate) ** last - (1 - rate) ** total
    np.testing.assert_allclose(bar.error, 2**0.5 * left, rtol=1e-10)  # sums of 60 numbers in float64


@pytest.mark.parametrize("rule", [Unroll(truncate=4), Unroll(truncate=2)], ids=["slow", "few"])
def test_too_short_a_truncation_cannot_tell(rule):
    solver = jaxhpo.from_optax(lambda w, h, batch: 0.5 * jnp.sum((w - h) ** 2), optax.sgd(0.05))

    def outer_loss(h):
        return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=60, adjoint=rule).params)

    bar = jaxhpo.error_bar(outer_loss)(jnp.ones(2))
    assert not bar.known and "cannot tell" in str(bar)  # each step leaves .95 of a contribution


@pytest.mark.slow
def test_a_saddle_cannot_tell():
    # Training to a saddle in w₂: the Hessian has a negative eigenvalue there.
    solver = jaxhpo.from_optax(lambda w, h, batch: (w[0] - h) ** 2 - 0.1 * w[1] ** 2, optax.sgd(0.1))

    def outer_loss(h):
        start = solver.init(jnp.array([0.0, 1e-3]), h)
        w = jaxhpo.solve(solver, start, h, num_steps=50, adjoint=Implicit(CG(), on_failure="keep")).params
        return jnp.sum((w - 2) ** 2)

    bar = jaxhpo.error_bar(outer_loss)(jnp.asarray(1.0))
    assert not bar.known and np.isfinite(bar.hypergradient)


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        pytest.param(ForwardGradient(16), STEPS, id="forward"),
        pytest.param(Smoothing(16, 1e-3), SMOOTHED, id="smoothed", marks=pytest.mark.slow),
    ],
)
def test_the_jackknife_has_the_mean_square_error(rule, reference):
    exact = jax.grad(ridge(Unroll()))(POINT)

    def of(key):
        bar = jaxhpo.error_bar(ridge(rule, key=key))(POINT)
        return bar.error**2, jnp.sum((bar.hypergradient - exact) ** 2)

    keys = jax.random.split(jax.random.key(1), 400)
    estimated, true = (np.asarray(x) for x in jax.jit(jax.vmap(of))(keys))
    spread = np.hypot(*(x.std() / len(keys) ** 0.5 for x in (estimated, true)))
    assert abs(estimated.mean() - true.mean()) <= 4 * spread  # standard errors of two means
    assert spread <= 0.1 * true.mean()
    assert jaxhpo.error_bar(ridge(rule))(POINT).reference == reference


@pytest.mark.parametrize("rule", [Unroll(), jaxhpo.DrMAD()], ids=repr)
def test_other_rules_are_held_against_tangents(rule):
    bar = jax.jit(jaxhpo.error_bar(ridge(rule), directions=400))(POINT)
    true = off(bar, jax.grad(ridge(Unroll()))(POINT))
    assert bar.known and bar.reference == STEPS
    np.testing.assert_allclose(bar.error, true, rtol=0.2, atol=1e-14)  # χ² of 400: 2 standard errors are 7 %


def nested(form):
    one = ridge(Unroll(truncate=12)), ridge(ForwardGradient(8)), ridge(Implicit(CG(maxiter=3)))
    forms = {
        "jit": lambda f: lambda h: jax.jit(f)(h),
        "vmap": lambda f: lambda h: jnp.mean(jax.vmap(lambda c: f(h + c))(jnp.arange(3) * 0.1)),
        "scan": lambda f: lambda h: jax.lax.scan(lambda a, c: (a + f(h + c), None), 0.0, jnp.arange(3) * 0.1)[0],
        "checkpoint": lambda f: lambda h: jax.checkpoint(f)(h),
        "cond": lambda f: lambda h: jax.lax.cond(h[0] > -9, f, jnp.sum, h),
    }
    return [(f, forms[form](f)) for f in one]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jit", "vmap", "scan", "checkpoint", "cond"])
def test_within_transformations(form):
    for plain, outer_loss in nested(form):
        bar = jax.jit(jaxhpo.error_bar(outer_loss))(POINT)
        want = jax.jit(jax.grad(outer_loss))(POINT)
        np.testing.assert_allclose(bar.hypergradient, want, rtol=1e-9, atol=1e-14)
        if form not in ("vmap", "scan"):  # there, the mean or sum of three
            np.testing.assert_allclose(bar.error, jax.jit(jaxhpo.error_bar(plain))(POINT).error, rtol=1e-6)


@pytest.mark.parametrize("rule", [Unroll(truncate=20), ForwardGradient(16)], ids=repr)
def test_what_the_levels_share_is_computed_once(rule):
    functions = jax.value_and_grad(ridge(rule, 100)), jaxhpo.error_bar(ridge(rule, 100))
    plain, with_bar = (count_arithmetic(function, POINT) for function in functions)
    assert with_bar <= 1.02 * plain  # sums of a few copies of the hyperparameters, and nothing else


def test_continuing_costs_its_products():
    products = 20
    outer_loss = ridge(Implicit(CG(maxiter=products)), 400)
    functions = jax.value_and_grad(ridge(Unroll(), 400)), jax.value_and_grad(outer_loss), jaxhpo.error_bar(outer_loss)
    unrolled, plain, with_bar = (count_arithmetic(fn, POINT, unknown_length=products) for fn in functions)
    assert with_bar - plain <= 0.25 * unrolled  # of 400 steps; four solves, each counted as long as the longest


def quadratic(rule, curvatures, num_steps, rate=0.1):
    """½ Σ cᵢ (wᵢ − hᵢ)²: a mode of each curvature."""
    solver = jaxhpo.from_optax(lambda w, h, batch: 0.5 * jnp.sum(curvatures * (w - h) ** 2), optax.sgd(rate))
    size = len(curvatures)

    def outer_loss(h):
        start = solver.init(jnp.zeros(size), h)
        return jnp.sum(jaxhpo.solve(solver, start, h, num_steps=num_steps, adjoint=rule).params)

    return jaxhpo.error_bar(outer_loss)(jnp.ones(size))


@pytest.mark.slow
def test_what_is_not_known_is_not_claimed():
    slow = quadratic(Unroll(truncate=8), jnp.array([5.0, 0.01]), 200)  # of the slow mode 8 steps see nothing
    ended = quadratic(Unroll(truncate=16), jnp.ones(2), 100, rate=1.0)  # of all but the last the contribution is zero
    diverged = quadratic(Unroll(), jnp.ones(2), 400, rate=30.0)
    assert not slow.known and not ended.known and not diverged.known and np.isfinite(ended.error)
    rounded = jaxhpo.error_bar(lambda h: jnp.sum(jnp.round(h * 1000) / 1000))(jnp.ones(2))
    called = jaxhpo.error_bar(with_a_callback)(jnp.ones(2))
    assert not rounded.known and not called.known and np.isfinite(called.hypergradient).all()


@jax.custom_vjp
def with_a_callback(h):
    return jax.pure_callback(lambda x: np.sum(x**2), jax.ShapeDtypeStruct((), h.dtype), h)


with_a_callback.defvjp(lambda h: (with_a_callback(h), h), lambda h, ct: (2 * h * ct,))


@pytest.mark.slow
def test_few_random_directions_are_held_against_tangents():
    exact = jax.grad(ridge(Unroll()))(POINT)
    bar = jaxhpo.error_bar(ridge(ForwardGradient(2)), directions=12)(POINT)  # as many as hyperparameters
    np.testing.assert_allclose(bar.error, off(bar, exact), rtol=1e-9)


@pytest.mark.parametrize(("number", "size"), [pytest.param(6, 1000, marks=pytest.mark.slow), (6, 12), (6, 6), (3, 2)])
def test_length_from_random_directions(number, size):
    """The logarithm is unbiased, and as many are within a factor of two as SciPy's Beta distribution says."""
    e = jnp.zeros(size).at[0].set(1.0)  # any of that length: the directions have no preferred one
    rows = jax.vmap(lambda key: orthogonal(key, min(number, size), size))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(
        rows @ rows.mT, jnp.broadcast_to(size * jnp.eye(rows.shape[1]), (4000, *rows.shape[1:2] * 2)), atol=1e-9 * size
    )
    lengths = length_factor(number, size) * np.sqrt(np.mean((rows @ e) ** 2, axis=1))
    logs = np.log(lengths)
    assert abs(logs.mean()) <= 4 * logs.std() / 4000**0.5 + 1e-12
    if number < size:
        part, beta = np.mean((lengths > 0.5) & (lengths < 2)), scipy.stats.beta(number / 2, (size - number) / 2)
        to_square = size / number * length_factor(number, size) ** 2  # of one unit of Beta
        within = beta.cdf(4 / to_square) - beta.cdf(0.25 / to_square)
        assert within >= 0.97 and abs(part - within) <= 4 * (within * (1 - within) / 4000) ** 0.5


@pytest.mark.slow
def test_a_vmap_prints_a_line_for_each():
    bars = jax.vmap(jaxhpo.error_bar(ridge(Unroll(truncate=12))))(jnp.stack([POINT, POINT + 0.1]))
    assert len(str(bars).splitlines()) == 2


def test_a_solution_of_another_library_cannot_tell():
    def outer_loss(h):
        return jnp.sum(jaxhpo.implicit(lambda w, h: w - h, jnp.ones(2), h) ** 2)

    bar = jaxhpo.error_bar(outer_loss)(jnp.ones(2))
    assert not bar.known and np.isnan(bar.error)


def test_the_sentence_says_why():
    values = {"value": jnp.ones(()), "hypergradient": jnp.ones(1), "known": False, "norm": 1.0, "reference": OPTIMUM}
    assert "more inner steps" in str(jaxhpo.ErrorBar(error=0.5, **values))
    assert "not convex" in str(jaxhpo.ErrorBar(error=np.nan, **values))
    bar = jaxhpo.error_bar(lambda h: jnp.log(ridge(Unroll())(h) - 100))(POINT)
    assert not bar.known and str(bar).endswith(": the outer loss is nan")


@pytest.mark.slow
def test_carry_key_and_words():
    def outer_loss(h, carry, key):
        shifted = h + 1e-3 * jax.random.normal(key, h.shape)
        return carry * ridge(Unroll(truncate=12))(shifted), carry + 1, None

    bar = jaxhpo.error_bar(outer_loss)(POINT, 2.0, jax.random.key(3))
    assert str(bar).startswith("hypergradient of length 0.") and "the derivative of the inner steps" in str(bar)
    np.testing.assert_allclose(bar.value, outer_loss(POINT, 2.0, jax.random.key(3))[0], rtol=1e-12)


def test_settings_are_checked():
    with pytest.raises(jaxhpo.JaxhpoError, match="directions"):
        jaxhpo.error_bar(ridge(Unroll()), directions=0)
    with pytest.raises(jaxhpo.JaxhpoError, match="products"):
        jaxhpo.error_bar(ridge(Unroll()), products=1.5)
