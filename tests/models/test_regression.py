"""Regression in closed form, against SciPy's densities and scikit-learn."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.stats

import jaxhpo
import jaxhpo.criteria
from jaxhpo import JaxhpoError
from jaxhpo.models import regression

RNG = np.random.default_rng(0)
X = RNG.normal(size=(15, 4))
Y = X @ np.array([1.0, -2.0, 0.0, 0.5]) + 0.3 * RNG.normal(size=15)
H = np.array([0.3, -1.0, 2.0, 0.0])


def test_evidence_is_the_marginal_likelihood():
    covariance = np.eye(15) / np.exp(1.3) + X / np.exp(H) @ X.T
    posterior = regression.bayesian_linear(X, Y, H, 1.3)
    np.testing.assert_allclose(
        posterior.log_evidence, scipy.stats.multivariate_normal.logpdf(Y, cov=covariance), rtol=1e-10
    )
    # the same Gaussian by conditioning the joint of weights and data
    gain = np.diag(np.exp(-H)) @ X.T @ np.linalg.inv(covariance)
    np.testing.assert_allclose(posterior.mean, gain @ Y, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(posterior.covariance, np.diag(np.exp(-H)) - gain @ X @ np.diag(np.exp(-H)), atol=1e-12)


def test_gradient_of_the_evidence_is_the_papers():
    """∂ log p/∂ log αᵢ = ½ − ½ αᵢ (mᵢ² + Σᵢᵢ) (MacKay 1992)."""
    posterior = regression.bayesian_linear(X, Y, H, 1.3)
    expected = 0.5 - 0.5 * np.exp(H) * (posterior.mean**2 + jnp.diag(posterior.covariance))
    gradient = jax.grad(lambda h: regression.bayesian_linear(X, Y, h, 1.3).log_evidence)(H)
    np.testing.assert_allclose(gradient, expected, rtol=1e-8)


@pytest.mark.slow
def test_kernel_ridge_is_sklearns():
    kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")
    lengthscales = np.array([0.5, 2.0, 1.0, 1e4])
    theirs = kernel_ridge.KernelRidge(alpha=0.1, kernel="rbf", gamma=0.5).fit(X / lengthscales, Y)
    kernel = regression.squared_exponential(X, X, np.log(lengthscales))
    ours = regression.squared_exponential(X[:5] + 0.1, X, np.log(lengthscales)) @ regression.kernel_ridge(
        kernel, Y, 0.1
    )
    np.testing.assert_allclose(ours, theirs.predict((X[:5] + 0.1) / lengthscales), rtol=1e-9)
    assert np.all(np.isfinite(jax.grad(lambda h: regression.squared_exponential(X, X, h).sum())(np.zeros(4))))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_sklearns(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = np.digitize(Y, [0.0] if classes == 2 else [-1.0, 1.0])
    weights = np.arange(15) % 3
    ours = regression.logistic_regression(X, labels, 0.5, weights, num_classes=classes)
    theirs = linear_model.LogisticRegression(C=2.0, tol=1e-10, max_iter=3000).fit(X, labels, sample_weight=weights)
    np.testing.assert_allclose(
        ours.weights.T, theirs.coef_[slice(None) if classes > 2 else 0], atol=1e-5
    )  # their error
    shift = theirs.intercept_ - theirs.intercept_.mean() if classes > 2 else theirs.intercept_[0]
    np.testing.assert_allclose(ours.intercept, shift, atol=1e-5)
    logs = np.log(theirs.predict_proba(X))[np.arange(15), labels]
    np.testing.assert_allclose(ours.losses(X, labels), -logs, atol=1e-5)


@pytest.mark.parametrize("classes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_logistic_regression_is_differentiable(classes):
    """In penalties, examples' weights and features, against differences."""
    labels = np.digitize(Y, [0.0] if classes == 2 else [-1.0, 1.0])

    def loss(h, weights, x):
        fitted = regression.logistic_regression(x, labels, jnp.exp(h), weights, num_classes=classes)
        return fitted.losses(1.1 * X, labels).sum()

    given = jnp.asarray(H), jnp.linspace(0.5, 2.0, 15), jnp.asarray(X)
    jax.test_util.check_grads(jax.jit(loss), given, order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-5)


@pytest.mark.slow
def test_logistic_regression_in_criteria():
    """Folds in one program, against one fold after the other."""
    labels = jnp.asarray(np.digitize(Y, [0.0]))  # an array of JAX, under `jit` and `vmap`

    def fit(h, weights):
        return regression.logistic_regression(X, labels, jnp.exp(h), weights)

    folds = jaxhpo.criteria.cross_validation(
        fit, lambda fitted, h: fitted.losses(X, labels), jaxhpo.criteria.folds(15, 3)
    )
    one = [float(np.mean(fit(H, 1 - mask).losses(X, labels)[mask == 1])) for mask in jaxhpo.criteria.folds(15, 3)]
    np.testing.assert_allclose(jax.jit(folds.by_fold)(H), one, rtol=1e-9)


@pytest.mark.slow
def test_logistic_regression_of_other_types_and_of_nan():
    labels = np.digitize(Y, [0.0])
    ours = regression.logistic_regression(np.round(9 * X).astype(np.int32), labels, 1.0).weights
    exact = regression.logistic_regression(np.round(9 * X), labels, 1.0).weights
    np.testing.assert_allclose(ours, exact, rtol=1e-6)  # integers are computed in float32, of spacing 1.2e-7
    half = regression.logistic_regression(jnp.asarray(X, jnp.bfloat16), labels, 1.0).weights
    np.testing.assert_allclose(half, regression.logistic_regression(X, labels, 1.0).weights, atol=0.05)  # 8 bits of X
    unknown = jax.jit(lambda x: regression.logistic_regression(x, labels, 1.0).weights)(jnp.where(X > 1, jnp.nan, X))
    assert np.isnan(unknown).all()


@pytest.mark.slow
def test_evidence_of_softmax_regression():
    """The term that holds the intercepts' sum belongs into the prior."""
    labels, h = np.digitize(Y, [-1.0, 1.0]), jnp.zeros(4)

    def prior(fitted, h):
        return (
            0.5 * jnp.sum(jnp.exp(h)[:, None] * fitted.weights**2) - 1.5 * h.sum() + 0.5 * fitted.intercept.sum() ** 2
        )

    evidence = jaxhpo.criteria.laplace_evidence(
        lambda h, weights: regression.logistic_regression(X, labels, jnp.exp(h), weights, num_classes=3),
        lambda fitted, h: fitted.losses(X, labels),
        prior,
        weights=jnp.ones(15),
    )
    jax.test_util.check_grads(evidence, (h,), order=1, modes=["rev"], atol=1e-4, rtol=1e-4, eps=1e-4)


def test_features():
    x = np.linspace(-1, 1, 7)
    np.testing.assert_allclose(regression.polynomial(x, 3), np.vander(x, 4, increasing=True))
    fourier = regression.fourier(np.arange(8) / 8, 3)
    np.testing.assert_allclose(fourier.T @ fourier, np.diag([8.0] + [4.0] * 6), atol=1e-12)  # orthogonal on a period


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: regression.logistic_regression(X, Y[:3] > 0, 1.0), "do not fit"),
        (lambda: regression.logistic_regression(X, Y > 0, 1.0, num_classes=1), "num_classes"),
        (lambda: regression.logistic_regression(X, np.arange(15) % 3, 1.0), "integers from 0 to 2: .*`num_classes=3`"),
        (lambda: regression.logistic_regression(X, 1 + np.arange(15) % 2, 1.0), "integers from 1 to 2"),
        (lambda: regression.logistic_regression(X, Y, 1.0), "has the type float64"),
        (lambda: regression.logistic_regression(X, Y > 0, -1.0), "not above 0"),
        (lambda: regression.bayesian_linear(X, Y[:3], H), "do not fit"),
        (lambda: regression.bayesian_linear(X, Y, H[:2]), "do not fit"),
        (lambda: regression.polynomial(X[:, 0], -1), "degree"),
        (lambda: regression.fourier(X[:, 0], 0), "num_frequencies"),
    ],
)
def test_refusals_say_what_to_write(call, says):
    with pytest.raises(JaxhpoError, match=says):
        call()
