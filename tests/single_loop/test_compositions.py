"""Methods that `benchmarks/bilevel.py` composes are, of one minibatch, their published updates written out."""

import importlib
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

ROOT = pathlib.Path(__file__).parents[2]
MNIST = pathlib.Path(os.environ.get("JAXHPO_DATA_DIR", ""), "mnist")
STEP, RATIO, UPDATES = 0.1, 0.5, 5
RNG = np.random.default_rng(0)
(X_IN, Y_IN), (X_OUT, Y_OUT) = ((RNG.normal(size=(64, 3)), RNG.normal(size=64)) for _ in range(2))
Z0, X0 = np.array([0.5, -0.3, 0.2]), np.full(3, -1.0)


@pytest.fixture
def bilevel(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bilevel")


def train_loss(z, x, batch):
    return jnp.mean((batch[0] @ z - batch[1]) ** 2) + jnp.sum(jnp.exp(x) * z**2)


def outer_loss(z, x, batch):
    return jnp.mean((batch[0] @ z - batch[1]) ** 2) + 0.01 * jnp.sum(x**2)


# Both losses are quadratic in z, so that their derivatives are written here by hand, in NumPy.


def g_z(z, x):
    return 2 * X_IN.T @ (X_IN @ z - Y_IN) / 64 + 2 * np.exp(x) * z


def g_x(z, x):
    return np.exp(x) * z**2


def hessian(x):
    return 2 * X_IN.T @ X_IN / 64 + 2 * np.diag(np.exp(x))


def f_z(z):
    return 2 * X_OUT.T @ (X_OUT @ z - Y_OUT) / 64


def f_x(x):
    return 0.02 * x


def power(first, exponent):
    return [first * (t + 1.0) ** -exponent for t in range(40)]


def moved(z, v, x):
    """The direction of x with v in the place of the solution of the linear system."""
    return 2 * np.exp(x) * z * v + f_x(x)


def terms(z, x, num):
    """The first terms of the Neumann series for -v."""
    found = [STEP * f_z(z)]
    for _ in range(num - 1):
        found.append(found[-1] - STEP * hessian(x) @ found[-1])
    return found


def descent(z, x, rate, num):
    for _ in range(num):
        z = z - rate * g_z(z, x)
    return z


def run(bilevel, name, updates=UPDATES):
    """What the benchmark finds for x at each update."""
    problem = bilevel.Problem(
        (X_IN, Y_IN),
        (X_OUT, Y_OUT),
        train_loss,
        outer_loss,
        lambda key: (jnp.asarray(Z0), jnp.asarray(X0)),
        lambda x, rough: (0.0, 0.0),
        calls=1,
    )
    _, calls = bilevel.runner(problem, bilevel.METHODS[name])
    run, _ = bilevel.runner(problem._replace(calls=updates * calls, points=updates), bilevel.METHODS[name])
    return run(np.array([[STEP, RATIO]]), jax.random.key(3))[0][0]


def fsla():
    z, v, x = Z0, np.zeros(3), X0
    for rate in power(STEP, 1 / 2):
        z = z - rate * g_z(z, x)
        v = v - rate * (hessian(x) @ v + f_z(z))
        x = x - RATIO * rate * moved(z, v, x)  # of one minibatch recursive momentum is the direction itself
        yield x


def vrbo():
    z, x = Z0, X0
    for t in range(40):
        v = -sum(terms(z, x, 11))
        direction = moved(z, v, x)
        z, x = z - STEP * g_z(z, x), x - RATIO * STEP * direction * (t % 10 == 9)
        yield x


def f3sa():
    z, y, x = Z0, Z0, X0
    for of_z, of_y, multiplier in zip(power(STEP, 2 / 5), power(STEP / 10, 3 / 5), power(10.0, -1 / 5), strict=True):
        direction = f_x(x) + multiplier * (g_x(y, x) - g_x(z, x))
        z, y = z - of_z * g_z(z, x), y - of_y * (multiplier * g_z(y, x) + f_z(y))
        x = x - RATIO * of_z * direction
        yield x


def bome():
    z, x = Z0, X0
    for _ in range(40):
        y = descent(z, x, STEP, 10)
        q_z, q_x, by_z, by_x = g_z(z, x), g_x(z, x) - g_x(y, x), f_z(z), f_x(x)
        square = q_z @ q_z + q_x @ q_x
        multiplier = np.maximum(0.5 * square - (by_z @ q_z + by_x @ q_x), 0.0) / square
        z, x = z - STEP * (by_z + multiplier * q_z), x - RATIO * STEP * (by_x + multiplier * q_x)
        yield x


@pytest.mark.parametrize(
    ("name", "written", "updates"),
    [
        pytest.param("FSLA", fsla, 5, marks=pytest.mark.slow),  # quick in `test_published.py`
        pytest.param("VRBO", vrbo, 21, marks=pytest.mark.slow),
        ("F3SA", f3sa, 5),
        ("BOME", bome, 5),
    ],
)
def test_of_one_minibatch_a_composition_is_its_updates_written_out(bilevel, name, written, updates):
    found = run(bilevel, name, updates)
    assert not np.allclose(found[-1], X0, atol=1e-3)
    for got, want in zip(found[1:], written(), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-12)  # float64


def bsa(z, x, d, t):
    z = descent(z, x, power(STEP, 1 / 2)[t], 10)
    return z, [(x - RATIO * power(STEP, 1 / 2)[t] * moved(z, -10 * term, x), None) for term in terms(z, x, 10)]


def ttsa(z, x, d, t):
    z = descent(z, x, power(STEP, 2 / 5)[t], 1)
    return z, [(x - RATIO * power(STEP, 3 / 5)[t] * moved(z, -10 * term, x), None) for term in terms(z, x, 10)]


def sustain(z, x, d, t):
    rate, eta, nexts = power(STEP, 1 / 3)[t], power(0.5, 2 / 3)[t], []
    for k in range(10):
        direction = moved(z, -10 * terms(z, x, 10)[k], x)
        if d is not None:
            (before_z, before_x), last = d
            correction = last - moved(before_z, -10 * terms(before_z, before_x, 10)[k], before_x)
            direction = direction + (1 - eta) * correction
        nexts.append((x - RATIO * rate * direction, ((z, x), direction)))
    return z - rate * g_z(z, x), nexts


@pytest.mark.parametrize(
    ("name", "step"), [pytest.param("BSA", bsa, marks=pytest.mark.slow), ("TTSA", ttsa), ("SUSTAIN", sustain)]
)
def test_series_of_random_length_are_one_of_the_ten(bilevel, name, step):
    """Which one, the update's own chance says: one fits to rounding, and the next update goes on from it."""
    z, x, d, lengths = Z0, X0, None, []
    for t, got in enumerate(run(bilevel, name)[1:]):
        z, nexts = step(z, x, d, t)
        fits = [k for k, (want, _) in enumerate(nexts) if np.allclose(got, want, rtol=1e-12, atol=0)]
        assert len(fits) == 1
        x, d = nexts[fits[0]]
        lengths.append(fits[0])
    assert len(set(lengths)) > 1


@pytest.mark.slow
def test_the_quick_form_writes_its_rows_beside_those_of_others(bilevel, tmp_path, capsys):
    quick = ["--quick", "--out", str(tmp_path), "--problems", "quadratic"]
    bilevel.main([*quick, "--methods", "SABA"])
    bilevel.main([*quick, "--methods", "BOME"])
    assert "| SABA |" in capsys.readouterr().out.split("quadratic:")[2] and (tmp_path / "bilevel.png").exists()


def test_the_inner_problem_of_cleaning_is_solved(bilevel):
    rng = np.random.default_rng(1)
    images, labels, weights = rng.normal(size=(200, 7)), rng.integers(0, 10, 200), rng.random(200)
    part = bilevel.Softmax(images, labels, 0.2)
    exact, rough = part.solve(weights), part.solve(weights, rough=True)
    residual = scipy.special.softmax(images @ exact, 1) - np.eye(10)[labels]
    slope = images.T @ (weights[:, None] * residual) / 200 + 0.4 * exact
    assert np.abs(slope).max() < 1e-7  # the tolerance given to L-BFGS
    np.testing.assert_allclose(rough, exact, atol=1e-3)  # a gradient of 1e-4 over the penalty's curvature of 0.4


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="JAXHPO_DATA_DIR has no mnist")
def test_cleaning_reports_its_controls(bilevel, tmp_path, capsys):
    bilevel.main(["--quick", "--out", str(tmp_path), "--problems", "cleaning", "--methods", "SABA"])
    rows = capsys.readouterr().out
    assert all(f"| *{name}* |" in rows for name in ("no weights", "right labels alone", "validation images alone"))
