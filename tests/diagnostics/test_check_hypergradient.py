"""`check_hypergradient` accepts exact hypergradients, finds wrong ones, and names the cause."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import PROBLEMS, outer_loss
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxhpo
from jaxhpo import CG, Identity, Implicit, Unroll
from jaxhpo._core.mesh import ravel
from jaxhpo._core.record import recording
from jaxhpo._core.trace import flat_by, past_rules
from jaxhpo._core.validate import short_name
from jaxhpo._diagnostics.check.remedies import REMEDIES, Changed
from jaxhpo._diagnostics.rows import Layout, joined, judge, leaf_rows, slope_rows

RIDGE = PROBLEMS["ridge"]
H = jnp.asarray(RIDGE.hparams)


def test_exact_rule_passes():
    check = jaxhpo.check_hypergradient(outer_loss(RIDGE, Unroll(), 30), H)
    assert check.relative_error < 1e-8 and check.cosine > 1 - 1e-12
    assert check.coordinates[2] == "hparams[2]"
    np.testing.assert_allclose(check.numeric, RIDGE.unrolled(RIDGE.hparams, RIDGE.step_size, 30), rtol=1e-7)
    assert "6 coordinates" in str(check) and "\n" not in str(check)


def test_progress_is_shown_after_a_while(monkeypatch, capsys):
    """Of the hypergradient, and of one coordinate."""
    loss = lambda h: h**3  # noqa: E731
    for delay, end in ((np.inf, ""), (0.0, "check_hypergradient 2/2\n")):
        monkeypatch.setattr("jaxhpo._diagnostics.check.check.EVERY", delay)
        jaxhpo.check_hypergradient(loss, jnp.asarray(1.0))
        shown = capsys.readouterr().err
        assert shown.endswith(end) and bool(shown) == bool(end)


def test_error_of_approximate_rule_is_measured():
    """T1–T2 on ridge: the measured error is that of its closed form."""
    exact = RIDGE.hypergradient(RIDGE.hparams)
    approximate = RIDGE.partial(RIDGE.hparams, lambda A: RIDGE.step_size * np.eye(len(A)))
    check = jaxhpo.check_hypergradient(outer_loss(RIDGE, Implicit(Identity(RIDGE.step_size)), 400), H)
    want = np.linalg.norm(approximate - exact) / np.linalg.norm(exact)
    assert check.relative_error == pytest.approx(want, rel=1e-6)
    assert check.norm_ratio == pytest.approx(np.linalg.norm(approximate) / np.linalg.norm(exact), rel=1e-6)
    assert "worst at hparams[" in str(check) and "bias" in str(check) and check.verdict == "differs"


def test_random_directions():
    h = jnp.linspace(-1.0, 1.0, 100).reshape(20, 5)
    check = jaxhpo.check_hypergradient(lambda h: jnp.sum(jnp.sin(h)), h, num_directions=7, key=jax.random.key(2))
    assert check.coordinates is None and check.numeric.shape == (8,) and check.relative_error < 1e-9  # and the slope


@pytest.mark.parametrize("penalty", [0.1, pytest.param(200.0, marks=pytest.mark.slow)])
def test_float32_is_no_trouble(penalty):
    """Closed-form ridge by five folds: differences were off by up to 40 % of the exact hypergradient at 200."""
    rng = np.random.default_rng(0)
    X, y = jnp.asarray(rng.normal(size=(60, 5)), jnp.float32), jnp.asarray(rng.normal(size=60) * 10, jnp.float32)
    folds = jnp.ones((5, 60), jnp.float32).at[jnp.arange(60) % 5, jnp.arange(60)].set(0.0)

    def fit(h, row):
        return jnp.linalg.solve((X.T * row[None]) @ X + jnp.diag(h), X.T @ (row * y))

    def loss(h):
        return jnp.sum((1 - folds) * (jax.vmap(lambda row: fit(h, row))(folds) @ X.T - y[None]) ** 2)

    h = jnp.full(5, penalty, jnp.float32)
    check = jaxhpo.check_hypergradient(loss, h)
    # Rounding errors of a solve are below 1e-7 times the matrix's condition, here below 10.
    assert check.verdict == "agrees" and check.relative_error < 1e-4 and check.reference == "exact tangents"
    # Differences, where a solver of the user's leaves nothing else, follow the size of h too.
    given = lambda h: (loss(h), jax.grad(loss)(h))  # noqa: E731
    by_host = lambda h, carry, key: (*jax.pure_callback(given, jax.eval_shape(given, h), h), carry, None)  # noqa: E731
    check = jaxhpo.check_hypergradient(None, h, gradient=by_host)
    assert check.verdict == "agrees" and check.reference == "central differences" and check.relative_error < 1e-2


def test_wrong_rules_of_the_users_are_found():
    """A `custom_vjp` with half of the true derivative, and a `custom_jvp`, which forward mode alone would believe."""
    half, double = jax.custom_vjp(lambda x: jnp.sum(x**2)), jax.custom_jvp(lambda x: jnp.sum(x**2))
    half.defvjp(lambda x: (half(x), x), lambda x, g: (g * x,))
    double.defjvp(lambda primals, dots: (double(*primals), 4 * jnp.sum(primals[0] * dots[0])))
    for f, factor in ((half, 0.5), (double, 2.0)):
        check = jaxhpo.check_hypergradient(f, jnp.arange(1.0, 4.0))
        assert check.norm_ratio == pytest.approx(factor, rel=1e-9)
        assert check.cosine == pytest.approx(1.0) and check.relative_error == pytest.approx(abs(1 - factor), rel=1e-9)
        assert re.search(r"<lambda>.*derivative rule", str(check)) and f"{factor:.3g} times" in str(check)


def test_libraries_whose_name_begins_with_that_of_jax_are_no_part_of_it():
    names = {"jax": jax}
    exec(compile("f = jax.custom_jvp(lambda x: x**2)", f"{os.path.dirname(jax.__file__)}opt/loss.py", "exec"), names)
    names["f"].defjvp(lambda primals, dots: (primals[0] ** 2, dots[0]))
    assert jaxhpo.check_hypergradient(names["f"], 3.0).verdict == "differs"


@jax.custom_jvp
def bisected(x):
    """The cube root, by bisection, with its derivative."""

    def halve(_, ends):
        middle = sum(ends) / 2
        return jnp.where(middle**3 < x, middle, ends[0]), jnp.where(middle**3 < x, ends[1], middle)

    return jax.lax.fori_loop(0, 60, halve, (0.0 * x, 0.0 * x + 8.0))[0]


bisected.defjvp(lambda primals, dots: (bisected(*primals), dots[0] / (3 * bisected(*primals) ** 2)))


def test_differences_decide_where_forward_mode_is_blind():
    """A bisection moves in steps: JAX's derivative of it is zero, that of differences right. So of rounding."""

    @jax.custom_jvp
    def fine(x):  # rounded to integers, with the derivative of the identity
        return jnp.round(x * 1e9).astype(int) / 1e9

    fine.defjvp(lambda primals, dots: (fine(*primals), dots[0]))
    for f in (bisected, fine):
        check = jaxhpo.check_hypergradient(lambda h, f=f: jnp.sum(jax.vmap(f)(h) ** 2), jnp.array([2.0, 5.0]))
        assert check.reference == "central differences" and check.verdict == "agrees", f


def test_what_is_rounded_in_rule_and_reference_is_found():
    """A part of the loss whose derivative JAX takes to be zero, in reverse and in forward mode."""
    check = jaxhpo.check_hypergradient(lambda h: jnp.sum(h**2 + jnp.round(h * 1e9).astype(int) / 1e9), jnp.ones(2))
    assert check.verdict == "differs" and check.relative_error == pytest.approx(1 / 3, rel=1e-3)  # 2 for 3


def test_past_rules_looks_into_every_program():
    """Stopped gradients and rules in branches, loops, linear solves, under `checkpoint`, `vmap` and `jit`."""
    third = jax.custom_vjp(lambda x: x**3)
    third.defvjp(lambda x: (third(x), x), lambda x, g: (g,))

    def f(x):
        stop = jax.lax.stop_gradient
        y = jax.checkpoint(lambda x: jax.lax.cond(x > 0, lambda x: stop(x) * x, lambda x: x, x))(x)
        y = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, stop(c[1]) * x), (0, y))[1]
        y += jax.lax.scan(lambda c, _: (jax.jit(third)(stop(c) * 0.5), None), x, None, 2)[0]
        y += jnp.sum(jax.vmap(lambda a: third(stop(a) * x))(jnp.array([0.5, 0.1])))
        return y + jax.lax.custom_linear_solve(lambda v: stop(x) * v, y, lambda mv, b: b / mv(1.0), symmetric=True)

    closed = jax.make_jaxpr(f)(1.5)
    program = jax.extend.core.jaxpr_as_fun(closed.replace(jaxpr=past_rules(closed.jaxpr)))
    got = jax.jvp(lambda x: program(x)[0], (1.5,), (1.0,))
    np.testing.assert_allclose(got, (f(1.5), (f(1.5 + 1e-6) - f(1.5 - 1e-6)) / 2e-6), rtol=1e-8)


@pytest.mark.slow
def test_square_root_of_an_untouched_zero():
    """A parameter without gradient, under Adam without `eps_root`: forward mode alone has 0 · ∞."""
    solver = jaxhpo.from_optax(lambda p, h, b: (p[0] - h) ** 2 + 0 * p[1], optax.adam(0.1))

    def loss(h):
        return jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=100, adjoint=Implicit(CG())).params[0]

    check = jaxhpo.check_hypergradient(loss, jnp.asarray(1.0))
    assert check.reference == "exact tangents" and np.isfinite(check.numeric).all()


def test_a_leaf_without_effect_is_zero_up_to_rounding():
    """The scale of weights that are normalised; a leaf that is small, and wrong, is told from it."""

    def loss(h, change=lambda x: x):
        w = h["scale"] * jnp.arange(1.0, 4.0, dtype=jnp.float32)
        return jnp.sum((w / jnp.linalg.norm(w) - h["mean"]) ** 2) + 1e-4 * change(h["small"])

    h = {"scale": jnp.float32(0.7), "mean": jnp.ones(3, jnp.float32), "small": jnp.float32(1.0)}
    check = jaxhpo.check_hypergradient(loss, h)
    assert check.verdict == "agrees", str(check)
    check = jaxhpo.check_hypergradient(lambda h: loss(h, turned), h)
    assert check.verdict == "differs" and "'small'" in str(check)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_square_root_inside_of_shard_map(kind):
    """Its type there has another mesh than outside."""
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(kind,))):

        def loss(h):
            part = lambda h: jax.lax.psum(jnp.sum(jnp.sqrt(h) * (1 + jax.lax.axis_index("d"))), "d")  # noqa: E731
            return jax.shard_map(part, in_specs=P(), out_specs=P())(h)

        check = jaxhpo.check_hypergradient(loss, jnp.array([1.0, 4.0]))
    assert check.reference == "exact tangents"
    np.testing.assert_allclose(check.numeric, [1.5, 0.75])  # 3 / 2√h


def test_interval_and_leaves():
    """The slope of every leaf is exact; the interval holds the error in 95 of 100 draws of directions, by χ²."""
    rng, layout = np.random.default_rng(0), Layout({"a": jnp.zeros((30, 4)), "b": jnp.zeros(50)})
    true = rng.normal(size=170)
    scaled = true * np.repeat([1.05, 1.0], [120, 50])
    noisy = true + 0.3 * rng.normal(size=170)
    error, inside = np.linalg.norm(noisy - true) / np.linalg.norm(true), 0
    for seed in range(400):
        rows = slope_rows(layout, noisy, 8, jax.random.key(seed))
        low, high = judge(layout, rows, rows.directions @ noisy, rows.directions @ true).interval
        inside += low <= error <= high
    assert abs(inside / 400 - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5  # four standard errors
    rows = slope_rows(layout, scaled, 8, jax.random.key(0))
    judged = judge(layout, rows, rows.directions @ scaled, rows.directions @ true)
    np.testing.assert_allclose(list(judged.by_leaf.values()), [0.05, 0.0], atol=1e-12)
    rows = joined(slope_rows(layout, noisy, 8, jax.random.key(0)), leaf_rows(layout, noisy, 2000, jax.random.key(1)))
    judged = judge(layout, rows, rows.directions @ noisy, rows.directions @ true)
    for part, got in zip(layout.parts, judged.by_leaf.values(), strict=True):
        want = np.linalg.norm(noisy[part] - true[part]) / np.linalg.norm(true[part])
        assert got == pytest.approx(want, rel=0.1)  # 2000 directions: three standard errors


def test_directions_that_do_not_exist_are_not_taken():
    """No slope of a zero; in a scalar, nothing beside its slope; of 40 leaves, random directions alone."""
    many = {f"{i}": jnp.full(2, i / 10) for i in range(1, 41)}
    for h in (jnp.zeros(70), {"rate": jnp.ones(()), "weights": jnp.linspace(-1.0, 0.0, 70)}, many):
        layout, grad = Layout(h), np.asarray(ravel(h)[0], float)
        rows = joined(slope_rows(layout, grad, 8, jax.random.key(0)), leaf_rows(layout, grad, 8, jax.random.key(1)))
        assert rows.directions.any(1).all() and len(rows.directions) == len(rows.kinds) == len(rows.leaves)
        for factor in (1.0, 2.0):
            judged = judge(layout, rows, factor * rows.directions @ grad, rows.directions @ grad)
            wanted = (factor - 1) * bool(grad.any())
            np.testing.assert_allclose([judged.agreement.relative_error, *judged.by_leaf.values()], wanted, atol=1e-12)
    check = jaxhpo.check_hypergradient(lambda h: h**2 + jax.lax.stop_gradient(h), 1.0, num_directions=3)
    assert check.coordinates == ("hparams",) and "2 by the rule, 3 by the reference" in str(check)
    assert "training" not in str(check)  # there is none


def test_predictivity():
    """Of a quadratic, whose change along a step d is ⟨g, d⟩ + ‖d‖², by the formula; of oscillations, nothing."""
    h = jnp.linspace(-1.0, 1.0, 30)
    check = jaxhpo.check_hypergradient(lambda h: jnp.sum(h**2), h, step=0.3)
    assert not check.remedies
    large, small = check.predictivity
    assert (large.step, small.step) == (0.3, pytest.approx(0.1))
    # ⟨g, d⟩ has the variance s² ‖g‖² and ‖d‖² has 2 m s⁴: for s = 0.3 the correlation is .93 in the mean, for 0.1 .99.
    assert 0.8 < large.correlation < small.correlation < 1 and small.interval[0] < small.correlation < small.interval[1]
    assert "foretells steps of 0.3 with correlation" in str(check) and "raise that" not in str(check)
    rough = jaxhpo.check_hypergradient(lambda h: jnp.sum(jnp.sin(1e4 * h)), h, step=0.3)
    assert rough.verdict == "agrees" and abs(rough.predictivity[0].correlation) < 0.9 and "eps_root" in str(rough)
    assert not rough.remedies and "fewer inner steps" in str(rough)  # there is no training
    # arctanh .99 − arctanh .58 = 1.98 and arctanh .88 − arctanh .58 = .71, of a standard deviation √(2/5) = .63.
    found = {f"with r = {r}": large._replace(correlation=r) for r in (0.88, 0.99, np.nan)}
    tried = str(dataclasses.replace(check, predictivity=(large._replace(correlation=0.58), small), remedies=found))
    assert "; with with r = 0.99 0.99.\n" in tried and "chance: with r = 0.88 (0.88), with r = nan (nan)." in tried


def test_what_foretells_nothing_is_said():
    """Roots of negative numbers, and steps from a minimum; a hypergradient that is too short foretells by its slope."""
    outside = jaxhpo.check_hypergradient(lambda h: jnp.sum(jnp.sqrt(h)), jnp.full(3, 0.01), step=0.5)
    found = outside.predictivity[0]
    assert np.isnan(found.correlation) and "of 8 points the outer loss is not finite" in str(outside)
    assert "eps_root" not in str(outside)
    stationary = jaxhpo.check_hypergradient(lambda h: jnp.sum((h - 1) ** 2), jnp.full(3, 1 + 1e-5), step=0.1)
    assert stationary.verdict == "agrees" and "as near a stationary point" in str(stationary)
    assert "eps_root" not in str(stationary)
    short = lambda h, carry, key: (jnp.sum(h), jnp.full_like(h, 1e-4), carry, None)  # noqa: E731
    check = jaxhpo.check_hypergradient(None, jnp.ones(3), gradient=short, step=0.1)
    assert "with correlation 1.00" in str(check) and "slope 10000" in str(check)


def test_in_the_units_of_the_search():
    """With h = e^u the derivative by u is that by h times h, and no step leaves the range of h."""
    h = {"a": jnp.array([0.01, 0.1, 2.0]), "b": jnp.asarray(3.0)}
    transforms = {"a": jaxhpo.positive, "b": None}

    def outer_loss(h):
        return jnp.sum(jnp.sqrt(h["a"])) + h["b"] ** 2

    check = jaxhpo.check_hypergradient(outer_loss, h, step=0.1, transforms=transforms)
    np.testing.assert_allclose(check.analytic, [0.05, 0.5 * 0.1**0.5, 0.5 * 2**0.5, 6.0], rtol=1e-12)
    assert check.verdict == "agrees" and check.predictivity[0].correlation > 0.9
    assert np.isnan(jaxhpo.check_hypergradient(outer_loss, h, step=0.1).predictivity[0].correlation)

    def own(h, carry, key):
        return outer_loss(h), jax.grad(outer_loss)(h), carry, None

    again = jaxhpo.check_hypergradient(None, h, gradient=own, transforms=transforms)
    np.testing.assert_allclose(again.analytic, check.analytic, rtol=1e-12)
    with pytest.raises(jaxhpo.JaxhpoError, match=r"hparams\['a'\].*greater than 0"):
        jaxhpo.check_hypergradient(outer_loss, {"a": -h["a"], "b": h["b"]}, transforms=transforms)


def circle_map(h):
    """p ← p − 3 sin(p − h), which is chaotic; at half the rate it converges to h, as 1.5 |cos(p − h)| < 2."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum(1 - jnp.cos(p - h)), optax.sgd(3.0))
    return jnp.sum((jaxhpo.solve(solver, solver.init(jnp.zeros(20), h), h, num_steps=60).params - 3.0) ** 2)


def doubling_map(h):
    """p ← 2 p + h, so that the outer loss is Σ sin(255 h) after 8 steps, and Σ sin(15 h) after 4."""
    solver = jaxhpo.fixed_point(lambda p, h, b: 2 * p + h)
    return jnp.sum(jnp.sin(jaxhpo.solve(solver, solver.init(jnp.zeros(20), h), h, num_steps=8).params))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "step", "raised", "vain"),
    [
        (circle_map, 0.1, "half the inner rate", "half as many inner steps"),
        (doubling_map, 0.02, "half as many inner steps", None),
    ],
)
def test_remedies_are_tried(loss, step, raised, vain):
    """What makes a chaotic training regular raises the correlation to nearly 1, and is named beside it."""
    check = jaxhpo.check_hypergradient(loss, jnp.linspace(-1.0, 1.0, 20), step=step)
    first, found = check.predictivity[0], check.remedies
    assert check.verdict == "agrees" and first.correlation < 0.9 < 0.97 < found[raised].correlation
    text = str(check)
    assert f"slope {first.slope:.2f}; with {raised} {found[raised].correlation:.2f}" in text and "What else" in text
    assert vain is None or (not found[vain].above(first) and f"not better beyond chance: {vain} (" in text)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Unroll(hvp_fraction=0.5), jaxhpo.Reversible(), jaxhpo.SAMA()], ids=short_name)
def test_remedies_are_other_trainings(rule):
    """Half the rate and half the steps under any rule, its own backward pass included, are those of another solver."""
    train = lambda p, h, b: jnp.mean(jnp.exp(h)[None] * (p[None] - b) ** 4)  # noqa: E731
    data = jax.random.normal(jax.random.key(0), (8, 6, 3))

    def grad(rate, batches):
        solver = jaxhpo.momentum_sgd(train, learning_rate=rate, momentum=0.5)

        def loss(h):
            start = solver.init(jnp.ones(3), h)
            random = jax.random.key(1)
            sol = jaxhpo.solve(solver, start, h, batches, condition_batch=data[0], key=random, adjoint=rule)
            return jnp.sum(sol.params**2)

        return jax.jit(jax.value_and_grad(loss))(jnp.zeros(3))

    for name, rate, batches in (("half the inner rate", 0.1, data), ("half as many inner steps", 0.2, data[:4])):
        with recording(rule=lambda given, change=REMEDIES[name]: Changed(given, change)):
            got = grad(0.2, data)
        want = grad(rate, batches)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7), got, want)  # `Reversible` rounds


def random_loss(rule):
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h) ** 2 * b), optax.sgd(0.1))

    def loss(h, carry, key):
        batches = 1 + jax.random.uniform(key, (4, 5))
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(5), h), h, batches, key=key, adjoint=rule)
        return jnp.sum((sol.params - carry) ** 2), carry, None

    return loss


@pytest.mark.slow
def test_random_rules_are_averaged():
    """An unbiased one is told from a biased one; the data that a key draws are those of the reference."""
    check = jaxhpo.check_hypergradient(random_loss(Unroll()), jnp.ones(5), carry=jnp.asarray(3.0))
    assert check.verdict == "agrees" and check.draws == 1
    check = jaxhpo.check_hypergradient(
        random_loss(jaxhpo.ForwardGradient(num_directions=1)), jnp.ones(5), carry=jnp.asarray(3.0), repeats=400
    )
    # One direction of five: a draw is off by √(5 + 1), the mean of 400 by a twentieth of that.
    assert check.verdict in ("agrees", "cannot tell") and check.draws == 400
    assert check.noise == pytest.approx(6**0.5 / 20, rel=0.3) and "by chance" in str(check)
    check = jaxhpo.check_hypergradient(random_loss(Unroll(truncate=1)), jnp.ones(5), carry=jnp.asarray(3.0))
    assert check.verdict == "differs" and check.draws == 8 and "truncate=1" in check.causes[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", [Implicit(), jaxhpo.RealTime()], ids=lambda m: type(m).__name__)
def test_pairs(method):
    """Against the derivative of their own value."""
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.3))
    pair = jaxhpo.hypergradient(method, solver, lambda sol, h, b: jnp.sum((sol.params - 3.0) ** 2), num_steps=40)
    h = jnp.ones(2)
    given = jaxhpo.from_pair(pair)
    carry = pair.init(jnp.zeros(2), h)
    assert jaxhpo.check_hypergradient(None, h, gradient=given, carry=carry).verdict == "agrees"

    def doubled(h, carry, key):
        value, grad, carry, info = given(h, carry, key)
        return value, 2 * grad, carry, info

    check = jaxhpo.check_hypergradient(None, h, gradient=doubled, carry=carry)
    assert check.norm_ratio == pytest.approx(2) and "2 times the true one" in str(check)


def test_leaf_without_effect_is_refused():
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"hparams\['b'\].*Remove it"):
        jaxhpo.check_hypergradient(lambda h: h["a"] ** 2, {"a": 1.0, "b": 2.0})


X, LABELS = jnp.array([[1.0, 2.0], [3.0, 1.0], [0.5, 2.0]]), jnp.array([1, 0, 0])
FLAT = {
    "argmax": lambda w: jnp.mean(jnp.argmax(X * w[None], 1) == LABELS),
    "gt": lambda w: jax.lax.scan(lambda c, x: (c + jnp.where(jnp.sum(x * w) > 1, 1.0, 0.0), None), 0.0, X)[0],
    "round": lambda w: jnp.round(jnp.sum(X @ w)),
    "sort": lambda w: jnp.sum(jnp.argsort(X @ w) * 1.0),
}


OPERATIONS = {
    # Of logits z, with the operations that alone make them piecewise constant; none where a derivative passes.
    "rank": (lambda z: jnp.mean(jnp.sum(z[:, None] > z[None], 1)), ["gt"]),
    "top k": (lambda z: jnp.sum(jax.lax.top_k(z, 2)[1]), ["top_k"]),
    "of the largest": (lambda z: jnp.sum(jax.lax.top_k(z, 2)[0]), []),
    "sorted": (lambda z: jnp.sort(z)[1], []),
    "sorted by": (lambda z: jax.lax.sort((z, LABELS * 1.0), num_keys=1)[1][0], ["sort"]),
    "precision at 1": (lambda z: LABELS[jnp.argsort(z)][-1] * 1.0, ["sort"]),
    "area under the curve": (lambda z: jnp.mean((z[:, None] >= z[None]) & (LABELS[:, None] > LABELS[None])), ["ge"]),
    "one hot": (lambda z: jax.nn.one_hot(jnp.argmax(z), 3)[0], ["argmax"]),
    "floor": (lambda z: jnp.sum(jnp.floor(z)), ["floor"]),
    "sign": (lambda z: jnp.sum(jnp.sign(z)), ["sign"]),
    "integers": (lambda z: jnp.sum(z.astype(int)) * 1.0, ["convert_element_type"]),
    "branch": (lambda z: jax.lax.cond(z[0] > 0, lambda: 1.0, lambda: 0.0), ["gt"]),
    "where": (lambda z: jnp.sum(jnp.where(z > 0, 1.0, 0.0)), ["gt"]),
    "hinge": (lambda z: jnp.sum(jnp.where(z > 0, z, 0.0)), []),
    "constant": (lambda z: jnp.sum(jax.lax.stop_gradient(z)), []),
}


def test_piecewise_constant_operations_are_told_from_others():
    for name, (fn, operations) in OPERATIONS.items():
        assert flat_by(lambda w, fn=fn: fn(X @ w), jnp.ones(2))[0] == operations, name


@pytest.mark.parametrize("name", FLAT)
def test_a_piecewise_constant_outer_loss_is_named(name):
    """JAX's derivative of an accuracy is zero, but the accuracy depends on the hyperparameters."""

    def outer_loss(h):
        # A train loss with comparisons and signs of its own, which are not at fault.
        solver = jaxhpo.from_optax(lambda w, h, batch: jnp.sum(jnp.abs(w - h) + jax.nn.relu(w * h)), optax.sgd(0.1))
        return FLAT[name](jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=2).params)

    words = f"piecewise constant in it, through `{name}` .*smooth loss.*`EvolutionStrategies`"
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=words):
        jaxhpo.check_hypergradient(outer_loss, jnp.ones(2))


@pytest.mark.parametrize("rule", [jaxhpo.Unroll(), jaxhpo.Unroll(truncate=1)], ids=["exact", "truncated"])
def test_advice_fits_the_rule(rule):
    def train_loss(w, h, batch):
        return jnp.sum((w - h) ** 2) + jnp.sum(jax.lax.stop_gradient(w) * w * h)

    def outer_loss(h):
        solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
        return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(2), h), h, num_steps=3, adjoint=rule).params ** 2)

    text = str(jaxhpo.check_hypergradient(outer_loss, jnp.ones(2)))
    assert re.search(r"`stop_gradient` \(test_check_hypergradient.py:\d+, in [^;]*train_loss\)", text)
    assert ("truncate=1" in text) == (rule.truncate is not None)


# --- planted faults ---

DATA = [jnp.asarray(np.random.default_rng(i).normal(size=(60, 10)), jnp.float32) for i in range(2)]
CLASSES = [jnp.argmax(x[:, :3] + 0.5 * x[:, 3:6], 1) for x in DATA]
NETWORK = {"a": jax.random.normal(jax.random.key(0), (10, 6), jnp.float32) / 3, "b": jnp.ones((6, 3), jnp.float32)}
PENALTIES = jax.tree.map(lambda x: jnp.full_like(x, -4.0), NETWORK)  # 78: more than are taken one by one
MOMENTUM = optax.sgd(0.3, momentum=0.9)


def cross_entropy(logits, i):
    return optax.softmax_cross_entropy_with_integer_labels(logits, CLASSES[i]).mean()


def hidden(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def penalty(p, h):
    return sum(jnp.sum(jnp.exp(h[k]) * p[k] ** 2) for k in p)


def normalised(p, x, fixed):
    z = x @ p["a"]
    mean, var = z.mean(0), z.var(0)
    if fixed:
        mean, var = jax.lax.stop_gradient((mean, var))
    return jnp.tanh((z - mean[None]) / jnp.sqrt(var[None] + 1e-3)) @ p["b"]


def low(p, x):
    x, p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (x, p))
    return hidden(p, x).astype(jnp.float32)


def network(rule=Unroll(), change=lambda h: h, train=hidden, val=hidden, batches=None, steps=30):  # noqa: B008
    def train_loss(p, h, batch):
        weights = 1.0 if batch is None else batch
        losses = optax.softmax_cross_entropy_with_integer_labels(train(p, DATA[0]), CLASSES[0])
        return jnp.mean(weights * losses) + penalty(p, h)

    def loss(h):
        h, solver = change(h), jaxhpo.from_optax(train_loss, MOMENTUM)
        count = None if batches is not None else steps
        sol = jaxhpo.solve(solver, solver.init(NETWORK, h), h, batches, num_steps=count, adjoint=rule)
        return cross_entropy(val(sol.params, DATA[1]), 1)

    return loss


def linear(rule=Implicit(), tx=MOMENTUM, steps=200, size=jnp.asarray):  # noqa: B008
    """Converges at a rate of about 0.95 a step."""

    def train_loss(p, h, batch):
        return cross_entropy(DATA[0] @ p["a"], 0) + penalty(p, h)

    def loss(h, direct):
        start, solver = {"a": jnp.zeros((10, 3), jnp.float32)}, jaxhpo.from_optax(train_loss, tx)
        sol = jaxhpo.solve(solver, solver.init(start, h), h, num_steps=steps, adjoint=rule)
        return cross_entropy(DATA[1] @ sol.params["a"], 1) + 0.1 * jnp.mean(direct["a"] ** 2)

    return loss


def both(loss):
    return lambda h: loss(h, h)


@jax.custom_jvp
def grown(x):
    return x


grown.defjvp(lambda primals, dots: (primals[0], 1.05 * dots[0]))
turned = jax.custom_vjp(lambda x: x)
turned.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def without_direct(h, carry, key):
    value, grad = jax.value_and_grad(linear())(h, h)
    return value, grad, carry, None


def without_mixed(h, carry, key):
    value, grad = jax.value_and_grad(network(change=lambda h: {**h, "b": jax.lax.stop_gradient(h["b"])}))(h)
    value, direct = jax.value_and_grad(lambda h: network()(jax.lax.stop_gradient(h)) + 0.1 * jnp.mean(h["b"] ** 2))(h)
    return value, jax.tree.map(jnp.add, grad, direct), carry, None


@dataclasses.dataclass(frozen=True)
class OtherBatches:
    """Unrolls; the backward pass takes each step's batch from the step before."""

    def run(self, problem):
        own, steps = Unroll().run(problem)
        rolled = problem._replace(xs=jax.tree.map(lambda x: jnp.roll(x, 1, 0), problem.xs))
        other, _ = Unroll().run(rolled)
        stop = jax.lax.stop_gradient
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda x, y: stop(x) + y - stop(y) if is_float(x) else x, own, other), steps


LOGISTIC = {"a": jnp.full((10, 3), -3.0, jnp.float32)}
FEW = jax.random.bernoulli(jax.random.key(1), 0.2, (30, 60)) * 5.0
WITH_RATE = {**LOGISTIC, "rate": jnp.asarray(0.3, jnp.float32)}
DECAYED = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.3))
FAULTS = {
    "factor": (network(change=lambda h: {**h, "b": grown(h["b"])}), PENALTIES, "grown.*'b'.* is 1.05 times"),
    "sign": (network(change=lambda h: {**h, "b": turned(h["b"])}), PENALTIES, "derivative rule.*'b'.* is -1 times"),
    "direct term": (without_direct, LOGISTIC, "lacks its direct term"),
    "mixed term": (without_mixed, PENALTIES, "'b'.* is its direct term alone"),
    "learning rate": (
        both(linear(tx=lambda h: optax.sgd(h["rate"], momentum=0.9))),
        WITH_RATE,
        r"'rate'.*does not enter the condition.*Unroll\(\)",
    ),
    "short run": (both(linear(steps=20)), LOGISTIC, "has not converged.*Take more inner steps"),
    "three iterations": (both(linear(Implicit(CG(maxiter=3)))), LOGISTIC, "linear solve ended MAX_ITERATIONS.*bias"),
    "truncated": (network(Unroll(truncate=3)), PENALTIES, "last 3 inner steps alone"),
    "weight decay": (both(linear(tx=DECAYED)), LOGISTIC, "decoupled weight decay"),
    "batch statistics": (
        network(train=lambda p, x: normalised(p, x, True), val=lambda p, x: normalised(p, x, False)),
        PENALTIES,
        r"`stop_gradient` \(test_check_hypergradient.py:\d+, in normalised\)",
    ),
    "bfloat16": (network(train=low, steps=100), PENALTIES, "ounding errors.*16 bits"),
    "other minibatch": (network(OtherBatches(), batches=FEW), PENALTIES, r"`OtherBatches\(\)`, a rule of your own"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found_and_named(name):
    fault, h, words = FAULTS[name]
    try:
        given = {"gradient": fault} if name.endswith("term") else {}
        check = jaxhpo.check_hypergradient(None if given else fault, h, **given)
    except jaxhpo.ZeroHypergradientError as error:
        text = str(error)
    else:
        text = str(check)
        assert check.verdict == ("cannot tell" if name == "bfloat16" else "differs")
    assert re.search(words, text, re.DOTALL), text


@pytest.mark.slow
def test_a_tolerance_is_the_cause():
    """A run that ends at a tolerance is differentiated as it ran, and goes on to a tenth of it."""
    solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - 1) ** 2 + jnp.exp(h) * p**2), optax.sgd(0.1))

    def loss(h):
        sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=1000, tol=0.1, adjoint=Implicit(CG()))
        return jnp.sum((sol.params - 0.5) ** 2)

    text = str(jaxhpo.check_hypergradient(loss, jnp.array([-2.0, -1.0])))
    assert re.search(r"has not converged: .* in \d\d steps, and \d+ more bring it to 0.0\d.* a smaller `tol`", text), (
        text
    )


@pytest.mark.slow
def test_without_a_fault():
    """The same problems without one."""
    for loss, h in ((network(), PENALTIES), (both(linear()), LOGISTIC), (network(batches=FEW), PENALTIES)):
        check = jaxhpo.check_hypergradient(loss, h, by_leaf=True)
        assert check.verdict == "agrees", str(check)
