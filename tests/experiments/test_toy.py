"""The toy study: each rule's factor is its closed form; runs are classified as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy


def apart(rows):
    return {r["rule"]: [r[s]["largest difference to closed form"] for s in ("sigma 0", "sigma 4")] for r in rows}


def test_unrolling_has_the_factor_of_its_closed_form_with_and_without_noise():
    (row,) = toy.factors(["Unroll()"], 3)
    assert max(*apart([row])["Unroll()"]) < 1e-10
    want = 1 - (1 - 2 * toy.RATE) ** toy.INNER
    assert row["sigma 0"]["factor"]["mean"] == pytest.approx(want, rel=1e-9)


@pytest.mark.slow
def test_every_rule_with_a_closed_form_has_that_factor():
    names = [name for name, (_, closed) in toy.METHODS.items() if closed is not None and name != "Unroll()"]
    found = apart(toy.factors(names, 3))
    assert len(found) == 6 and all(max(pair) < 1e-8 for pair in found.values())


@pytest.mark.slow
def test_reverse_mode_forward_mode_and_the_closed_form_search_alike():
    """Noise on both: the run by the closed form is written here in NumPy and optax's Adam."""
    problem, key, rate = toy.draw("vector", jax.random.key(3)), jax.random.key(4), 0.02
    found = [
        toy.search(m, "descent", rate, problem, 2.0, 0.5, key, 5) for m, _ in (toy.METHODS[n] for n in toy.QUICK[:2])
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)
    h, mean, square, want = np.array(problem.first), 0.0, 0.0, []
    for i, k in enumerate(jax.random.split(key, 5)):
        inner, outer, _ = jax.random.split(k, 3)
        left = np.prod(1 - 2 * toy.RATE * (1 + 2.0 * np.asarray(jax.random.normal(inner, (toy.INNER,)))))
        apart = h + left * (problem.start - h) - problem.target
        want.append(np.sum(apart**2))
        g = 2 * (1 - left) * apart * (1 + 0.5 * np.asarray(jax.random.normal(outer, h.shape)))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
        h = h - rate * (mean / (1 - 0.9 ** (i + 1))) / (np.sqrt(square / (1 - 0.999 ** (i + 1))) + 1e-8)
    np.testing.assert_allclose(found[0], want, rtol=1e-8)


def test_runs_are_counted_by_when_they_converge_and_whether_they_stay():
    inside, outside = toy.WITHIN / 2, 2 * toy.WITHIN
    losses = jnp.array(
        [[outside, inside, inside, outside], [outside] * 4, [inside] * 4, [jnp.nan, jnp.nan, jnp.nan, inside]]
    )
    found = toy.outcome(losses)
    assert found["converged"]["mean"] == 3 / 4
    assert found["converged"]["error"] == pytest.approx((3 / 4 * 1 / 4 / 4) ** 0.5)
    assert found["stay"]["mean"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert found["converge and stay"]["mean"] == pytest.approx((2 / 3 + 0 + 1 + 1) / 4)
    assert found["inner steps"] == 2 * toy.INNER  # two of four runs have converged after the second step
    assert toy.outcome(losses[1:2]) | {"converged": None} == {
        "converged": None,
        "stay": None,
        "converge and stay": {"mean": 0.0, "error": None, "n": 1},
        "inner steps": None,
    }
