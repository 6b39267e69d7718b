"""First-order rules: `DrMAD`, `FiniteDifference` and `SAMA`, against the formulas of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, grad, outer_loss, relative_error

import jaxhpo
from jaxhpo import SAMA, DrMAD, FiniteDifference, JaxhpoError, Unroll, ZeroHypergradientWarning

RIDGE = PROBLEMS["ridge"]
RULES = [FiniteDifference(0.1), SAMA(), DrMAD()]
# In the quick suite one rule tests the code that all share.
rules = pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=[] if isinstance(r, DrMAD) else pytest.mark.slow) for r in RULES], ids=str
)


def trace(loss, h):
    """Traces the gradient, which suffices for warnings and errors."""
    return jax.eval_shape(jax.grad(loss), h)


# --- the difference of two gradients ---


def weighted():
    """L(w, h) = (1/n) Σ_i e^{h_i} softplus(−y_i x_iᵀw): a weight per example, whose gradient is not quadratic in w."""
    rng = np.random.default_rng(0)
    X, y, w = rng.normal(size=(12, 4)), np.sign(rng.normal(size=12)), rng.normal(size=4)
    solver = jaxhpo.from_optax(lambda w, h, batch: jnp.mean(jnp.exp(h) * jax.nn.softplus(-y * (X @ w))), optax.sgd(0.5))

    def hypergradient(rule, v, dtype=jnp.float64):
        """(dθ/dh)ᵀ v after one step from w."""

        def pairing(h):
            state = solver.init(jnp.asarray(w, dtype), h)
            return jnp.vdot(v.astype(dtype), jaxhpo.solve(solver, state, h, num_steps=1, adjoint=rule).params)

        return jax.grad(pairing)(jnp.zeros(12, dtype))

    def closed_form(v):
        return 0.5 * y / (1 + np.exp(y * (X @ w))) * (X @ v) / 12  # −α ∂_h [∇_w L · v] at h = 0

    return jax.jit(hypergradient, static_argnums=(0, 2)), closed_form, rng.normal(size=4)


def test_error_of_the_difference_is_of_second_order():
    """Half of ε gives a quarter of the error: the measured ratio is 4.00 at these ε."""
    hypergradient, closed_form, v = weighted()
    errors = [relative_error(hypergradient(FiniteDifference(0.5, e), v), closed_form(v)) for e in (0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)
    assert errors[1] < 1e-3


@pytest.mark.slow
def test_cotangents_of_any_size():
    """Linear in the size of v from 1e-30 on, whose square underflows in float32; zero at zero; NaN stays NaN."""
    hypergradient, closed_form, v = weighted()
    rule = FiniteDifference(0.5)
    tiny = hypergradient(rule, 1e-30 * v, jnp.float32)
    assert relative_error(np.float64(tiny) * 1e30, closed_form(v)) < 1e-3
    np.testing.assert_array_equal(hypergradient(rule, 0 * v), np.zeros(12))
    assert np.all(np.isnan(hypergradient(rule, np.nan * v)))


OPTIMISERS = {
    "adam": lambda rate: optax.adam(rate, eps_root=1e-8),
    "clipping and momentum": lambda rate: optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(rate, momentum=0.9)),
    "adamw": lambda rate: optax.adamw(rate, eps_root=1e-8),
    "rmsprop": lambda rate: optax.rmsprop(rate, eps_in_sqrt=True, eps=1e-8),
}


@pytest.mark.parametrize(
    "name", ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIMISERS)[1:])]
)
def test_sama_equals_one_unrolled_step_of_any_optimiser(name):
    """Equal to `Unroll(truncate=1)`, learning rate included; exactly, since ∇_h L is quadratic in the weights."""
    h = {"penalty": jnp.asarray(RIDGE.hparams), "rate": jnp.asarray(0.05)}
    solver = jaxhpo.from_optax(
        lambda w, h, b: RIDGE.train_loss(w, h["penalty"], b), lambda h: OPTIMISERS[name](h["rate"])
    )

    def loss(h, rule):
        sol = jaxhpo.solve(solver, solver.init(jnp.asarray(RIDGE.params), h), h, num_steps=10, adjoint=rule)
        return RIDGE.val_loss(sol.params)

    got, want = jax.jit(lambda h: [jax.grad(loss)(h, rule) for rule in (SAMA(), Unroll(truncate=1))])(h)
    for key in h:
        assert relative_error(got[key], want[key]) < 1e-9


@pytest.mark.slow
def test_square_root_at_zero_is_reported():
    """A weight whose gradient is always zero, under Adam without `eps_root`: the error names the remedy."""
    solver = jaxhpo.from_optax(lambda w, h, b: h * w[0] ** 2, optax.adam(0.1))

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=3, adjoint=SAMA())
        return jnp.sum(sol.params**2)

    with pytest.raises(jaxhpo.NonFiniteError, match=r"SAMA\(epsilon=0\.01\).*eps_root"):
        jaxhpo.check_hypergradient(loss, jnp.asarray(1.0))


@pytest.mark.slow
def test_bfloat16_is_differenced_in_float32():
    """ε = 0.01 is below the spacing of bfloat16 numbers near these weights, so only float32 can be right."""
    problem = RIDGE._replace(params=RIDGE.params + 4)  # bfloat16 numbers are 2⁻⁵ = 0.03 apart from 4 on
    w, h = (jnp.asarray(x, jnp.bfloat16) for x in (problem.params, problem.hparams))
    start, low_h, rate = np.asarray(w, float), np.asarray(h, float), problem.step_size
    A, b, P, q = ridge_data(low_h)
    exact = -rate * np.exp(low_h) * start * (P @ (start - rate * (A @ start - b)) - q)
    got = grad(outer_loss(problem, SAMA(), 1, jnp.bfloat16))(h)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, exact) < 2**-6  # the step, v, p and the result are rounded by up to 2⁻⁹ each


# --- along the line ---


def ridge_data(h=RIDGE.hparams):
    """The train loss's gradient A w − b and the validation loss's P w − q, in NumPy."""
    found = []
    RIDGE.partial(h, lambda H: found.append(H) or H)
    A, solution = found[0], RIDGE.solution(h)
    q = -np.asarray(jax.grad(RIDGE.val_loss)(jnp.zeros(6)))
    P = np.stack([np.asarray(jax.grad(RIDGE.val_loss)(jnp.asarray(e))) for e in np.eye(6)], axis=1) + q[:, None]
    return A, A @ solution, P, q


def momentum_run(rates, m, T, length):
    """DrMAD of v ← m v − (1−m)(A w − b), w ← w + α_t v in NumPy: cotangents of h, α, w_0 and v_0."""
    A, b, P, q = ridge_data()
    h, w, v = np.exp(RIDGE.hparams), RIDGE.params, np.full(6, 0.1)
    start = w
    for t in range(T):
        v = m * v - (1 - m) * (A @ w - b)
        w = w + rates[t] * v
    velocity, a_w, a_v = (w - start) / rates.sum(), P @ w - q, np.zeros(6)
    share, d_h, d_rates = np.concatenate([[0], np.cumsum(rates)]) / rates.sum(), np.zeros(6), np.zeros(T)
    for i in reversed(range(length)):
        t = int((i + 0.5) * T / length)
        x = start + share[t] * (w - start)
        new = m * velocity - (1 - m) * (A @ x - b)
        d_v = a_v + rates[t] * a_w
        d_rates[t] = T / length * (a_w @ new)
        d_h -= T / length * (1 - m) * h * x * d_v
        a_w, a_v = a_w - (1 - m) * A @ d_v, m * d_v
    return {"penalty": d_h, "rates": d_rates, "start": a_w, "velocity": a_v}


@pytest.mark.parametrize("points", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_drmad_of_momentum_equals_its_formula(points):
    """Every input that the rule sees, with a decaying schedule and an initial velocity, at all points or some."""
    T, m = 12, 0.6
    rates = 0.5 * np.linspace(1, 0, T)
    h = {"penalty": jnp.asarray(RIDGE.hparams), "rates": jnp.asarray(rates), "start": jnp.asarray(RIDGE.params)}
    h["velocity"] = jnp.full(6, 0.1)
    solver = jaxhpo.momentum_sgd(lambda w, h, b: RIDGE.train_loss(w, h["penalty"], b), lambda h, t: h["rates"][t], m)

    def loss(h):
        state = solver.init(h["start"], h)
        state = state._replace(opt_state=state.opt_state._replace(velocity=h["velocity"]))
        return RIDGE.val_loss(jaxhpo.solve(solver, state, h, num_steps=T, adjoint=DrMAD(points)).params)

    if points:
        with pytest.warns(ZeroHypergradientWarning, match=r"hparams\['rates'\] acts through the optimiser alone"):
            got = grad(loss)(h)
    else:
        got = grad(loss)(h)
    want = momentum_run(rates, m, T, points or T)
    for key in h:
        assert relative_error(got[key], want[key]) < 1e-9, key


def optax_run(rate, m, T):
    """The same for v ← m v + A w − b, w ← w − α v, with v on its own line from v_0 = 0: cotangents of h and α."""
    A, b, P, q = ridge_data()
    w, v = RIDGE.params, np.zeros(6)
    for _ in range(T):
        v = m * v + A @ w - b
        w = w - rate * v
    a_w, a_v, d_h, d_rate = P @ w - q, np.zeros(6), np.zeros(6), 0.0
    for t in reversed(range(T)):
        x, u = RIDGE.params + t / T * (w - RIDGE.params), t / T * v
        d_rate -= a_w @ (m * u + A @ x - b)
        d_v = a_v - rate * a_w
        d_h += np.exp(RIDGE.hparams) * x * d_v
        a_w, a_v = a_w + A @ d_v, m * d_v
    return {"penalty": d_h, "rate": d_rate}


@pytest.mark.slow
def test_drmad_of_an_optax_optimiser_equals_its_formula():
    """The optimiser's state is interpolated; its counters have the value that they had at that step."""
    h = {"penalty": jnp.asarray(RIDGE.hparams), "rate": jnp.asarray(0.05)}
    # The schedule is NaN after the last step, so a counter that ran ahead would give NaN.
    solver = jaxhpo.from_optax(
        lambda w, h, b: RIDGE.train_loss(w, h["penalty"], b),
        lambda h: optax.sgd(lambda t: jnp.where(t < 10, h["rate"], jnp.nan), momentum=0.7),
    )

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.asarray(RIDGE.params), h), h, num_steps=10, adjoint=DrMAD())
        return RIDGE.val_loss(sol.params)

    got, want = grad(loss)(h), optax_run(0.05, 0.7, 10)
    for key in h:
        assert relative_error(got[key], want[key]) < 1e-9, key


def test_drmad_is_exact_on_a_straight_line():
    r"""L = cᵀw + ½ h ‖w‖² at h = 0: w_t = w_0 − c Σ_{s<t} α_s is a line under any schedule, and Hessians vanish.

    So a = ∇V(w_T) throughout, dF/dh = −Σ_t α_t w_tᵀa, and dF/dα_t = −cᵀa.
    """
    rng = np.random.default_rng(0)
    c, start, target = rng.normal(size=(3, 4))
    rates = rng.uniform(0.1, 1.0, size=8)
    solver = jaxhpo.momentum_sgd(
        lambda w, h, b: jnp.vdot(c, w) + 0.5 * h["penalty"] * jnp.sum(w**2), lambda h, t: h["rates"][t], 0.0
    )

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.asarray(start), h), h, num_steps=8, adjoint=DrMAD())
        return 0.5 * jnp.sum((sol.params - target) ** 2)

    got = grad(loss)({"penalty": jnp.asarray(0.0), "rates": jnp.asarray(rates)})
    states = start - np.outer(np.concatenate([[0], np.cumsum(rates)]), c)
    a = states[-1] - target
    assert got["penalty"] == pytest.approx(-np.sum(rates * (states[:-1] @ a)), rel=1e-12)
    np.testing.assert_allclose(got["rates"], np.full(8, -c @ a), rtol=1e-12)


def unstable(rule):
    """w_T for L = −½ h w², whose Hessian −h makes every cotangent grow by 1 + αh a step, on the line as elsewhere."""
    solver = jaxhpo.from_optax(lambda w, h, b: -0.5 * h * w**2, optax.sgd(0.1))

    def loss(h):
        return jaxhpo.solve(solver, solver.init(jnp.ones(()), h), h, num_steps=40, adjoint=rule).params

    return loss


def test_drmad_explosion_is_nan():
    """1.2⁴⁰ = 1470-fold: NaN from a bound below that on, by default 100, and finite with one above."""
    hypergradients = [grad(unstable(DrMAD(max_growth=bound)))(2.0) for bound in (1.21**40, 1.19**40)]
    assert np.isfinite(hypergradients[0]) and np.isnan(hypergradients[1])
    assert np.isfinite(grad(unstable(DrMAD(5)))(2.0))  # 1.2⁵ = 2.5


@pytest.mark.slow
def test_drmad_explosion_is_reported():
    with pytest.raises(jaxhpo.NonFiniteError, match=r"DrMAD\(.*grew 1\.47e\+03-fold.*num_points=50"):
        jaxhpo.check_hypergradient(unstable(DrMAD()), jnp.asarray(2.0))


@pytest.mark.codegen
def test_drmad_memory_does_not_depend_on_the_number_of_steps():
    solver = jaxhpo.from_optax(lambda w, h, b: jnp.sum(h * w**2), optax.sgd(0.1))

    def temporary(num_steps):
        def loss(h):
            state = solver.init(jnp.ones(10_000), h)
            return jnp.sum(jaxhpo.solve(solver, state, h, num_steps=num_steps, adjoint=DrMAD()).params)

        return jax.jit(jax.grad(loss)).lower(jnp.asarray(0.1)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(500) <= temporary(5) + 10_000  # less than one entry per weight more


# --- all three rules ---


def noisy(rule, h):
    """L = ½‖w − h − noise‖², with a key per step in the batches, another in the optimiser, and an integer index."""
    solver = jaxhpo.from_optax(
        lambda w, h, batch: 0.5 * jnp.sum((w - h - jax.random.normal(batch["key"], (3,)) * batch["index"]) ** 2),
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.2)),
    )
    batches = {"key": jax.random.split(jax.random.key(0), 5), "index": jnp.arange(5)}
    return jaxhpo.solve(solver, solver.init(jnp.zeros(3), h), h, batches, adjoint=rule).params


@rules
def test_keys_and_integers(rule):
    """w_T = (1 − (1 − α)^T) h + noise, of which the rules of one step see α h."""
    want = 1 - 0.8**5 if isinstance(rule, DrMAD) else 0.2
    rule = FiniteDifference(0.2) if isinstance(rule, FiniteDifference) else rule
    got = jax.jit(jax.grad(lambda h: jnp.sum(noisy(rule, h))))(jnp.ones(3))
    np.testing.assert_allclose(got, np.full(3, want), rtol=1e-9)


@rules
def test_second_derivatives_are_refused(rule):
    loss = outer_loss(RIDGE, rule, 3)
    middle = jaxhpo.from_optax(lambda h, z, b: loss(h) + jnp.sum(z * h), optax.sgd(0.1))

    def nested(z):
        return jnp.sum(jaxhpo.solve(middle, middle.init(jnp.zeros(6), z), z, num_steps=2).params)

    h = jnp.asarray(RIDGE.hparams)
    for twice in (jax.jacfwd(jax.grad(loss)), jax.jacrev(jax.grad(loss)), jax.grad(nested)):
        with pytest.raises(JaxhpoError, match=r"second derivative.*use `Unroll\(\)`"):
            jax.eval_shape(twice, h)


def train(h, rule, tx=None, **settings):
    """The solution as a function of all inputs that a rule may not see."""
    solver = jaxhpo.from_optax(
        lambda w, g, batch: jnp.sum((w - batch) ** 2) + g["penalty"] * jnp.sum(w**2),
        tx or (lambda g: optax.sgd(lambda t: g["rates"][t])),
    )
    state, g = solver.init(h["start"], h), {"penalty": h["penalty"], "rates": h["rates"]}
    return jnp.sum(jaxhpo.solve(solver, state, g, h["data"], adjoint=rule, **settings).params)


EVERYTHING = {"penalty": 0.1, "rates": jnp.full(4, 0.1), "start": jnp.zeros(3), "data": jnp.ones((4, 3))}


@pytest.mark.parametrize(
    ("rule", "leaf", "message"),
    [
        (FiniteDifference(0.1), "start", r"state\.params is an initial value.*`Unroll\(\)` sees it"),
        (FiniteDifference(0.1), "data", r"batches is being differentiated.*all batches but the last"),
        (FiniteDifference(0.1), "rates", r"hparams\['rates'\] does not enter the train loss.*`Unroll\(\)`"),
        (SAMA(), "start", r"state\.params is an initial value"),
        (SAMA(), "data", "all batches but the last"),
        (SAMA(), "rates", r"hparams\['rates'\] acts through the optimiser alone"),
        (DrMAD(2), "data", r"batches is being differentiated.*visits only 2 inner steps.*`DrMAD\(\)`"),
        (DrMAD(2), "rates", r"hparams\['rates'\] acts through the optimiser alone.*visits only 2"),
    ],
    ids=str,
)
def test_unseen_leaves_are_warned_about(rule, leaf, message):
    def loss(value):
        return train({**EVERYTHING, leaf: value}, rule)

    with pytest.warns(ZeroHypergradientWarning, match=message):
        trace(loss, EVERYTHING[leaf])
    trace(lambda p: train({**EVERYTHING, "penalty": p}, rule), 0.1)  # no warning about a leaf that the rule sees


def test_closed_over_settings_and_other_results_are_warned_about():
    """A rate that the optimiser closes over, and an outer loss that reads the optimiser's state."""

    def rate(r):
        return train(EVERYTHING, FiniteDifference(0.1), tx=optax.sgd(r))

    with pytest.warns(ZeroHypergradientWarning, match=r"a float64\[\] that is closed over does not enter"):
        trace(rate, 0.1)
    solver = jaxhpo.from_optax(lambda w, h, b: h * jnp.sum(w**2), optax.sgd(0.1, momentum=0.9))

    def trace_of_momentum(h):
        return jnp.sum(
            jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=2, adjoint=SAMA()).opt_state[0][0]
        )

    with pytest.warns(ZeroHypergradientWarning, match=r"solution\.opt_state.*parameters alone"):
        trace(trace_of_momentum, 0.1)


FIXED_POINT = jaxhpo.fixed_point(lambda w, h, b: 0.5 * w + h)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FiniteDifference(0), "step_size.*above 0"),
        (lambda: FiniteDifference(0.1, epsilon=-1.0), "epsilon.*at least|epsilon.*above 0"),
        (lambda: SAMA(jnp.ones(())), "epsilon.*plain number"),
        (lambda: DrMAD(0), "num_points.*at least 1"),
        (lambda: DrMAD(max_growth=0.0), "max_growth.*above 0"),
        *((lambda rule=rule: train(EVERYTHING, rule, tol=1e-3), "tol=0.001.*Implicit") for rule in RULES),
        *(
            (
                lambda rule=rule: jaxhpo.solve(FIXED_POINT, FIXED_POINT.init(1.0, 1.0), 1.0, num_steps=2, adjoint=rule),
                r"fixed_point.*from_optax.*Unroll\(truncate=1\)",
            )
            for rule in RULES[:2]
        ),
    ],
)
def test_invalid_arguments_are_refused(make, message):
    with pytest.raises(JaxhpoError, match=message):
        make()


@pytest.mark.slow
def test_16_bit_values_that_are_not_cast_are_refused():
    """A bfloat16 value that the loss closes over, or a loss that accepts 16-bit parameters only."""

    def loss(c):
        solver = jaxhpo.from_optax(lambda w, h, b: jnp.sum(c * w**2), optax.sgd(0.1))
        return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(2), None), None, num_steps=2, adjoint=SAMA()).params)

    with pytest.raises(JaxhpoError, match=r"a bfloat16\[\] that is closed over.*within `hparams`"):
        trace(loss, jnp.asarray(1, jnp.bfloat16))
    x = jnp.ones(3, jnp.bfloat16)
    strict = jaxhpo.from_optax(lambda w, h, b: jnp.sum(h * jax.lax.mul(x, w) ** 2), optax.sgd(0.1))
    with pytest.raises(JaxhpoError, match="noise in bfloat16.*through `batches`"):
        jaxhpo.solve(strict, strict.init(jnp.ones(3, jnp.bfloat16), 1.0), 1.0, num_steps=2, adjoint=SAMA())


def test_settings_are_values():
    names = {"FiniteDifference": FiniteDifference, "SAMA": SAMA, "DrMAD": DrMAD}
    for rule in (*RULES, DrMAD(5), SAMA(0.1)):
        assert eval(repr(rule), names) == rule and hash(eval(repr(rule), names)) == hash(rule)
