"""`Auto`, and `on_error`: the rules of a run are chosen, and replaced where they mislead."""

import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import CG, SAMA, Auto, Identity, Implicit, JaxhpoError, Neumann, Unroll, tune
from jaxhpo._tune.remedies import NO_REMEDIES
from jaxhpo._tune.rules import Rules, stronger
from jaxhpo._tune.step import Step

RIDGE = jaxhpo.testing.ridge(0)
POINT = jnp.asarray(RIDGE.hparams)


def ridge(rule, num_steps=60, **settings):
    solver = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(RIDGE.step_size))

    def outer_loss(h):
        start = solver.init(jnp.asarray(RIDGE.params), h)
        sol = jaxhpo.solve(solver, start, h, num_steps=num_steps, adjoint=rule, **settings)
        return RIDGE.val_loss(sol.params)

    return outer_loss


class Backwards:
    """A rule of a user's with the wrong sign: the run diverges, and nothing says so."""

    def run(self, problem):
        final, steps = Unroll().run(problem)
        stopped = jax.lax.stop_gradient(final)
        return jax.tree.map(
            lambda x, s: 2 * s - x if jnp.issubdtype(x.dtype, jnp.floating) else x, final, stopped
        ), steps


# --- Auto -------------------------------------------------------------------------------------------------------------


def test_auto_is_exact_by_itself():
    np.testing.assert_array_equal(jax.grad(ridge(Auto()))(POINT), jax.grad(ridge(Unroll()))(POINT))


def test_auto_is_implicit_in_a_run_to_a_tolerance():
    to_tol = jax.grad(ridge(Auto(), 400, tol=1e-9))(POINT)
    np.testing.assert_array_equal(to_tol, jax.grad(ridge(Implicit(), 400, tol=1e-9))(POINT))


@pytest.mark.slow
def test_auto_is_implicit_where_nothing_else_fits(monkeypatch):
    monkeypatch.setattr(
        jaxhpo._diagnostics.auto, "available_bytes", lambda: -1
    )  # a binomial schedule of a tiny model takes 0
    np.testing.assert_array_equal(jax.grad(ridge(Auto()))(POINT), jax.grad(ridge(Implicit()))(POINT))


def test_a_converged_run_is_tuned_by_a_cheap_rule():
    result = tune(ridge(Auto(), 400), POINT, optax.adam(0.1), num_steps=6, progress=False)
    name = result.message.removeprefix("Auto: ").partition(", which explains most of the exact hypergradient ")[0]
    assert name.startswith("Implicit(CG("), result.message
    rule = {"Implicit(CG())": Implicit(CG()), "Implicit(CG(maxiter=5))": Implicit(CG(maxiter=5))}[name]
    by_rule = tune(ridge(rule, 400), POINT, optax.adam(0.1), num_steps=6, progress=False)
    np.testing.assert_array_equal(result.history["value"], by_rule.history["value"])


@pytest.mark.slow
def test_no_rule_is_chosen_that_cannot_see_a_leaf():
    solver = jaxhpo.from_optax(
        lambda w, h, batch: RIDGE.train_loss(w, h["penalty"], batch), lambda h: optax.sgd(jnp.exp(h["rate"]))
    )

    def outer_loss(h):
        start = solver.init(jnp.asarray(RIDGE.params), h)
        return RIDGE.val_loss(jaxhpo.solve(solver, start, h, num_steps=200, adjoint=Auto()).params)

    start = {"penalty": POINT, "rate": jnp.asarray(np.log(RIDGE.step_size / 50))}
    result = tune(outer_loss, start, optax.adam(0.1), num_steps=2, progress=False)
    assert result.message.startswith(("Auto: Unroll", "Auto: Forward")) and "Implicit" not in result.message


@pytest.mark.slow
def test_auto_chooses_anew_where_the_loss_stalls():
    start = jnp.zeros(3)  # the minimum: no step lowers the loss
    solver = jaxhpo.from_optax(lambda w, h, batch: jnp.sum((w - h) ** 2), optax.sgd(0.1))

    def outer_loss(h):
        w = jaxhpo.solve(solver, solver.init(jnp.ones(3), h), h, num_steps=100, adjoint=Auto()).params
        return jnp.sum((w - 1e-3) ** 2)

    calls = []
    choose = jaxhpo._tune.rules.choose

    def counted(*args):
        calls.append(args)
        return choose(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxhpo._tune.rules, "choose", counted)
        tune(outer_loss, start, optax.adam(0.3), num_steps=40, progress=False)
    assert len(calls) == 3  # before step 0, after 8 steps without a lower loss, and after 16 more


@pytest.mark.parametrize(
    ("values", "probed", "wait", "anew"),
    [
        ([1.0, 0.8, 1.1], 0, 8, True),
        ([1.0, 0.8, 0.9], 0, 8, False),
        ([1.0, 1.1, 1.2], 0, 8, False),  # nothing was gained
        ([1.0, 0.8, 1.1], 0, 16, False),  # the last choice changed nothing
        ([1.0, 0.8, 1.3, 1.2], 2, 8, False),  # it falls since the last choice
        ([1.0, 0.8, 1.3, 1.4], 2, 8, True),
        ([1.0, 0.8, np.nan], 0, 8, False),
    ],
)
def test_auto_chooses_anew_at_once_where_all_that_was_gained_is_lost(values, probed, wait, anew):
    rules = Rules(SimpleNamespace(step=SimpleNamespace()), None)
    rules.chosen, rules.probed, rules.wait = Unroll(), probed, wait
    assert rules.has_stalled([{"value": value} for value in values]) == anew


def test_auto_in_a_population_is_exact():
    starts, settings = jnp.stack([POINT, POINT + 0.1]), {"num_steps": 3, "population": 2, "progress": False}
    by_auto, exact = (tune(ridge(rule), starts, optax.adam(0.1), **settings) for rule in (Auto(), Unroll()))
    np.testing.assert_array_equal(by_auto.history["value"], exact.history["value"])


@pytest.mark.parametrize(
    ("rule", "on_error"),
    [
        pytest.param(Auto(), None, id="auto", marks=pytest.mark.slow),
        pytest.param(Backwards(), "tighten", id="on_error"),
    ],
)
def test_a_resumed_run_takes_the_same_rules(tmp_path, rule, on_error):
    settings = {"optimizer": optax.adam(0.1), "progress": False, "on_error": on_error}
    whole = tune(ridge(rule, 200), POINT, num_steps=18, **settings)
    tune(ridge(rule, 200), POINT, num_steps=14, run_dir=tmp_path, **settings)
    resumed = tune(ridge(rule, 200), POINT, num_steps=18, run_dir=tmp_path, **settings)
    np.testing.assert_array_equal(resumed.history["value"], whole.history["value"])
    assert whole.message.partition(";")[0] in resumed.message


# --- on_error ---------------------------------------------------------------------------------------------------------


def test_a_rule_that_misleads_is_replaced():
    silent = tune(ridge(Backwards()), POINT, optax.adam(0.05), num_steps=40, progress=False)
    assert silent.history["value"][-1] > 1.2 * silent.history["value"][0] and silent.status == "finished"
    result = tune(ridge(Backwards()), POINT, optax.adam(0.05), num_steps=80, progress=False, on_error="tighten")
    assert result.history["value"][-1] < result.history["value"][0]
    assert result.message.startswith("before step 11: the last 6 measured moves go nowhere (mean cosine -")
    assert "becomes Unroll()" in result.message
    slope, size = (result.history[name] for name in ("measured_slope", "measured_norm"))
    assert np.isfinite(slope[::2]).all() and np.isnan(slope[1::2]).all() and (size[::2] > 0).all()


@pytest.mark.slow
def test_another_rule_begins_with_fresh_moments():
    momentum = optax.sgd(0.5, momentum=0.9)
    settings = {"progress": False, "record": "hparams"}
    result = tune(ridge(Backwards()), POINT, momentum, num_steps=14, on_error="tighten", **settings)
    assert "before step 11" in result.message
    there = jax.tree.map(lambda x: x[11], result.history["hparams"])
    fresh = tune(ridge(Unroll()), there, momentum, num_steps=3, **settings)
    np.testing.assert_array_equal(result.history["value"][11:], fresh.history["value"])


OPTIMISERS = {
    "adam": optax.adam(0.1),
    "lbfgs": optax.lbfgs(linesearch=None),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "dog": optax.contrib.dog(init_step=("learning_rate", 0.1)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(1e-3), optax.rmsprop(0.1)),
}


def after_steps(rule, optimizer, number):
    """The outer step on ridge, its compiled update, and the state after so many."""
    step = Step(ridge(rule), optimizer, None, None, NO_REMEDIES, None)
    update, state = jax.jit(step.update), step.init(POINT)
    for _ in range(number):
        state, _ = update(state)
    return step, update, state


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_moves_as_at_the_start_after_a_rule_that_misled(name):
    step, update, state = after_steps(Unroll(), OPTIMISERS[name], 20)
    after, _ = update(step.restarted(state))
    fresh, _ = update(step.init(state.point))
    np.testing.assert_array_equal(after.point, fresh.point)


def test_schedules_go_on_past_a_rule_that_misled():
    falling = optax.linear_schedule(0.1, 0.0, 10)
    injected = optax.inject_hyperparams(optax.adam)(falling)
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    for optimizer in (injected, optax.adam(falling), optax.MultiSteps(optax.adam(falling), 1)):
        step, update, state = after_steps(Unroll(), optimizer, 3)
        after, _ = update(step.restarted(state))
        # A first step of Adam is its rate, here that of the fourth step.
        assert np.abs(after.point - state.point).max() == pytest.approx(0.07, rel=1e-4)
    step, _, state = after_steps(Backwards(), optax.chain(optax.adam(0.05), plateau), 6)
    assert state.opt_state[1].scale < 1
    chex.assert_trees_all_equal(step.restarted(state).opt_state[1], state.opt_state[1])


def test_an_optimiser_that_makes_up_its_state_begins_anew():
    plain = optax.trace(0.9)
    later = optax.GradientTransformation(
        lambda params: None,
        lambda grads, state, params=None: plain.update(grads, plain.init(grads) if state is None else state),
    )
    falling = optax.scale_by_schedule(optax.linear_schedule(-0.1, 0.0, 10))
    step = Step(ridge(Unroll()), optax.chain(later, falling), None, None, NO_REMEDIES, None)
    state, _ = step.update(step.init(POINT))
    assert jax.tree.structure(step.restarted(state)) == jax.tree.structure(step.init(POINT))
    assert step.restarted(state).opt_state[1] == state.opt_state[1] == (1,)


class Counter(NamedTuple):
    calls: Any


def test_counts_that_no_moments_share_go_on():
    """Of whatever optimiser: schedules of a decay, conditions on the step, and one of a user's own."""

    def half_at_times(updates, state, params=None):
        scale = jnp.where(state.calls % 2 == 0, 1.0, 0.5)
        return jax.tree.map(lambda u: scale * u, updates), Counter(state.calls + 1)

    own = optax.GradientTransformation(lambda params: Counter(jnp.zeros((), jnp.int32)), half_at_times)
    decay = optax.adamw(0.1, weight_decay=optax.linear_schedule(1.0, 0.0, 3))  # type: ignore
    ending = optax.conditionally_transform(optax.set_to_zero(), lambda count: count >= 3)
    step, update, state = after_steps(Unroll(), optax.chain(decay, ending, own), 4)
    again = step.restarted(state).opt_state
    assert again[0][0].count == 0 and not again[0][0].mu.any()
    assert (again[0][1].count, again[1].step, again[2].calls) == (4, 4, 4)
    after, _ = update(step.restarted(state))
    np.testing.assert_array_equal(after.point, state.point)


def test_gradients_accumulated_by_a_rule_that_misled_are_left_out():
    optimizer = optax.MultiSteps(optax.sgd(optax.linear_schedule(0.1, 0.0, 10)), 4)
    step, _, state = after_steps(Backwards(), optimizer, 7)
    again = step.restarted(state).opt_state
    assert (again.mini_step, again.gradient_step) == (0, 1) and not again.acc_grads.any()
    assert state.opt_state.mini_step == 3 and state.opt_state.acc_grads.any()


@pytest.mark.parametrize("every", [2, 3, 4])
def test_moves_of_several_steps_are_judged(every):
    optimizer = optax.MultiSteps(optax.adam(0.05), every)
    result = tune(ridge(Backwards()), POINT, optimizer, num_steps=60, progress=False, on_error="stop")
    slope = result.history["measured_slope"]
    assert result.status == "misled" and np.isfinite(slope[every - 1 :: every]).sum() == 6
    assert np.isnan(np.delete(slope, np.s_[every - 1 :: every])).all()


def test_an_error_is_not_held_past_its_rule():
    result = tune(ridge(Backwards()), POINT, optax.adam(0.05), num_steps=14, progress=False, on_error="tighten")
    error = result.history["error"]
    assert "before step 11" in result.message and error[10] > 0 and np.isnan(error[11])
    assert error[12] <= 1e-12 * result.history["hypergradient_norm"][12]


@pytest.mark.parametrize(("slopes", "found"), [([0.0, 1, 1, 1, 1, 1], False), ([0.0, 0, 0, 0, 0, 0.2], True)])
def test_cosines_count_alike_whatever_the_norm(slopes, found):
    rules = Rules(SimpleNamespace(step=SimpleNamespace()), "stop")
    norms = [100.0, 1, 1, 1, 1, 1]
    rows = [
        {"measured_norm": n, "measured_slope": -c * n, "error": 0.4, "hypergradient_norm": 1.0}
        for n, c in zip(norms, slopes, strict=True)
    ]
    assert bool(rules.misleads(rows)) == found


def test_a_derivative_of_zero_says_nothing_of_moves():
    """Of an outer loss that does not depend on the hyperparameters, as of parameters from before their step."""

    def gradient(h, carry, key):
        return jnp.sum(carry) + 0 * jnp.sum(h), jax.grad(ridge(Unroll()))(h), carry, None

    settings = {"gradient": gradient, "carry": POINT, "progress": False, "on_error": "stop"}
    result = tune(None, POINT, optax.adam(0.05), num_steps=16, **settings)
    assert result.status == "finished" and (result.history["measured_norm"][::2] == 0).all()


def test_a_rule_that_misleads_ends_the_run():
    result = tune(ridge(Backwards()), POINT, optax.adam(0.1), num_steps=40, progress=False, on_error="stop")
    assert result.status == "misled" and len(result.history["value"]) == 11
    assert "the last 6 measured moves go nowhere" in result.message and "on_error='stop'" in result.message


def test_where_nothing_stronger_is_left_the_run_ends():
    def gradient(h, carry, key):
        value, grad = jax.value_and_grad(ridge(Unroll()))(h)
        return value, -grad, carry, None

    result = tune(None, POINT, optax.adam(0.1), num_steps=40, gradient=gradient, progress=False, on_error="tighten")
    assert result.status == "misled" and "`gradient` has no derivative rule to be replaced" in result.message


def slow_ridge_by(rule):
    """Twenty steps at a small rate."""
    solver = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(0.2 * RIDGE.step_size))

    def outer_loss(h):
        start = solver.init(jnp.asarray(RIDGE.params), h)
        return RIDGE.val_loss(jaxhpo.solve(solver, start, h, num_steps=20, adjoint=rule).params)

    return outer_loss


def slow_ridge(last):
    """Twenty steps at a small rate, of which the last are differentiated."""
    return slow_ridge_by(Unroll(truncate=last))


def test_a_poor_direction_that_leads_down_is_kept():
    result = tune(slow_ridge(16), POINT, optax.adam(0.05), num_steps=24, progress=False, on_error="tighten")
    error = result.history["error"] / result.history["hypergradient_norm"]
    assert (error > 0.3).mean() > 0.8 and (np.diff(result.history["value"]) < 0).all()
    assert result.message.startswith("24 outer steps")


def test_a_truncation_that_leads_uphill_is_lengthened():
    result = tune(slow_ridge(2), POINT, optax.adam(0.05), num_steps=24, progress=False, on_error="tighten")
    assert (np.diff(result.history["value"])[:10] > 0).all() and (np.diff(result.history["value"])[15:] < 0).all()
    assert "Unroll(truncate=2) becomes Unroll()" in result.message


def test_the_ladder_of_rules_ends_at_exact_ones():
    for rule in (Unroll(truncate=3), SAMA(), Implicit(CG(maxiter=3)), Implicit(Identity(0.1)), Backwards(), Auto()):
        steps = [rule]
        while (higher := stronger(steps[-1], 1000)) is not None:
            steps.append(higher)
        assert len(steps) <= 5 and steps[-1] in (Unroll(), Auto())
    assert stronger(Implicit(Neumann(5, 0.1)), 1000) == Implicit()  # a series may be the fault, and has no better end
    assert stronger(Unroll(truncate=20), 100) == Unroll()  # ten times as many are all steps


@pytest.mark.slow
def test_a_rule_that_fails_later_is_chosen_anew():
    # The Hessian is diag(h₀, 1 + h₁²): each step lowers h₀, which at last is negative.
    solver = jaxhpo.from_optax(
        lambda w, h, batch: 0.5 * (h[0] * w[0] ** 2 + w[1] ** 2 * (1 + h[1] ** 2)) - w[0] - w[1], optax.sgd(0.1)
    )

    def outer_loss(h):
        return -0.01 * jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=300, adjoint=Auto()).params[0]

    result = tune(outer_loss, jnp.ones(2), optax.sgd(20.0), num_steps=4, progress=False)
    assert result.message.startswith("Auto: Implicit(") and ": Auto: Unroll()" in result.message
    assert result.status == "finished" and np.isfinite(result.history["hypergradient_norm"]).all()


@pytest.mark.slow
def test_no_move_is_no_reason():
    """Of eight steps of `MultiSteps` seven do not move, and a dead rectifier never does."""
    optimizer = optax.MultiSteps(optax.adam(0.05), 5)
    result = tune(slow_ridge(16), POINT, optimizer, num_steps=30, progress=False, on_error="stop")
    assert result.status == "finished"
    solver = jaxhpo.from_optax(lambda w, h, batch: jnp.sum((w - h) ** 2), optax.sgd(0.1))

    def dead(h):
        w = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50).params
        return jnp.sum(jax.nn.relu(w - 0.5))

    assert (
        tune(dead, jnp.ones(2), optax.sgd(0.3), num_steps=16, progress=False, on_error="tighten").status == "finished"
    )


def test_what_cannot_be_chosen_is_exact_by_itself():
    def outer_loss(h):
        solver = jaxhpo.from_optax(RIDGE.train_loss, optax.sgd(jnp.exp(h)))
        start = solver.init(jnp.asarray(RIDGE.params), h)
        return RIDGE.val_loss(jaxhpo.solve(solver, start, POINT, num_steps=400, tol=1e-3, adjoint=Auto()).params)

    with pytest.raises(jaxhpo.ZeroHypergradientError), warnings.catch_warnings(action="ignore"):
        tune(outer_loss, jnp.log(RIDGE.step_size), optax.adam(0.1), num_steps=2, progress=False)


@pytest.mark.slow
def test_a_run_goes_on_with_another_loss(tmp_path):
    """A rule that is not in the other loss's list is chosen anew."""
    settings = {"optimizer": optax.adam(0.1), "progress": False, "run_dir": tmp_path, "resume": "continue"}
    tune(slow_ridge_by(Auto()), POINT, num_steps=2, **settings)
    result = tune(ridge(Auto(), 400, tol=1e-6), POINT, num_steps=4, **settings)
    assert result.status == "finished" and np.isfinite(result.history["value"]).all()


def test_settings_are_checked():
    with pytest.raises(JaxhpoError, match="on_error"):
        tune(ridge(Unroll()), POINT, optax.adam(0.1), num_steps=2, on_error="warn")
    with pytest.raises(JaxhpoError, match="on_error='tighten'"):
        tune(ridge(Unroll()), POINT[None], optax.adam(0.1), num_steps=2, on_error="tighten", population=1)
