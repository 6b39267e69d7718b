"""The outer step as a pair of functions, and populations: N members equal N runs."""

import functools
import io
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import JaxhpoError, Remedies
from jaxhpo._cli.main import main

pytestmark = pytest.mark.usefixtures("compiled_once")  # members that run alone differ in their data
SOLVER = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - h["goal"]) ** 2), lambda h: optax.sgd(h["rate"]))
TRANSFORMS = {"goal": None, "rate": jaxhpo.box(0.0, 0.4)}
N = 3
STARTS = {"goal": jnp.array([[0.1, 0.2], [0.3, -0.4], [0.7, 0.9]]), "rate": jnp.array([0.02, 0.05, 0.1])}
TARGETS = jnp.array([1.5, -0.5, 1.0])
KEYS = jax.random.split(jax.random.key(7), N)


def outer_loss(h, carry, key):
    """Warm-started and noisy; the target is a setting of the member."""
    state, target = carry
    sol = jaxhpo.solve(SOLVER, jax.lax.stop_gradient(state), h, num_steps=3)
    noise = 0.1 * jax.random.normal(key, (2,))
    value = jnp.sum((sol.params - target + noise) ** 2)
    return value, (sol.state, target), {"optimality": sol.info.optimality, "held_out": value + noise[0]}


CARRY = (jax.vmap(lambda h: SOLVER.init(jnp.zeros(2), h))(STARTS), TARGETS)


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def population(loss=outer_loss, hparams=STARTS, carry=CARRY, key=KEYS, num_steps=6, **settings):
    settings = {"transforms": TRANSFORMS, "optimizer": optax.adam(0.1), "population": N, "progress": False} | settings
    return jaxhpo.tune(loss, hparams, carry=carry, key=key, num_steps=num_steps, **settings)


def alone(i, loss=outer_loss, hparams=STARTS, carry=CARRY, key=KEYS, **settings):
    return population(loss, at(hparams, i), at(carry, i), key[i], population=None, **settings)


def untimed(history):
    return {name: x for name, x in history.items() if name not in ("seconds", "peak_bytes", "linear_solves")}


def check_member(result, i, want, rtol=1e-10):
    """The member ends as the run of its own did; sums may be rounded in another order."""
    got = result.member(i)
    for a, b in ((got.hparams, want.hparams), (got.best_hparams, want.best_hparams), (got.carry, want.carry)):
        chex.assert_trees_all_close(a, b, rtol=rtol, atol=rtol)
    chex.assert_trees_all_close(untimed(got.history), untimed(want.history), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(got.best_value, want.best_value, rtol=rtol)
    assert got.best_step == want.best_step
    assert got.status == want.status and result.members[i].num_steps == len(want.history["value"])


# --- the pair ---------------------------------------------------------------------------------------------------------


def test_loop_over_outer_step_equals_tune():
    step = jaxhpo.outer_step(outer_loss, optax.adam(0.1), transforms=TRANSFORMS, remedies=Remedies(clip=0.01))
    state, update, reports = step.init(at(STARTS, 0), at(CARRY, 0), KEYS[0]), jax.jit(step.update), []
    for _ in range(6):
        state, report = update(state)
        reports.append(report)
    want = alone(0, remedies=Remedies(clip=0.01))
    chex.assert_trees_all_close((step.hparams(state), state.carry), (want.hparams, want.carry), rtol=1e-12)
    got = jax.tree.map(lambda *x: np.stack(x), *reports)
    for name in ("value", "hparams", "info", "hypergradient_norm"):
        chex.assert_trees_all_close(getattr(got, name), want.history[name], rtol=1e-12)
    assert got.finite.all() and got.remedies["clipped_entries"].sum() > 0


def test_outer_step_under_scan_and_vmap():
    """Three starts, six steps, in one program; the population does the same."""
    step = jaxhpo.outer_step(outer_loss, optax.adam(0.1), transforms=TRANSFORMS)

    @jax.jit
    def run(hparams, carry, keys):
        states = jax.vmap(step.init)(hparams, carry, keys)
        return jax.lax.scan(lambda states, _: jax.vmap(step.update)(states), states, length=6)

    states, reports = run(STARTS, CARRY, KEYS)
    result = population()
    chex.assert_trees_all_close(jax.vmap(step.hparams)(states), result.hparams, rtol=1e-12)
    np.testing.assert_allclose(reports.value, result.history["value"], rtol=1e-12)


def test_holding_a_step_that_is_not_finite():
    """As the docstring has it: the step is skipped, and its successor draws another key."""

    def loss(h, carry, key):
        return jnp.where(jax.random.bernoulli(key, 0.4), jnp.nan, h**2), carry, None

    step = jaxhpo.outer_step(loss, optax.sgd(0.1))

    def body(old, _):
        new, report = step.update(old)
        held = jax.tree.map(functools.partial(jnp.where, report.finite), new, old._replace(step=new.step))
        return held, report

    state, reports = jax.lax.scan(body, step.init(1.0), length=20)
    taken = int(reports.finite.sum())
    assert 0 < taken < 20
    np.testing.assert_allclose(step.hparams(state), 0.8**taken, rtol=1e-12)
    want = jaxhpo.tune(loss, 1.0, optax.sgd(0.1), num_steps=20, on_not_finite="skip", progress=False)
    np.testing.assert_array_equal(np.isnan(want.history["score"]), ~reports.finite)


def test_outer_step_refuses_what_tune_refuses():
    with pytest.raises(JaxhpoError, match="not an optax transformation"):
        jaxhpo.outer_step(outer_loss, 0.1)
    with pytest.raises(JaxhpoError, match="starts outside the set of its projection"):
        jaxhpo.outer_step(lambda h: h**2, optax.sgd(0.1), projections=lambda h: h - 1.0).init(0.5)


# --- populations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"remedies": Remedies(clip=0.3, accumulate=2)}, marks=pytest.mark.slow),
        {"remedies": Remedies(clip_norm=0.3), "monitor": lambda info: info["held_out"], "patience": 2, "num_steps": 12},
        pytest.param({"optimizer": optax.lbfgs(), "record": ("hparams", "hypergradient")}, marks=pytest.mark.slow),
        pytest.param({"max_inner_steps": 14}, marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulate", "patience", "lbfgs", "budget"],
)
def test_members_equal_runs(settings):
    result = population(**settings)
    assert result.best_value.shape == (N,) and result.history["value"].shape[1:] == (N,)
    if "patience" in settings:
        assert len({member.num_steps for member in result.members}) > 1  # they end at different steps
    for i in range(N):
        check_member(result, i, alone(i, **settings))


def test_population_of_one_equals_the_run():
    first = lambda tree: jax.tree.map(lambda x: x[:1], tree)  # noqa: E731
    result = population(hparams=first(STARTS), carry=first(CARRY), key=KEYS[:1], population=1)
    check_member(result, 0, alone(0), rtol=1e-12)


@pytest.mark.slow
def test_one_key_is_split_and_traced_once():
    calls = []

    def loss(h, carry, key):
        calls.append(0)
        return outer_loss(h, carry, key)

    result = population(loss, key=jax.random.key(7))
    assert len(calls) == 1
    chex.assert_trees_all_equal(untimed(result.history), untimed(population().history))


def broken(policy):
    """Member 1 is not finite above .34, the others never."""

    def loss(h, carry, key):
        limit, draw = carry
        value = jnp.sum((h - 1.0) ** 2) * (1 + 0.1 * jax.random.uniform(key))
        bad = (h > limit) | jax.random.bernoulli(key, draw)
        return jnp.where(bad, jnp.nan, value), carry, {"h": h}

    carry = (jnp.array([9.0, 0.34, 9.0]), jnp.array([0.0, 0.0, 0.3 if policy == "skip" else 0.0]))
    return {
        "loss": loss,
        "hparams": jnp.array([0.0, 0.1, 0.2]),
        "carry": carry,
        "transforms": None,
        "optimizer": optax.sgd(0.1),
        "on_not_finite": policy,
        "num_steps": 16 - 11 * (policy == "backtrack"),
    }


@pytest.mark.filterwarnings("ignore:Outer step:RuntimeWarning")
@pytest.mark.parametrize("policy", [pytest.param("stop", marks=pytest.mark.slow), "skip", "backtrack"])
def test_a_member_that_is_not_finite_spoils_no_other(policy, tmp_path):
    settings = broken(policy)
    result = population(**settings)
    assert result.status == "finished" and result.members[1].status in ("not_finite", "finished")
    for i in range(N):
        check_member(result, i, alone(i, **settings))
    assert (result.members[1].status == "not_finite") == (policy != "backtrack")
    assert ("1 of 3 members ended before: 1 not_finite" in result.message) == (policy != "backtrack")
    assert np.isfinite(np.asarray(result.hparams)).all()
    counts = {name: x.sum(0).tolist() for name, x in result.history["remedies"].items()}
    if policy == "skip":
        assert counts["skipped_steps"][1] == 10 and counts["skipped_steps"][2] > 0 == counts["skipped_steps"][0]
    if policy == "backtrack":
        assert counts["halvings"][1] > 0 == counts["halvings"][0]


def test_the_warning_names_the_members():
    settings = broken("stop")
    settings["carry"] = (jnp.array([0.3, 9.0, 0.3]), jnp.zeros(3))
    match = r"Outer step \d, member 2: The outer loss is nan.*These members end"
    with pytest.warns(RuntimeWarning, match=match), pytest.warns(RuntimeWarning, match=r"Outer step \d, member 0:"):
        result = population(**settings)
    assert [member.status for member in result.members] == ["not_finite", "finished", "not_finite"]


def test_a_monitor_that_fails_for_one_member_names_it():
    settings = {"monitor": lambda info: info["held_out"][0], "num_steps": 2, "transforms": None, "hparams": jnp.ones(3)}

    def loss(h, carry, key):
        return (h - carry) ** 2, carry, {"held_out": jnp.stack([jnp.where(carry > 1, jnp.nan, h)])}

    with pytest.warns(RuntimeWarning, match="gave NaN or infinity at every outer step for member 1, so that none"):
        result = population(loss, carry=jnp.array([0.0, 2.0, 0.5]), **settings)
    assert np.isnan(result.best_value).tolist() == [False, True, False] and result.best_step.tolist() == [1, 1, 1]
    assert np.isfinite(float(repr(result).split("best_value=")[1].split(",")[0]))


def test_all_members_end():
    settings = broken("stop") | {"patience": 3, "min_delta": 10.0, "num_steps": 50}
    settings["carry"] = (jnp.array([9.0, 0.2, 9.0]), jnp.zeros(3))
    with pytest.warns(RuntimeWarning, match="member 1"):
        result = population(**settings)
    assert result.status == "mixed" and "1 not_finite, 2 patience" in result.message
    assert result.exit_code == 0 and "population=3" in repr(result)
    settings["carry"] = (jnp.zeros(3) - 1, jnp.zeros(3))
    with pytest.raises(jaxhpo.NonFiniteError, match=r"Outer step 0, members 0, 1, 2 \(explained for the first\)"):
        population(**settings)


def test_a_zero_hypergradient_names_the_members():
    loss = lambda h: jnp.sum(h["used"] ** 2) + jnp.sum(jnp.maximum(h["flat"], 0.0))  # noqa: E731
    start = {"used": jnp.ones((3, 2)), "flat": jnp.array([1.0, -1.0, -1.0])}
    settings = {"carry": None, "transforms": None, "num_steps": 2}
    with pytest.warns(jaxhpo.ZeroHypergradientWarning, match=r"`hparams\['flat'\]` \(members 1, 2\) has"):
        population(loss, start, **settings)
    with pytest.raises(jaxhpo.ZeroHypergradientError, match=r"`hparams\['unused'\]` \(members 0, 1, 2\).*Remove it"):
        population(lambda h: loss(h), start | {"flat": jnp.ones(3), "unused": jnp.ones(3)}, **settings)


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_is_bit_identical(tmp_path, at):
    """A member has ended before the interruption, or ends after it."""
    settings = broken("skip") | {"patience": 12}
    settings["num_steps"] = 18

    def interrupt(step):
        if step.step == 3 * at:
            raise KeyboardInterrupt

    with pytest.warns(RuntimeWarning, match="member 1"):
        want = population(**settings)
    with pytest.warns(RuntimeWarning, match="member 1"):
        stopped = population(**settings, run_dir=tmp_path, callbacks=[interrupt])
        got = population(**settings, run_dir=tmp_path)
    assert stopped.status == "interrupted" and "resumed" in got.message
    assert got.members == want.members and got.status == want.status
    chex.assert_trees_all_equal(untimed(got.history), untimed(want.history))
    for name in ("hparams", "carry", "best_hparams", "best_value", "best_step"):
        chex.assert_trees_all_equal(getattr(got, name), getattr(want, name))


def test_a_member_that_continues_on_a_later_call_has_no_gap(tmp_path):
    settings = {"monitor": lambda info: info["held_out"], "run_dir": tmp_path / "run", "num_steps": 12}
    ended = population(patience=2, **settings)
    lengths = [member.num_steps for member in ended.members]
    assert len(set(lengths)) > 1
    result = population(**settings | {"num_steps": max(lengths) + 3})
    for i, length in enumerate(lengths):
        rows = result.member(i).history["value"]
        assert len(rows) == result.members[i].num_steps == length + 3 and np.isfinite(rows).all()
        np.testing.assert_array_equal(rows[:length], ended.member(i).history["value"])


def test_another_population_is_refused(tmp_path):
    population(num_steps=2, run_dir=tmp_path)
    with pytest.raises(JaxhpoError, match=r"the shape \[3, 2\] there, \[2, 2\] here"):
        population(
            hparams=at(STARTS, slice(2)), carry=at(CARRY, slice(2)), key=KEYS[:2], population=2, run_dir=tmp_path
        )


def test_callbacks_progress_and_table(tmp_path, monkeypatch, capsys):
    seen, out = [], io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    result = population(callbacks=[seen.append], progress=True, run_dir=tmp_path)
    assert seen[-1].value.shape == seen[-1].best_value.shape == seen[-1].hparams["rate"].shape == (N,)
    np.testing.assert_array_equal(seen[-1].best_value, result.best_value)
    assert "step 6/6: 3 of 3 members: median loss" in out.getvalue()
    for source in (result, tmp_path):
        table = jaxhpo.history_table(source)
        np.testing.assert_array_equal(table["value[2]"], result.history["value"][:, 2])
        np.testing.assert_array_equal(table["hparams['goal'][1, 0]"], result.history["hparams"]["goal"][:, 1, 0])
    assert list(jaxhpo.history_table(result.member(2))["value"]) == list(result.history["value"][:, 2])
    assert main(["show", str(tmp_path)]) == 0 and main(["plot", str(tmp_path)]) == 0
    shown, best = capsys.readouterr().out, int(result.best_value.argmin())
    assert f"member {best}, the best of 3" in shown and f"best: {result.best_value[best]:.6g}" in shown


def test_large_leaves_are_summed_up_by_member():
    start = jnp.stack([jnp.ones(2000), jnp.arange(2000.0)])
    result = population(lambda h: jnp.sum(h**2), start, None, KEYS[:2], population=2, transforms=None, num_steps=1)
    np.testing.assert_array_equal(result.history["hparams"].maximum, [[1.0, 1999.0]])


def test_members_spread_over_devices():
    """The leading axis is sharded: each device computes its members."""
    mesh = jax.make_mesh((4,), ("member",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("member"))
    start = jnp.linspace(0.0, 1.0, 8)
    loss = lambda h: (h - 3.0) ** 2  # noqa: E731
    settings = {"carry": None, "key": None, "population": 8, "transforms": None}
    got, want = (population(loss, x, **settings) for x in (jax.device_put(start, spread), start))
    assert len(got.hparams.sharding.device_set) == 4
    chex.assert_trees_all_equal(untimed(got.history), untimed(want.history))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"population": 4}, r"`hparams\['goal'\]` is float64\[3, 2\], but `population=4` needs a leading axis of 4"),
        ({"carry": at(CARRY, 0)}, r"`carry\[0\].*write `jnp.broadcast_to\(x, \(3, \*x.shape\)\)`"),
        (
            {"hparams": at(STARTS, 0)},
            r"`hparams\['rate'\]` is float64\[\], .* one entry per member|`hparams\['goal'\]`",
        ),
        ({"hparams": STARTS | {"rate": jnp.array([0.1, 0.5, 0.1])}}, r"Member 1: `hparams\['rate'\]`: .* 0.5"),
        ({"key": KEYS[:2]}, "an array of keys"),
        ({"population": 0}, "population"),
        ({"population": True}, "population"),
    ],
)
def test_a_leaf_without_the_leading_axis_is_refused(settings, match):
    with pytest.raises(JaxhpoError, match=match):
        population(**settings)


@pytest.mark.parametrize(
    "change", [lambda h: {"h": h}, lambda h: jnp.stack([h, h]), lambda h: h.astype(jnp.float32), lambda h: None]
)
def test_a_carry_that_changes_is_refused(change):
    """Of structure, shape, type, or to nothing, by one run, a population, a scan, and where several are averaged."""
    loss = lambda h, carry, key: (h, change(h), None)  # noqa: E731
    settings, refused = {"transforms": None}, pytest.raises(JaxhpoError, match="a `carry` of the structure")
    with refused:
        population(loss, jnp.array([1.0, 2.0]), jnp.ones(2), KEYS[:2], population=2, **settings)
    with refused:
        alone(0, loss, jnp.ones(1), jnp.ones(1), remedies=jaxhpo.Remedies(accumulate=2), **settings)
    step = jaxhpo.outer_step(loss, optax.sgd(0.1))
    with refused:
        jax.lax.scan(lambda state, _: step.update(state), step.init(1.0, 1.0), length=2)


def test_members_need_a_population():
    with pytest.raises(JaxhpoError, match="needs the result of a population"):
        alone(0).member(0)


def test_member_that_was_never_finite_does_not_keep_others_from_patience():
    outer_loss = lambda h, carry, key: ((h - 3.0) ** 2 + carry, carry, jnp.ones(()))  # noqa: E731
    starts, carry = jnp.array([1.0, 2.0]), jnp.array([0.0, jnp.nan])
    settings = {"monitor": lambda info: info, "patience": 2, "progress": False}
    with pytest.warns(RuntimeWarning, match="member 1"):
        result = jaxhpo.tune(outer_loss, starts, optax.sgd(0.1), num_steps=9, population=2, carry=carry, **settings)
    assert result.members == (("overfitting", 3), ("not_finite", 0))
