"""Contracts of `solve` apart from its derivative rules: batches, state, stopping, closures, warnings, diagnosis."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from helpers import PROBLEMS, grad, outer_loss, relative_error, rows

import jaxhpo
from jaxhpo import CG, Direct, Identity, Implicit, Neumann, Unroll, ZeroHypergradientWarning
from jaxhpo._core.trace import equations, subprograms

STEP = 0.1
RIDGE = PROBLEMS["ridge"]


def squared(p, h, batch):
    """Train loss with its minimum at p = h + batch."""
    return jnp.sum((p - h - batch) ** 2)


# --- batches ---


@pytest.mark.parametrize("adjoint", [Unroll(), Unroll(checkpoint=3), Implicit()], ids=str)
def test_function_of_the_step_equals_stacked_batches(adjoint):
    data = jnp.asarray(np.random.default_rng(0).normal(size=(11, 2)))
    solver = jaxhpo.from_optax(squared, optax.sgd(STEP))

    def loss(h, batches):
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, batches, num_steps=11, adjoint=adjoint)
        return jnp.sum(sol.params**2)

    h = jnp.ones(2)
    both = jax.jit(lambda h: [jax.value_and_grad(loss)(h, batches) for batches in (data, lambda t: data[t])])(h)
    chex.assert_trees_all_close(*both, rtol=1e-12)


@pytest.mark.codegen
def test_function_of_the_step_takes_no_memory_for_batches():
    """A million stacked batches of 1000 numbers would take 8 GB, their indices 8 MB; CG takes some vectors of 8 kB."""
    solver = jaxhpo.from_optax(squared, optax.sgd(STEP))
    key = jax.random.key(0)

    def loss(h):
        batches = lambda t: jax.random.normal(jax.random.fold_in(key, t), (1000,))  # noqa: E731
        start = solver.init(jnp.zeros(1000), h)
        sol = jaxhpo.solve(solver, start, h, batches, num_steps=10**6, adjoint=Implicit(CG()))
        return jnp.sum(sol.params)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros(1000)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100 * 8 * 1000


def test_data_are_differentiable():
    """T steps from zero end at Σ_t 2η(1−2η)^{T−1−t} b_t (h = 0): the derivative with respect to each batch."""
    T = 9
    solver = jaxhpo.from_optax(squared, optax.sgd(STEP))

    def end(batches):
        h = jnp.zeros(1)
        return jaxhpo.solve(solver, solver.init(jnp.zeros(1), h), h, batches).params[0]

    got = grad(end)(jnp.ones((T, 1)))[:, 0]
    np.testing.assert_allclose(got, 2 * STEP * (1 - 2 * STEP) ** np.arange(T - 1, -1, -1), rtol=1e-12)


def test_integer_boolean_and_key_leaves():
    """Batches hold keys, indices and masks; only floating-point leaves are differentiated."""
    T = 6
    keys = jax.random.split(jax.random.key(1), T)
    batches = {"key": keys, "index": jnp.arange(T) % 2, "mask": jnp.arange(T) > 2}

    def train_loss(p, h, b):
        target = h[b["index"]] + 0.1 * jax.random.normal(b["key"], ())
        return jnp.where(b["mask"], 1.0, 0.5) * jnp.sum((p - target) ** 2)

    solver = jaxhpo.from_optax(train_loss, optax.adam(STEP, eps_root=1e-8))  # Adam's state has an integer count
    for adjoint in (Unroll(), Unroll(checkpoint=2, truncate=4), Implicit()):

        def loss(h, adjoint=adjoint):
            return jaxhpo.solve(solver, solver.init(jnp.zeros(3), h), h, batches, adjoint=adjoint).params.sum()

        if isinstance(adjoint, Unroll) and adjoint.truncate is None:
            assert jaxhpo.check_hypergradient(loss, jnp.array([0.3, -0.2])).relative_error < 1e-6
        else:
            assert jnp.all(jnp.isfinite(grad(loss)(jnp.array([0.3, -0.2]))))


# --- what can be a hyperparameter under Unroll ---


def test_learning_rate_schedule_closed_form():
    r"""p_T = h + Π_t (1 − 2α_t) (p_0 − h), so dp_T/dα_t = −2 Π_{s≠t} (1 − 2α_s) (p_0 − h)."""
    rates = jnp.linspace(0.05, 0.2, 7)
    solver = jaxhpo.from_optax(lambda p, h, b: (p - 1.0) ** 2, lambda h: optax.sgd(lambda t: h[jnp.minimum(t, 6)]))

    def end(rates):
        return jaxhpo.solve(solver, solver.init(jnp.zeros(()), rates), rates, num_steps=7).params

    factors = 1 - 2 * np.asarray(rates)
    want = [2 * np.prod(np.delete(factors, t)) for t in range(7)]
    np.testing.assert_allclose(grad(end)(rates), want, rtol=1e-12)


def test_initial_parameters_closed_form():
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - 1.0) ** 2), optax.sgd(STEP))

    def end(h):
        return jaxhpo.solve(solver, solver.init(2 * h["start"], h), h, num_steps=8).params.sum()

    got = grad(end)({"start": jnp.ones(3)})["start"]
    np.testing.assert_allclose(got, 2 * (1 - 2 * STEP) ** 8 * np.ones(3), rtol=1e-12)


@pytest.mark.parametrize("checkpoint", [5, *(pytest.param(c, marks=pytest.mark.slow) for c in (None, 1, 3))])
def test_momentum_sgd_trajectory(checkpoint):
    """v ← m v − (1−m) g, p ← p + α v, by hand; and its hypergradients against differences."""
    T, rates, decays = 20, np.linspace(0.1, 0.3, 20), np.linspace(0.5, 0.9, 20)
    p, v = 0.0, 0.0
    for t in range(T):
        v = decays[t] * v - (1 - decays[t]) * 2 * (p - 1.0)
        p = p + rates[t] * v
    solver = jaxhpo.momentum_sgd(lambda p, h, b: (p - 1.0) ** 2, lambda h, t: h["lr"][t], lambda h, t: h["m"][t])

    def end(h):
        return jaxhpo.solve(
            solver, solver.init(jnp.zeros(()), h), h, num_steps=T, adjoint=Unroll(checkpoint=checkpoint)
        ).params

    h = {"lr": jnp.asarray(rates), "m": jnp.asarray(decays)}
    np.testing.assert_allclose(end(h), p, rtol=1e-12)
    assert jaxhpo.check_hypergradient(end, h).relative_error < 1e-9


def test_model_state_is_carried():
    """A running mean of the parameters: m ← 0.9 m + 0.1 p, differentiated with the rest."""

    def train_loss(p, h, batch, state):
        return jnp.sum((p - h) ** 2), {"mean": 0.9 * state["mean"] + 0.1 * p, "count": state["count"] + 1}

    solver = jaxhpo.from_optax(train_loss, optax.sgd(STEP), has_state=True)
    state = {"mean": jnp.zeros(2), "count": jnp.zeros((), jnp.int32)}

    def outer(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h, state), h, num_steps=5)
        return jnp.sum(sol.model_state["mean"] ** 2), sol.model_state["count"]

    assert outer(jnp.ones(2))[1] == 5
    assert jaxhpo.check_hypergradient(lambda h: outer(h)[0], jnp.ones(2)).relative_error < 1e-9


def test_warm_start_continues():
    """Two solves of 10 steps, the second from the first's state, are one of 20; momentum included."""
    solver = jaxhpo.from_optax(squared, optax.sgd(STEP, momentum=0.8))
    h, batches = jnp.ones(2), lambda t: jnp.zeros(2)
    start = solver.init(jnp.zeros(2), h)
    first = jaxhpo.solve(solver, start, h, batches, num_steps=10)
    second = jaxhpo.solve(solver, first.state, h, batches, num_steps=10)
    chex.assert_trees_all_close(second.params, jaxhpo.solve(solver, start, h, batches, num_steps=20).params, rtol=1e-12)


# --- implicit ---


def test_tolerance_stops_the_loop():
    problem = RIDGE
    solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(problem.step_size))
    h = jnp.asarray(problem.hparams)

    def run(h, tol, most=5000):
        start = solver.init(jnp.asarray(problem.params), h)
        return jaxhpo.solve(solver, start, h, num_steps=most, tol=tol, adjoint=Implicit(CG(tol=1e-13)))

    info = jax.jit(run, static_argnums=(1, 2))(h, 1e-11, 5000).info
    assert info.optimality < 1e-11 and 10 < info.num_steps < 5000 and info.finite
    before = run(h, None, int(info.num_steps) - 1).info
    assert before.optimality >= 1e-11  # it stopped at the first step that reached the tolerance
    short = run(h, 1e-11, 3).info
    assert short.num_steps == 3 and short.optimality > 1e-11
    got = grad(lambda h: problem.val_loss(run(h, 1e-11).params))(h)
    assert relative_error(got, problem.hypergradient(problem.hparams)) < 1e-9


def test_condition_batch():
    """Minibatch steps, but the condition on all data: the hypergradient is that of the full problem."""
    data = jnp.asarray([[0.0], [2.0]])
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.mean((p - b) ** 2) + h * jnp.sum(p**2), optax.sgd(0.0))

    def end(h, where):
        start = solver.init(jnp.ones(()) / (1 + h), h)  # the minimiser on all data
        return jaxhpo.solve(
            solver, start, h, lambda t: data[1], num_steps=1, adjoint=Implicit(), condition_batch=where
        ).params

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZeroHypergradientWarning)  # the start depends on h, and is a constant here
        # p* = 1/(1+h): dp*/dh = −1/(1+h)²
        assert grad(lambda h: end(h, data))(0.5) == pytest.approx(-1 / 1.5**2, rel=1e-12)
        # On the last batch alone this point is not optimal.
        assert (
            jaxhpo.solve(
                solver, solver.init(jnp.ones(()) / 1.5, 0.5), 0.5, lambda t: data[1], num_steps=1, adjoint=Implicit()
            ).info.optimality
            > 1
        )


@pytest.mark.slow
def test_lasso_by_fixed_point():
    """Proximal gradient on the lasso with orthonormal X: w = soft(Xᵀy, e^h), dw/dh = −e^h sign(w) on the support."""
    rng = np.random.default_rng(0)
    X = np.linalg.qr(rng.normal(size=(20, 5)))[0]
    y = X @ np.array([2.0, -1.5, 0.1, 0.0, 1.0]) + 0.01 * rng.normal(size=20)

    def step(w, h, batch):
        z = w - 0.5 * X.T @ (X @ w - y)
        return jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.5 * jnp.exp(h), 0)

    solver = jaxhpo.fixed_point(step)
    h = jnp.log(0.3)
    soft = np.sign(X.T @ y) * np.maximum(np.abs(X.T @ y) - 0.3, 0)
    want = -0.3 * np.sign(soft).sum()
    for rule in (Unroll(), Implicit(Direct()), Implicit(Neumann(80, 1.0))):

        def end(h, rule=rule):
            return jaxhpo.solve(solver, solver.init(jnp.zeros(5), h), h, num_steps=80, adjoint=rule).params.sum()

        assert end(h) == pytest.approx(soft.sum(), rel=1e-10)
        assert grad(end)(h) == pytest.approx(want, rel=1e-10)


def test_non_symmetric_fixed_point():
    """w = M w + h with M not symmetric: dw/dh = (I − M)⁻¹, its transpose applied to the cotangent."""
    M = np.array([[0.2, 0.5], [-0.1, 0.3]])
    solver = jaxhpo.fixed_point(lambda w, h, batch: M @ w + h)
    v = np.array([1.0, -2.0])
    for rule in (Implicit(Direct()), Implicit(Neumann(100, 1.0)), Unroll()):

        def end(h, rule=rule):
            return (
                jnp.asarray(v)
                @ jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=100, adjoint=rule).params
            )

        np.testing.assert_allclose(grad(end)(jnp.ones(2)), np.linalg.solve((np.eye(2) - M).T, v), rtol=1e-12)


@pytest.mark.slow
def test_implicit_attaches_to_any_solution():
    """A closed-form solution: first and second derivatives equal those of differentiating the solution itself."""
    problem = RIDGE
    h = jnp.asarray(problem.hparams)
    hessian = jax.hessian(lambda w, h: problem.train_loss(w, h, None))

    def dense(h):
        zero = jnp.zeros(len(problem.params))
        return jnp.linalg.solve(hessian(zero, h), -jax.grad(problem.train_loss)(zero, h, None))

    def attached(h):
        return jaxhpo.implicit(
            lambda w, h: jax.grad(problem.train_loss)(w, h, None), jax.lax.stop_gradient(dense(h)), h
        )

    def derivatives(solution):
        loss = lambda h: problem.val_loss(solution(h))  # noqa: E731
        return jax.jit(lambda h: (jax.grad(loss)(h), jax.jvp(solution, (h,), (h,))[1], jax.hessian(loss)(h)))(h)

    got, want = derivatives(attached), derivatives(dense)
    chex.assert_trees_all_close(got[:2], want[:2], rtol=1e-9)
    chex.assert_trees_all_close(got[2], want[2], rtol=1e-8)


@functools.cache
def unrolled(num_steps):
    """The hypergradient of unrolling, by whatever schedule."""
    return grad(outer_loss(RIDGE, Unroll(), num_steps))(jnp.asarray(RIDGE.hparams))


SAME_AS_UNROLL = ("unroll", "unroll-plain", "unroll-every", "unroll-7", "unroll-binomial", "forward", "forward-chunks")


@rows()
def test_closures_are_seen(case):
    """Hyperparameters that the loss closes over, with an index array and a key, get the same result as arguments."""
    problem, index, key = RIDGE, jnp.arange(6)[::-1][::-1], jax.random.key(3)
    adjoint = case.make(problem)
    h = jnp.asarray(problem.hparams)

    def loss(h):
        def train_loss(w, _, batch):
            return problem.train_loss(w, h[index], None) + 0 * jax.random.normal(key, ())

        solver = jaxhpo.from_optax(train_loss, optax.sgd(problem.step_size))
        start = solver.init(jnp.asarray(problem.params), None)
        return problem.val_loss(jaxhpo.solve(solver, start, None, num_steps=30, adjoint=adjoint, key=key).params)

    want = unrolled(30) if case.name in SAME_AS_UNROLL else grad(outer_loss(problem, adjoint, 30))(h)
    mapped = jax.vmap(jax.grad(loss))
    scanned = jax.jit(lambda h: jax.lax.scan(lambda c, _: (c, mapped(h[None])[0]), 0, length=2)[1])(h)
    chex.assert_trees_all_close(scanned[1], want, rtol=1e-12)


# --- never silently zero ---


def scalar_loss(rule, tx=lambda h: optax.sgd(h["lr"]), start=lambda h: jnp.zeros(())):
    solver = jaxhpo.from_optax(lambda p, h, b: (p - h["target"]) ** 2, tx)

    def loss(h):
        return (jaxhpo.solve(solver, solver.init(start(h), h), h, num_steps=10, adjoint=rule).params - 2.0) ** 2

    return loss


H = {"target": 1.0, "lr": 0.1}


def test_learning_rate_under_implicit_warns():
    with pytest.warns(ZeroHypergradientWarning, match=r"hparams\['lr'\].*Implicit\(.*Unroll\(\)"):
        got = grad(scalar_loss(Implicit()))(H)
    assert got["lr"] == 0 and got["target"] != 0


def test_only_perturbed_inputs_warn():
    loss = scalar_loss(Implicit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(H)  # no derivative at all
        jax.grad(lambda t: loss({"target": t, "lr": 0.1}))(1.0)  # not of the rate


def test_initial_parameters_under_implicit_warn():
    loss = scalar_loss(Implicit(), optax.sgd(0.1), start=lambda h: h["target"])
    with pytest.warns(ZeroHypergradientWarning, match=r"state\.params.*initial.*Unroll\(\)"):
        grad(lambda t: loss({"target": t}))(1.0)


def test_unused_leaf_under_implicit_warns():
    with pytest.warns(ZeroHypergradientWarning, match=r"hparams\['unused'\]"):
        grad(scalar_loss(Implicit(), optax.sgd(0.1)))({"target": 1.0, "unused": 3.0})


def test_value_closed_over_by_the_optimiser_warns_under_implicit():
    """A learning rate that is closed over, not passed, warns too; otherwise its zero would be silent."""

    def loss(rate):
        solver = jaxhpo.from_optax(lambda p, h, b: (p - 1.0) ** 2, optax.sgd(rate))
        return jaxhpo.solve(solver, solver.init(jnp.zeros(()), None), None, num_steps=5, adjoint=Implicit()).params

    with pytest.warns(ZeroHypergradientWarning, match=r"float64\[\] that is closed over.*Unroll\(\)"):
        assert grad(loss)(0.1) == 0


@pytest.mark.parametrize("adjoint", [Implicit(), Unroll(truncate=2)], ids=str)
def test_batches_with_zero_hypergradient_warn(adjoint):
    solver = jaxhpo.from_optax(squared, optax.sgd(STEP))

    def loss(data):
        start = solver.init(jnp.zeros(1), jnp.zeros(1))
        return jaxhpo.solve(solver, start, jnp.zeros(1), {"x": data}["x"], adjoint=adjoint).params.sum()

    with pytest.warns(ZeroHypergradientWarning, match=r"batches.*exactly zero.*Unroll\(\)"):
        got = grad(loss)(jnp.ones((5, 1)))
    assert (got[:3] == 0).all() and got[4] != 0


def test_one_warning_for_many_leaves():
    """MAML's initial weights under Implicit get one warning, at the caller's line, not one per leaf."""
    solver = jaxhpo.from_optax(lambda p, h, b: sum(jnp.sum((x - 1) ** 2) for x in p.values()), optax.sgd(0.1))

    def loss(start):
        sol = jaxhpo.solve(solver, solver.init(start, start), start, num_steps=2, adjoint=Implicit())
        return sum(jnp.sum(x) for x in sol.params.values())

    with pytest.warns(ZeroHypergradientWarning) as caught:
        jax.grad(loss)({"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)})
    initial = [w for w in caught if "initial" in str(w.message)]
    assert len(initial) == 1 and "2 more leaves" in str(initial[0].message)
    assert all(w.filename == __file__ for w in caught)


def test_truncated_schedule_warns():
    solver = jaxhpo.from_optax(lambda p, h, b: (p - 1.0) ** 2, lambda h: optax.sgd(lambda t: h["rates"][t]))

    def loss(h):
        return jaxhpo.solve(solver, solver.init(jnp.zeros(()), h), h, num_steps=5, adjoint=Unroll(truncate=2)).params

    with pytest.warns(ZeroHypergradientWarning, match=r"hparams\['rates'\].*last 2 of 5"):
        got = grad(loss)({"rates": jnp.full(5, 0.1)})["rates"]
    assert (got[:3] == 0).all() and (got[3:] != 0).all()
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['rates'\].*some entries"):
        jaxhpo.check_hypergradient(loss, {"rates": jnp.full(5, 0.1)})
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['rates'\].*some entries"):
        jaxhpo.tune(loss, {"rates": jnp.full(5, 0.1)}, optax.sgd(0.1), num_steps=1, progress=False)


@pytest.mark.parametrize("judge", ["tune", "check"])
def test_tune_and_check_raise_on_zero_hypergradient(judge):
    loss = scalar_loss(Implicit(Identity(0.1)))
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['lr'\].*Unroll\(\)"):
        if judge == "tune":
            jaxhpo.tune(loss, H, optax.adam(0.1), num_steps=2, progress=False)
        else:
            jaxhpo.check_hypergradient(loss, H)


def test_zero_hypergradient_raises_at_every_call():
    """The cached derivative of a jitted outer loss would warn only once."""
    loss = jax.jit(scalar_loss(Implicit(Identity(0.1))))
    for _ in range(2):
        with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['lr'\]"):
            jaxhpo.check_hypergradient(loss, H)
        with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['lr'\]"):
            jaxhpo.tune(loss, H, optax.adam(0.1), num_steps=2, progress=False)


# --- never silently wrong or NaN ---


def test_decoupled_weight_decay_shows_in_the_optimality():
    solver = jaxhpo.from_optax(lambda p, h, b: (p - h) ** 2, optax.adamw(0.01, weight_decay=1.0))
    sol = jaxhpo.solve(solver, solver.init(jnp.zeros(()), 1.0), 1.0, num_steps=3000, adjoint=Implicit())
    assert sol.info.optimality > 0.1 and sol.info.finite

    def loss(h):
        return jaxhpo.solve(solver, solver.init(jnp.zeros(()), h), h, num_steps=3000, adjoint=Implicit()).params

    assert "decoupled weight decay" in str(jaxhpo.check_hypergradient(loss, jnp.asarray(1.0)))


def test_divergence_is_reported_at_its_first_step():
    loss = scalar_loss(Unroll(), lambda h: optax.sgd(jnp.where(h["lr"] > 0, 1e200, 0.1)))
    sol_solver = jaxhpo.from_optax(lambda p, h, b: (p - h) ** 4, optax.sgd(1e200))
    sol = jaxhpo.solve(sol_solver, sol_solver.init(jnp.zeros(()), 1.0), 1.0, num_steps=5)
    assert not sol.info.finite
    message = r"The train loss is not finite at inner step 1\..*learning rate x curvature"
    with pytest.raises(jaxhpo.NonFiniteError, match=message):
        jaxhpo.check_hypergradient(loss, H)


@pytest.mark.parametrize("fault", [lambda x: jnp.sqrt(x - x), lambda x: jnp.log(x - x), lambda x: jnp.exp(1e4 * x)])
def test_fault_of_the_outer_loss_is_not_attributed_to_the_inner_run(fault):
    inner = scalar_loss(Unroll(), optax.sgd(0.1))
    with pytest.raises(jaxhpo.NonFiniteError, match=r"No inner step is at fault.*outer loss"):
        jaxhpo.check_hypergradient(lambda t: fault(inner({"target": t}) + 1.0), jnp.asarray(1.0))


@pytest.mark.slow
def test_square_root_at_zero_is_named_with_its_remedy():
    """Adam on a parameter without gradient: its second moment is zero, where a square root has no finite derivative."""

    def loss(h, eps_root=0.0):
        solver = jaxhpo.from_optax(lambda p, h, b: (p[0] - h) ** 2 + h * p[1] ** 2, optax.adam(0.1, eps_root=eps_root))
        return jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=4).params[0]

    with pytest.raises(jaxhpo.NonFiniteError, match=r"opt_state\[0\]\.nu.*eps_root=1e-6"):
        jaxhpo.check_hypergradient(loss, jnp.asarray(1.0))
    with pytest.raises(jaxhpo.NonFiniteError, match=r"Outer step 0.*`hparams`.*eps_root=1e-6"):
        jaxhpo.tune(loss, jnp.asarray(1.0), optax.adam(0.1), num_steps=2, progress=False)
    assert jaxhpo.check_hypergradient(lambda h: loss(h, 1e-8), jnp.asarray(1.0)).relative_error < 1e-5


@functools.cache  # of unrolling, with which every rule is compared
def penalty_of_one_leaf(rule, twice=True):
    """Both derivatives of a training whose penalty is on one of two parameter leaves (on kernels, not on biases)."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))

    def train_loss(p, h, batch):
        return (
            jnp.mean((x @ p["kernel"] - 1 + p["bias"]) ** 2) + h * jnp.sum(p["kernel"] ** 2) + jnp.sum(p["bias"] ** 2)
        )

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.2))
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(())}

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(params, h), h, num_steps=300, adjoint=rule, key=jax.random.key(0))
        return jnp.sum(sol.params["kernel"] ** 2) + sol.params["bias"]

    return jax.jit(jax.value_and_grad(jax.grad(loss)))(1.0) if twice else (grad(loss)(1.0), None)


@rows(lambda case: case.implicit)
def test_hyperparameters_that_reach_one_leaf_only(case):
    """Equal to Unroll, in two derivatives."""
    rule = Implicit(Neumann(300, 0.2)) if case.name.startswith("neumann") else case.make(RIDGE)
    exact = case.name not in ("identity", "nystrom")
    got, second = penalty_of_one_leaf(rule, twice=exact)
    if exact:
        want = penalty_of_one_leaf(Unroll())
        assert relative_error(got, want[0]) < 1e-9 and relative_error(second, want[1]) < 1e-8
    else:
        assert jnp.isfinite(got) and got != 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_cg_at_any_scale(size, dtype):
    """x is linear in b at any scale: squares of its entries must neither underflow nor overflow."""
    A, b = jnp.diag(jnp.array([1.0, 4.0, 9.0], dtype)), jnp.ones(3, dtype)
    x, info = CG()(lambda v: A @ v, size * b)
    np.testing.assert_allclose(x / size, [1.0, 1 / 4, 1 / 9], rtol=1e-5)
    assert info.status == jaxhpo.LinearStatus.CONVERGED


def test_cg_keeps_nan():
    """A cotangent or a Hessian that is NaN gives NaN, not the zeros that CG started from."""
    for product, b in ((lambda v: v, jnp.array([1.0, jnp.nan])), (lambda v: jnp.nan * v, jnp.ones(2))):
        x, info = CG()(product, b)
        assert jnp.isnan(x).all() and info.status == jaxhpo.LinearStatus.NOT_FINITE


def test_cg_on_parameters_of_two_precisions():
    def loss(h):
        solver = jaxhpo.from_optax(
            lambda p, h, b: jnp.sum((p["a"] - h) ** 2) + jnp.sum((p["b"] - h) ** 2), optax.sgd(0.2)
        )
        params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
        sol = jaxhpo.solve(solver, solver.init(params, h), h, num_steps=100, adjoint=Implicit())
        return sol.params["a"].sum() + sol.params["b"].sum()

    assert grad(loss)(0.5) == pytest.approx(4.0, rel=1e-6)


def test_model_that_runs_only_in_bfloat16():
    """A scan with a bfloat16 carry: the condition cannot be traced in float32, and is traced in bfloat16."""

    def train_loss(w, h, batch):
        end, _ = jax.lax.scan(lambda c, _: ((c * w).astype(jnp.bfloat16), None), jnp.ones((), jnp.bfloat16), length=2)
        return (end - 1) ** 2 + h.astype(jnp.bfloat16) * w**2

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))

    def loss(h, adjoint):
        start = solver.init(jnp.ones((), jnp.bfloat16), h)
        return jaxhpo.solve(solver, start, h, num_steps=20, adjoint=adjoint).params.astype(jnp.float32)

    for adjoint in (Unroll(), Implicit()):
        assert -1 < grad(functools.partial(loss, adjoint=adjoint))(jnp.asarray(0.1, jnp.float32)) < 0


def test_model_state_under_implicit_warns():
    solver = jaxhpo.from_optax(
        lambda p, h, b, state: ((p - h) ** 2, 0.5 * state + 0.5 * p), optax.sgd(0.1), has_state=True
    )

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(()), h, jnp.zeros(())), h, num_steps=5, adjoint=Implicit())
        return sol.params + sol.model_state

    with pytest.warns(ZeroHypergradientWarning, match=r"model_state.*Unroll\(\)"):
        grad(loss)(1.0)


@pytest.fixture
def double_well():
    """The minimiser that gradient descent reaches from `start`; at the top of the well, 0, the Hessian is −1."""
    solver = jaxhpo.from_optax(lambda p, t, b: jnp.sum((p**2 - 1) ** 2) / 4 + t * jnp.sum(p), optax.sgd(0.1))

    def loss(t, adjoint, start=0.05):
        return jaxhpo.solve(solver, solver.init(jnp.full(2, start), t), t, num_steps=5, adjoint=adjoint).params.sum()

    return loss


def test_indefinite_hessian(double_well):
    """CG fails at its first direction; by default another solver goes on, also where other members need none."""
    starts = jnp.array([0.05, 0.9])  # where the Hessian 3p² − 1 is negative, and where it is positive
    both = jax.vmap(jax.value_and_grad(lambda t, start: double_well(t, Implicit(), start)), (None, 0))
    value, hypergrad = jax.jit(both)(0.0, starts)
    np.testing.assert_allclose(hypergrad, -2 / (3 * (value / 2) ** 2 - 1), rtol=1e-12)
    assert jnp.isnan(grad(lambda t: double_well(t, Implicit(CG())))(0.0))


@pytest.mark.slow
def test_indefinite_hessian_is_reported(double_well):
    with pytest.raises(jaxhpo.NonFiniteError, match=r"linear solve .* failed: it ended INDEFINITE.*General\(\)"):
        jaxhpo.check_hypergradient(lambda t: double_well(t, Implicit(CG())), jnp.asarray(0.0))
    keeping = Implicit(CG(), on_failure="keep")
    check = jaxhpo.check_hypergradient(lambda t: double_well(t, keeping), jnp.asarray(0.0))
    assert check.analytic[0] != 0  # the iterate reached
    assert check.linear_statuses == (jaxhpo.LinearStatus.INDEFINITE,) and "INDEFINITE" in str(check)


def test_implicit_around_a_solver_that_is_not_jax():
    """Newton's method of SciPy, which converts its arguments to Python numbers: under jit, grad, vmap and twice."""
    scale = np.arange(1.0, 4.0)

    def fit(args):
        target, rate = float(args["target"]), args["rate"]
        assert isinstance(rate, np.ndarray)
        return {"w": scipy.optimize.newton(lambda w: scale * w + rate * w**3 - target, np.ones(3))}

    def outer(target, rate=0.5):
        condition = lambda p, a: {"w": scale * p["w"] + a["rate"] * p["w"] ** 3 - a["target"]}  # noqa: E731
        args = {"target": target, "rate": jnp.full(3, rate)}
        return jnp.sum(jaxhpo.implicit(condition, fit, args, like={"w": jnp.zeros(3)})["w"])

    targets = jnp.array([0.5, 2.0])
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(outer)))(targets)
    w = np.stack([fit({"target": t, "rate": np.full(3, 0.5)})["w"] for t in targets])
    curvature = scale + 1.5 * w**2
    np.testing.assert_allclose(value, w.sum(1), rtol=1e-12)
    np.testing.assert_allclose(slope, (1 / curvature).sum(1), rtol=1e-9)  # Newton's tolerance is 1.5e-8, squared
    with pytest.raises(Exception, match=r"returned a tree of shapes float64\[2\], but `like` has float64\[3\]"):
        jaxhpo.implicit(lambda w, a: w - a, lambda a: np.zeros(2), 1.0, like=jnp.zeros(3)).block_until_ready()
    second = jax.jit(jax.grad(jax.grad(outer)))(2.0)
    np.testing.assert_allclose(second, (-3 * w[1] / curvature[1] ** 3).sum(), rtol=1e-9)


def test_a_condition_that_is_not_zero_at_the_solution_is_said(capsys):
    """By the step to the root, in units of the solution: neither the sign of the condition nor its scale matters."""

    def outer(h, off):
        solution = jax.lax.stop_gradient((1 + off) * jnp.arange(3.0) / h)
        return jnp.sum(jaxhpo.implicit(lambda w, h: 1e6 * (jnp.arange(3.0) - h * w), solution, h, jaxhpo.Direct()))

    check = jaxhpo.check_hypergradient(lambda h: outer(h, 0.05), 2.0)
    assert "not zero at the solution: Newton's step from there is 4.8e-02 of its" in str(check)  # 0.05 / 1.05
    with jaxhpo.debug_solves():
        jax.jit(jax.grad(outer))(2.0, 0.5)
    assert "implicit: Newton's step from the solution is 3.3e-01 of its length" in capsys.readouterr().out  # 0.5 / 1.5


def test_implicit_at_a_minimum_with_a_flat_direction():
    """Softmax regression whose intercepts may all be shifted alike, so that the Jacobian is singular.

    LU of it ends in noise for some data and not for others: a loss that the shift does not change has the derivative of
    the regression with a penalty on the sum of the intercepts, which leaves the rest as it is.
    """
    features, classes = 5, 3

    def objective(p, penalty, x, labels, anchored):
        logits = x @ p["w"] + p["b"][None]
        loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss + jnp.sum(penalty[:, None] * p["w"] ** 2) / 2 + anchored * jnp.sum(p["b"]) ** 2

    def derivative(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        x, other = jax.random.normal(keys[0], (2, 40, features))
        labels, more = (jax.random.randint(key, (40,), 0, classes) for key in keys[1:3])
        start = {"w": jnp.zeros((features, classes)), "b": jnp.zeros(classes)}
        flat, unravel = jax.flatten_util.ravel_pytree(start)

        def outer(penalty, anchored):
            total = lambda v: objective(unravel(v), jax.lax.stop_gradient(penalty), x, labels, 1.0)  # noqa: E731
            newton = lambda v, _: (v - jnp.linalg.solve(jax.hessian(total)(v), jax.grad(total)(v)), None)  # noqa: E731
            root = unravel(jax.lax.scan(newton, flat, None, 12)[0])
            p = jaxhpo.implicit(lambda p, h: jax.grad(objective)(p, h, x, labels, anchored), root, penalty)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(other @ p["w"] + p["b"][None], more))

        return [jax.grad(outer)(jnp.ones(features), anchored) for anchored in (0.0, 1.0)]

    alone, anchored = jax.lax.map(derivative, jnp.arange(30))
    # The residual goes down to ε^¾ ‖b‖ = 2e-12 ‖b‖; the smallest curvature of these is above 1e-2.
    np.testing.assert_allclose(alone, anchored, rtol=1e-7, atol=1e-9)


ROOTS = {
    "negative slope": lambda w, a: 1 - a * w,  # of JAXopt's issues: dw/da = −1/a²
    "fixed point": lambda w, a: jnp.cos(a * w[::-1]) / 2 - w,
    "maximum": lambda w, a: -4 * w**3 + a,
    "saddle point": lambda w, a: w[::-1] - a,
    "KKT conditions": lambda w, a: jnp.stack([w[0] + w[1] - a, w[0] - a**2]),  # of min x²/2 with x = a²
    "not symmetric": lambda w, a: jnp.array([[1.0, -3.0], [3.0, 1.0]]) @ w - a,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if i else []) for i, n in enumerate(ROOTS)])
def test_implicit_derivative_of_any_root(name):
    """By default right, in both modes; under CG right or NaN. Newton's steps find and check the root."""

    def newton(a):
        step = lambda w, _: (w - jnp.linalg.solve(jax.jacfwd(ROOTS[name])(w, a), ROOTS[name](w, a)), None)  # noqa: E731
        return jax.lax.scan(step, jnp.array([0.7, 0.8]), None, 30)[0]

    a = jnp.asarray(0.6)
    root, want = jax.jit(lambda a: jax.jvp(newton, (a,), (jnp.ones_like(a),)))(a)
    for mode, linear_solver in ((jax.jacrev, None), (jax.jacfwd, None), (jax.jacrev, CG())):
        got = jax.jit(mode(lambda a, s=linear_solver: jaxhpo.implicit(ROOTS[name], root, a, s)))(a)
        assert relative_error(got, want) < 1e-9 or (linear_solver is not None and jnp.isnan(got).all()), linear_solver


def test_cg_reports():
    A = jnp.diag(jnp.array([1.0, 4.0, 9.0]))
    b = jnp.ones(3)
    x, info = CG(tol=1e-12)(lambda v: A @ v, b)
    np.testing.assert_allclose(x, [1.0, 1 / 4, 1 / 9], rtol=1e-10)
    assert info.status == jaxhpo.LinearStatus.CONVERGED and info.num_iterations == 3  # three distinct eigenvalues
    x, info = CG(maxiter=2)(lambda v: A @ v, b)
    assert info.status == jaxhpo.LinearStatus.MAX_ITERATIONS and 0 < info.residual < 1
    x, info = CG()(lambda v: jnp.array([1.0, -1.0]) * v, jnp.ones(2))
    assert info.status == jaxhpo.LinearStatus.INDEFINITE and jnp.all(jnp.isfinite(x)) and x.any()
    x, info = CG()(lambda v: jnp.nan * v, jnp.ones(2))
    assert info.status == jaxhpo.LinearStatus.NOT_FINITE
    x, info = CG(damping=2.0)(lambda v: A @ v, b, x0=jnp.array([1 / 3, 1 / 6, 1 / 11]))
    assert info.num_iterations == 0  # a warm start at the damped solution
    low = A.astype(jnp.float32)  # under a NumPy setting of another type
    x, info = CG(damping=np.float64(2.0))(lambda v: low @ v, b.astype(jnp.float32))
    np.testing.assert_allclose(x, [1 / 3, 1 / 6, 1 / 11], rtol=1e-5)
    x, info = CG()(lambda v: A @ v, jnp.zeros(3))
    assert info.status == jaxhpo.LinearStatus.CONVERGED and not x.any()


@pytest.mark.parametrize("linear_solver", [CG(), Neumann(50, 0.1)], ids=str)
def test_the_condition_is_linearised_outside_the_iterations(linear_solver):
    """No tanh, the model's nonlinearity, is left inside the loop of the linear solve."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((jnp.tanh(p) - h) ** 2), optax.sgd(0.1))

    def loss(h):
        start = solver.init(jnp.zeros(3), h)
        return jaxhpo.solve(solver, start, h, num_steps=1, adjoint=Implicit(linear_solver)).params.sum()

    program = list(equations(jax.make_jaxpr(jax.grad(loss))(jnp.ones(3)).jaxpr))
    assert any(e.primitive.name == "tanh" for e in program)  # in the inner step and in the linearisation
    inside = [
        e
        for loop in program
        if loop.primitive.name in ("while", "scan") and loop.params.get("length") != 1
        for part in subprograms(list(loop.params.values()))
        for e in equations(part)
    ]
    assert inside and not any(e.primitive.name == "tanh" for e in inside)
