"""The benchmarks of searches: LassoBench's problems are what they say, and small runs report every method."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

pytestmark = pytest.mark.slow


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def lasso(benchmark):
    pytest.importorskip("optuna")
    return benchmark("lasso_bench")


def test_the_design_is_celers(lasso):
    datasets = pytest.importorskip("celer.datasets")
    w = np.linspace(-1, 1, 20)
    x, y, _ = datasets.make_correlated_data(10, 20, corr=0.6, w_true=w, snr=3, random_state=42)
    ours = lasso.correlated(10, 20, w, 3)
    assert np.array_equal(ours[0], x) and np.array_equal(ours[1], y)


def test_weighted_lasso_and_its_hypergradient(lasso):
    """Weights as scikit-learn's, with a penalty each by scaling columns; the hypergradient as central differences."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    data = lasso.load(60, 3)
    low, high = lasso.box(data)
    h = jnp.asarray(np.random.default_rng(0).uniform((low + high) / 2, high, 60))
    scale = np.exp(-np.asarray(h))
    model = linear_model.Lasso(1.0, fit_intercept=False, tol=1e-12, max_iter=10**6)
    want = model.fit(np.asarray(data.x) * scale, data.y).coef_ * scale
    got, _ = lasso.descend(data, jnp.ones(len(data.y)), data.rate, jnp.exp(h), jnp.zeros(60), 1e-10)
    assert relative_error(got, want) <= 1e-6 and np.array_equal(got != 0, want != 0)
    assert len(data.y) == 25 and 0 < (got != 0).sum() < 25  # 15 % of 30 rows, rounded up, are for the test
    score = jax.jit(lambda h: lasso.scored(h, data, jnp.zeros((5, 60)), 1e-10)[0])
    found = jax.grad(score)(h)
    i = int(jnp.abs(found).argmax())
    step = 1e-4 * jnp.eye(60)[i]
    difference = (score(h + step) - score(h - step)) / 2e-4
    assert found[i] != 0 and abs(found[i] / difference - 1) <= 1e-2  # conjugate gradients to 1e-3


def small(module, folder):
    """The report of a small run."""
    module.main(["--quick", "--out", str(folder)])
    assert (folder / f"{module.__name__}.png").stat().st_size > 10_000
    return json.loads((folder / f"{module.__name__}.json").read_text())


def test_lasso_bench_reports_every_method(lasso, tmp_path):
    (found,) = small(lasso, tmp_path)["summary"].values()
    assert found.keys() == {"one penalty", "hypergradient", *lasso.SEARCHES}
    for method in ("hypergradient", *lasso.SEARCHES):
        own = found[method]
        assert own["at 1"]["score"]["mean"] <= own["at 0.05"]["score"]["mean"] + 1e-3  # of what it trained to 1e-4
        assert 0 < own["spent"] <= own["budget"]


def test_irrelevant_reports_every_number_of_hyperparameters(benchmark, tmp_path):
    module = benchmark("irrelevant")
    rows = small(module, tmp_path)["rows"]
    assert [row["others"] for row in rows] == [0, 1]
    assert all(value["mean"] >= 0 for row in rows for value in row["regret"].values())
    for row in rows:  # they do not matter
        assert all(moved < 0.01 * row["moves the loss by"][0] for moved in row["moves the loss by"][1:])


def test_hybrid_spends_as_many_trainings_as_the_others(benchmark, tmp_path):
    pytest.importorskip("optuna")
    rows = small(module := benchmark("hybrid"), tmp_path)["rows"]
    assert [row["method"] for row in rows] == list(module.METHODS)
    assert {row["trainings"] for row in rows} == {24}  # the budget of a small run
    assert all(np.isfinite(row["test"]) and min(filter(None, row["curve"])) == row["validation"] for row in rows)
