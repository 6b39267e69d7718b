"""Hyperparameters without leaves, or without entries: every function that takes hyperparameters, taken or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALL_RULES, PROBLEMS

import jaxhpo
from jaxhpo import (
    HOAG,
    EvolutionStrategies,
    ForwardGradient,
    Hypernetwork,
    Implicit,
    PersistentES,
    RealTime,
    Reversible,
    Smoothing,
    Unroll,
)

pytestmark = pytest.mark.usefixtures("compiled_once")  # a run and its resumption are the same program
TARGET, KEY = jnp.arange(3.0), jax.random.key(0)


def total(hparams):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(hparams))


def train_loss(w, hparams, batch):
    return jnp.sum((w - TARGET) ** 2) + (0.1 + total(hparams)) * jnp.sum(w**2)


SOLVER = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
MOMENTUM = jaxhpo.momentum_sgd(train_loss, 0.1, 0.5)


def val_loss(solution, hparams, batch):
    return jnp.sum((solution.params - 1) ** 2) + total(hparams)


def outer_loss(adjoint, solver=SOLVER):
    def loss(hparams):
        start = solver.init(jnp.ones(3), hparams)
        return val_loss(jaxhpo.solve(solver, start, hparams, num_steps=4, key=KEY, adjoint=adjoint), hparams, None)

    return loss


EMPTY = {"dict": {}, "tuple": (), "none": None, "entries": {"a": jnp.zeros((2, 0)), "b": None}}
PARTLY = {"a": jnp.zeros(0), "b": None, "c": jnp.full(2, 0.5), "d": {}}


def trees(*chosen):
    """The trees as pytest parameters; in the quick suite the first alone."""
    every = {**EMPTY, "partly": PARTLY}
    marks = [[], *[[pytest.mark.slow]] * len(every)]
    rows = zip(chosen or every, marks, strict=False)
    return pytest.mark.parametrize("hparams", [pytest.param(every[name], id=name, marks=m) for name, m in rows])


RULES = [(case.make(PROBLEMS["ridge"]), SOLVER) for case in ALL_RULES if case.name != "nystrom"]
RULES += [(ForwardGradient(2), SOLVER), (Smoothing(2, 0.1), SOLVER), (Reversible(), MOMENTUM)]
METHODS = [Unroll(), Implicit(), HOAG(), RealTime(), EvolutionStrategies(2, 0.1), PersistentES(2, 0.1, 4)]
METHODS += [Hypernetwork(optax.sgd(0.1), scale=0.5)]


@trees("dict", "partly")
def test_every_rule_takes_them(hparams):
    """Traced only. The hypergradient is a tree like the hyperparameters."""
    for rule, solver in RULES:
        got = jax.eval_shape(jax.grad(outer_loss(rule, solver)), hparams)
        assert jax.tree.structure(got) == jax.tree.structure(hparams), rule
        assert [x.shape for x in jax.tree.leaves(got)] == [jnp.shape(x) for x in jax.tree.leaves(hparams)], rule


def test_a_leaf_without_entries_is_no_loss():
    """Rules that do not see a leaf warn of it, but not of one that has nothing to see."""
    solver = jaxhpo.from_optax(lambda w, h, batch: h["seen"] * jnp.sum((w - TARGET) ** 2), optax.sgd(0.1))
    hparams = {"seen": jnp.ones(()), "unseen": jnp.ones(()), "empty": jnp.zeros(0)}
    for rule in (Implicit(), jaxhpo.FiniteDifference(0.1)):
        gradient = jax.grad(outer_loss(rule, solver))
        with pytest.warns(jaxhpo.ZeroHypergradientWarning, match="hparams\\['unseen'\\] ") as found:
            jax.eval_shape(gradient, hparams)
        assert len(found) == 1 and "more leaves" not in str(found[0].message)
        jax.eval_shape(gradient, {name: x for name, x in hparams.items() if name != "unseen"})  # warnings are errors


@trees("dict", "partly")
@pytest.mark.slow
def test_every_pair_takes_them(hparams):
    for method in METHODS:
        pair = jaxhpo.hypergradient(method, SOLVER, val_loss, num_steps=4)
        state = pair.init(jnp.ones(3), hparams)
        got, after, _ = jax.eval_shape(lambda h, s, pair=pair: pair.update(h, s, key=KEY), hparams, state)
        assert jax.tree.structure(got) == jax.tree.structure(hparams), method
        assert jax.tree.structure(after) == jax.tree.structure(state), method


@trees()
@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.lbfgs()], ids=["adam", "lbfgs"])
def test_tune_takes_them(hparams, optimizer, tmp_path):
    """It records; with nothing to move, the same value at every step. The folder is read back."""
    settings = {"remedies": jaxhpo.Remedies(clip=1.0, clip_norm=1.0), "progress": False, "run_dir": tmp_path / "run"}
    settings["projections"] = optax.projections.projection_non_negative
    for num_steps in (2, 3):
        result = jaxhpo.tune(outer_loss(Unroll()), hparams, optimizer, num_steps=num_steps, **settings)
    moved = any(x.size for x in jax.tree.leaves(hparams))
    assert len(result.history["value"]) == 3 and (np.ptp(result.history["value"]) > 0) == moved
    assert jax.tree.structure(result.best_hparams) == jax.tree.structure(hparams)
    assert jaxhpo.load(tmp_path / "run").best_value == result.best_value
    jaxhpo.history_table(result)


@trees("dict", "partly")
@pytest.mark.slow
def test_a_population_takes_them(hparams):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), hparams)
    result = jaxhpo.tune(outer_loss(Unroll()), stacked, optax.adam(0.1), num_steps=2, population=2, progress=False)
    assert result.best_value.shape == (2,) and result.member(1).status == "finished"


@trees("dict", "partly")
@pytest.mark.slow
def test_the_functions_around_them_take_them(hparams):
    like = jnp.ones(3)
    root = jax.grad(lambda a: jnp.sum(jaxhpo.implicit(lambda w, a: w - like * (1 + total(a)), like, a)))(hparams)
    assert jax.tree.structure(root) == jax.tree.structure(hparams)
    assert jaxhpo.memory_plan(outer_loss(Unroll()), hparams).asked.call == "Unroll()"


@pytest.mark.parametrize("hparams", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize(
    "check", [jaxhpo.check_hypergradient, lambda _, h: jaxhpo.compare(outer_loss, h, progress=False)]
)
def test_a_check_of_nothing_is_refused(check, hparams):
    """These differentiate by nothing that a loss closes over, and a comparison without entries would be perfect."""
    with pytest.raises(jaxhpo.JaxhpoError, match="`hparams` (got .* no leaves to differentiate by|has no entries)"):
        check(outer_loss(Unroll()), hparams)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL_RULES if case.name in ("unroll", "cg")], ids=lambda c: c.name)
def test_a_loss_may_close_over_all_that_is_tuned(case):
    """The hypergradient is that of the same loss with explicit hyperparameters."""
    rule = case.make(PROBLEMS["ridge"])

    def by_closure(h):
        solver = jaxhpo.from_optax(lambda w, _, batch: train_loss(w, h, batch), optax.sgd(0.1))
        return val_loss(jaxhpo.solve(solver, solver.init(jnp.ones(3), ()), (), num_steps=4, adjoint=rule), h, None)

    h = jnp.asarray(0.5)
    want = jax.jit(jax.grad(outer_loss(rule)))(h)
    np.testing.assert_allclose(jax.jit(jax.grad(by_closure))(h), want, rtol=1e-12)
