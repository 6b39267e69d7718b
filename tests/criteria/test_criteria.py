"""Criteria of model selection against closed forms in NumPy, refits, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from helpers import enable_x64

import jaxhpo
from jaxhpo import JaxhpoError, criteria
from jaxhpo.criteria import Posterior

RNG = np.random.default_rng(0)
N, P = 30, 6
X = RNG.normal(size=(N, P))
Y = X @ np.array([2.0, -1.0, 0.5, 0, 0, 0]) + 0.7 * RNG.normal(size=N)
H = np.array([-1.0, 0.5, 0.0, 1.0, 2.0, -0.5])  # log precisions of the prior
BETA = 1.7  # precision of the noise


def normal_losses(w, h, x=X, y=Y):
    return 0.5 * BETA * (x @ w - y) ** 2 - 0.5 * jnp.log(BETA / (2 * jnp.pi))


def normal_prior(w, h):
    return 0.5 * jnp.sum(jnp.exp(h) * w**2 - h + jnp.log(2 * jnp.pi))


def exact_fit(h, weights):
    a = BETA * X.T @ (weights[:, None] * X) + jnp.diag(jnp.exp(h))
    return jnp.linalg.solve(a, BETA * X.T @ (weights * Y))


def marginal(h, x=X, y=Y):
    """−log N(y | 0, I/β + X A⁻¹ Xᵀ), the evidence of Bayesian linear regression."""
    c = jnp.eye(len(y)) / BETA + x @ jnp.diag(jnp.exp(-h)) @ x.T
    return 0.5 * (y @ jnp.linalg.solve(c, y) + jnp.linalg.slogdet(c)[1] + len(y) * jnp.log(2 * jnp.pi))


# --- evidence ---------------------------------------------------------------------------------------------------------


def quadratic_fit(rule):
    """The same minimum by gradient descent, differentiated by a rule."""

    def loss(w, h, batch):
        return jnp.sum(normal_losses(w, h)) + normal_prior(w, h)

    rate = 1.0 / np.linalg.eigvalsh(BETA * X.T @ X + np.diag(np.exp(H))).max()
    solver = jaxhpo.from_optax(loss, optax.sgd(rate))

    def fit(h, weights):
        return jaxhpo.solve(solver, solver.init(jnp.zeros(P), h), h, num_steps=1500, adjoint=rule).params

    return fit


GAUSS_NEWTON = jaxhpo.gauss_newton(
    lambda w, h, batch: X @ w, lambda out, batch: 0.5 * BETA * jnp.sum((out - Y) ** 2), normal_prior
)


@pytest.mark.parametrize(
    ("fit", "curvature"),
    [
        pytest.param(exact_fit, GAUSS_NEWTON, id="formula-gauss_newton"),
        pytest.param(quadratic_fit(jaxhpo.Implicit()), "exact", id="implicit-exact"),
        pytest.param(exact_fit, "exact", id="formula-exact", marks=pytest.mark.slow),
        pytest.param(
            quadratic_fit(jaxhpo.Implicit()), GAUSS_NEWTON, id="implicit-gauss_newton", marks=pytest.mark.slow
        ),
        pytest.param(quadratic_fit(jaxhpo.Unroll()), "exact", id="unroll-exact", marks=pytest.mark.slow),
        pytest.param(quadratic_fit(jaxhpo.Unroll()), GAUSS_NEWTON, id="unroll-gauss_newton", marks=pytest.mark.slow),
    ],
)
def test_evidence_of_a_linear_model_is_the_marginal_likelihood(fit, curvature):
    criterion = criteria.laplace_evidence(fit, normal_losses, normal_prior, jnp.ones(N), curvature=curvature)
    value, gradient = jax.jit(jax.value_and_grad(criterion))(H)
    expected, slope = jax.value_and_grad(marginal)(jnp.asarray(H))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(
        value, -scipy.stats.multivariate_normal.logpdf(Y, cov=np.eye(N) / BETA + X / np.exp(H) @ X.T)
    )
    np.testing.assert_allclose(gradient, slope, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_mackays_fixed_point_is_the_zero_of_the_hypergradient():
    """One precision a: a = γ/‖m‖², γ = Σ βsᵢ/(a + βsᵢ), s the eigenvalues of XᵀX (MacKay 1992)."""
    s, a = np.linalg.eigvalsh(X.T @ X), 1.0
    for _ in range(500):
        m = np.linalg.solve(BETA * X.T @ X + a * np.eye(P), BETA * X.T @ Y)
        a = np.sum(BETA * s / (a + BETA * s)) / np.sum(np.square(m))
    criterion = criteria.laplace_evidence(exact_fit, normal_losses, normal_prior, jnp.ones(N))
    slope, curvature = (d(lambda h: criterion(jnp.full(P, h))) for d in (jax.grad, lambda f: jax.grad(jax.grad(f))))
    newton = np.log(a) - slope(np.log(a)) / curvature(np.log(a))
    assert abs(newton - np.log(a)) < 1e-6 and curvature(np.log(a)) > 0


def test_the_evidence_is_differentiated_through_the_mode():
    """Logistic regression: the determinant depends on the mode, so a constant mode gives another derivative."""
    labels = (Y > 0).astype(float)

    def losses(w, h):
        return optax.sigmoid_binary_cross_entropy(X @ w, labels)

    def fit(h, weights):
        def newton(w, _):
            g, k = (d(lambda w: weights @ losses(w, h) + normal_prior(w, h))(w) for d in (jax.grad, jax.hessian))
            return w - jnp.linalg.solve(k, g), None

        return jax.lax.scan(newton, jnp.zeros(P), length=12)[0]

    criterion = jax.jit(criteria.laplace_evidence(fit, losses, normal_prior, jnp.ones(N)))
    still = criteria.laplace_evidence(lambda h, w: jax.lax.stop_gradient(fit(h, w)), losses, normal_prior, jnp.ones(N))
    gradient = jax.jit(jax.grad(criterion))(H)
    step = 1e-5
    for j in range(P):
        e = step * np.eye(P)[j]
        np.testing.assert_allclose(gradient[j], (criterion(H + e) - criterion(H - e)) / (2 * step), rtol=1e-6)
    assert np.linalg.norm(gradient - jax.jit(jax.grad(still))(H)) > 1e-3 * np.linalg.norm(gradient)


def test_a_hessian_that_is_not_positive_definite_gives_nan():
    criterion = criteria.laplace_evidence(exact_fit, normal_losses, lambda w, h: -1e3 * jnp.sum(w**2), jnp.ones(N))
    assert np.isnan(criterion(H))


@pytest.mark.slow
def test_diagonal_determinant_is_exact_where_the_posterior_factorises():
    q, _ = np.linalg.qr(X)
    x = q * np.arange(1.0, P + 1)

    def losses(w, h):
        return normal_losses(w, h, x)

    def fit(h, weights):
        return BETA * x.T @ Y / (BETA * jnp.sum(x**2, 0) + jnp.exp(h))

    dense, diagonal = (
        criteria.laplace_evidence(fit, losses, normal_prior, jnp.ones(N), determinant=d) for d in ("dense", "diagonal")
    )
    np.testing.assert_allclose(diagonal(H), dense(H), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(diagonal)(H), jax.grad(dense)(H), rtol=1e-9)
    assert (
        abs(
            criteria.laplace_evidence(exact_fit, normal_losses, normal_prior, jnp.ones(N), determinant="diagonal")(H)
            - marginal(H)
        )
        > 1e-3
    )


@pytest.mark.slow
def test_stochastic_determinant_is_unbiased_for_value_and_gradient():
    """Over 400 vectors both are within four standard errors, taken from 40 parts of ten vectors."""

    @jax.jit
    @jax.vmap
    def part(key):
        determinant = criteria.StochasticDeterminant(10, 20, jaxhpo.CG(tol=1e-12), key)
        how = {"determinant": determinant}
        return jax.value_and_grad(
            criteria.laplace_evidence(exact_fit, normal_losses, normal_prior, jnp.ones(N), **how)
        )(H)

    values, gradients = part(jax.random.split(jax.random.key(0), 40))
    parts = np.column_stack([gradients, values])
    expected, slope = jax.value_and_grad(marginal)(jnp.asarray(H))
    mean, error = np.mean(parts, 0), np.std(parts, 0, ddof=1) / 40**0.5
    assert np.all(np.abs(mean - np.append(slope, expected)) < 4 * error + 1e-9)
    assert np.linalg.norm(error[:-1]) < 0.1 * np.linalg.norm(slope)  # otherwise the test says nothing


@pytest.mark.slow
def test_lanczos_is_exact_where_it_may_be():
    """Vectors of signs are exact of a diagonal matrix, also where its Krylov space ends early."""
    for diagonal in (jnp.arange(1.0, 8), jnp.array([2.0, 2.0, 5.0, 5.0]), jnp.full(3, 3.0)):
        found = criteria.StochasticDeterminant(3, 30)(lambda v, d=diagonal: d * v, jnp.zeros(diagonal.size))
        np.testing.assert_allclose(found, jnp.sum(jnp.log(diagonal)), rtol=1e-10)


# --- validation -------------------------------------------------------------------------------------------------------


def ridge_fit(h, weights):
    xw = X * weights[:, None]
    return jnp.linalg.solve(xw.T @ X + jnp.diag(jnp.exp(h)), xw.T @ Y)


def squared(w, h):
    return (X @ w - Y) ** 2


def test_cross_validation_is_the_loop_over_folds():
    masks = criteria.folds(N, 5, seed=3)
    cv = criteria.cross_validation(ridge_fit, squared, masks)
    by_hand = []
    for mask in masks.astype(bool):
        xt, yt = X[~mask], Y[~mask]
        w = np.linalg.solve(xt.T @ xt + np.diag(np.exp(H)), xt.T @ yt)
        by_hand.append(np.mean((X[mask] @ w - Y[mask]) ** 2))
    np.testing.assert_allclose(cv.by_fold(H), by_hand, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(cv)(H), np.mean(by_hand), rtol=1e-12)  # folds of six each
    step = 1e-6
    slope = [(cv(H + step * e) - cv(H - step * e)) / (2 * step) for e in np.eye(P)]
    np.testing.assert_allclose(jax.grad(cv)(H), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_hold_out_is_one_fold():
    masks = criteria.folds(N, 3)
    np.testing.assert_allclose(
        criteria.hold_out(ridge_fit, squared, masks[0])(H),
        criteria.cross_validation(ridge_fit, squared, masks).by_fold(H)[0],
    )


def test_a_nan_among_training_examples_is_not_that_of_the_fold():
    def losses(w, h):
        return jnp.where(jnp.arange(N) == 0, jnp.nan, squared(w, h))

    values = criteria.cross_validation(ridge_fit, losses, criteria.folds(N, 5)).by_fold(H)
    assert np.isnan(values).sum() == 1


@pytest.mark.parametrize("n, k", [(30, 5), (31, 4), (7, 7)])
def test_folds_hold_out_each_example_once(n, k):
    masks = criteria.folds(n, k, seed=1)
    np.testing.assert_array_equal(masks.sum(0), 1)
    assert set(masks.sum(1)) <= {n // k, -(-n // k)}
    assert (criteria.folds(n, k, seed=2) != masks).any()


def test_stratified_folds_have_their_share_of_each_label():
    labels = np.repeat([0, 1, 2], [50, 7, 12])
    masks = criteria.folds(69, 5, stratify=labels)
    for label in range(3):
        counts = masks[:, labels == label].sum(1)
        assert counts.max() - counts.min() <= 1
    plain = [np.ptp(criteria.folds(69, 5, seed=s)[:, labels == 1].sum(1)) for s in range(20)]
    assert max(plain) > 1


@pytest.mark.parametrize(
    ("shape", "intercept"),
    [
        ((30, 6), True),
        ((12, 40), True),
        pytest.param((30, 6), False, marks=pytest.mark.slow),
        pytest.param((12, 40), False, marks=pytest.mark.slow),
    ],
)
def test_leave_one_out_is_that_of_refitting(shape, intercept):
    rng = np.random.default_rng(1)
    n, p = shape
    x, y = rng.normal(size=shape) + 0.5, rng.normal(size=n) + 1
    penalties = np.exp(rng.normal(size=p))
    errors = []
    for i in range(n):
        rest = np.arange(n) != i
        mean, base = (x[rest].mean(0), y[rest].mean()) if intercept else (0, 0)
        xt, yt = x[rest] - mean, y[rest] - base
        w = np.linalg.solve(xt.T @ xt + np.diag(penalties), xt.T @ yt)
        errors.append((y[i] - base - (x[i] - mean) @ w) ** 2)
    np.testing.assert_allclose(criteria.leave_one_out(x, y, penalties, intercept=intercept), np.mean(errors), rtol=1e-8)
    two = criteria.leave_one_out(x, np.stack([y, 2 * y], 1), penalties, intercept=intercept)
    np.testing.assert_allclose(two, (1 + 4) / 2 * np.mean(errors), rtol=1e-8)


@pytest.mark.slow
def test_generalised_cross_validation_is_invariant_under_rotation():
    """And is leave-one-out where all leverages are equal."""
    rotation = np.linalg.qr(RNG.normal(size=(N, N)))[0]
    given, rotated = (
        criteria.generalised_cross_validation(r @ X, r @ Y, np.exp(H), intercept=False) for r in (np.eye(N), rotation)
    )
    np.testing.assert_allclose(rotated, given, rtol=1e-10)
    x, y = np.eye(5), np.arange(5.0)
    np.testing.assert_allclose(
        criteria.generalised_cross_validation(x, y, 2.0), criteria.leave_one_out(x, y, 2.0), rtol=1e-12
    )


# --- variational bounds -----------------------------------------------------------------------------------------------


def test_kl_is_that_of_scipys_densities():
    """Against quadrature of each coordinate, for prefix trees of precisions and means."""
    q = Posterior(
        {"a": jnp.array([0.3, -1.0]), "b": jnp.array(2.0)}, {"a": jnp.array([-1.0, 0.2]), "b": jnp.array(0.1)}
    )
    log_precision, mean = {"a": 0.4, "b": jnp.array(-0.7)}, {"a": jnp.array([0.1, 0.0]), "b": 1.0}
    points = np.linspace(-12, 12, 200_001)

    def one(mu, s, a, m):
        p, r = scipy.stats.norm(mu, np.exp(s)), scipy.stats.norm(m, np.exp(-a / 2))
        return np.trapezoid(p.pdf(points) * (p.logpdf(points) - r.logpdf(points)), points)

    expected = one(0.3, -1.0, 0.4, 0.1) + one(-1.0, 0.2, 0.4, 0.0) + one(2.0, 0.1, -0.7, 1.0)
    np.testing.assert_allclose(criteria.kl(q, log_precision, mean), expected, rtol=1e-10)
    np.testing.assert_allclose(criteria.kl(Posterior(mean["a"], jnp.full(2, -0.2)), 0.4, mean["a"]), 0, atol=1e-15)


def factorised():
    """Data whose posterior factorises, and the posterior."""
    x = np.linalg.qr(X)[0] * np.arange(1.0, P + 1)
    precision = BETA * np.sum(x**2, 0) + np.exp(H)
    return x, Posterior(jnp.asarray(BETA * x.T @ Y / precision), jnp.asarray(-0.5 * np.log(precision)))


def test_elbo_at_the_exact_posterior_is_the_evidence():
    """E_q of a quadratic loss in closed form: the loss at the mean + ½ β Σ x² s²; by samples, within 4 errors."""
    x, q = factorised()
    spread = 0.5 * BETA * jnp.sum(x**2 @ jnp.exp(2 * q.log_scale))
    bound = jnp.sum(normal_losses(q.mean, None, x)) + spread + criteria.kl(q, H)
    np.testing.assert_allclose(bound, marginal(H, x), rtol=1e-12)
    elbo = criteria.negative_elbo(lambda w, batch: normal_losses(w, None, x), num_samples=50)
    draws = jnp.stack([elbo(q, H, None, jax.random.key(i)) for i in range(40)])
    assert abs(draws.mean() - bound) < 4 * draws.std(ddof=1) / 40**0.5


def test_elbo_is_a_bound():
    """Of correlated features: below the log evidence for every posterior, its optimum included."""
    a = BETA * X.T @ X + np.diag(np.exp(H))
    mean, precision = np.linalg.solve(a, BETA * X.T @ Y), np.diag(a)
    for scale in (0.5, 1.0, 2.0):
        q = Posterior(jnp.asarray(mean), jnp.asarray(np.log(scale) - 0.5 * np.log(precision)))
        spread = 0.5 * BETA * jnp.sum(X**2 @ jnp.exp(2 * q.log_scale))
        assert jnp.sum(normal_losses(q.mean, None)) + spread + criteria.kl(q, H) > marginal(H) + 1e-3


@pytest.mark.slow
def test_local_noise_has_the_same_mean_and_less_variance():
    x, q = factorised()

    def gradients(elbo, batch):
        grad = jax.jit(jax.vmap(jax.grad(lambda q, key: elbo(q, H, batch, key)), (None, 0)))
        return np.concatenate(grad(q, keys), 1)

    keys = jax.random.split(jax.random.key(1), 2000)
    shared = gradients(criteria.negative_elbo(lambda w, batch: normal_losses(w, None, x)), None)
    alone = gradients(criteria.negative_elbo(lambda w, row: normal_losses(w, None, row[0], row[1]), local=True), (x, Y))
    error = np.sqrt(shared.var(0) / 2000 + alone.var(0) / 2000)
    assert np.all(np.abs(shared.mean(0) - alone.mean(0)) < 4.5 * error)  # 12 components, one in 7000 by chance
    assert alone.var(0)[:P].sum() < 0.7 * shared.var(0)[:P].sum()


@pytest.mark.slow
def test_local_dense_draws_what_random_weights_give():
    kernel = Posterior(jnp.asarray(RNG.normal(size=(P, 2))), jnp.asarray(RNG.normal(size=(P, 2)) - 1))
    bias = Posterior(jnp.ones(2), jnp.zeros(2))
    keys = jax.random.split(jax.random.key(0), 20_000)
    local = jax.vmap(lambda key: criteria.local_dense(kernel, bias, X[:3], key))(keys)

    def weights(key):
        k, b = criteria.draw((both := Posterior(*zip(kernel, bias, strict=True))), key)
        return X[:3] @ k + b[None]

    drawn = jax.vmap(weights)(keys)
    deviation = drawn.std(0)
    np.testing.assert_allclose(local.mean(0), drawn.mean(0), atol=6 * deviation.max() / 20_000**0.5)
    np.testing.assert_allclose(local.std(0), deviation, rtol=0.03)  # relative errors of 1/√(2·20000) = .5 %
    examples = np.corrcoef(np.asarray(local[:, :2, 0]).T)[0, 1]  # two examples share no noise
    assert abs(examples) < 4 / 20_000**0.5 < abs(np.corrcoef(np.asarray(drawn[:, :2, 0]).T)[0, 1])


@pytest.mark.parametrize("per", ["weight", "leaf", "all"])
@pytest.mark.parametrize("with_mean", [False, True])
def test_closest_prior_is_the_zero_of_the_gradient(per, with_mean):
    q = Posterior(
        {"a": jnp.array([0.3, -1.0]), "b": jnp.array([2.0])}, {"a": jnp.array([-1.0, 0.2]), "b": jnp.array([0.1])}
    )
    if per == "weight" and with_mean:
        with pytest.raises(JaxhpoError, match="the same"):
            criteria.closest_prior(q, per, with_mean=True)
        return
    log_precision, mean = criteria.closest_prior(q, per, with_mean=with_mean)
    gradients = jax.grad(lambda prior: criteria.kl(q, *prior))((log_precision, mean))
    assert all(np.abs(g).max() < 1e-12 for g in jax.tree.leaves(gradients if with_mean else gradients[0]))
    lower = criteria.kl(q, log_precision, mean)
    assert lower < criteria.kl(q, jax.tree.map(lambda x: x + 0.1, log_precision), mean)


def test_pruning_sets_the_weights_of_largest_density_at_zero():
    q = Posterior(
        {"a": jnp.array([0.1, 5.0]), "b": jnp.array([-3.0, 0.2])}, {"a": jnp.array([-3.0, 0.0]), "b": jnp.zeros(2)}
    )
    density = criteria.density_at_zero(q)
    np.testing.assert_allclose(density["a"][1], np.exp(-12.5), rtol=1e-12)
    left = criteria.pruned(q, 0.5)
    assert left["a"].tolist() == [0.0, 5.0] or left["a"].tolist() == [0.1, 5.0]
    flat, kept = (np.concatenate([np.ravel(t[k]) for k in "ab"]) for t in (density, left))
    assert flat[kept == 0].min() >= flat[kept != 0].max() and (kept == 0).sum() == 2
    assert jax.tree.leaves(criteria.pruned(q, 0.0))[0].tolist() == [0.1, 5.0]


# --- with tune, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tune_minimises_criteria():
    for criterion in (
        criteria.cross_validation(ridge_fit, squared, criteria.folds(N, 5)),
        criteria.laplace_evidence(exact_fit, normal_losses, normal_prior, jnp.ones(N)),
        lambda h: criteria.leave_one_out(X, Y, jnp.exp(h)),
    ):
        result = jaxhpo.tune(criterion, jnp.zeros(P), optax.adam(0.1), num_steps=30, progress=False)
        assert result.best_value < result.history["value"][0]


ONES = np.ones(N)
PAIR = Posterior((jnp.ones(2), jnp.ones(1)), (jnp.zeros(2), jnp.zeros(1)))


def bound(posterior, prior):
    elbo = criteria.negative_elbo(lambda w, batch: sum(jnp.sum(x**2) for x in jax.tree.leaves(w)))
    return elbo(posterior, prior, None, jax.random.key(0))


def evidence(losses, prior=normal_prior, fit=exact_fit, weights=ONES, h=H):
    return criteria.laplace_evidence(fit, losses, prior, weights)(h)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: criteria.folds(3, 5), "3 or fewer"),
        (lambda: criteria.folds(6, 3, stratify=[0, 1]), "one label for each of 6"),
        (lambda: criteria.cross_validation(lambda h: h, squared, np.eye(N)), "fit"),
        (lambda: criteria.cross_validation(ridge_fit, squared, np.ones(N)), "shape"),
        (lambda: criteria.cross_validation(ridge_fit, squared, np.zeros((2, N))), "holds out nothing"),
        (lambda: criteria.cross_validation(ridge_fit, squared, np.ones((1, N))), "or everything"),
        (lambda: criteria.cross_validation(ridge_fit, squared, np.full((2, N), 0.5)), "other than 0"),
        (lambda: criteria.hold_out(ridge_fit, squared, np.arange(N)), "other than 0"),
        (lambda: criteria.folds(6, 3, seed=-1), "seed.*0 or more"),
        (lambda: criteria.folds(6, 3, seed=None), "seed"),
        (lambda: criteria.folds(4, 2, stratify=["a", None, "a", "b"]), "1 examples, the first at 1"),
        (lambda: criteria.folds(4, 2, stratify=[1.0, 0.0, np.nan, np.nan]), "2 examples, the first at 2"),
        (lambda: evidence(lambda w, h: squared(w, h).sum()), "shape \\(\\).*one loss"),
        (lambda: evidence(squared, lambda w, h: w**2), "scalar"),
        (lambda: evidence(squared, fit=lambda h, weights: jnp.ones(P), weights=1.0), "one weight"),
        (lambda: criteria.leave_one_out(X[:1], Y[:1], 1.0), "1 rows"),
        (lambda: criteria.generalised_cross_validation(X[:0], Y[:0], 1.0), "0 rows"),
        (lambda: criteria.leave_one_out(X, Y, np.zeros(P)), "above 0"),
        (lambda: criteria.concrete(jax.random.key(0), np.zeros(3), 0), "`one_hot`"),
        (lambda: criteria.concrete_log_density(np.full(2, 0.5), np.zeros(2), -1.0), "above 0"),
        (lambda: criteria.width_mask(1.0, 2, 0.0), "above 0"),
        (lambda: criteria.width_mask(1.0, -2), "size"),
        (lambda: criteria.kl(Posterior(jnp.ones(2), jnp.ones(2)), jnp.ones(3)), "float64\\[3\\].*each leaf"),
        (lambda: criteria.kl(Posterior(jnp.ones(2), jnp.ones(2)), {"a": 1.0}), "log_precision.*each leaf"),
        (lambda: bound(PAIR, (0.0,)), "tuple of 1"),
        (lambda: bound(PAIR, (0.0, 0.0, 0.0)), "tuple of 3"),
        (lambda: bound(PAIR, (0.0, 5.0)), "None"),  # of a tuple of parameters, it may be meant as a precision of each
        (lambda: criteria.cross_validation(ridge_fit, lambda w, h: squared(w, h).mean(), np.eye(N))(H), "each of them"),
        (lambda: criteria.leave_one_out(X, Y, np.ones(P + 1)), "do not fit"),
        (lambda: criteria.laplace_evidence(exact_fit, normal_losses, normal_prior, 1.0, curvature="diagonal"), "exact"),
        (lambda: criteria.laplace_evidence(exact_fit, normal_losses, normal_prior, 1.0, determinant="no"), "dense"),
        (lambda: criteria.StochasticDeterminant(0), "num_vectors"),
        (lambda: criteria.negative_elbo(lambda w, b: w, num_samples=0), "num_samples"),
        (lambda: criteria.closest_prior(Posterior(1.0, 1.0), "layer"), "'leaf'"),
        (lambda: criteria.pruned(Posterior(jnp.ones(2), jnp.ones(2)), 2.0), "0 to 1"),
    ],
)
def test_refusals_say_what_to_write(call, says):
    with pytest.raises(JaxhpoError, match=says):
        call()


@pytest.mark.slow
def test_leave_one_out_in_float32_with_a_small_penalty():
    """Of many features the fit is nearly exact, and 1 − S_ii small: it is no difference of numbers near 1/n."""
    x, y = RNG.normal(size=(5, 20)), RNG.normal(size=5)
    for criterion in (criteria.leave_one_out, criteria.generalised_cross_validation):
        exact, rounded = (criterion(x.astype(t), y.astype(t), np.asarray(1e-6, t)) for t in (np.float64, np.float32))
        np.testing.assert_allclose(rounded, exact, rtol=1e-3)  # ε = 1e-7 times the condition of a 5 × 5 kernel


@pytest.mark.slow
def test_nothing_is_nan_or_lost_at_the_ends():
    kernel = Posterior(jnp.ones((3, 2)), jnp.zeros((3, 2)))
    gradient = jax.grad(lambda q: criteria.local_dense(q, None, jnp.zeros((1, 3)), jax.random.key(0)).sum())(kernel)
    assert all(np.isfinite(g).all() for g in gradient)
    sharp = Posterior(jnp.array([3.0, 2.0, 0.0]), jnp.full(3, -800.0))
    assert criteria.density_at_zero(sharp).tolist() == [0, 0, 1]
    assert criteria.pruned(sharp, 0.67).tolist() == [3, 0, 0]
    cv = criteria.cross_validation(
        lambda h, w: h, lambda w, h: jnp.ones(3000), jnp.asarray(criteria.folds(3000, 5), jnp.bfloat16)
    )
    assert cv(0.0) == 1


@pytest.mark.slow
def test_a_prior_of_a_tuple_of_parameters():
    both, flat = bound(PAIR, ((0.0, 5.0), None)), bound(Posterior(*map(list, PAIR)), [0.0, 5.0])
    assert both == flat == bound(PAIR, ((0.0, 5.0), (0.0, 0.0)))
    assert bound(PAIR, (3.0, None)) == bound(PAIR, 3.0)


@pytest.mark.slow
def test_python_numbers_are_parameters():
    q, arrays = (
        Posterior({"a": 1, "b": 0.5}, {"a": -2, "b": 0.0}),
        Posterior(*({"a": jnp.array(float(a)), "b": jnp.array(b)} for a, b in [(1, 0.5), (-2, 0.0)])),
    )
    for call in (
        lambda q: criteria.draw(q, jax.random.key(0)),
        lambda q: criteria.kl(q, 0.3),
        criteria.density_at_zero,
    ):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, call(q), call(arrays)))
    assert criteria.pruned(q, 0.5) == {"a": 1, "b": 0}
    assert np.isfinite(evidence(lambda w, h: (w - Y) ** 2, lambda w, h: 0.5 * h * w**2, lambda h, weights: 1.0, h=2.0))


@pytest.mark.slow
def test_half_precision_is_computed_in_float32():
    low, h = jnp.bfloat16, jnp.float32(0.5)
    x, y, w = jnp.asarray(X, low), jnp.asarray(Y, low), jnp.ones(P, low)

    def losses(w, h):
        return 0.5 * (x @ w - y) ** 2

    def value(determinant, w):
        made = criteria.laplace_evidence(
            lambda h, weights: w,
            losses,
            lambda w, h: h * jnp.sum(w**2),
            jnp.ones(N, jnp.float32),
            determinant=determinant,
        )
        return made(h)

    for determinant in ("dense", "diagonal", criteria.StochasticDeterminant(4, P)):
        np.testing.assert_allclose(value(determinant, w), value(determinant, w.astype(jnp.float32)), rtol=1e-6)
    for criterion in (criteria.leave_one_out, criteria.generalised_cross_validation):
        np.testing.assert_array_equal(criterion(x, y, h), criterion(x.astype(jnp.float32), y.astype(jnp.float32), h))


def test_pruning_is_jitted_and_mapped_over_fractions():
    q = Posterior(jnp.asarray(RNG.normal(size=100)), jnp.asarray(RNG.normal(size=100)))
    fractions = jnp.arange(101) / 100
    curve = jax.jit(jax.vmap(criteria.pruned, (None, 0)))(q, fractions)
    np.testing.assert_array_equal((curve == 0).sum(1), np.arange(101))  # 0.29 · 100 is 28.999999999999996
    for at in (0, 29, 57, 100):
        np.testing.assert_array_equal(criteria.pruned(q, at / 100), curve[at])


def test_labels_may_be_of_several_types():
    masks = criteria.folds(6, 3, stratify=np.array(["a", 1] * 3, object))
    assert (masks[:, ::2].sum(1) == 1).all()


def test_labels_of_pandas_that_are_missing_are_refused():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(JaxhpoError, match="no label .None or NaN. for 1 examples, the first at 1"):
        criteria.folds(4, 2, stratify=pandas.Series(["a", pandas.NA, "b", "a"], dtype="string"))


@pytest.mark.slow
def test_pruning_counts_of_many_weights():
    """No weight of nine million for a fraction of zero, where float32's rounding is one."""
    with enable_x64(False):
        q = criteria.Posterior(jnp.ones(9_000_000), jnp.zeros(9_000_000))
        assert int((criteria.pruned(q, 0.0) == 0).sum()) == 0
        assert int((jax.jit(criteria.pruned)(q, 0.0) == 0).sum()) == 0
