"""The estimators of `jaxhpo.sklearn`: scikit-learn's own checks, their criteria against refits, and what they find."""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo
from jaxhpo import JaxhpoError

pytest.importorskip("sklearn.base")
import sklearn.datasets
import sklearn.linear_model
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from threadpoolctl import threadpool_limits

from jaxhpo.sklearn import (
    BilevelElasticNet,
    BilevelKernelRidge,
    BilevelLasso,
    BilevelLogisticRegression,
    BilevelRidge,
    _kernel,
    _lasso,
    _logistic,
    _ridge,
)
from jaxhpo.sklearn._base import Data, rotated

ESTIMATORS = [BilevelRidge, BilevelLogisticRegression, BilevelKernelRidge, BilevelLasso, BilevelElasticNet]
FOLDS = [(np.arange(24) % 3 != k, np.arange(24) % 3 == k) for k in range(3)]
FOLDS = [(np.flatnonzero(train), np.flatnonzero(test)) for train, test in FOLDS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices are small here: more threads of the linear algebra would wait for each other, eight times as long."""
    with threadpool_limits(1):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the checks give bad input on purpose, which scikit-learn warns of
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scikit_learns_checks_pass(estimator):
    results = check_estimator(estimator(), on_skip=None)  # raises where one fails
    passed = [result for result in results if result["status"] == "passed"]
    print(f"{estimator.__name__}: {len(passed)} checks passed of {len(results)}")
    assert len(passed) > 50
    left = {result["check_name"] for result in results} - {result["check_name"] for result in passed}
    assert left <= {"check_array_api_input"}  # runs where SCIPY_ARRAY_API is set only


# --- criteria ---------------------------------------------------------------------------------------------------------


def data(n=24, p=5, classes=0, index=None, seed=0, weighted=True):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    y = x @ rng.normal(size=(p, max(1, classes)))
    y = y[:, 0] + rng.normal(size=n) if classes == 0 else (y + rng.gumbel(size=y.shape)).argmax(1)
    if classes:
        y[: 2 * classes] = np.tile(np.arange(classes), 2)
        y = np.eye(classes)[y]
    x, sizes, _ = rotated(x - x.mean(0), np.arange(p) if index is None else np.asarray(index), n)
    weights = rng.uniform(0.5, 3, n) if weighted else np.ones(n)
    return Data(x, y, weights, sizes, FOLDS), rng.normal(size=len(sizes)) + 1


RIDGE = {
    "evidence": _ridge.evidence,
    "leave_one_out": lambda d: _ridge.squared(d, _ridge.left_out(d)),
    "gcv": lambda d: _ridge.squared(d, _ridge.generalised(d)),
    "folds": lambda d: _ridge.squared(d, _ridge.held_out(d)),
}
LOGISTIC = {"evidence": _logistic.laplace, "leave_one_out": _logistic.left_out, "folds": _logistic.held_out}
TALL, WIDE = {}, {"p": 60, "index": np.arange(60) % 2}  # groups of 30 features, of which 24 rows leave 24
GROUPED = {"index": [2, 0, 1, 1, 0]}
QUICK = [(name, make, GROUPED) for name, make in RIDGE.items()]
QUICK += [(name, make, {"classes": 3, **GROUPED}) for name, make in LOGISTIC.items()]
CASES = [(name, make, case) for name, make in RIDGE.items() for case in (TALL, WIDE, {"p": 30})]
CASES += [(name, make, {"classes": k, **TALL}) for name, make in LOGISTIC.items() for k in (2, 3)]
CASES += [(name, make, {"classes": 2, **GROUPED}) for name, make in LOGISTIC.items()]
CASES += [("evidence", _logistic.laplace, {"classes": 3, **WIDE})]
CASES += [("evidence", _logistic.laplace, {"classes": 2, "p": 30})]  # through X A Xᵀ, as rows are fewer
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]


@pytest.mark.parametrize(("name", "make", "case"), CASES)
def test_gradients_and_hessians_are_those_of_the_value(name, make, case):
    given, h = data(**case)
    criterion = make(given)
    _, grad = criterion.value_and_grad(h)
    hessian = criterion.hessian(h)
    sides = [[criterion.value_and_grad(h + s * e) for s in (-1e-4, 1e-4)] for e in np.eye(len(h))]
    values = [(right[0] - left[0]) / 2e-4 for left, right in sides]
    grads = np.array([(right[1] - left[1]) / 2e-4 for left, right in sides])
    np.testing.assert_allclose(grad, values, atol=1e-5 * (1 + abs(grad).max()))
    if name == "evidence":  # the others have that of Gauss and Newton
        np.testing.assert_allclose(hessian, grads, atol=1e-5 * abs(grads).max())
    else:
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-9)


def test_evidence_is_the_marginal_likelihood():
    """With the noise profiled out: min over σ² of −log N(Qᵀy | 0, σ²(I + Qᵀ X Λ⁻¹ Xᵀ Q)), Q orthogonal to ones."""
    given, h = data(weighted=False)
    q = np.linalg.svd(np.ones((24, 1)))[0][:, 1:]
    y, cov = q.T @ given.y, np.eye(23) + q.T @ given.x @ np.diag(np.exp(-h)) @ given.x.T @ q
    energy = y @ np.linalg.solve(cov, y)
    expected = 0.5 * (23 * np.log(energy) + np.linalg.slogdet(cov)[1])
    np.testing.assert_allclose(_ridge.evidence(given).value_and_grad(h)[0], expected, rtol=1e-10)


def test_errors_left_out_are_those_of_refits():
    given, h = data(weighted=False)
    error, _ = _ridge.left_out(given)(h)
    for i in range(24):
        rest = np.delete(np.arange(24), i)
        fitted = sklearn.linear_model.Ridge(1.0).fit(given.x[rest] * np.exp(-h / 2), given.y[rest])
        expected = given.y[i] - fitted.predict(given.x[[i]] * np.exp(-h / 2))[0]
        np.testing.assert_allclose(error[i], expected, rtol=1e-8)


@pytest.mark.parametrize("classes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_the_log_loss_left_out_is_near_that_of_refits(classes):
    """It is one step of Newton's method: close, where penalties are strong, but for the intercepts, which are free."""
    given, h = data(classes=classes, weighted=False)
    value, _ = _logistic.left_out(given).value_and_grad(h + 3)
    splits = [(np.delete(np.arange(24), i), np.array([i])) for i in range(24)]
    expected, _ = _logistic.held_out(given._replace(splits=splits)).value_and_grad(h + 3)
    np.testing.assert_allclose(value, expected, rtol=1e-3 if classes == 2 else 1e-2)


def test_the_kernels_evidence_and_its_prediction():
    """The marginal likelihood of what is orthogonal to ones, and the kriging equations with a free intercept."""
    given, h = data(weighted=False)
    u = np.append(-1.0, h)
    _, grad = _kernel.evidence(given).value_and_grad(u)
    values = [[_kernel.evidence(given).value_and_grad(u + s * e)[0] for s in (-1e-5, 1e-5)] for e in np.eye(6)]
    np.testing.assert_allclose(grad, [(right - left) / 2e-5 for left, right in values], atol=1e-7)
    x, y, _ = problem(n=30, p=3)
    model = BilevelKernelRidge(shrinkage=1.0).fit(x, y)
    assert len(set(model.lengthscales_)) == 3
    z = (x - x.mean(0)) / x.std(0) / model.lengthscales_
    k = np.exp(-0.5 * ((z[:, None] - z) ** 2).sum(-1))
    q = np.linalg.svd(np.ones((30, 1)))[0][:, 1:]
    cov = np.eye(29) + q.T @ k @ q / model.penalty_
    energy = 0.5 * (29 * np.log(y @ q @ np.linalg.solve(cov, q.T @ y)) + np.linalg.slogdet(cov)[1])
    np.testing.assert_allclose(model.path_[-1].criterion, energy, rtol=1e-9)
    bordered = np.block([[k + model.penalty_ * np.eye(30), np.ones((30, 1))], [np.ones((1, 30)), np.zeros((1, 1))]])
    *weights, intercept = np.linalg.solve(bordered, np.append(y, 0.0))
    np.testing.assert_allclose(model.predict(x), k @ weights + intercept, rtol=1e-7)


@pytest.mark.slow
def test_lengthscales_tell_which_features_matter():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (80, 4))
    model = BilevelKernelRidge().fit(x, np.sin(2 * x[:, 0]) + x[:, 1] ** 2 + 0.1 * rng.normal(size=80))
    assert model.lengthscales_[2:].min() > 3 * model.lengthscales_[:2].max() and "one lengthscale" in model.reason_
    grouped = BilevelKernelRidge(groups=["yes", "yes", "no", "no"]).fit(x, x[:, 0] * x[:, 1])
    assert grouped.groups_["no"] > 3 * grouped.groups_["yes"]


@pytest.mark.parametrize("ratio", [0.4, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_derivative_of_lasso_is_that_of_proximal_steps(ratio):
    """`jaxhpo.fixed_point` with `Implicit()` at the solution, for the errors of each fold."""
    given, h = data(weighted=False)
    h = h + 1.0
    errors, slopes = _lasso.held_out(given, ratio)(h)
    assert (slopes == 0).any() and (slopes != 0).any()  # some weights are zero

    def outer_loss(h, train, test):
        mean, level = given.x[train].mean(0, keepdims=True), given.y[train].mean()
        x, y = given.x[train] - mean, given.y[train] - level
        rate = 1 / jnp.linalg.eigvalsh(x.T @ x).max()

        def step(w, h, batch):
            w = w - rate * (x.T @ (x @ w - y))
            shrunk = jnp.sign(w) * jnp.maximum(jnp.abs(w) - rate * ratio * jnp.exp(h), 0)
            return shrunk / (1 + rate * (1 - ratio) * jnp.exp(h))

        solver, rule = jaxhpo.fixed_point(step), jaxhpo.Implicit(jaxhpo.General())
        w = jaxhpo.solve(solver, solver.init(jnp.zeros(5), h), h, num_steps=2000, adjoint=rule).params
        return 0.5 * jnp.sum((given.y[test] - level - (given.x[test] - mean) @ w) ** 2)

    given = given._replace(x=jnp.asarray(given.x), y=jnp.asarray(given.y))
    place, program = 0, jax.jit(jax.value_and_grad(outer_loss))
    for train, test in given.splits:
        value, grad = program(jnp.asarray(h), train, test)
        rows = slice(place, place := place + len(test))
        np.testing.assert_allclose(0.5 * errors[rows] @ errors[rows], value, rtol=1e-7)
        np.testing.assert_allclose(errors[rows] @ slopes[rows], grad, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_lasso_with_one_penalty_is_scikit_learns():
    x, y, _ = problem(n=60, p=20)
    for estimator, rival in (
        (BilevelLasso(shrinkage=0.0), sklearn.linear_model.Lasso),
        (BilevelElasticNet(l1_ratio=0.3, shrinkage=0.0), sklearn.linear_model.ElasticNet),
    ):
        model = estimator.fit(x, y)
        ratio = {} if rival is sklearn.linear_model.Lasso else {"l1_ratio": 0.3}
        expected = rival(alpha=model.penalties_[0] / 60, tol=1e-10, max_iter=100_000, **ratio)
        np.testing.assert_allclose(
            model.predict(x), expected.fit((x - x.mean(0)) / x.std(0), y).predict((x - x.mean(0)) / x.std(0)), rtol=1e-6
        )
    assert BilevelLasso().fit(x, y).reason_ == "there is only one penalty"  # one for each feature overfits folds
    grouped = BilevelLasso(groups=[0] * 3 + [1] * 17).fit(x, y)
    assert grouped.groups_[1] > 2 * grouped.groups_[0] and (grouped.coef_[3:] == 0).sum() > 10
    with pytest.raises(JaxhpoError, match="and 1 at most"):
        BilevelElasticNet(l1_ratio=0.0).fit(x, y)


@pytest.mark.parametrize("classes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_the_level_of_the_evidence_is_that_of_leave_one_out(classes):
    """A plane separates the classes, so the evidence alone would hardly penalise."""
    x, _, signal = problem(n=60, p=4)
    labels = np.digitize(signal, [0] if classes == 2 else [-1, 1])
    model = BilevelLogisticRegression(shrinkage=0.0).fit(x, labels)
    given = Data((x - x.mean(0)) / x.std(0), np.eye(classes)[labels], np.ones(60), np.ones(4, int), [])
    loss = _logistic.left_out(given).value_and_grad
    found = np.log(model.penalties_)
    assert loss(found)[0] <= min(loss(found + 0.2)[0], loss(found - 0.2)[0], loss(model.path_[0].log_penalties)[0])
    assert abs(found - model.path_[0].log_penalties).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_laplaces_evidence_is_that_of_jax(classes):
    """`criteria.laplace_evidence` of the same model, but for constants: the priors' normalisers."""
    given, h = data(classes=classes, weighted=False)
    u = _logistic.contrasts(classes)
    lam = np.append(np.exp(h), _logistic.FREE)

    def fit(h, weights):
        return _logistic.fit(given, np.exp(np.asarray(h)), None)

    def losses(theta, h):
        x = np.column_stack([given.x, np.ones(24)])
        return -(given.y * jax.nn.log_softmax(x @ theta @ u.T, 1)).sum(1)

    def prior(theta, h):
        return 0.5 * (lam[:, None] * theta**2).sum() - 0.5 * u.shape[1] * h.sum()

    theta = fit(h, None)
    energy = float(losses(theta, h).sum() + prior(theta, h))
    flat = jax.hessian(lambda t: losses(t.reshape(theta.shape), h).sum() + prior(t.reshape(theta.shape), h))
    expected = energy + 0.5 * np.linalg.slogdet(np.asarray(flat(theta.ravel())))[1]
    np.testing.assert_allclose(_logistic.laplace(given).value_and_grad(h)[0], expected, rtol=1e-9)


# --- fits -------------------------------------------------------------------------------------------------------------


def problem(n=80, p=12, useful=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) * 10 ** rng.uniform(-1, 1, p)
    signal = (x / x.std(0))[:, :useful].sum(1)
    return x, signal + rng.normal(size=n), signal


def test_penalties_that_are_given_are_ridges():
    x, y, _ = problem()
    model = BilevelRidge(shrinkage=5.0).fit(x, y)
    scaled = (x - x.mean(0)) / x.std(0) / np.sqrt(model.penalties_)
    expected = sklearn.linear_model.Ridge(1.0).fit(scaled, y)
    np.testing.assert_allclose(model.predict(x), expected.predict(scaled), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_one_penalty_is_logistic_regressions(classes):
    x, _, signal = problem()
    y = np.digitize(signal, [0] if classes == 2 else [-1, 1])
    model = BilevelLogisticRegression(shrinkage=0.0).fit(x, y)
    scaled = (x - x.mean(0)) / x.std(0)
    expected = sklearn.linear_model.LogisticRegression(C=1 / model.penalties_[0], tol=1e-8, max_iter=1000)
    np.testing.assert_allclose(model.predict_proba(x), expected.fit(scaled, y).predict_proba(scaled), atol=1e-4)
    assert model.one_penalty_ and model.coef_.shape == ((1, 12) if classes == 2 else (3, 12))
    assert (model.predict(x) == model.classes_[model.predict_proba(x).argmax(1)]).all()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"criterion": "leave_one_out"}, {"criterion": "gcv"}, {"cv": 4}])
def test_noise_is_penalised_by_every_criterion(settings):
    x, y, _ = problem(n=60, p=20)
    model = BilevelRidge(**settings).fit(x, y)
    assert not model.one_penalty_ and "nats better than one penalty" in model.reason_
    assert np.median(model.penalties_[3:]) > 10 * model.penalties_[:3].max()
    if settings.get("criterion") != "gcv":
        x, y, _ = problem(n=300, p=20)
        labels = np.where(y > 0, "yes", "no")
        model = BilevelLogisticRegression(**settings).fit(x, labels)
        assert np.median(model.penalties_[3:]) > 2 * model.penalties_[:3].max()


@pytest.mark.slow
def test_one_penalty_is_kept_where_features_are_alike():
    x, _, _ = problem(n=60, p=20)
    y = (x / x.std(0)).sum(1) + 3 * np.random.default_rng(1).normal(size=60)
    model = BilevelRidge().fit(x, y)
    assert model.one_penalty_ and model.shrinkage_ == 0 and "one penalty kept" in model.reason_
    assert len(set(model.penalties_)) == 1
    gains = [model.path_[0].score - level.score for level in model.path_[1:]]
    assert max(gains) <= 2.0  # the default `min_gain`
    other = BilevelRidge(min_gain=np.inf).fit(*problem()[:2])  # which has features that differ
    assert other.one_penalty_ and not BilevelRidge().fit(*problem()[:2]).one_penalty_


@pytest.mark.slow
def test_groups_and_covariates():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 150))
    y = x[:, :50] @ rng.normal(size=50) + 0.1 * rng.normal(size=60)
    names = np.repeat(["a", "b", "c"], 50)
    mixed = rng.permutation(150)
    model = BilevelRidge(groups=names[mixed]).fit(x[:, mixed], y)
    assert list(model.groups_) == ["a", "b", "c"] and min(model.groups_, key=model.groups_.__getitem__) == "a"
    np.testing.assert_allclose(model.penalties_, [model.groups_[name] for name in names[mixed]])
    with pytest.raises(jaxhpo.JaxhpoError, match=r"`groups` got a dict.*\[groups\[name\] for name in X.columns\]"):
        BilevelRidge(groups=dict.fromkeys(range(x.shape[1]), "a")).fit(x, y)
    by_covariate = BilevelRidge(groups=names, covariates=[0.0, 1.0, 1.0], shrinkage=0.0).fit(x, y)
    assert by_covariate.groups_["b"] == pytest.approx(by_covariate.groups_["c"]) and not by_covariate.one_penalty_
    assert by_covariate.groups_["b"] > 10 * by_covariate.groups_["a"]
    # a covariate that is constant, or given twice, changes nothing
    twice = np.column_stack([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], np.ones(3)])
    again = BilevelRidge(groups=names, covariates=twice, shrinkage=0.0).fit(x, y)
    np.testing.assert_allclose(again.penalties_, by_covariate.penalties_, rtol=1e-3)


@pytest.mark.parametrize("estimator", [BilevelRidge, BilevelLogisticRegression])
def test_weights_are_repetitions(estimator):
    x, y, signal = problem(n=40, p=4)
    y = y if estimator is BilevelRidge else signal > 0
    times = np.random.default_rng(0).integers(0, 3, 40)
    for criterion in ("evidence", "leave_one_out"):
        weighted = estimator(criterion=criterion, shrinkage=1.0).fit(x, y, sample_weight=times)
        repeated = estimator(criterion=criterion, shrinkage=1.0).fit(np.repeat(x, times, 0), np.repeat(y, times))
        np.testing.assert_allclose(weighted.penalties_, repeated.penalties_, rtol=1e-3)
        np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-3)


@pytest.mark.parametrize("estimator", [BilevelElasticNet, pytest.param(BilevelLasso, marks=pytest.mark.slow)])
def test_weights_of_lasso_are_repetitions_within_a_fold(estimator):
    x, y, _ = problem(n=40, p=4)
    rows = np.repeat(np.arange(40), np.random.default_rng(0).integers(0, 3, 40))

    def fit(rows, weights=None):
        folds = [(np.flatnonzero(rows % 4 != k), np.flatnonzero(rows % 4 == k)) for k in range(4)]
        return estimator(groups=[0, 0, 1, 1], cv=folds, shrinkage=1.0).fit(x[rows], y[rows], weights)

    weighted, repeated, plain = fit(np.arange(40), np.bincount(rows, minlength=40)), fit(rows), fit(np.arange(40))
    np.testing.assert_allclose(weighted.penalties_, repeated.penalties_, rtol=1e-3)
    np.testing.assert_allclose(weighted.predict(x), repeated.predict(x), rtol=1e-3)
    assert np.abs(weighted.predict(x) - plain.predict(x)).max() > 0.1


@pytest.mark.slow
def test_folds_are_a_number_a_splitter_or_pairs():
    x, y, _ = problem(n=40, p=4)
    fits = [BilevelRidge(cv=cv).fit(x, y) for cv in (4, KFold(4), list(KFold(4).split(x)))]
    np.testing.assert_array_equal(fits[0].penalties_, fits[1].penalties_)
    np.testing.assert_array_equal(fits[0].penalties_, fits[2].penalties_)
    # a row of weight zero is in no fold, and pairs still mean the rows that were given
    x, y = np.insert(x, 7, 99.0, 0), np.insert(y, 7, 99.0)
    pairs = [tuple(part + (part >= 7) for part in pair) for pair in KFold(4).split(x[:-1])]
    pairs[0] = (np.append(pairs[0][0], 7), pairs[0][1])
    fitted = BilevelRidge(cv=pairs).fit(x, y, sample_weight=np.where(np.arange(41) == 7, 0.0, 1.0))
    np.testing.assert_allclose(fitted.penalties_, fits[0].penalties_, rtol=1e-9)


@pytest.mark.parametrize(
    "estimator",
    [BilevelRidge, *(pytest.param(e, marks=pytest.mark.slow) for e in ESTIMATORS if e is not BilevelRidge)],
    ids=lambda e: e.__name__,
)
def test_within_scikit_learn(estimator):
    x, y, signal = problem(n=40, p=4)
    y = signal > 0 if estimator is BilevelLogisticRegression else y
    fitted = make_pipeline(StandardScaler(), estimator()).fit(x, y)
    np.testing.assert_allclose(fitted.predict(x), estimator().fit(x, y).predict(x), rtol=1e-4)
    search = GridSearchCV(estimator(), {"shrinkage": [1.0, 0.0], "groups": [None, [0, 0, 1, 1]]}, cv=2).fit(x, y)
    assert set(search.best_params_) == {"shrinkage", "groups"}
    model = clone(estimator(groups=np.array([0, 0, 1, 1]), min_gain=0.0)).fit(x, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(x), model.predict(x))
    small = estimator().fit(np.float32(x), y)
    np.testing.assert_allclose(small.predict(x), estimator().fit(x, y).predict(x), rtol=1e-3)


def test_names_of_features_are_shown():
    frame = sklearn.datasets.load_diabetes(as_frame=True)
    model = BilevelRidge().fit(frame.data, frame.target)
    assert list(model.groups_) == list(frame.data.columns) == list(model.feature_names_in_)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    x, y, _ = problem(n=40, p=4)
    model = BilevelRidge().fit(x, y)
    figure = model.plot(tmp_path / "penalties.png")
    left, right = figure.axes
    assert (tmp_path / "penalties.png").stat().st_size > 1000
    np.testing.assert_allclose(left.lines[0].get_xdata(), sorted(model.penalties_))
    np.testing.assert_allclose(right.lines[0].get_ydata(), [level.score for level in model.path_])


def test_nothing_is_learnt_from_a_constant():
    x, _, _ = problem(n=20, p=4)
    model = BilevelRidge().fit(np.column_stack([x, np.ones(20)]), np.full(20, 7.0))
    np.testing.assert_allclose(model.predict(np.ones((1, 5))), 7.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": [0, 1]}, "write a label for each feature"),
        ({"covariates": np.ones((3, 1))}, "there are 4 penalties"),
        ({"criterion": "aic"}, "write one of 'evidence'"),
        ({"shrinkage": -1}, "write 'score'"),
        ({"shrinkage": "auto"}, "write 'score'"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    x, y, _ = problem(n=20, p=4)
    with pytest.raises(JaxhpoError, match=message):
        BilevelRidge(**settings).fit(x, y)


def test_too_many_penalties_are_refused_and_groups_of_them_are_not(monkeypatch):
    monkeypatch.setattr("jaxhpo.sklearn._base.LARGEST", 50)
    x, y, _ = problem(n=20, p=60)
    with pytest.raises(JaxhpoError, match="write `groups=`"):
        BilevelRidge().fit(x, y)
    assert BilevelRidge(groups=np.arange(60) // 30).fit(x, y).coef_.shape == (60,)
    with pytest.raises(JaxhpoError, match="write `groups=`"):
        BilevelLogisticRegression(groups=np.arange(60) // 30).fit(x, np.arange(20) % 3)


def test_other_faults_are_refused():
    x, y, _ = problem(n=20, p=4)
    with pytest.raises(JaxhpoError, match="how often it counts"):
        BilevelRidge().fit(x, y, sample_weight=np.full(20, 1 / 20))
    with pytest.raises(JaxhpoError, match="1 class"):
        BilevelLogisticRegression().fit(x, np.zeros(20))
    sparse = pytest.importorskip("scipy.sparse")
    for estimator in ESTIMATORS:
        model = estimator().fit(x, y > 0)
        for method in ("fit", "predict", "predict_proba", "predict_log_proba", "decision_function", "score"):
            if hasattr(model, method):
                targets = (y > 0,) if method in ("fit", "score") else ()
                with pytest.raises(TypeError, match="dense data is required"):
                    getattr(model, method)(sparse.csr_matrix(x), *targets)


@pytest.mark.slow
def test_it_is_imported_where_it_is_used_and_says_what_it_needs():
    code = """if True:
        import sys, jaxhpo
        assert "sklearn" not in sys.modules and "sklearn" in dir(jaxhpo)
        sys.modules["sklearn"] = None
        try:
            jaxhpo.sklearn
        except ImportError as error:
            assert "pip install 'jaxhpo[sklearn]'" in str(error)
        else:
            raise AssertionError
        del sys.modules["sklearn"]
        jaxhpo.sklearn.BilevelRidge
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert "sklearn" in dir(jaxhpo)


@pytest.mark.slow
def test_ten_thousand_rows_of_a_thousand_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10_000, 1000))
    w = rng.normal(size=1000) * np.exp(rng.normal(size=1000))
    y = x @ w + 40 * rng.normal(size=10_000)
    model, one = (BilevelRidge(shrinkage=tau).fit(x, y) for tau in (1.2, 0.0))
    assert np.linalg.norm(model.coef_ - w) < np.linalg.norm(one.coef_ - w)


# --- what was once wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [BilevelRidge, *(pytest.param(e, marks=pytest.mark.slow) for e in ESTIMATORS[1:-1])],
)
def test_units_do_not_matter(estimator):
    x, y, signal = problem(n=40, p=4)
    y = (signal > 0).astype(int) if estimator is BilevelLogisticRegression else y
    units = np.array([1e9, 1e-12, 1.0, 1e-90])
    plain, scaled = estimator().fit(x, y), estimator().fit(x * units, y)
    np.testing.assert_allclose(scaled.predict(x * units), plain.predict(x), rtol=1e-6)
    assert scaled.reason_ == plain.reason_


@pytest.mark.slow
def test_repeated_folds_are_no_more_rows():
    x, _, signal = problem(n=48, p=5)
    labels = (signal + np.random.default_rng(1).logistic(size=48) > 0).astype(int)
    splits = list(KFold(4, shuffle=True, random_state=0).split(x))
    once, thrice = (BilevelLogisticRegression(cv=splits * k).fit(x, labels) for k in (1, 3))
    np.testing.assert_allclose(thrice.penalties_, once.penalties_, rtol=1e-3)  # where the search ends
    np.testing.assert_allclose(thrice.path_[0].criterion, once.path_[0].criterion, rtol=1e-6)


@pytest.mark.parametrize("estimator", [BilevelRidge, BilevelKernelRidge, BilevelLasso])
def test_a_constant_target_is_predicted(estimator):
    x, _, _ = problem(n=20, p=3)
    np.testing.assert_allclose(estimator().fit(x, np.full(20, 7.0)).predict(x), 7.0, rtol=1e-9)


def test_splits_may_be_lists_or_masks():
    x, y, _ = problem(n=24, p=3)
    masks = [(np.arange(24) % 3 != k, np.arange(24) % 3 == k) for k in range(3)]
    weights = np.arange(24) % 4
    forms = (FOLDS, masks, [(list(train), list(test)) for train, test in FOLDS])
    found = [BilevelRidge(cv=form).fit(x, y, weights).coef_ for form in forms]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ({"groups": ["a", None, "b"]}, {}, "`groups` has labels that cannot be sorted"),
        ({"groups": [[0, 1], [2], [3]]}, {}, "`groups` has labels that cannot be sorted"),
        ({"groups": ["a", "b"]}, {}, "`groups` has 2 entries"),
        ({"covariates": ["a", "b", "c"]}, {}, "`covariates` holds what is no number"),
        ({"shrinkage": None}, {}, "`shrinkage` got None"),
        ({"min_gain": float("nan")}, {}, "`min_gain` got nan"),
        ({"cv": FOLDS}, {"sample_weight": np.arange(24) % 3 == 0}, "`cv` has a fold in which"),
        ({}, {"y": np.full(24, 1e200)}, "entries of 1e.200"),
    ],
)
def test_settings_that_cannot_be_used(settings, given, said):
    x, y, _ = problem(n=24, p=3)
    with pytest.raises(JaxhpoError, match=said):
        BilevelRidge(**settings).fit(x, **{"y": y} | given)
