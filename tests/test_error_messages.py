"""Error messages for users' mistakes: each raises the library's own exception, which names the culprit and the remedy.

Every row is one mistake. It is made eagerly and, where `jit` is set, again while `jax.jit` traces, before anything is
compiled. Rows with `jit` are the mistakes that shapes, dtypes, trees, settings or constants reveal.
"""

import datetime
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxhpo
from jaxhpo import (
    CG,
    Direct,
    Identity,
    Implicit,
    InnerState,
    JaxhpoError,
    LinearInfo,
    LinearStatus,
    Neumann,
    NonFiniteError,
    Unroll,
    ZeroHypergradientError,
    ZeroHypergradientWarning,
    box,
    check_hypergradient,
    fixed_point,
    from_optax,
    implicit,
    momentum_sgd,
    positive,
    simplex,
    solve,
    tune,
    unit_interval,
)


class Mistake(NamedTuple):
    """One row of the table.

    `call(h)` makes the mistake, where h is `HPARAMS`; the message must contain the patterns `culprit` and `remedy`.
    """

    id: str
    call: Callable[[Any], Any]
    culprit: str
    remedy: str
    expected: type = JaxhpoError
    jit: bool = True


PARAMS = {"w": np.zeros(3)}
HPARAMS = {"target": np.ones(3), "lr": np.float64(0.1)}
SGD = optax.sgd(0.1)
NAN = np.array([0.0, np.nan, 0.0])
DATA = np.ones((4, 3))  # one row for each of four steps
OLD_KEY = np.zeros(2, np.uint32)  # what `jax.random.PRNGKey(0)` returns


def loss(params, hparams, batch):
    return jnp.sum((params["w"] - hparams["target"]) ** 2)


def data_loss(params, hparams, batch):
    return jnp.sum((params["w"] - batch) ** 2) + jnp.sum(hparams["target"] * params["w"] ** 2)


def stateful_loss(params, hparams, batch, model_state):
    return loss(params, hparams, batch), model_state


def step(params, hparams, batch):
    return {"w": 0.5 * params["w"] + hparams["target"]}


SOLVER = from_optax(loss, SGD)


def train(
    h, loss=loss, tx=SGD, params=PARAMS, batches=None, num_steps=3, has_state=False, model_state=None, **settings
):
    """A whole correct program; each row makes one part of it wrong."""
    solver = from_optax(loss, tx, has_state=has_state)
    state = solver.init(params, h, *(() if model_state is None else (model_state,)))
    return solve(solver, state, h, batches, num_steps=num_steps, **settings).params


def returning(value):
    """A loss (or a condition, a step, an outer loss) that returns `value`."""
    return lambda *args: value


def iterate(h, step, condition=None, **settings):
    solver = fixed_point(step, condition)
    return solve(solver, solver.init(PARAMS, h), h, num_steps=3, **settings).params


def system(linear_solver, h=PARAMS["w"]):
    """The derivative of the root w of w - h = 0."""
    return jax.grad(lambda h: jnp.sum(implicit(lambda w, h: w - h, h, h, linear_solver=linear_solver)))(jnp.asarray(h))


def momentum(h, learning_rate=0.1, momentum=0.9, **settings):
    solver = momentum_sgd(loss, learning_rate, momentum)
    return solve(solver, solver.init(PARAMS, h, **settings), h, num_steps=3).params


def outer(h):
    return jnp.sum(h["target"] ** 2) + h["lr"] ** 2


def search(outer_loss=outer, hparams=HPARAMS, optimizer=SGD, num_steps=1, **settings):
    settings = {"progress": False} | settings
    return tune(outer_loss, hparams, optimizer, num_steps=num_steps, **settings)


def total(params):
    return jnp.sum(params["w"])


class Loader:
    """A data loader: an iterable with a length."""

    def __len__(self):
        return 4

    def __iter__(self):
        yield from DATA


class TrainState(NamedTuple):
    """The state of another library."""

    params: Any
    opt_state: Any


class Optimiser:
    """The optimiser of another library."""

    def __init__(self, parameters, lr=0.1):
        pass

    def step(self):
        pass


MISTAKES = [
    # --- from_optax: the loss ---
    Mistake(
        "loss-string", lambda h: from_optax("mse", SGD), "`loss`", r"give a function `loss\(params, hparams, batch\)`"
    ),
    Mistake("loss-none", lambda h: from_optax(None, SGD), "`loss`", r"give a function `loss\(params"),
    Mistake("loss-and-tx-swapped", lambda h: from_optax(SGD, loss), "`loss`", r"give a function `loss\(params"),
    Mistake(
        "loss-of-two-arguments",
        lambda h: from_optax(lambda params, batch: 0.0, SGD),
        r"`loss`.*\(params, batch\)",
        r"write it as `loss\(params, hparams, batch\)`",
    ),
    Mistake("loss-returns-none", lambda h: train(h, returning(None)), "`loss` returned None", "return a scalar"),
    Mistake("loss-returns-string", lambda h: train(h, returning("0.3")), "`loss` returned '0.3'", "return a scalar"),
    Mistake("loss-returns-python-float", lambda h: train(h, returning(1.0)), "`loss` returned 1.0", "with `jax.numpy`"),
    Mistake("loss-returns-bool", lambda h: train(h, returning(True)), "`loss` returned True", "return a scalar"),
    Mistake(
        "loss-returns-count",
        lambda h: train(h, lambda p, h, b: jnp.sum(p["w"] > 0)),
        r"`loss` returned int64\[\]",
        "cross-entropy in place of a count",
    ),
    Mistake(
        "loss-returns-vector",
        lambda h: train(h, lambda p, h, b: (p["w"] - h["target"]) ** 2),
        r"`loss` returned shape \(3,\)",
        r"take `\.mean\(\)`",
    ),
    Mistake(
        "loss-returns-tuple",
        lambda h: train(h, lambda p, h, b: (loss(p, h, b), {"accuracy": 0.5})),
        "`loss` returned a tuple",
        "drop the rest, or.*has_state=True",
    ),
    Mistake(
        "loss-returns-dict",
        lambda h: train(h, lambda p, h, b: {"loss": loss(p, h, b)}),
        "`loss` returned {'loss'",
        "return a scalar",
    ),
    Mistake(
        "loss-returns-complex",
        lambda h: train(h, lambda p, h, b: loss(p, h, b) * 1j),
        r"`loss` returned complex128\[\]",
        "return a real floating-point scalar",
    ),
    Mistake(
        "loss-needs-a-batch",
        lambda h: train(h, lambda p, h, batch: jnp.sum((p["w"] - batch["x"]) ** 2)),
        "`loss` raised.*`batch=None`",
        "pass `batches=`",
    ),
    # --- from_optax: model state ---
    Mistake(
        "state-loss-of-three-arguments",
        lambda h: from_optax(loss, SGD, has_state=True),
        "`loss`.*called with 4",
        r"write it as `loss\(params, hparams, batch, model_state\)`",
    ),
    Mistake(
        "state-loss-without-has-state",
        lambda h: from_optax(stateful_loss, SGD),
        "`loss`.*called with 3",
        "pass `has_state=True`",
    ),
    Mistake(
        "state-not-given-to-init",
        lambda h: train(h, stateful_loss, has_state=True),
        "`init` got no model state",
        r"write `solver\.init\(params, hparams, model_state\)`",
    ),
    Mistake(
        "state-given-without-has-state",
        lambda h: train(h, model_state={"mean": np.zeros(3)}),
        "`init` got a model state",
        r"write `from_optax\(loss, tx, has_state=True\)`",
    ),
    Mistake(
        "state-not-returned",
        lambda h: train(h, lambda p, h, b, s: loss(p, h, b), has_state=True, model_state={"mean": np.zeros(3)}),
        "`loss` returned.*has_state=True",
        r"return `\(scalar, model_state\)`",
    ),
    Mistake(
        "state-returned-first",
        lambda h: train(h, lambda p, h, b, s: (s, loss(p, h, b)), has_state=True, model_state={"mean": np.zeros(3)}),
        r"`loss` returned \(\{.mean.",
        r"`\(scalar, model_state\)`",
    ),
    Mistake(
        "state-loses-a-leaf",
        lambda h: train(h, lambda p, h, b, s: (loss(p, h, b), {}), has_state=True, model_state={"mean": np.zeros(3)}),
        "changed the tree of the state.*'mean'",
        "return the whole model state",
    ),
    Mistake(
        "state-changes-its-shape",
        lambda h: train(
            h,
            lambda p, h, b, s: (loss(p, h, b), {"mean": s["mean"][:2]}),
            has_state=True,
            model_state={"mean": np.zeros(3)},
        ),
        r"state\.model_state\['mean'\]` from float64\[3\] to float64\[2\]",
        "reshape it",
    ),
    Mistake(
        "state-of-a-string",
        lambda h: train(h, stateful_loss, has_state=True, model_state={"name": "net"}),
        r"`model_state\['name'\]` is 'net'",
        "leave it out of the tree",
    ),
    Mistake(
        "state-becomes-a-string",
        lambda h: train(h, lambda p, h, b, s: (loss(p, h, b), "s"), has_state=True, model_state=np.zeros(3)),
        "`model_state` is 's'",
        "leave it out of the tree",
    ),
    # --- from_optax: tx ---
    Mistake("tx-string", lambda h: from_optax(loss, "sgd"), "`tx` got 'sgd'", r"write an .*`optax\.sgd\(0\.1\)`"),
    Mistake("tx-none", lambda h: from_optax(loss, None), "`tx` got None", r"`optax\.sgd\(0\.1\)`"),
    Mistake("tx-number", lambda h: from_optax(loss, 0.1), r"`tx` got 0\.1", r"`optax\.sgd\(0\.1\)`"),
    Mistake("tx-list", lambda h: from_optax(loss, [SGD]), "`tx` got ", r"`optax\.sgd\(0\.1\)`"),
    Mistake(
        "tx-uncalled", lambda h: from_optax(loss, optax.adam), "`tx` got the function `adam`", r"`optax\.adam\(0\.1\)`"
    ),
    Mistake("tx-class", lambda h: from_optax(loss, Optimiser), "`tx` got the class Optimiser", r"`optax\.sgd\(0\.1\)`"),
    Mistake("tx-optimiser-object", lambda h: from_optax(loss, Optimiser(0)), "`tx` got", r"`optax\.sgd\(0\.1\)`"),
    Mistake(
        "tx-schedule",
        lambda h: from_optax(loss, optax.cosine_decay_schedule(0.1, 10)),
        "`tx` got a schedule",
        r"`optax\.sgd\(schedule\)`",
    ),
    Mistake(
        "tx-of-no-argument",
        lambda h: from_optax(loss, lambda: SGD),
        "`tx` got a function",
        r"write it as `tx\(hparams\)`",
    ),
    Mistake(
        "tx-of-two-arguments",
        lambda h: from_optax(loss, lambda hparams, step: SGD),
        r"`tx`.*\(hparams, step\)",
        r"write it as `tx\(hparams\)`",
    ),
    Mistake(
        "tx-returns-its-rate",
        lambda h: train(h, tx=lambda h: h["lr"]),
        r"`tx\(hparams\)` returned",
        r"return an `optax\.GradientTransformation`",
    ),
    Mistake(
        "tx-returns-none",
        lambda h: train(h, tx=returning(None)),
        r"`tx\(hparams\)` returned None",
        r"return an `optax\.GradientTransformation`",
    ),
    # --- momentum_sgd ---
    Mistake("rate-string", lambda h: momentum(h, "0.1"), "`learning_rate` got '0.1'", r"float such as 0\.1"),
    Mistake("rate-none", lambda h: momentum(h, None), "`learning_rate` got None", r"float such as 0\.1"),
    Mistake(
        "rate-negative", lambda h: momentum(h, -0.1), r"`learning_rate` got -0\.1", "at least 0: write such a number"
    ),
    Mistake("rate-nan", lambda h: momentum(h, np.nan), "`learning_rate` got nan", "must be finite.*write"),
    Mistake(
        "rate-nan-array",
        lambda h: momentum(h, jax.device_put(np.float64(np.nan))),
        "`learning_rate` got nan",
        "finite",
        jit=False,
    ),
    Mistake(
        "rate-vector",
        lambda h: momentum(h, jnp.full(3, 0.1)),
        r"`learning_rate` is float64\[3\]",
        "one real number is needed: write",
    ),
    Mistake(
        "rate-optax-schedule",
        lambda h: momentum(h, optax.constant_schedule(0.1)),
        r"`learning_rate` got a function of signature `\(count\)`",
        r"`learning_rate\(hparams, step\)`",
    ),
    Mistake("rate-optimiser", lambda h: momentum(h, SGD), "`learning_rate` got", r"float such as 0\.1"),
    Mistake(
        "rate-no-prefix",
        lambda h: momentum(h, lambda h, t: {"layer1": h["lr"]}),
        "`learning_rate` returned a tree that is not a prefix",
        "return one number",
    ),
    Mistake(
        "rate-returns-none", lambda h: momentum(h, returning(None)), "`learning_rate` returned", "return one number"
    ),
    Mistake(
        "rate-whole-schedule",
        lambda h: momentum(h, lambda h, t: jnp.full(100, 0.1)),
        r"`learning_rate` returned float64\[100\] for `params\['w'\]`",
        r"index it: `rates\[step\]`",
    ),
    Mistake("rate-returns-string", lambda h: momentum(h, returning("a")), "`learning_rate` returned 'a'", "one number"),
    Mistake("momentum-one", lambda h: momentum(h, 0.1, 1.0), r"`momentum` got 1\.0", r"write a number in \[0, 1"),
    Mistake("momentum-percent", lambda h: momentum(h, 0.1, 90), "`momentum` got 90", r"write a number in \[0, 1"),
    Mistake("momentum-negative", lambda h: momentum(h, 0.1, -0.9), r"`momentum` got -0\.9", "at least 0"),
    Mistake("momentum-bool", lambda h: momentum(h, 0.1, True), "`momentum` got True", r"float such as 0\.1"),
    Mistake(
        "momentum-loss-of-one-argument",
        lambda h: momentum_sgd(lambda p: 0.0, 0.1, 0.9),
        r"`loss`.*\(p\)",
        r"`loss\(params, hparams, batch\)`",
    ),
    Mistake(
        "momentum-params-integer", lambda h: momentum_sgd(loss, 0.1, 0.9).init({"w": 1}, h), r"`params\['w'\]`", "`1.0`"
    ),
    # --- fixed_point ---
    Mistake(
        "step-not-callable",
        lambda h: fixed_point(SGD),
        "`step` got",
        r"give a function `step\(params, hparams, batch\)`",
    ),
    Mistake(
        "step-of-two-arguments",
        lambda h: fixed_point(lambda params, hparams: params),
        r"`step`.*\(params, hparams\)",
        r"write it as `step\(params, hparams, batch\)`",
    ),
    Mistake("step-returns-none", lambda h: iterate(h, returning(None)), "`step` returned", "return one array per leaf"),
    Mistake(
        "step-returns-a-pair",
        lambda h: iterate(h, lambda p, h, b: (p, 0.0)),
        "`step` returned the tree",
        "return one array per leaf of `params`",
    ),
    Mistake(
        "step-changes-the-shape",
        lambda h: iterate(h, lambda p, h, b: {"w": p["w"][:2]}),
        r"`step` returned float64\[2\] for `params\['w'\]`",
        "of the same shape",
    ),
    Mistake(
        "step-changes-the-type",
        lambda h: iterate(h, lambda p, h, b: {"w": p["w"].astype(int)}),
        r"`step` returned int64\[3\] for `params\['w'\]`",
        "floating-point",
    ),
    Mistake(
        "step-becomes-complex",
        lambda h: iterate(h, lambda p, h, b: {"w": jnp.sqrt(p["w"] + 0j)}),
        r"`step` returned complex128\[3\] for `params\['w'\]`",
        "floating-point",
    ),
    Mistake(
        "step-renames-a-leaf",
        lambda h: iterate(h, lambda p, h, b: {"v": p["w"]}),
        "`step` returned the tree",
        "one array per leaf",
    ),
    Mistake(
        "step-returns-strings",
        lambda h: iterate(h, returning({"w": "w"})),
        r"`step` returned 'w' .*\['w'\]",
        "one array",
    ),
    Mistake(
        "condition-of-two-arguments",
        lambda h: fixed_point(step, lambda params, hparams: params),
        "`condition` got a function",
        r"write it as `condition\(params, hparams, batch\)`",
    ),
    Mistake(
        "condition-an-objective",
        lambda h: iterate(h, step, loss, adjoint=Implicit()),
        "`condition` returned the tree",
        r"`jax\.grad\(objective\)`",
    ),
    Mistake("condition-string", lambda h: fixed_point(step, "zero"), "`condition` got 'zero'", "give a function"),
    Mistake(
        "fixed-point-with-cg",
        lambda h: iterate(h, step, adjoint=Implicit(CG())),
        r"Implicit\(.*CG\(.*not symmetric",
        r"use `Neumann\(num_terms, 1\.0\)` or `Direct\(\)`",
    ),
    Mistake(
        "fixed-point-with-model-state",
        lambda h: fixed_point(step).init(PARAMS, h, {"mean": np.zeros(3)}),
        "`init` got a model state",
        "has_state=True",
    ),
    # --- Solver.init: parameters and hyperparameters ---
    Mistake("params-empty", lambda h: SOLVER.init({}, h), "`params` got {}, which has no leaves", "give a pytree of"),
    Mistake("params-only-none", lambda h: SOLVER.init({"w": None}, h), "`params`.*no leaves", "give a pytree of"),
    Mistake(
        "params-no-entries", lambda h: SOLVER.init({"w": np.zeros(0)}, h), "`params` has no entries", "give arrays"
    ),
    Mistake(
        "params-integer", lambda h: SOLVER.init({"w": np.arange(3)}, h), r"`params\['w'\]` is int64\[3\]", "astype"
    ),
    Mistake(
        "params-complex",
        lambda h: SOLVER.init({"w": np.ones(3) * 1j}, h),
        r"`params\['w'\]` is complex128",
        "imaginary part as two",
    ),
    Mistake(
        "params-key", lambda h: SOLVER.init({"w": jax.random.key(0)}, h), r"`params\['w'\]` is key<fry>", "closing over"
    ),
    Mistake("hparams-complex", lambda h: SOLVER.init(PARAMS, 1j), "`hparams` is 1j", "imaginary part as two"),
    Mistake(
        "params-string", lambda h: SOLVER.init({"w": "init"}, h), r"`params\['w'\]` is 'init'", "give floating-point"
    ),
    Mistake(
        "params-object-array",
        lambda h: SOLVER.init({"w": np.array([1.0, None])}, h),
        r"`params\['w'\]` is object\[2\]",
        "give floating-point arrays",
    ),
    Mistake(
        "params-function",
        lambda h: SOLVER.init({"w": 0.0, "act": jnp.tanh}, h),
        r"`params\['act'\]`",
        "give floating-point",
    ),
    Mistake(
        "params-nan",
        lambda h: SOLVER.init({"w": NAN}, h),
        r"`params\['w'\]`.*1 entries.*index \[1\]",
        "Clean the values",
    ),
    Mistake(
        "params-overflow-in-float16",
        lambda h: SOLVER.init({"w": np.array([1e3, np.inf], np.float16)}, h),
        r"`params\['w'\]` is float16\[2\].*infinite",
        "Clean the values",
    ),
    Mistake(
        "params-a-whole-state",
        lambda h: SOLVER.init(InnerState(PARAMS), h),
        "`params` got a whole InnerState",
        r"pass its `\.params`",
    ),
    Mistake(
        "params-a-whole-solution",
        lambda h: SOLVER.init(solve(SOLVER, SOLVER.init(PARAMS, h), h, num_steps=1), h),
        "`params` got a whole Solution",
        r"pass its `\.params`",
    ),
    Mistake(
        "hparams-python-integer",
        lambda h: SOLVER.init(PARAMS, {"target": 1}),
        r"`hparams\['target'\]` is 1 ",
        r"`1\.0`",
    ),
    Mistake(
        "hparams-integer-array",
        lambda h: SOLVER.init(PARAMS, jnp.arange(3)),
        r"`hparams` is int64\[3\]",
        r"astype\(float\)",
    ),
    Mistake(
        "hparams-bool", lambda h: SOLVER.init(PARAMS, {"nesterov": True}), r"`hparams\['nesterov'\]`", "closing over it"
    ),
    Mistake("hparams-string", lambda h: SOLVER.init(PARAMS, {"lr": "0.1"}), r"`hparams\['lr'\]` is '0.1'", "or floats"),
    Mistake(
        "hparams-key",
        lambda h: SOLVER.init(PARAMS, {"target": np.ones(3), "key": jax.random.key(0)}),
        r"`hparams\['key'\]` is key",
        "keep it out of the tree",
    ),
    Mistake(
        "hparams-nan", lambda h: SOLVER.init(PARAMS, {"target": NAN}), r"`hparams\['target'\]`.*NaN", "Clean the values"
    ),
    Mistake(
        "hparams-object", lambda h: SOLVER.init(PARAMS, {"lr": object()}), r"`hparams\['lr'\]` is <obj", "or floats"
    ),
    # --- solve: solver, state, hparams ---
    Mistake(
        "solver-optax",
        lambda h: solve(SGD, PARAMS, h),
        "`solver` got Grad",
        r"write `jaxhpo\.from_optax\(train_loss, tx\)`",
    ),
    Mistake("solver-loss", lambda h: solve(loss, PARAMS, h), "`solver` got function", "make one with `from_optax`"),
    Mistake(
        "solver-class", lambda h: solve(jaxhpo.Solver, PARAMS, h), "`solver` got type", "make one with `from_optax`"
    ),
    Mistake(
        "state-params",
        lambda h: solve(SOLVER, PARAMS, h),
        "`state` got dict",
        r"pass `solver\.init\(params, hparams\)`",
    ),
    Mistake(
        "state-array",
        lambda h: solve(SOLVER, jnp.zeros(3), h),
        "`state` got",
        r"pass `solver\.init\(params, hparams\)`",
    ),
    Mistake(
        "state-none", lambda h: solve(SOLVER, None, h), "`state` got None", r"pass `solver\.init\(params, hparams\)`"
    ),
    Mistake(
        "state-uncalled", lambda h: solve(SOLVER, SOLVER.init, h), "`state` got function", r"pass `solver\.init\(params"
    ),
    Mistake(
        "state-of-another-library",
        lambda h: solve(SOLVER, TrainState(PARAMS, None), h, num_steps=3),
        "`state` got TrainState",
        r"pass `solver\.init\(params, hparams\)`",
    ),
    Mistake(
        "state-a-solution",
        lambda h: solve(SOLVER, solve(SOLVER, SOLVER.init(PARAMS, h), h, num_steps=1), h, num_steps=1),
        "`state` got Solution",
        r"pass its `\.state`",
    ),
    Mistake(
        "state-and-hparams-swapped",
        lambda h: solve(SOLVER, h, SOLVER.init(PARAMS, h), num_steps=3),
        "`state` got dict",
        r"pass `solver\.init\(params, hparams\)`",
    ),
    Mistake(
        "state-twice",
        lambda h: solve(SOLVER, SOLVER.init(PARAMS, h), SOLVER.init(PARAMS, h), num_steps=3),
        "`hparams` got a whole InnerState",
        r"write `solve\(solver, state, hparams, batches\)`",
    ),
    Mistake(
        "state-made-by-hand",
        lambda h: solve(from_optax(loss, optax.adam(0.1)), InnerState(PARAMS), h, num_steps=3),
        r"`state\.opt_state` has the tree",
        r"pass `solver\.init\(params, hparams\)`",
    ),
    Mistake(
        "state-of-another-solver",
        lambda h: solve(from_optax(loss, optax.adam(0.1)), SOLVER.init(PARAMS, h), h, num_steps=3),
        r"`state\.opt_state`.*made by another",
        r"the `\.state` of a solution of the same solver",
    ),
    Mistake(
        "state-of-another-model",
        lambda h: solve(
            momentum_sgd(loss, 0.1, 0.9),
            momentum_sgd(loss, 0.1, 0.9).init({"w": np.zeros(2)}, h)._replace(params=PARAMS),
            h,
            num_steps=3,
        ),
        r"`state\.opt_state\.velocity\['w'\]` is float64\[2\]",
        r"pass `solver\.init\(params, hparams\)`",
    ),
    Mistake(
        "state-with-nan",
        lambda h: solve(SOLVER, SOLVER.init(PARAMS, h)._replace(params={"w": NAN}), h, num_steps=3),
        r"`params\['w'\]`.*NaN",
        "Clean the values",
    ),
    Mistake(
        "solve-integer-hparams",
        lambda h: solve(SOLVER, SOLVER.init(PARAMS, h), {"target": np.arange(3)}, num_steps=3),
        r"`hparams\['target'\]` is int64",
        r"astype\(float\)",
    ),
    # --- solve: num_steps ---
    Mistake("steps-missing", lambda h: train(h, num_steps=None), "`batches=None`.*how many", "pass `num_steps=100`"),
    Mistake(
        "steps-missing-with-function",
        lambda h: train(h, data_loss, batches=lambda t: jnp.asarray(DATA)[t], num_steps=None),
        "`batches` a function",
        "pass `num_steps=100`",
    ),
    Mistake("steps-zero", lambda h: train(h, num_steps=0), "`num_steps` got 0", "write 1 or more"),
    Mistake("steps-negative", lambda h: train(h, num_steps=-5), "`num_steps` got -5", "write 1 or more"),
    Mistake("steps-float", lambda h: train(h, num_steps=1e3), r"`num_steps` got 1000\.0", "write a Python integer"),
    Mistake("steps-string", lambda h: train(h, num_steps="10"), "`num_steps` got '10'", "write a Python integer"),
    Mistake("steps-bool", lambda h: train(h, num_steps=True), "`num_steps` got True", "write a Python integer"),
    Mistake(
        "steps-array",
        lambda h: train(h, num_steps=jax.device_put(np.int32(3))),
        "`num_steps`",
        "Python integer",
        jit=False,
    ),
    Mistake(
        "steps-traced",
        lambda h: jax.jit(lambda T: train(h, num_steps=T))(3),
        "`num_steps` is traced",
        "pass a Python integer, or jit with `static_argnames",
    ),
    Mistake("steps-range", lambda h: train(h, num_steps=range(3)), r"`num_steps` got range", "write a Python integer"),
    Mistake(
        "steps-unlike-batches",
        lambda h: train(h, data_loss, batches=DATA, num_steps=10),
        "`batches` holds 4 steps, but `num_steps=10`",
        "omit `num_steps`, or cut the batches.*pass `lambda t: batch`",
    ),
    # --- solve: batches ---
    Mistake(
        "batches-number", lambda h: train(h, batches=100), "`batches` got the integer 100", "write `num_steps=100`"
    ),
    Mistake("batches-empty", lambda h: train(h, batches={}, num_steps=3), "`batches` got {}", "pass arrays"),
    Mistake("batches-scalar", lambda h: train(h, batches={"x": 1.0}), r"`batches\['x'\]`", "add it.*or close over"),
    Mistake(
        "batches-different-lengths",
        lambda h: train(h, batches={"x": DATA, "y": DATA[:3]}),
        "`batches` has leading axes of different lengths",
        "cut them to the same length",
    ),
    Mistake(
        "batches-of-length-zero",
        lambda h: train(h, batches=DATA[:0], num_steps=None),
        "`batches`.*length 0",
        "at least one",
    ),
    Mistake("batches-iterator", lambda h: train(h, batches=iter(DATA)), "`batches` got", "stack.*pass one function"),
    Mistake(
        "batches-generator", lambda h: train(h, batches=(x for x in DATA)), "`batches` got <gen", "stack.*one function"
    ),
    Mistake(
        "batches-zip", lambda h: train(h, batches=zip(DATA, DATA, strict=True)), "`batches` got <zip", "stack.*function"
    ),
    Mistake(
        "batches-loader", lambda h: train(h, batches=Loader()), "`batches` got <.*Loader", "stack.*pass one function"
    ),
    Mistake(
        "batches-tree-of-functions",
        lambda h: train(h, batches={"x": lambda t: DATA[0]}),
        "`batches` got {'x': <function",
        "pass one function",
    ),
    Mistake(
        "batches-list-of-pairs",
        lambda h: train(h, data_loss, batches=[(DATA, DATA), (DATA, DATA), (DATA, DATA)]),
        "`batches` got a list of 3 batches",
        r"jnp\.stack.*write them as a tuple",
    ),
    Mistake(
        "batches-list-of-arrays",
        lambda h: train(h, data_loss, batches=[DATA, DATA], num_steps=None),
        "`batches` got a list of 2 batches",
        r"jnp\.stack",
    ),
    Mistake(
        "batches-list-with-a-short-one",
        lambda h: train(h, data_loss, batches=[{"x": DATA}, {"x": DATA[:3]}]),
        "`batches` got a list of 2 batches",
        r"stack equal batches",
    ),
    Mistake(
        "batches-strings", lambda h: train(h, batches=np.array(["a", "b", "c"])), r"`batches` is <U1\[3\]", "convert it"
    ),
    Mistake("batches-path", lambda h: train(h, batches="data.npz"), r"`batches` is 'data\.npz'", "convert it"),
    Mistake(
        "batches-records",
        lambda h: train(h, batches=np.zeros(3, [("x", float), ("y", int)])),
        "`batches` is .*'x'.*'y'",
        "convert it to numbers",
    ),
    Mistake(
        "batches-objects",
        lambda h: train(h, batches=[np.array([1, None, 2])]),
        r"`batches\[0\]` is object",
        "convert it",
    ),
    Mistake(
        "batches-nan",
        lambda h: train(h, data_loss, batches=np.where(DATA > 0, np.nan, 0), num_steps=None),
        r"`batches` is float64\[4, 3\] with 12 entries",
        "Clean the values, or mask them",
    ),
    Mistake("batches-rule", lambda h: train(h, batches=Unroll()), r"`batches` is Unroll\(", "convert it|`adjoint="),
    Mistake(
        "batches-function-of-no-argument",
        lambda h: train(h, data_loss, batches=lambda: DATA[0]),
        "`batches` got a function",
        r"write it as `batches\(step\)`",
    ),
    Mistake(
        "batches-function-of-two-arguments",
        lambda h: train(h, data_loss, batches=lambda key, step: DATA[0]),
        r"`batches`.*\(key, step\)",
        r"write it as `batches\(step\)`",
    ),
    Mistake(
        "batches-function-returns-none",
        lambda h: train(h, data_loss, batches=lambda t: None),
        r"`batches\(step\)` returned None",
        "`return batch`",
    ),
    Mistake(
        "batches-function-returns-strings",
        lambda h: train(h, data_loss, batches=lambda t: {"x": "a"}),
        r"`batches\(step\)\['x'\]` is 'a'",
        "convert it to numbers",
    ),
    # --- solve: tol, condition_batch, key ---
    Mistake(
        "tol-with-unroll",
        lambda h: train(h, tol=1e-3),
        r"`tol=0\.001`.*Unroll\(",
        r"omit `tol`, or use `adjoint=Implicit\(\.\.\.\)`",
    ),
    Mistake("tol-string", lambda h: train(h, tol="1e-3", adjoint=Implicit()), "`tol` got '1e-3'", "float such as"),
    Mistake(
        "tol-negative", lambda h: train(h, tol=-1e-3, adjoint=Implicit()), r"`tol` got -0\.001", "at least 0: write"
    ),
    Mistake("tol-nan", lambda h: train(h, tol=float("nan"), adjoint=Implicit()), "`tol` got nan", "must be finite"),
    Mistake(
        "tol-nan-array",
        lambda h: train(h, tol=jax.device_put(np.float32(np.nan)), adjoint=Implicit()),
        "`tol` got nan",
        "finite",
        jit=False,
    ),
    Mistake("tol-bool", lambda h: train(h, tol=True, adjoint=Implicit()), "`tol` got True", "float such as"),
    Mistake(
        "tol-vector", lambda h: train(h, tol=h["target"] + 0, adjoint=Implicit()), r"`tol`.*\[3", "write|float such as"
    ),
    Mistake(
        "condition-batch-of-another-tree",
        lambda h: train(h, data_loss, batches=DATA, num_steps=None, condition_batch={"x": DATA}, adjoint=Implicit()),
        "`condition_batch` has the tree",
        "give it the tree of a step's batch",
    ),
    Mistake(
        "condition-batch-without-batches",
        lambda h: train(h, condition_batch=DATA, adjoint=Implicit()),
        "`condition_batch` has the tree",
        "give it the tree of a step's batch",
    ),
    Mistake(
        "condition-batch-strings",
        lambda h: train(h, data_loss, batches=DATA, num_steps=None, condition_batch="all"),
        "`condition_batch` is 'all'",
        "convert it",
    ),
    Mistake(
        "condition-batch-nan",
        lambda h: train(h, data_loss, batches=DATA, num_steps=None, condition_batch=NAN, adjoint=Implicit()),
        "`condition_batch`.*NaN",
        "Clean the values",
    ),
    Mistake("key-integer", lambda h: train(h, key=0), "`key` got 0", r"write `jax\.random\.key\(0\)`"),
    Mistake(
        "key-old-style", lambda h: train(h, key=OLD_KEY), r"`key` got uint32\[2\]", "write `jax.random.wrap_key_data"
    ),
    Mistake(
        "key-old-style-traced",
        lambda h: train(h, key=jax.random.PRNGKey(0)),
        r"`key` got uint32\[2\]",
        r"write `jax\.random\.wrap_key_data\(key\)`",
    ),
    Mistake(
        "key-several",
        lambda h: train(h, key=jax.random.split(jax.random.key(0), 2)),
        r"`key`.*shape \(2,\)",
        "index it",
    ),
    # --- solve: adjoint ---
    Mistake(
        "adjoint-class", lambda h: train(h, adjoint=Unroll), "`adjoint` got the class Unroll", r"write `Unroll\(\)`"
    ),
    Mistake(
        "adjoint-implicit-class", lambda h: train(h, adjoint=Implicit), "`adjoint` got the class", r"`Implicit\(\)`"
    ),
    Mistake("adjoint-string", lambda h: train(h, adjoint="unroll"), "`adjoint` got 'unroll'", r"write `Unroll\(\)`"),
    Mistake(
        "adjoint-stateful-method",
        lambda h: train(h, adjoint=jaxhpo.HOAG()),
        r"`adjoint` got HOAG\(.*keeps state",
        r"write `hypergradient\(HOAG\(",
    ),
    Mistake("adjoint-none", lambda h: train(h, adjoint=None), "`adjoint` got None", r"write `Unroll\(\)`"),
    Mistake(
        "adjoint-linear-solver",
        lambda h: train(h, adjoint=CG(20)),
        r"`adjoint` got CG\(",
        r"write `Implicit\(CG\(maxiter=20",
    ),
    Mistake(
        "adjoint-linear-solver-class",
        lambda h: train(h, adjoint=CG),
        "`adjoint` got the class CG",
        r"`Implicit\(CG\(\.\.\.\)\)`",
    ),
    # --- the settings of rules and linear solvers ---
    Mistake(
        "checkpoint-unknown",
        lambda h: Unroll(checkpoint="log"),
        r"`Unroll\(checkpoint=.*'log'",
        "write 'auto', 'sqrt', 'binomial', an integer",
    ),
    Mistake("checkpoint-zero", lambda h: Unroll(checkpoint=0), r"`Unroll\(checkpoint=.*got 0", "write 1 or more"),
    Mistake("checkpoint-float", lambda h: Unroll(checkpoint=2.5), r"`Unroll\(checkpoint=.*got 2\.5", "Python integer"),
    Mistake("checkpoint-bool", lambda h: Unroll(checkpoint=True), r"`Unroll\(checkpoint=.*got True", "Python integer"),
    Mistake(
        "memory-limit-unknown",
        lambda h: Unroll(memory_limit="gpu"),
        r"`Unroll\(memory_limit=.*'gpu'",
        "a number of bytes, or 'device'",
    ),
    Mistake("truncate-zero", lambda h: Unroll(truncate=0), r"`Unroll\(truncate=.*got 0", "write 1 or more"),
    Mistake("truncate-string", lambda h: Unroll(truncate="all"), r"`Unroll\(truncate=.*'all'", "Python integer"),
    Mistake("implicit-class", lambda h: Implicit(CG), "`linear_solver` got the class CG", r"write `CG\(\.\.\.\)`"),
    Mistake("implicit-string", lambda h: Implicit("cg"), "`linear_solver` got 'cg'", r"write `CG\(\)`"),
    Mistake(
        "implicit-of-unroll",
        lambda h: Implicit(Unroll()),
        r"`linear_solver` got Unroll\(",
        r"as `adjoint=Unroll\(.*`CG\(\)`",
    ),
    Mistake(
        "implicit-of-implicit",
        lambda h: Implicit(Implicit()),
        r"`linear_solver` got Implicit\(",
        r"as `adjoint=Implicit\(",
    ),
    Mistake("implicit-number", lambda h: Implicit(20), "`linear_solver` got 20", r"write `CG\(\)`"),
    Mistake(
        "implicit-solver-of-one-argument",
        lambda h: Implicit(lambda b: b),
        r"`linear_solver`.*`\(b\)`",
        r"write it as `linear_solver\(matvec, b, x0=None\)`",
    ),
    Mistake(
        "implicit-solver-without-report",
        lambda h: jax.grad(lambda h: total(train(h, adjoint=Implicit(lambda matvec, b: b))))({"target": h["target"]}),
        "`linear_solver` returned",
        r"write `return x, info`",
    ),
    Mistake(
        "implicit-solver-flattens",
        lambda h: jax.grad(
            lambda h: total(train(h, adjoint=Implicit(lambda matvec, b: (jnp.concatenate(jax.tree.leaves(b)), None))))
        )({"target": h["target"]}),
        "`linear_solver` returned the tree",
        "return one array per leaf of `b`",
    ),
    Mistake(
        "implicit-solver-of-integers",
        lambda h: system(lambda matvec, b: (jnp.zeros(3, int), None)),
        r"`linear_solver` returned int64\[3\] for `b`",
        "return one array per leaf of `b`, .* floating-point",
    ),
    Mistake(
        "implicit-solver-status-alone",
        lambda h: system(lambda matvec, b: (b, LinearStatus.CONVERGED)),
        r"`linear_solver` returned .*CONVERGED",
        "write `return x, info`, a `LinearInfo`",
    ),
    Mistake(
        "implicit-solver-status-in-words",
        lambda h: system(lambda matvec, b: (b, LinearInfo(status="CONVERGED"))),
        "`linear_solver` returned a report whose `status` is 'CONVERGED'",
        r"write `LinearInfo\(residual, num_iterations, LinearStatus.CONVERGED\)`",
    ),
    Mistake(
        "implicit-solver-residual-vector",
        lambda h: system(lambda matvec, b: (b, LinearInfo(residual=b - matvec(b)))),
        r"report whose `residual` is float64\[3\]",
        "one number",
    ),
    Mistake(
        "implicit-solver-loop-of-constants",
        lambda h: jax.shard_map(
            lambda h: system(lambda matvec, b: (jax.lax.fori_loop(0, 3, lambda _, x: b + x, jnp.zeros(3)), None), h),
            mesh=jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=jax.P("data"),
            out_specs=jax.P("data"),
        )(h["target"]),
        r"`linear_solver` raised TypeError under `shard_map`.*\['data'\]",
        r"begin with `jnp.zeros_like\(b\)`",
    ),
    Mistake(
        "cg-fallback-without-report",
        lambda h: system(CG(fallback=lambda matvec, b: b)),
        r"`CG\(fallback=\.\.\.\)` returned float64\[3\]",
        r"write `return x, info`",
    ),
    Mistake("cg-zero-iterations", lambda h: CG(maxiter=0), r"`CG\(maxiter=.*got 0", "write 1 or more"),
    Mistake("cg-float-iterations", lambda h: CG(1e-6), r"`CG\(maxiter=.*got 1e-06", "Python integer"),
    Mistake("cg-zero-tol", lambda h: CG(tol=0), r"`CG\(tol=.*got 0", "above 0: write"),
    Mistake("cg-string-tol", lambda h: CG(tol="1e-6"), r"`CG\(tol=.*'1e-6'", "float such as"),
    Mistake("cg-negative-damping", lambda h: CG(damping=-1.0), r"`CG\(damping=.*-1\.0", "at least 0: write"),
    Mistake("cg-traced-damping", lambda h: CG(damping=h["lr"] + jnp.zeros(())), r"`CG\(damping=", "a Python float"),
    Mistake("neumann-zero-terms", lambda h: Neumann(0, 0.1), r"`Neumann\(num_terms=.*got 0", "write 1 or more"),
    Mistake("neumann-swapped", lambda h: Neumann(0.1, 20), r"`Neumann\(num_terms=.*got 0\.1", "Python integer"),
    Mistake("neumann-step-zero", lambda h: Neumann(20, 0.0), r"`Neumann\(step_size=.*got 0\.0", "above 0: write"),
    Mistake("neumann-step-nan", lambda h: Neumann(20, np.nan), r"`Neumann\(step_size=.*nan", "finite.*write"),
    Mistake("neumann-step-none", lambda h: Neumann(20, None), r"`Neumann\(step_size=.*None", "float such as"),
    Mistake("identity-negative", lambda h: Identity(-0.1), r"`Identity\(scale=.*-0\.1", "above 0: write"),
    Mistake("identity-array", lambda h: Identity(np.ones(3)), r"`Identity\(scale=.*float64\[3\]", "float such as"),
    Mistake("direct-string", lambda h: Direct("lu"), r"`Direct\(damping=.*'lu'", "float such as"),
    Mistake("direct-infinite", lambda h: Direct(np.inf), r"`Direct\(damping=.*inf", "finite.*write"),
    # --- hypergradients that are zero ---
    Mistake(
        "zero-rate-under-implicit",
        lambda h: jax.grad(lambda h: total(train(h, tx=lambda h: optax.sgd(h["lr"]), adjoint=Implicit())))(h),
        r"hparams\['lr'\].*Implicit\(",
        r"`Unroll\(\)` sees it",
        ZeroHypergradientWarning,
    ),
    Mistake(
        "zero-unused-under-implicit",
        lambda h: jax.grad(lambda h: total(train(h, adjoint=Implicit(Identity(0.1)))))(h),
        r"hparams\['lr'\].*Implicit\(",
        "if nothing uses it, remove it",
        ZeroHypergradientWarning,
    ),
    Mistake(
        "zero-initial-params-under-implicit",
        lambda h: jax.grad(lambda w: total(train(h, params={"w": w}, adjoint=Implicit())))(jnp.ones(3)),
        r"state\.params\['w'\].*initial",
        r"`Unroll\(\)` sees it",
        ZeroHypergradientWarning,
    ),
    Mistake(
        "zero-initial-params-under-truncation",
        lambda h: jax.grad(lambda w: total(train(h, params={"w": w}, adjoint=Unroll(truncate=1))))(jnp.ones(3)),
        r"state\.params\['w'\].*initial",
        "`Unroll\\(\\)` without `truncate` sees it",
        ZeroHypergradientWarning,
    ),
    Mistake(
        "zero-schedule-under-truncation",
        lambda h: jax.grad(
            lambda r: total(
                train(
                    {"target": h["target"], "r": r},
                    tx=lambda h: optax.sgd(lambda t: h["r"][t]),
                    adjoint=Unroll(truncate=1),
                )
            )
        )(jnp.full(3, 0.1)),
        r"hparams\['r'\].*last 1 of 3",
        "`Unroll\\(\\)` without `truncate` sees all",
        ZeroHypergradientWarning,
    ),
    Mistake(
        "zero-unused-argument-of-implicit",
        lambda h: jax.grad(lambda a: total(implicit(lambda p, a: {"w": p["w"] - a[0]}, PARAMS, a)), allow_int=True)(
            (h["target"] + 0.0, h["lr"] + 0.0)
        ),
        r"args\[1\]",
        "Put it into the condition",
        ZeroHypergradientWarning,
    ),
    # --- implicit ---
    Mistake(
        "implicit-condition-string",
        lambda h: implicit("ridge", PARAMS, h),
        "`condition` got 'ridge'",
        r"give a function `condition\(params, args\)`",
    ),
    Mistake(
        "implicit-condition-of-three-arguments",
        lambda h: implicit(lambda params, hparams, batch: params, PARAMS, h),
        "`condition`.*called with 2",
        r"write it as `condition\(params, args\)`",
    ),
    Mistake(
        "implicit-objective",
        lambda h: implicit(lambda p, h: loss(p, h, None), PARAMS, h),
        "`condition` returned the tree",
        r"`jax\.grad\(objective\)`",
    ),
    Mistake(
        "implicit-condition-shape",
        lambda h: implicit(lambda p, h: {"w": p["w"][:2]}, PARAMS, h),
        r"`condition` returned float64\[2\] for `params\['w'\]`",
        "of the same shape",
    ),
    Mistake(
        "implicit-condition-none", lambda h: implicit(returning(None), PARAMS, h), "`condition` returned", "return one"
    ),
    Mistake(
        "implicit-condition-strings",
        lambda h: implicit(returning({"w": "0"}), PARAMS, h),
        r"`condition` returned '0'",
        "return",
    ),
    Mistake(
        "implicit-params-integer", lambda h: implicit(returning(0), np.arange(3), h), "`params` is int64", "astype"
    ),
    Mistake(
        "implicit-params-nan",
        lambda h: implicit(lambda p, a: p, {"w": NAN}, h),
        r"`params\['w'\]`.*NaN",
        "Clean the values",
    ),
    Mistake("implicit-params-empty", lambda h: implicit(lambda p, a: p, [], h), r"`params` got \[\]", "give a pytree"),
    Mistake("implicit-args-string", lambda h: implicit(lambda p, a: p, PARAMS, "l2"), "`args` is 'l2'", "convert it"),
    Mistake(
        "implicit-args-nan",
        lambda h: implicit(lambda p, a: p, PARAMS, {"x": NAN}),
        r"`args\['x'\]`.*NaN",
        "Clean the values",
    ),
    Mistake(
        "implicit-given-a-rule",
        lambda h: implicit(lambda p, a: p, PARAMS, h, Implicit()),
        r"`linear_solver` got Implicit\(",
        r"`CG\(\)`",
    ),
    Mistake(
        "implicit-function-without-like",
        lambda h: implicit(lambda p, a: p, lambda a: PARAMS["w"], h),
        "`params` got the function.*not known before it runs",
        r"`like=jnp\.zeros\(10\)`",
    ),
    Mistake(
        "implicit-like-without-function",
        lambda h: implicit(lambda p, a: p, 1.0, h, like=jnp.zeros(3)),
        "`params` got 1.0",
        r"give a function `params\(args\)`",
    ),
    Mistake(
        "implicit-on-failure",
        lambda h: implicit(lambda p, a: p, PARAMS, h, on_failure=None),
        r"`implicit\(on_failure=\.\.\.\)` got None",
        "'nan'.*or 'keep'",
    ),
    Mistake(
        "implicit-rule-on-failure",
        lambda h: Implicit(on_failure="raise"),
        r"`Implicit\(on_failure=\.\.\.\)` got 'raise'",
        "'nan'.*or 'keep'",
    ),
    Mistake(
        "cg-fallback",
        lambda h: CG(fallback="gmres"),
        r"`CG\(fallback=\.\.\.\)` got 'gmres'",
        "give a function `fallback",
    ),
    # --- transforms ---
    Mistake("positive-zero", lambda h: positive.inverse(0.0), r"`positive\.inverse`.*got 0", r"such as 1e-6"),
    Mistake("positive-integer", lambda h: positive.inverse(1), r"`positive\.inverse` got", r"Write `1\.0`"),
    Mistake("positive-string", lambda h: positive.forward("1.0"), r"`positive\.forward` got '1\.0'", "astype"),
    Mistake(
        "unit-interval-one", lambda h: unit_interval.inverse(1.0), r"`unit_interval\.inverse`.*got 1", r"Start inside"
    ),
    Mistake(
        "unit-interval-percent", lambda h: unit_interval.inverse(90.0), r"`unit_interval.*got 90", r"`box\(low, high\)`"
    ),
    Mistake("box-swapped", lambda h: box(1.0, 0.0), r"`box\(1\.0, 0\.0\)`", "smaller bound first"),
    Mistake("box-infinite", lambda h: box(0.0, np.inf), r"`box.*inf", r"`low \+ h`"),
    Mistake("box-string", lambda h: box("0", 1.0), r"`box.*'0'", r"`box\(0\.0, 0\.9\)`"),
    Mistake("box-none", lambda h: box(None, 1.0), r"`box.*None", r"`box\(0\.0, 0\.9\)`"),
    Mistake("box-shapes", lambda h: box(np.zeros(2), np.ones(3)), r"`box.*shape", r"Give numbers|`box\(0\.0, 0\.9\)`"),
    Mistake(
        "box-outside", lambda h: box(0.0, 1.0).inverse(2.0), r"`box\(0\.0, 1\.0\)\.inverse`.*got 2", "widen the box"
    ),
    Mistake("simplex-sum", lambda h: simplex.inverse(np.ones(3)), r"`simplex\.inverse`.*sum of 3", r"h\.sum\("),
    Mistake(
        "simplex-zero", lambda h: simplex.inverse(np.array([0.0, 1.0])), "`simplex.inverse`.*got 0", "such as 1e-6"
    ),
    Mistake("simplex-scalar", lambda h: simplex.forward(0.5), r"`simplex\.forward`.*shape \(\)", "use `unit_interval`"),
    # --- check_hypergradient ---
    Mistake(
        "check-not-callable",
        lambda h: check_hypergradient(0.3, HPARAMS),
        r"`outer_loss` got 0\.3",
        r"give a function `outer_loss\(hparams\)`",
        jit=False,
    ),
    Mistake(
        "check-of-two-arguments",
        lambda h: check_hypergradient(lambda h, batch: 0.0, HPARAMS),
        r"`outer_loss`.*\(h, batch\)",
        r"write it as `outer_loss\(hparams\)`",
        jit=False,
    ),
    Mistake(
        "check-integers", lambda h: check_hypergradient(outer, {"lr": 1}), r"`hparams\['lr'\]`", r"`1\.0`", jit=False
    ),
    Mistake("check-empty", lambda h: check_hypergradient(outer, {}), "`hparams` got {}", "give a pytree", jit=False),
    Mistake(
        "check-nan",
        lambda h: check_hypergradient(outer, {"target": NAN}),
        r"`hparams\['target'\]`",
        "Clean the",
        jit=False,
    ),
    Mistake(
        "check-vector",
        lambda h: check_hypergradient(lambda h: h["target"], HPARAMS),
        r"`outer_loss` returned shape \(3,\)",
        r"take `\.mean\(\)`",
        jit=False,
    ),
    Mistake(
        "check-metrics",
        lambda h: check_hypergradient(lambda h: (outer(h), 0.5), HPARAMS),
        "`outer_loss` returned a tuple of 2",
        "return the loss alone",
        jit=False,
    ),
    Mistake(
        "check-returns-none",
        lambda h: check_hypergradient(returning(None), HPARAMS),
        "`outer_loss` returned None",
        "return a scalar",
        jit=False,
    ),
    Mistake(
        "check-directions-zero",
        lambda h: check_hypergradient(outer, HPARAMS, num_directions=0),
        "`num_directions` got 0",
        "write 1 or more",
        jit=False,
    ),
    Mistake(
        "check-directions-float",
        lambda h: check_hypergradient(outer, HPARAMS, num_directions=8.0),
        "`num_directions` got 8.0",
        "Python integer",
        jit=False,
    ),
    Mistake(
        "check-step-zero",
        lambda h: check_hypergradient(outer, HPARAMS, step_size=0.0),
        "`step_size` got 0.0",
        "above 0: write",
        jit=False,
    ),
    Mistake(
        "check-step-string",
        lambda h: check_hypergradient(outer, HPARAMS, step_size="1e-3"),
        "`step_size` got '1e-3'",
        "float such as",
        jit=False,
    ),
    Mistake(
        "check-key",
        lambda h: check_hypergradient(outer, HPARAMS, key=7),
        "`key` got 7",
        r"`jax\.random\.key\(0\)`",
        jit=False,
    ),
    Mistake(
        "check-ignored-leaf",
        lambda h: check_hypergradient(lambda h: jnp.sum(h["target"] ** 2), HPARAMS),
        r"`hparams\['lr'\]`",
        "Remove it, or use it",
        ZeroHypergradientError,
        jit=False,
    ),
    Mistake(
        "check-nan-loss",
        lambda h: check_hypergradient(lambda h: jnp.sum(jnp.log(-h["target"])), {"target": np.ones(3)}),
        "outer loss is nan",
        r"logarithm of -1: bound its argument",
        NonFiniteError,
        jit=False,
    ),
    # --- tune ---
    Mistake(
        "tune-none",
        lambda h: search(None),
        "`outer_loss` got None",
        r"pass a function `outer_loss\(hparams\)`",
        jit=False,
    ),
    Mistake("tune-value", lambda h: search(0.3), r"`outer_loss` got 0\.3", r"give a function", jit=False),
    Mistake(
        "tune-two-arguments",
        lambda h: search(lambda h, key: 0.0),
        r"`outer_loss`.*\(h, key\)",
        r"`outer_loss\(hparams\)` or `outer_loss\(hparams, carry, key\)`",
        jit=False,
    ),
    Mistake(
        "tune-vector",
        lambda h: search(lambda h: h["target"]),
        "`outer_loss` returned shape",
        r"take `\.mean\(\)`",
        jit=False,
    ),
    Mistake(
        "tune-returns-none",
        lambda h: search(returning(None)),
        "`outer_loss` returned None",
        "return a scalar",
        jit=False,
    ),
    Mistake(
        "tune-returns-metrics",
        lambda h: search(lambda h: (outer(h), {})),
        "`outer_loss` returned a tuple of 2",
        "return the loss alone",
        jit=False,
    ),
    Mistake(
        "tune-forgets-the-carry",
        lambda h: search(lambda h, carry, key: outer(h)),
        r"`outer_loss\(hparams, carry, key\)` returned",
        r"return `\(value, carry, info\)`",
        jit=False,
    ),
    Mistake(
        "tune-reports-strings",
        lambda h: search(lambda h, carry, key: (outer(h), carry, {"name": "run"})),
        r"`info\['name'\]` is 'run'",
        "leave it out of the tree",
        jit=False,
    ),
    Mistake(
        "tune-carries-an-object",
        lambda h: search(lambda h, carry, key: (outer(h), carry, None), carry={"solver": "adam"}),
        r"`carry\['solver'\]` is 'adam'",
        "leave it out of the tree",
        jit=False,
    ),
    Mistake("tune-integers", lambda h: search(hparams={"k": 3}), r"`hparams\['k'\]` is 3", r"`1\.0`", jit=False),
    Mistake("tune-nan-start", lambda h: search(hparams={"target": NAN}), r"`hparams\['target'\]`", "Clean", jit=False),
    Mistake(
        "tune-optimiser-name",
        lambda h: search(optimizer="adam"),
        "`optimizer` got 'adam'",
        r"`optax\.adam\(",
        jit=False,
    ),
    Mistake(
        "tune-optimiser-uncalled",
        lambda h: search(optimizer=optax.adam),
        "`optimizer` got",
        r"`optax\.adam\(",
        jit=False,
    ),
    Mistake(
        "tune-optimiser-rate", lambda h: search(optimizer=0.1), r"`optimizer` got 0\.1", r"`optax\.adam\(0", jit=False
    ),
    Mistake(
        "tune-optimiser-class", lambda h: search(optimizer=Optimiser), "`optimizer` got", r"`optax\.adam\(", jit=False
    ),
    Mistake(
        "tune-optimiser-solver", lambda h: search(optimizer=SOLVER), "`optimizer` got", r"`optax\.adam\(", jit=False
    ),
    Mistake("tune-steps-zero", lambda h: search(num_steps=0), "`num_steps` got 0", "write 1 or more", jit=False),
    Mistake("tune-steps-float", lambda h: search(num_steps=1e2), "`num_steps` got 100.0", "Python integer", jit=False),
    Mistake("tune-steps-none", lambda h: search(num_steps=None), "`num_steps` got None", "Python integer", jit=False),
    Mistake("tune-patience-zero", lambda h: search(patience=0), "`patience` got 0", "write 1 or more", jit=False),
    Mistake("tune-patience-string", lambda h: search(patience="3"), "`patience` got '3'", "Python integer", jit=False),
    Mistake("tune-delta-negative", lambda h: search(min_delta=-1.0), "`min_delta` got -1.0", "at least 0", jit=False),
    Mistake("tune-delta-nan", lambda h: search(min_delta=np.nan), "`min_delta` got nan", "finite", jit=False),
    Mistake(
        "tune-callback",
        lambda h: search(callbacks=print),
        "`callbacks` got",
        r"write `callbacks=\[callback\]`",
        jit=False,
    ),
    Mistake(
        "tune-callbacks-answer",
        lambda h: search(callbacks=[lambda step: np.ones(2)]),
        "`callbacks`: one returned",
        "return True, or nothing",
        jit=False,
    ),
    Mistake("tune-window", lambda h: search(score_window=0), "`score_window` got 0", "write 1 or more", jit=False),
    Mistake("tune-resume", lambda h: search(resume=True), "`resume` got True", "'warn' or 'continue'", jit=False),
    Mistake("tune-progress", lambda h: search(progress="no"), "`progress` got 'no'", "write True or False", jit=False),
    Mistake(
        "tune-save-every-negative",
        lambda h: search(save_every=datetime.timedelta(seconds=-5)),
        "`save_every` got .*a negative time",
        "write a positive one",
        jit=False,
    ),
    Mistake(
        "tune-run-dir-empty", lambda h: search(run_dir=""), "`run_dir` got '', where no", "name a folder", jit=False
    ),
    Mistake(
        "tune-callbacks-number", lambda h: search(callbacks=5), "`callbacks` got 5", r"`callbacks=\[callb", jit=False
    ),
    Mistake(
        "tune-callbacks-string",
        lambda h: search(callbacks=["log"]),
        "`callbacks` got 'log'",
        "give a function",
        jit=False,
    ),
    Mistake(
        "tune-callback-of-no-argument",
        lambda h: search(callbacks=[lambda: None]),
        "`callbacks` got a function",
        r"write it as `callback\(tune_step\)`",
        jit=False,
    ),
    Mistake("tune-key-integer", lambda h: search(key=0), "`key` got 0", r"write `jax\.random\.key\(0\)`", jit=False),
    Mistake("tune-key-old-style", lambda h: search(key=OLD_KEY), r"`key` got uint32\[2\]", "wrap_key_data", jit=False),
    Mistake(
        "tune-gradient-value", lambda h: search(gradient=1.0), r"`gradient` got 1\.0", "give a function", jit=False
    ),
    Mistake(
        "tune-gradient-pair",
        lambda h: search(gradient=jaxhpo.hypergradient(jaxhpo.RealTime(), SOLVER, lambda s, h, b: 0.0, num_steps=1)),
        "`gradient` got a pair",
        r"write `gradient=from_pair\(pair\)`",
        jit=False,
    ),
    Mistake(
        "tune-gradient-of-one-argument",
        lambda h: search(gradient=lambda h: h),
        "`gradient` got a function",
        r"write it as `gradient\(hparams, carry, key\)`",
        jit=False,
    ),
    Mistake(
        "tune-gradient-of-value-and-grad",
        lambda h: search(gradient=lambda h, carry, key: jax.value_and_grad(outer)(h)),
        "`gradient.*` returned",
        r"return `\(value, hypergradient, carry, info\)`",
        jit=False,
    ),
    Mistake(
        "tune-gradient-of-one-leaf",
        lambda h: search(gradient=lambda h, carry, key: (outer(h), {"lr": h["lr"]}, None, None)),
        "`gradient` returned the tree",
        "return one array per leaf of `hparams`",
        jit=False,
    ),
    Mistake(
        "tune-transform-name", lambda h: search(transforms="positive"), "`transforms` is 'pos", "`positive`", jit=False
    ),
    Mistake(
        "tune-transform-class",
        lambda h: search(transforms={"target": None, "lr": box}),
        "`transforms` got the class box",
        r"write `box\(",
        jit=False,
    ),
    Mistake(
        "tune-transform-missing",
        lambda h: search(transforms={"lr": positive}),
        r"`transforms.*target|target.*`transforms`",
        "transform.*None",
        jit=False,
    ),
    Mistake(
        "tune-transform-misspelt",
        lambda h: search(transforms={"target": None, "lr": None, "rate": positive}),
        "`transforms.*rate",
        "transform.*None|correct its name",
        jit=False,
    ),
    Mistake(
        "tune-start-outside",
        lambda h: search(transforms={"target": None, "lr": positive}, hparams={"target": np.ones(3), "lr": 0.0}),
        r"`hparams\['lr'\]`",
        "Start from a small positive value",
        jit=False,
    ),
    Mistake(
        "tune-nan-loss",
        lambda h: search(lambda h: jnp.sum(jnp.sqrt(-h["target"])), {"target": np.ones(3)}),
        "Outer step 0: The outer loss is nan",
        r"square root of -1: write `sqrt\(maximum\(x, 0\) \+ eps\)`",
        NonFiniteError,
        jit=False,
    ),
    Mistake(
        "tune-ignored-leaf",
        lambda h: search(lambda h: jnp.sum(h["target"] ** 2)),
        r"`hparams\['lr'\]`",
        "Remove it, or use it",
        ZeroHypergradientError,
        jit=False,
    ),
    Mistake(
        "tune-rate-under-implicit",
        lambda h: search(lambda h: total(train(h, tx=lambda h: optax.sgd(h["lr"]), adjoint=Implicit(Identity(0.1))))),
        r"`hparams\['lr'\]`",
        r"`Unroll\(\)` sees it",
        ZeroHypergradientError,
        jit=False,
    ),
]

BY_ID = pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.id)


def expect(mistake, call, h):
    if issubclass(mistake.expected, Warning):
        with pytest.warns(mistake.expected) as caught:
            call(h)
        message = " ".join(str(w.message) for w in caught)
    else:
        with pytest.raises(JaxhpoError) as caught:
            call(h)
        assert caught.type is mistake.expected
        message = str(caught.value)
    assert re.search(mistake.culprit, message, re.DOTALL), message
    assert re.search(mistake.remedy, message, re.DOTALL), message


@BY_ID
def test_mistake(mistake):
    expect(mistake, mistake.call, HPARAMS)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.jit], ids=lambda m: m.id)
def test_mistake_while_tracing(mistake):
    """Inside a jitted function, with traced hyperparameters: raised before anything is compiled."""

    def call(h):
        mistake.call(h)  # its result, if any, need not be an array

    expect(mistake, jax.jit(call).trace, HPARAMS)


def test_mistakes_are_distinct(record_property):
    ids = [m.id for m in MISTAKES]
    assert len(set(ids)) == len(ids) >= 80
    record_property("mistakes", len(ids))
    print(f"{len(ids)} distinct mistakes, {sum(m.jit for m in MISTAKES)} of them also while tracing")


@pytest.mark.parametrize(
    "error", [KeyError("targt"), ZeroDivisionError("division"), TypeError("their own"), JaxhpoError("x")]
)
def test_exceptions_of_user_functions_propagate_unchanged(error):
    def broken(*args):
        raise error

    for call in (
        lambda: train(HPARAMS, broken),
        lambda: train(HPARAMS, tx=lambda h: broken()),
        lambda: train(HPARAMS, data_loss, batches=lambda t: broken()),
        lambda: iterate(HPARAMS, broken),
        lambda: momentum(HPARAMS, broken),
        lambda: implicit(broken, PARAMS, HPARAMS),
        lambda: search(broken),
        lambda: check_hypergradient(lambda h: broken(), HPARAMS),
    ):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error


@pytest.mark.parametrize(
    "call",
    [
        lambda: train(
            HPARAMS, lambda p, h, b: jnp.sum((p["w"] - b[0]) ** 2 + b[1]), batches=(DATA, DATA), num_steps=None
        ),
        lambda: train(
            HPARAMS, lambda p, h, b: jnp.sum((p["w"] - b[0]) ** 2 + b[1]), batches=[DATA, DATA[:, :1]], num_steps=4
        ),
        lambda: train(HPARAMS, lambda p, h, b: jnp.sum((p["w"] - b["x"]) ** 2), batches=lambda t: {"x": 1.0}),
        lambda: train(HPARAMS, num_steps=np.int64(3)),
        lambda: train(HPARAMS, tol=jnp.float32(1e-3), adjoint=Implicit()),
        lambda: train(HPARAMS, params={"w": np.zeros(3, ml_dtypes.bfloat16), "none": None, "empty": np.zeros(0)}),
        lambda: momentum(HPARAMS, lambda h, t: {"w": h["lr"]}, jnp.asarray(0.9)),
        lambda: momentum(HPARAMS, np.float32(0.1), 0),
        lambda: solve(SOLVER, SOLVER.init(PARAMS, {"target": 1.0}), {"target": np.float32(1.0)}, num_steps=2),
    ],
)
def test_near_misses_are_accepted(call):
    """Correct calls that resemble a mistake of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(call)
