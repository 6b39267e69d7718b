"""The benchmark of searches: equal budgets, refits, and LeNet by products of matrices; on images made up here."""

import gzip
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.data import _download
from jaxhpo.models import LeNet

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "search.py"


@pytest.fixture(scope="module")
def search():
    spec = importlib.util.spec_from_file_location("search_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path, monkeypatch):
    """MNIST's files, of 300 training and 40 test images: a bright row tells the class, beside noise."""
    rng = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    for name, count in (("train", 300), ("t10k", 40)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        pixels = rng.integers(0, 200, (count, 28, 28), np.uint8)
        pixels[np.arange(count), 2 * labels] = 255
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            file = tmp_path / "mnist" / f"{name}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(head + array.tobytes(), 1))
    monkeypatch.setenv("JAXHPO_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(_download, "_verify", lambda path, sha256: None)  # these files are not the published ones


def test_lenet_by_products_is_lenet(search):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 28, 28, 1)), jnp.float32)
    params = LeNet().init(jax.random.key(0), x)["params"]
    expected = LeNet().apply({"params": params}, x)
    # The order of float32 sums differs.
    with jax.numpy_rank_promotion("allow"):
        found = jax.jit(search.lenet)(params, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def row(method, seed, path, **more):
    problem = {"model": "mlp", "data": "mnist", "size": 1000, "penalties": "layer", "seed": seed, "method": method}
    figures = {"spent": 3.0, "validation": 0.5, "fresh": 0.5, "test": 0.25, "errors": 10.0}
    return problem | figures | {"path": path} | more


def test_table_and_picture_take_means_over_seeds(search, tmp_path):
    rows = [
        row(method, seed, [[1.0, 3.0], [0.9, 0.5]], test=0.2 + 0.2 * seed)
        for method in ("grid", "greedy")
        for seed in (0, 1)
    ]
    lines = search.table(rows).splitlines()
    assert lines[0] == "mlp, mnist, N = 1000, penalties: layer" and len(lines) == 4
    # The mean of .2 and .4, and its standard error: a deviation of .1414 over the root of two.
    assert lines[2].startswith("grid ") and "0.300 ± 0.100" in lines[2]
    search.draw(rows, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


@pytest.mark.slow
def test_methods_keep_to_the_budget_and_to_the_range(search, images, tmp_path, capsys):
    methods = ["untuned", "grid", "Hyperband", "value function", "implicit, CG", "greedy"]
    arguments = ["--quick", "--out", str(tmp_path), "--penalties", "layer", "--methods"]
    search.main([*arguments, *methods])
    report = json.loads((tmp_path / "report.json").read_text())
    found = {row["method"]: row for row in report["rows"]}
    assert list(found) == methods
    budget = 9 * 16  # trainings times steps, of --quick
    for method, row in found.items():
        assert budget * (0.6 if method != "untuned" else 0) < row["spent"] <= budget
        assert row["path"][1] == sorted(row["path"][1], reverse=True)
        assert search.LOW <= min(row["h"]) and max(row["h"]) <= search.HIGH
        assert np.isfinite([row[name] for name in ("validation", "fresh", "test", "errors")]).all()
    # A training that nothing warmed or rounded otherwise is judged by what the search saw.
    assert found["grid"]["fresh"] == pytest.approx(found["grid"]["validation"], abs=2e-5)
    # A step of greedy: a gradient, the mixed product of two, and the gradient of the validation loss.
    assert 2 < found["greedy"]["gradients a step"] < 5
    # Rows of other methods are kept.
    search.main([*arguments, "untuned"])
    assert [row["method"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]] == [
        *methods[1:],
        "untuned",
    ]
    assert "untuned" in capsys.readouterr().out
