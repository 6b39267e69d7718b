"""`benchmarks/tune_once.py` in a small form: what it counts, and what it writes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

tune_once = pytest.importorskip("tune_once", reason="optuna is missing")

SMALL = tune_once.OTHERS["digits"]._replace(steps=30)


@pytest.fixture
def small(monkeypatch):
    """One problem of 30 steps, with ranks promoted, as scripts are run."""
    monkeypatch.setattr(tune_once, "PROBLEMS", {"clean": SMALL})
    monkeypatch.setattr(tune_once, "OTHERS", {"digits": SMALL})
    monkeypatch.setattr(tune_once, "CURVE", (None, ("last_step", 1)))
    monkeypatch.setattr(tune_once, "TRIALS", 2)
    monkeypatch.setattr(tune_once, "shorter", lambda problem: problem)
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_a_run_writes_losses_costs_and_a_picture(small, tmp_path, capsys):
    tune_once.main(["--quick", "--seeds", "2", "--out", str(tmp_path), "--problem", "clean"])
    found = json.loads((tmp_path / "tune_once.json").read_text())["problems"]["clean"]
    assert (tmp_path / "tune_once.png").read_bytes().startswith(b"\x89PNG")
    assert all(math.isfinite(value["mean"]) and value["n"] == 2 for value in found["loss"].values())
    assert found["opponent"] in ("default", "Optuna", "NadamW") and "against" in capsys.readouterr().out
    third, each = (point["cost"] for point in found["curve"])
    # 70 % of the steps, a gradient of the outer loss each third or each; the products of two penalties are free.
    assert third == pytest.approx(1 + 0.7 / 3, abs=0.03) and each == pytest.approx(1.7, abs=0.07)


@pytest.mark.slow
def test_weights_of_validation_images_are_one(small):
    problem = tune_once.PROBLEMS["clean"]._replace(share=0.5)
    parts = problem.load(0)
    x, y, index, _ = tune_once.minibatch(problem, parts, True, jax.random.key(0))
    clean = index < 0
    assert 0.2 < clean.mean() < 0.8  # 100 draws of 1/2
    known = {
        image.tobytes(): label for part in (parts.train, parts.validation) for image, label in zip(*part, strict=True)
    }
    assert all(known[np.asarray(a, parts.train[0].dtype).tobytes()] == b for a, b in zip(x, y, strict=True))
    h = {"weights": jnp.full(len(parts.train[0]), -30.0)}
    params = problem.params(jax.random.key(1))
    some = tune_once.noisy_loss(params, h, 0.0, (x, y, index, None))
    want = jnp.sum(jnp.where(clean, tune_once.losses(params, x, y), 0)) / len(x)
    assert float(some) == pytest.approx(float(want), rel=1e-6)
