"""Stateful methods with derivatives: the pair of an `Implicit` rule, HOAG and its step, RealTime, T1-T2."""

import importlib.util
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import partial_sum, relative_error
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxhpo
import jaxhpo.testing
from jaxhpo import (
    CG,
    GMRES,
    HOAG,
    BiCGStab,
    Direct,
    Identity,
    Implicit,
    JaxhpoError,
    LinearStatus,
    Neumann,
    NormalCG,
    Nystrom,
    RealTime,
    Unroll,
    ZeroHypergradientError,
    ZeroHypergradientWarning,
    fixed_point,
    from_optax,
    from_pair,
    gauss_newton,
    hoag_step,
    hypergradient,
    solve,
    tune,
)

RIDGE = jaxhpo.testing.ridge()
H = jnp.asarray(RIDGE.hparams)
START = jnp.asarray(RIDGE.params)
SOLVED = jnp.asarray(RIDGE.solution(RIDGE.hparams))
EXACT = RIDGE.hypergradient(RIDGE.hparams)
SOLVER = from_optax(RIDGE.train_loss, optax.sgd(RIDGE.step_size))
KEY = jax.random.key(0)


def val_loss(solution, hparams, batch):
    return RIDGE.val_loss(solution.params)


def updated(pair, hparams, params, times=1, model_state=None, **kw):
    """Return the results of successive updates at one point."""
    state, update, results = pair.init(params, hparams, model_state), jax.jit(pair.update), []
    for _ in range(times):
        grad, state, info = update(hparams, state, **kw)
        results.append((grad, state, info))
    return results


# --- the pair of an `Implicit` rule ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_implicit_pair_warm_starts_and_reports_its_linear_solve():
    """With hyperparameters that hold a None, a direct dependence of the outer loss on them, and metrics."""
    solver = from_optax(lambda w, h, b: RIDGE.train_loss(w, h["log"], b), optax.sgd(RIDGE.step_size))

    def outer(solution, hparams, batch):
        return val_loss(solution, hparams, batch) + batch * jnp.sum(hparams["log"] ** 3), {"norm": jnp.ones(2)}

    pair = hypergradient(Implicit(CG()), solver, outer, num_steps=1)
    results = updated(pair, {"log": H, "none": None}, SOLVED, 2, outer_batch=0.1)
    for grad, _, info in results:
        assert grad["none"] is None and info.metrics["norm"].shape == (2,)
        assert relative_error(grad["log"], EXACT + 0.3 * RIDGE.hparams**2) <= 1e-9
        assert float(info.value) == pytest.approx(float(RIDGE.val_loss(SOLVED) + 0.1 * jnp.sum(H**3)), rel=1e-12)
        assert float(info.linear.residual) <= 2e-12 and int(info.linear.status) == LinearStatus.CONVERGED
    # Conjugate gradients from zero take as many products as there are dimensions; none, from the answer.
    assert [int(info.linear.num_iterations) for _, _, info in results] == [6, 0]


@pytest.mark.slow
def test_implicit_pair_equals_jax_grad_through_solve():
    """Also where the inner run has not converged, and neither equals the closed form."""

    def by_grad(h):
        return val_loss(solve(SOLVER, SOLVER.init(START, h), h, num_steps=3, adjoint=Implicit(CG())), h, None)

    grad, _, info = updated(hypergradient(Implicit(CG()), SOLVER, val_loss, num_steps=3), H, START)[0]
    value, want = jax.jit(jax.value_and_grad(by_grad))(H)
    assert relative_error(grad, want) <= 1e-13 < relative_error(grad, EXACT)
    assert float(info.value) == pytest.approx(float(value), rel=1e-14)


# `step` is a preconditioned descent, whose θ − Φ has the Jacobian D A: not symmetric, with the same root.
PRECONDITIONED = fixed_point(
    lambda w, h, b: w - RIDGE.step_size * jnp.linspace(0.2, 1.0, 6) * jax.grad(RIDGE.train_loss)(w, h, b)
)
GAUSS_NEWTON = gauss_newton(
    lambda w, h, b: w, lambda o, b: RIDGE.train_loss(o, jnp.full(6, -jnp.inf), b), lambda w, h: jnp.exp(h) @ w**2 / 2
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "solver", "closed_form"),
    [
        (Implicit(CG()), SOLVER, EXACT),
        (Implicit(Direct()), SOLVER, EXACT),
        (Implicit(GMRES()), SOLVER, EXACT),
        (Implicit(CG(), curvature=GAUSS_NEWTON), SOLVER, EXACT),
        (Implicit(Direct()), PRECONDITIONED, EXACT),
        (Implicit(GMRES()), PRECONDITIONED, EXACT),
        (Implicit(BiCGStab()), PRECONDITIONED, EXACT),
        (Implicit(NormalCG()), PRECONDITIONED, EXACT),
        (Implicit(Neumann(2000, 1.0)), PRECONDITIONED, EXACT),
        (Implicit(CG(damping=0.1)), SOLVER, RIDGE.partial(RIDGE.hparams, lambda A: np.linalg.inv(A + 0.1 * np.eye(6)))),
        (Implicit(Nystrom(6, 0.1)), SOLVER, RIDGE.partial(RIDGE.hparams, lambda A: np.linalg.inv(A + 0.1 * np.eye(6)))),
        (Implicit(Neumann(5, 0.3)), SOLVER, RIDGE.partial(RIDGE.hparams, lambda A: partial_sum(A, 0.3, 5))),
        (Implicit(Identity(0.3)), SOLVER, RIDGE.partial(RIDGE.hparams, lambda A: 0.3 * np.eye(6))),
        (Implicit(lambda matvec, b: (jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-12)[0], None)), SOLVER, EXACT),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)) if isinstance(value, Implicit) else None,
)
def test_implicit_pairs_equal_their_closed_forms(rule, solver, closed_form):
    results = updated(hypergradient(rule, solver, val_loss, num_steps=2), H, SOLVED, 2, key=KEY)
    for grad, _, _ in results:  # the second is warm-started where the linear solver can be
        assert relative_error(grad, closed_form) <= 1e-9


@pytest.mark.slow
def test_warm_started_linear_solve_converges_over_updates():
    """With one product with H per update, the linear solve continues in the next updates."""
    results = updated(hypergradient(Implicit(CG(maxiter=1)), SOLVER, val_loss, num_steps=1), H, SOLVED, 60)
    errors = [relative_error(grad, EXACT) for grad, _, _ in results]
    assert errors[0] > 0.05 and all(errors[k + 2] < errors[k] for k in range(25))
    assert errors[-1] <= 1e-9
    assert errors[-1] <= 1e-9
    cold = updated(
        hypergradient(Implicit(CG(maxiter=1)), SOLVER, val_loss, num_steps=1, warm_start=False), H, SOLVED, 2
    )
    np.testing.assert_array_equal(cold[0][0], cold[1][0])
    assert cold[1][1].linear_solution is None


@pytest.mark.slow
@pytest.mark.parametrize("curvatures", [(1.0, -2.0), (1.0, np.inf)], ids=["indefinite", "not finite"])
def test_failed_linear_solve_does_not_start_the_next(curvatures):
    scale = jnp.asarray(curvatures)
    solver = from_optax(lambda w, h, b: 0.5 * jnp.sum(scale * (w - h) ** 2), optax.sgd(0.0))
    pair = hypergradient(Implicit(CG()), solver, lambda s, h, b: jnp.sum(s.params * jnp.array([1.0, 3.0])), num_steps=1)
    results = updated(pair, jnp.ones(2), jnp.ones(2), 3)
    for grad, state, info in results:
        assert int(info.linear.status) in (LinearStatus.INDEFINITE, LinearStatus.NOT_FINITE)
        np.testing.assert_array_equal(state.linear_solution, 0)
        np.testing.assert_array_equal(grad, results[0][0])


@pytest.mark.slow
def test_bfloat16_parameters_have_a_float32_linear_solve():
    params = START.astype(jnp.bfloat16)
    h = H.astype(jnp.float32)
    solver = from_optax(
        lambda w, h, b: RIDGE.train_loss(w, h, b).astype(jnp.float32), optax.sgd(float(RIDGE.step_size))
    )

    def outer(solution, hparams, batch):
        return val_loss(solution, hparams, batch).astype(jnp.float32)

    pair = hypergradient(Implicit(CG()), solver, outer, num_steps=40)
    grad, state, info = updated(pair, h, params)[0]

    def by_grad(h):
        return outer(solve(solver, solver.init(params, h), h, num_steps=40, adjoint=Implicit(CG())), h, None)

    assert state.inner.params.dtype == jnp.bfloat16 and state.linear_solution.dtype == jnp.float32
    assert grad.dtype == jnp.float32 and float(info.linear.residual) <= 1e-5  # CG's 6e-6 in float32
    assert relative_error(grad, jax.jit(jax.grad(by_grad))(h)) <= 0.01  # that one casts the cotangents to bfloat16


@pytest.mark.slow
def test_implicit_pair_warns_of_zero_hypergradients():
    def loss(w, h, b, state):
        return RIDGE.train_loss(w, h["log"], b), {"mean": 0.9 * state["mean"] + w}

    solver = from_optax(loss, lambda h: optax.sgd(h["lr"], momentum=0.5), has_state=True)
    hparams, state = {"log": H, "lr": jnp.asarray(0.1)}, {"mean": jnp.zeros(6)}

    def warned(outer):
        pair = hypergradient(Implicit(CG()), solver, outer, num_steps=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            grad, _, _ = pair.update(hparams, pair.init(START, hparams, state))
        assert float(grad["lr"]) == 0
        return [w.message.leaf for w in caught if isinstance(w.message, ZeroHypergradientWarning)]

    assert warned(val_loss) == ["hparams['lr']"]
    assert warned(lambda s, h, b: jnp.sum(s.model_state["mean"])) == ["model_state['mean']", "hparams['lr']"]
    assert warned(lambda s, h, b: jnp.sum(s.opt_state[0].trace)) == ["opt_state[0].trace", "hparams['lr']"]
    pair = hypergradient(Implicit(CG()), solver, val_loss, num_steps=2)
    with pytest.raises(ZeroHypergradientError, match=r"hparams\['lr'\].*Unroll"):
        carry = pair.init(START, hparams, state)
        tune(None, hparams, optax.sgd(0.1), num_steps=1, gradient=from_pair(pair), carry=carry, progress=False)


# --- HOAG ------------------------------------------------------------------------------------------------------------


def test_hoag_tightens_and_converges():
    """40 updates in one scan: each inner run and linear solve ends within its tolerance, and the last is exact."""
    pair = hypergradient(HOAG("exponential", initial_tolerance=0.5, decay=0.5), SOLVER, val_loss, num_steps=50)

    @jax.jit
    def run(params, hparams):
        def body(state, _):
            grad, state, info = pair.update(hparams, state)
            return state, (grad, info)

        return jax.lax.scan(body, pair.init(params, hparams), None, 40)

    state, (grads, info) = jax.tree.map(np.asarray, run(START, H))
    hessian: Any = []
    RIDGE.partial(RIDGE.hparams, lambda A: hessian.append(A) or np.eye(6))
    scale = np.linalg.norm(hessian[0] @ (RIDGE.params - np.asarray(SOLVED)))
    np.testing.assert_allclose(state.scale, scale, rtol=1e-12)
    floor = np.finfo(float).eps ** 0.75
    np.testing.assert_allclose(info.tolerance, np.maximum(0.5 * 0.5 ** np.arange(1, 41), floor), rtol=1e-12)
    assert np.all(info.solution.optimality <= info.tolerance * scale)
    assert np.all(info.linear.residual <= 2 * info.tolerance)  # measured; the iteration's own is within the tolerance
    assert np.all(info.linear.num_iterations[1:] <= 2)  # a warm start needs one or two for each halving
    errors = np.linalg.norm(grads - EXACT, axis=1) / np.linalg.norm(EXACT)
    assert errors[0] > 0.05 and errors[-1] <= 1e-10


def test_hoag_step_by_hand():
    """L and the next point after a longer step, a rejection, a small rise, a small gain, a NaN.

    m = 4 and p = (2, 0, 0, 0), so L = ‖p‖/√m = 1 and the unit |V₁| is 1; ε_k = 0.1/k².
    """
    tx = hoag_step()
    h, p = jnp.ones(4), jnp.array([2.0, 0.0, 0.0, 0.0])
    state = tx.init(h)

    @jax.jit
    def update(h, state, gradient, value):
        updates, state = tx.update(gradient, state, h, value=value)
        return optax.apply_updates(h, updates), state

    def step(h, gradient, value):
        return update(h, state, gradient, value)

    h1, state = step(h, p, 1.0)
    np.testing.assert_allclose(h1, [-1.0, 1, 1, 1], rtol=1e-15)
    # ‖Δ‖ = 2 and 0.25 · 0.1/4 + 1.25 · 0.1 · 2 − 1 · 4 = −3.74375: V₂ = −2.75 is not above 1 − 3.74375.
    h2, state = step(h1, 0.95 * p, -2.75)
    assert float(state.curvature) == pytest.approx(0.95, rel=1e-15)
    np.testing.assert_allclose(h2, [-3.0, 1, 1, 1], rtol=1e-15)
    # −2.15 is above −2.75 + 0.2 · 2.75 = −2.2: back to h1, and from there with twice the curvature.
    h3, state = step(h2, 100 * p, -2.15)
    assert float(state.curvature) == pytest.approx(1.9, rel=1e-15) and float(state.value) == -2.75
    np.testing.assert_allclose(h3, [-2.0, 1, 1, 1], rtol=1e-15)
    # −2.3 is above −2.75, but not by 20 %: the step is made, with 1.9 / 0.95 = 2.
    h4, state = step(h3, 2 * p, -2.3)
    assert float(state.curvature) == pytest.approx(2.0, rel=1e-15)
    np.testing.assert_allclose(h4, [-4.0, 1, 1, 1], rtol=1e-15)
    # −2.3 − ‖Δ‖² L = −10.3: −5 is a gain, but not enough of one for a longer step.
    h5, state = step(h4, p, -5.0)
    assert float(state.curvature) == pytest.approx(2.0, rel=1e-15)
    np.testing.assert_allclose(h5, [-5.0, 1, 1, 1], rtol=1e-15)
    # A NaN is no progress: back to h4, with twice the curvature.
    h6, state = step(h5, p * jnp.nan, jnp.nan)
    np.testing.assert_allclose(h6, [-4.5, 1, 1, 1], rtol=1e-15)
    assert int(state.count) == 6


@pytest.mark.slow
def test_hoag_step_is_small_from_a_flat_start():
    tx = hoag_step()
    h, p = {"a": jnp.ones(3), "b": jnp.asarray(0.0)}, {"a": jnp.full(3, 1e-3), "b": jnp.asarray(0.0)}
    updates, state = tx.update(p, tx.init(h), h, value=jnp.asarray(-5.0))  # ‖p‖ = 1.7e-3 ≤ 1e-3 · 5
    assert float(state.curvature) == 5.0
    np.testing.assert_allclose(updates["a"], -2e-4, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_hoag_step_converges_at_any_scale(scale):
    """Curvatures 1 and 100, started near the valley: the first steps are rejected until L > 50."""
    curvature, centre = jnp.array([1.0, 100.0]), jnp.array([3.0, -2.0])

    def loss(h):
        return scale * (1 + 0.5 * jnp.sum(curvature * (h - centre) ** 2))

    tx = hoag_step()

    def body(carry, _):
        h, state = carry
        value, grad = jax.value_and_grad(loss)(h)
        updates, state = tx.update(grad, state, h, value=value)
        return (optax.apply_updates(h, updates), state), state.curvature / scale

    start = jnp.array([0.0, -1.97])  # p = (-3, 3) scale, and L = 3 scale
    (h, _), curvatures = jax.jit(lambda h: jax.lax.scan(body, (h, tx.init(h)), None, 600))(start)
    np.testing.assert_allclose(curvatures[:4], [3, 6, 12, 24], rtol=1e-9)
    assert curvatures[-1] > 50
    np.testing.assert_allclose(h, centre, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tolerance", "formula"),
    [
        ("quadratic", lambda k: 0.1 / k**2),
        ("cubic", lambda k: 0.1 / k**3),
        ("exponential", lambda k: 0.1 * 0.9**k),
        ("exact", lambda k: 0 * k + np.finfo(float).eps ** 0.75),
        (lambda k: 1 / (k * (k + 1)), lambda k: 1 / (k * (k + 1))),
    ],
)
def test_tolerances(tolerance, formula):
    results = updated(hypergradient(HOAG(tolerance), SOLVER, val_loss, num_steps=5), H, START, 7)
    np.testing.assert_allclose([info.tolerance for _, _, info in results], formula(np.arange(1.0, 8.0)), rtol=1e-12)


@pytest.mark.slow
def test_hoag_without_warm_start_and_with_line_searches():
    """L-BFGS can train the inner problem, since its line search is not differentiated."""
    solver = from_optax(RIDGE.train_loss, optax.lbfgs())
    for warm_start in (True, False):
        pair = hypergradient(HOAG("exact"), solver, val_loss, num_steps=30, warm_start=warm_start)
        results = updated(pair, H, START, 2)
        for grad, _, info in results:
            assert relative_error(grad, EXACT) <= 1e-9
            assert float(info.solution.optimality) <= 2e-12 * float(results[0][1].scale)
        first, second = (int(info.solution.num_steps) for _, _, info in results)
        assert first > 5 and second == (0 if warm_start else first)


# --- RealTime --------------------------------------------------------------------------------------------------------


def test_real_time_is_exact_at_constant_hyperparameters():
    """Three updates of four steps, in a scan, against the recursion of twelve steps in NumPy."""
    pair = hypergradient(RealTime(), SOLVER, val_loss, num_steps=4)

    @jax.jit
    def run(params, hparams):
        def body(state, _):
            grad, state, info = pair.update(hparams, state)
            return state, grad

        return jax.lax.scan(body, pair.init(params, hparams), None, 3)[1]

    for k, grad in enumerate(np.asarray(run(START, H))):
        assert relative_error(grad, RIDGE.unrolled(RIDGE.hparams, RIDGE.step_size, 4 * (k + 1))) <= 1e-9


NOISY = {"target": jnp.linspace(0.5, 1.0, 3), "log_rate": jnp.asarray(-2.0)}


def noisy_problem(tx):
    """Keys, counters and running means in the state; the target and the learning rate are hyperparameters."""

    def loss(w, h, batch, state):
        key, now = jax.random.split(state["key"])
        value = jnp.sum((w - h["target"] * batch + 0.1 * jax.random.normal(now, (3,))) ** 2)
        mean = 0.9 * state["mean"] + 0.1 * w
        return value, {"key": key, "count": state["count"] + 1, "mean": mean}

    def outer(solution, h, batch):
        more = jnp.sum(solution.model_state["mean"] ** 2) + batch * jnp.exp(h["log_rate"])
        return jnp.sum((solution.params - 1.0) ** 2) + more, solution.model_state["count"]

    state = {"key": KEY, "count": jnp.asarray(0), "mean": jnp.zeros(3)}
    return from_optax(loss, tx, has_state=True), outer, state


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.5),
        lambda h: optax.adam(jnp.exp(h["log_rate"]), eps_root=1e-8),
        lambda h: optax.inject_hyperparams(optax.sgd)(jnp.exp(h["log_rate"])),  # its state depends on h from the start
    ],
    ids=["momentum", "adam", "injected"],
)
def test_real_time_sees_all_inputs_of_forward(tx):
    """Learning rates, optimiser and model states with keys and counters, the outer loss's own use of h."""
    solver, outer, model_state = noisy_problem(tx)
    batches = jnp.linspace(0.5, 1.5, 5)
    pair = hypergradient(RealTime(), solver, outer)
    results = updated(pair, NOISY, jnp.zeros(3), 3, model_state, batches=batches, outer_batch=0.3)

    def by_grad(h):
        start = solver.init(jnp.zeros(3), h, model_state)
        sol = solve(solver, start, h, jnp.tile(batches, 3), adjoint=Unroll())
        return outer(sol, h, 0.3)[0]

    value, want = jax.jit(jax.value_and_grad(by_grad))(NOISY)
    grad, state, info = results[-1]
    assert jax.tree.structure(grad) == jax.tree.structure(NOISY) and int(info.metrics) == 15
    for name in NOISY:
        assert relative_error(grad[name], want[name]) <= 1e-9
    assert float(info.value) == pytest.approx(float(value), rel=1e-12)
    assert all(z.shape[0] == 4 for z in state.jacobian)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Implicit(CG()), HOAG(), RealTime()], ids=repr)
def test_vmapped_updates_equal_a_loop(method):
    pair = hypergradient(method, SOLVER, val_loss, num_steps=5)
    many = jnp.stack([H, H - 1.0])

    def two_updates(h):
        _, state, _ = pair.update(h, pair.init(START, h))
        grad, state, info = pair.update(h, state)
        return grad, state, info.value

    got = jax.jit(jax.vmap(two_updates))(many)
    want = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(two_updates), many))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


@pytest.mark.filterwarnings("ignore:.tune.. in 60 of 60 steps linear solves ended:RuntimeWarning")  # three products
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "num_steps", "rate", "num_updates"),
    [
        (HOAG(), 100, None, 40),
        (Implicit(CG(maxiter=3)), 5, 5.0, 60),
        (RealTime(), 5, 2.0, 150),
        (Implicit(Identity(RIDGE.step_size)), 1, 5.0, 150),
    ],
    ids=repr,
)
def test_validation_loss_falls_under_tune(method, num_steps, rate, num_updates):
    """By half the gain of the best single penalty on a grid: the penalties differ, and V is flat."""
    pair = hypergradient(method, SOLVER, val_loss, num_steps=num_steps)
    result = tune(
        None,
        H,
        hoag_step() if rate is None else optax.sgd(rate),
        num_steps=num_updates,
        gradient=from_pair(pair),
        carry=pair.init(START, H),
        progress=False,
    )

    def exact(h):
        return float(RIDGE.val_loss(RIDGE.solution(np.asarray(h))))

    best = min(exact(np.full(6, x)) for x in np.linspace(-12, 3, 200))
    print(method, exact(H), exact(result.hparams), best)
    assert exact(result.hparams) < (exact(H) + best) / 2


X = np.random.default_rng(0).normal(size=(32, 5))
Y = X @ np.linspace(-1.0, 1.0, 5) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", [Implicit(CG()), HOAG("exact"), RealTime()], ids=lambda m: type(m).__name__)
def test_sharded_updates_equal_those_on_one_device(method):
    """Data-parallel, and with one inner problem per device; the second update starts where the first ended."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def two_updates(h, x, y, mean=lambda v: v):
        def loss(w, h, batch):
            return 0.5 * mean(jnp.mean((batch[0] @ w - batch[1]) ** 2)) + 0.5 * jnp.sum(jnp.exp(h) * w**2)

        solver = from_optax(loss, optax.sgd(0.3, momentum=0.5))
        pair = hypergradient(method, solver, lambda s, h, b: mean(jnp.mean((b @ s.params - 1.0) ** 2)), num_steps=40)
        _, state, _ = pair.update(h, pair.init(jnp.zeros(5), h), lambda t: (x, y), x)
        return pair.update(h, state, lambda t: (x, y), x)[0]

    hs = jnp.linspace(-3.0, -2.0, 5)[None] + 0.1 * jnp.arange(8.0)[:, None]
    one = jax.jit(two_updates)(hs[0], X, Y)
    specs: Any = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    parallel = jax.shard_map(lambda h, x, y: two_updates(h, x, y, lambda v: jax.lax.pmean(v, "data")), **specs)
    assert relative_error(jax.jit(parallel)(hs[0], X, Y), one) <= 1e-12
    specs = {"mesh": mesh, "in_specs": (P("data"), P(), P()), "out_specs": P("data")}
    apart = jax.jit(jax.shard_map(lambda h, x, y: two_updates(h[0], x, y)[None], **specs))(hs, X, Y)
    assert relative_error(apart[0], one) <= 1e-12
    assert relative_error(apart[7], jax.jit(two_updates)(hs[7], X, Y)) <= 1e-12


# --- T1-T2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_t1_t2_follows_its_closed_form():
    """From the inner solution: −α Bᵀ ∂V, alternating one step of training and one of the hyperparameters."""
    rate = RIDGE.step_size
    pair = hypergradient(Implicit(Identity(rate)), SOLVER, val_loss, num_steps=1)
    run = {"gradient": from_pair(pair), "carry": pair.init(SOLVED, H), "progress": False}
    want = RIDGE.partial(RIDGE.hparams, lambda A: rate * np.eye(6))
    moved = tune(None, H, optax.sgd(1e-3), num_steps=1, **run).hparams - H
    assert relative_error(moved, -1e-3 * want) <= 1e-9
    moved = np.asarray(tune(None, H, optax.sgd(1e-3), num_steps=100, **run).hparams - H)
    cosine = moved @ -EXACT / np.linalg.norm(moved) / np.linalg.norm(EXACT)
    assert cosine > 0.9  # the directions differ, as H is no multiple of the identity: 0.98 at the start
    assert want @ EXACT / np.linalg.norm(want) / np.linalg.norm(EXACT) == pytest.approx(cosine, abs=0.02)


# --- HOAG against a grid --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("data", ["cancer", "digits"])
def test_hoag_needs_fewer_gradients_than_a_grid_of_20_points(data):
    """Within 1e-3 of the best of 200 points, on each of three splits, a Hessian product counted as three gradients."""
    pytest.importorskip("sklearn")
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "hoag.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_hoag", path)
    assert spec and spec.loader
    benchmark: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    methods = benchmark.compare(data, "Nesterov", 3, ("quadratic",))["methods"]
    hoag = methods["HOAG, quadratic"]
    assert hoag["gap"].max() <= 1e-3
    for grid in ("grid of 20, cold", "grid of 20, warm"):
        assert np.all(hoag["gradients"] < methods[grid]["gradients"])


# --- mistakes --------------------------------------------------------------------------------------------------------

NOT_SYMMETRIC = fixed_point(lambda w, h, b: w)


def pair_of(method, **kw):
    return hypergradient(method, SOLVER, val_loss, **kw)


def given(method, state=None, hparams=H, **kw):
    pair = pair_of(method, num_steps=2)
    return pair.update(hparams, pair.init(START, H) if state is None else state, **kw)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: pair_of(HOAG), r"the class HOAG: write `HOAG\(\.\.\.\)`"),
        (lambda: pair_of(CG()), r"Implicit\(CG\("),
        (lambda: pair_of(HOAG(), warm_start="yes"), "write True or False"),
        (lambda: HOAG("linear"), "'quadratic', 'cubic', 'exponential', 'exact'"),
        (lambda: HOAG(lambda: 0.1), r"tolerance\(k\)"),
        (lambda: HOAG(3.0), "not a schedule"),
        (lambda: HOAG(initial_tolerance=-0.1), "above 0"),
        (lambda: HOAG(decay=1.5), "below 1"),
        (lambda: HOAG(maxiter=0), "at least 1"),
        (lambda: HOAG(damping=-1.0), "at least 0"),
        (lambda: hoag_step("linear"), r"hoag_step\(tolerance=\.\.\.\)"),
        (lambda: given(HOAG(lambda k: jnp.ones(2))), "one real number is needed"),
        (lambda: hypergradient(HOAG(), NOT_SYMMETRIC, val_loss), "symmetric.*Neumann"),
        (lambda: pair_of(RealTime(), warm_start=False), r"hypergradient\(Forward\(\), \.\.\., warm_start=False\)"),
        (lambda: from_pair(HOAG()), r"make one with `hypergradient"),
        (lambda: given(HOAG(), SOLVER.init(START, H)), r"`state` got InnerState.*HOAGState.*`pair\.init"),
        (lambda: given(RealTime(), pair_of(HOAG()).init(START, H)), r"`state` got HOAGState.*RealTimeState"),
        (lambda: given(Implicit(), pair_of(Unroll()).init(START, H)), "`state` got RuleState.*ImplicitState"),
        (lambda: given(Unroll(), pair_of(Implicit()).init(START, H)), "`state` got ImplicitState.*RuleState"),
        (lambda: pair_of(HOAG(), num_steps=2).update(H, None), "carry=pair.init"),
        (lambda: given(RealTime(), hparams=jnp.ones(2)), "2 hyperparameters"),
        (lambda: given(Implicit(Nystrom(2, 0.1))), r"got no key: .* for a pair `update\(\.\.\., key=key\)`"),
        (lambda: given(HOAG(), key=jnp.zeros(2, jnp.uint32)), "typed key"),
        (lambda: pair_of(HOAG()).update(H, pair_of(HOAG()).init(START, H)), "num_steps"),
        (lambda: hoag_step().update(H, hoag_step().init(H), H), "`value=None`"),
        (lambda: hoag_step().update(H, hoag_step().init(H), value=1.0), "`params=None`"),
    ],
)
def test_mistakes(mistake, message):
    with pytest.raises(JaxhpoError, match=message):
        mistake()


# --- a Jacobian that is not symmetric ---------------------------------------------------------------------------------

SKEW = jnp.array([[1.0, 0.5], [0.2, 2.0]])
LINEAR_SOLVERS = {"direct": Direct(), "gmres": GMRES(), "normal-cg": NormalCG(), "neumann": Neumann(400, 0.1)}


def linear(solution, hparams, batch):
    return jnp.sum(solution.params * jnp.arange(1.0, 3.0))


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_the_pair_transposes_a_condition_that_is_no_gradient(name):
    """A p = h, so dF/dh = A⁻ᵀ c."""
    solver = fixed_point(lambda p, h, b: p - 0.1 * (SKEW @ p - h), condition=lambda p, h, b: SKEW @ p - h)
    pair = hypergradient(Implicit(LINEAR_SOLVERS[name]), solver, linear, num_steps=400)
    ((grad, _, _),) = updated(pair, jnp.array([0.4, -0.2]), jnp.array([0.3, 0.7]))
    assert relative_error(grad, np.linalg.solve(SKEW.T, np.arange(1.0, 3.0))) < 1e-9


@jax.custom_vjp
def reversing(x):
    return x


reversing.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def skew_loss(p, h, batch):
    return jnp.sum((p - h) ** 2) + 0.1 * jnp.sum(jnp.sin(p) * (SKEW @ reversing(p)) * h)


def test_the_pair_equals_grad_where_a_gradient_is_reversed():
    solver, start, h = from_optax(skew_loss, optax.sgd(0.1)), jnp.array([0.3, 0.7]), jnp.array([0.4, -0.2])
    ((grad, _, _),) = updated(hypergradient(Implicit(Direct()), solver, linear, num_steps=400), h, start)

    def loss(h):
        return linear(solve(solver, solver.init(start, h), h, num_steps=400, adjoint=Implicit(Direct())), h, None)

    assert relative_error(grad, jax.grad(loss)(h)) < 1e-9


def test_hoag_warns_where_a_gradient_is_reversed():
    pair = hypergradient(HOAG(), from_optax(skew_loss, optax.sgd(0.1)), linear, num_steps=5)
    with pytest.warns(RuntimeWarning, match="`reversing`.*HOAG.*takes the Hessian to be symmetric"):
        updated(pair, jnp.array([0.4, -0.2]), jnp.array([0.3, 0.7]))
