"""Unbiasedness of the randomised rules, and curvatures and linear solvers against matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, grad, outer_loss, relative_error

import jaxhpo
from jaxhpo import CG, GMRES, BiCGStab, Direct, ForwardGradient, Implicit, NormalCG, Nystrom, Smoothing, from_lineax

RIDGE = PROBLEMS["ridge"]
H = jnp.asarray(RIDGE.hparams)
STEPS = 30


@functools.cache
def draws(rule, num_draws):
    """Hypergradients of the ridge problem for many keys, shape (draws, m)."""
    solver = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(RIDGE.step_size))

    def loss(h, key):
        start = solver.init(jnp.asarray(RIDGE.params), h)
        return RIDGE.val_loss(jaxhpo.solve(solver, start, h, num_steps=STEPS, adjoint=rule, key=key).params)

    keys = jax.random.split(jax.random.key(0), num_draws)
    return np.asarray(jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(H, keys))


@pytest.mark.parametrize("make", [ForwardGradient, lambda m: Smoothing(m, 0.1)], ids=["forward", "smoothing"])
def test_orthogonal_directions_give_the_exact_hypergradient(make, monkeypatch):
    """For v_k = √m e_k the mean of v vᵀ is the identity; θ is linear in h here, so differences are exact too."""
    problem = PROBLEMS["quadratic"]
    m = len(problem.hparams)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: m**0.5 * jnp.eye(*shape, dtype=dtype))
    got = grad(outer_loss(problem, make(m), STEPS))(jnp.asarray(problem.hparams))
    assert relative_error(got, problem.unrolled(problem.hparams, problem.step_size, STEPS)) <= 1e-12


@pytest.mark.parametrize(
    "rule", [ForwardGradient(4), pytest.param(Smoothing(4, 1e-3), marks=pytest.mark.slow)], ids=str
)
def test_randomised_rules_are_unbiased(rule):
    """The mean of 20 000 draws lies within five standard errors of the exact hypergradient, in every entry."""
    got, want = draws(rule, 20_000), RIDGE.unrolled(RIDGE.hparams, RIDGE.step_size, STEPS)
    error = got.std(axis=0) / np.sqrt(len(got))
    assert np.all(np.abs(got.mean(axis=0) - want) < 5 * error)
    assert relative_error(got.mean(axis=0), want) < 0.1


def test_forward_gradient_variance():
    """E‖ĝ − g‖² = (m + 1)/K ‖g‖²: from E[(v·g)² ‖v‖²] = (m + 2)‖g‖² for v ~ N(0, I)."""
    K, m = 4, len(H)
    got, want = draws(ForwardGradient(K), 20_000), RIDGE.unrolled(RIDGE.hparams, RIDGE.step_size, STEPS)
    measured = np.mean(np.sum((got - want) ** 2, axis=1)) / np.sum(want**2)
    assert measured == pytest.approx((m + 1) / K, rel=0.05)  # 20 000 draws: the figure's own error is about 1 %


@pytest.mark.parametrize("rule", [ForwardGradient(2), Smoothing(2, 0.1), Implicit(Nystrom(2, 0.1))], ids=str)
def test_missing_key_is_refused(rule):
    solver = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(0.1))
    with pytest.raises(jaxhpo.JaxhpoError, match=r"no key.*key=key"):
        jaxhpo.solve(solver, solver.init(jnp.zeros(6), H), H, num_steps=2, adjoint=rule)


def test_smoothing_of_a_map_without_derivative():
    """θ(h) = sign(h) has derivative 0 everywhere; smoothed by σ it has that of erf: √(2/π)/σ exp(−h²/2σ²)."""
    solver = jaxhpo.fixed_point(lambda p, h, batch: jnp.sign(h) + 0 * p)
    sigma, h = 0.5, 0.2

    def end(h, key):
        start = solver.init(jnp.zeros(()), h)
        return jaxhpo.solve(solver, start, h, num_steps=1, adjoint=Smoothing(2000, sigma), key=key).params

    got = jax.jit(jax.vmap(jax.grad(end), in_axes=(None, 0)))(h, jax.random.split(jax.random.key(0), 50))
    want = np.sqrt(2 / np.pi) / sigma * np.exp(-(h**2) / (2 * sigma**2))
    assert np.mean(got) == pytest.approx(want, abs=5 * float(np.std(got)) / np.sqrt(50))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_forward_in_chunks_of_any_size_with_an_empty_leaf(chunk_size):
    """θ ← θ − 0.2 (θ − h) from zero: dθ/dh = 1 − 0.8⁵ after five steps."""
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p["w"] - h) ** 2), optax.sgd(0.1))
    params = {"w": jnp.zeros(3), "none": jnp.zeros(0)}

    def loss(h):
        start, rule = solver.init(params, h), jaxhpo.Forward(chunk_size)
        return jnp.sum(jaxhpo.solve(solver, start, h, num_steps=5, adjoint=rule).params["w"])

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.ones(3)), 1 - 0.8**5, rtol=1e-12)


@pytest.mark.codegen
def test_forward_carries_only_the_columns_of_perturbed_leaves():
    """Of 10 000 hyperparameters and one rate, only the rate is differentiated: one column, not 10 001."""
    solver = jaxhpo.from_optax(
        lambda p, h, b: jnp.sum(h["penalty"] * p**2) + jnp.sum(p), lambda h: optax.sgd(h["rate"])
    )

    def loss(rate):
        h = {"penalty": jnp.ones(10_000), "rate": rate}
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(10_000), h), h, num_steps=20, adjoint=jaxhpo.Forward())
        return jnp.sum(sol.params)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.asarray(0.1)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * 10_000 * 8  # a few copies of the parameters


# --- curvature ---


def logistic_data():
    """The design matrix and labels of the logistic problem, recovered from its loss."""
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(40, 5)), np.where(rng.uniform(size=40) > 0.5, 1.0, -1.0)
    return jnp.asarray(X), jnp.asarray(y)


def example_loss(w, h, batch):
    X, y = batch
    return jax.nn.softplus(-y * (X @ w))


def penalty(w, h):
    return 0.5 * jnp.sum(jnp.exp(h) * w**2)


CURVATURES = {
    # A linear model: Gauss-Newton is the Hessian itself.
    "gauss-newton": jaxhpo.gauss_newton(
        lambda w, h, batch: batch[0] @ w, lambda o, batch: jnp.mean(jax.nn.softplus(-batch[1] * o)), penalty
    ),
    "outer-product": jaxhpo.outer_product(example_loss, penalty),
}


@pytest.mark.parametrize("linear_solver", [pytest.param(Direct(), marks=pytest.mark.slow), CG(tol=1e-13)], ids=str)
@pytest.mark.parametrize("name", CURVATURES)
def test_curvature_closed_form(name, linear_solver):
    """dF/dh = −eʰ w ∘ G⁻¹ ∇V with G = Xᵀ diag(p(1−p)) X/n + diag(eʰ), or with p(1−p) replaced by (p − y)²."""
    batch = X, y = logistic_data()
    h, target = jnp.full(5, -1.0), jnp.arange(5.0)
    solver = jaxhpo.from_optax(lambda w, h, b: jnp.mean(example_loss(w, h, b)) + penalty(w, h), optax.sgd(1.0))
    rule = Implicit(linear_solver, curvature=CURVATURES[name])

    def outer(h):
        w = jaxhpo.solve(solver, solver.init(jnp.zeros(5), h), h, lambda t: batch, num_steps=300, adjoint=rule).params
        return jnp.sum((w - target) ** 2), w

    got, w = jax.jit(jax.grad(outer, has_aux=True))(h)
    w = np.asarray(w)
    p = 1 / (1 + np.exp(-X @ w))
    weight = p * (1 - p) if name == "gauss-newton" else (p - (y > 0)) ** 2
    G = X.T @ (X * weight[:, None]) / len(y) + np.diag(np.exp(h))
    want = -np.exp(h) * w * np.linalg.solve(G, 2 * (w - target))
    assert relative_error(got, want) < 1e-9


def test_gauss_newton_is_definite_where_the_hessian_is_indefinite():
    """One unit tanh(ab): its Hessian has a negative eigenvalue here; Gauss-Newton with a penalty has none."""
    predict = lambda p, h, b: jnp.tanh(p[0] * p[1])[None]  # noqa: E731
    output_loss = lambda o, b: 0.5 * jnp.sum((o - 2.0) ** 2)  # noqa: E731
    regulariser = lambda p, h: 0.5 * h * jnp.sum(p**2)  # noqa: E731
    point, h = jnp.array([0.5, 0.5]), 0.1
    hessian = jax.jit(jax.hessian(lambda p: output_loss(predict(p, h, None), None) + regulariser(p, h)))(point)
    assert np.linalg.eigvalsh(hessian)[0] < 0
    product = jaxhpo.gauss_newton(predict, output_loss, regulariser).linearise(point, h, None)
    matrix = jax.jit(jax.vmap(product))(jnp.eye(2))
    J = jax.jit(jax.jacobian(lambda p: predict(p, h, None)))(point)
    np.testing.assert_allclose(matrix, J.T @ J + 0.1 * np.eye(2), rtol=1e-12)
    assert CG()(product, jnp.ones(2))[1].status == jaxhpo.LinearStatus.CONVERGED


# --- reports of the linear solvers ---

SOLVERS = [GMRES(), BiCGStab(), NormalCG()]


@pytest.mark.parametrize("solver", [*SOLVERS, Direct()], ids=str)
def test_non_symmetric_systems(solver):
    """A x = b and its transpose, through the derivative of x."""
    rng = np.random.default_rng(0)
    A, b, v = rng.normal(size=(4, 4)) + 4 * np.eye(4), rng.normal(size=4), rng.normal(size=4)
    x, info = jax.jit(lambda b: solver(lambda u: A @ u, b))(b)
    np.testing.assert_allclose(x, np.linalg.solve(A, b), rtol=1e-8)
    assert info.status == jaxhpo.LinearStatus.CONVERGED and info.residual < 1e-8
    back = jax.jit(jax.grad(lambda b: jnp.asarray(v) @ solver(lambda u: A @ u, b)[0]))(b)
    np.testing.assert_allclose(back, np.linalg.solve(A.T, v), rtol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_failure_is_reported(solver):
    assert solver(lambda u: jnp.nan * u, jnp.ones(3))[1].status == jaxhpo.LinearStatus.NOT_FINITE
    # A singular matrix, b outside its range: the residual cannot fall below 1/√2.
    x, info = solver(lambda u: jnp.array([1.0, 0.0]) * u, jnp.ones(2))
    assert info.residual > 0.7 - 1e-9 or info.status == jaxhpo.LinearStatus.NOT_FINITE
    if not isinstance(solver, NormalCG):  # which solves the normal equations, and those are solvable
        assert info.status != jaxhpo.LinearStatus.CONVERGED


def test_nystrom_is_exact_for_a_matrix_of_low_rank():
    """Exact for a matrix of rank 2 from a sketch of rank 2, and of rank 4."""
    U = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0]
    A, b = U @ np.diag([3.0, 1.0]) @ U.T, jnp.arange(8.0)
    for rank in (2, 4, 100):
        solver = Nystrom(rank, 0.5)
        x, info = jax.jit(lambda b, key, solver=solver: solver(lambda u: A @ u, b, key=key))(b, jax.random.key(rank))
        np.testing.assert_allclose(x, np.linalg.solve(A + 0.5 * np.eye(8), b), rtol=1e-9)
        assert info.num_iterations == min(rank, 8)


def test_lineax_needs_a_solver():
    with pytest.raises(jaxhpo.JaxhpoError, match=r"from_lineax.*lineax\.CG"):
        from_lineax("cg")
