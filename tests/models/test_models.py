"""Models of every kind: flax nnx, flax linen, equinox, a plain pytree; batch statistics, dropout, bfloat16."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import RULES, grad

import jaxhpo
from jaxhpo import CG, Implicit, Unroll

# The figure asked of every kind of model.
TOLERANCE = 1e-5
NUM_INPUTS, WIDTH, NUM_OUTPUTS = 3, 4, 2

rng = np.random.default_rng(0)
inputs, val_inputs = jnp.asarray(rng.normal(size=(12, NUM_INPUTS))), jnp.asarray(rng.normal(size=(6, NUM_INPUTS)))
mixing = jnp.asarray(rng.normal(size=(NUM_INPUTS, NUM_OUTPUTS)))
targets, val_targets = jnp.sin(inputs @ mixing), jnp.sin(val_inputs @ mixing)


class Model(NamedTuple):
    """Parameters as a pytree, and `(params, inputs) -> outputs`."""

    params: Any
    apply: Callable


def plain_mlp(dtype=jnp.float64) -> Model:
    rng = np.random.default_rng(1)
    params = [
        {"kernel": jnp.asarray(rng.normal(size=(n, m)) / np.sqrt(n), dtype), "bias": jnp.zeros(m, dtype)}
        for n, m in [(NUM_INPUTS, WIDTH), (WIDTH, NUM_OUTPUTS)]
    ]

    def apply(params, x):
        for i, layer in enumerate(params):
            x = (jnp.tanh(x) if i else x) @ layer["kernel"] + layer["bias"][None]
        return x

    return Model(params, apply)


def linen_mlp() -> Model:
    model = nn.Sequential([nn.Dense(WIDTH, param_dtype=float), nn.tanh, nn.Dense(NUM_OUTPUTS, param_dtype=float)])
    variables = model.init(jax.random.key(0), inputs)
    return Model(variables["params"], lambda params, x: model.apply({"params": params}, x))


def nnx_mlp() -> Model:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(NUM_INPUTS, WIDTH, param_dtype=float, rngs=rngs),
        nnx.tanh,
        nnx.Linear(WIDTH, NUM_OUTPUTS, param_dtype=float, rngs=rngs),
    )
    graph, params = nnx.split(model, nnx.Param)
    return Model(params, lambda params, x: nnx.merge(graph, params)(x))


def equinox_mlp() -> Model:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(NUM_INPUTS, NUM_OUTPUTS, WIDTH, 1, jnp.tanh, dtype=float, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return Model(params, lambda params, x: jax.vmap(eqx.combine(params, rest))(x))


MODELS = {"plain pytree": plain_mlp, "linen": linen_mlp, "nnx": nnx_mlp, "equinox": equinox_mlp}


def models(*quick):
    """Every kind of model; in the quick suite these alone, of which each kind meets one of the rules."""
    return pytest.mark.parametrize(
        "make", [pytest.param(m, id=n, marks=[] if n in quick else [pytest.mark.slow]) for n, m in MODELS.items()]
    )


def mean_squared(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def penalty(params, log_penalties):
    """Σ_leaf exp(log penalty) ‖leaf‖², one log penalty a leaf."""
    leaves = jax.tree.leaves(params)
    return sum(jnp.exp(log_penalties[i]) * jnp.sum(leaf**2) for i, leaf in enumerate(leaves))


def trained(model, tx, adjoint, num_steps):
    """The validation loss of a model trained with one penalty a leaf, as a function of the hyperparameters."""

    def train_loss(params, h, batch):
        return mean_squared(model.apply(params, inputs), targets) + penalty(params, h["log_penalties"])

    solver = jaxhpo.from_optax(train_loss, tx)

    def outer(h):
        sol = jaxhpo.solve(solver, solver.init(model.params, h), h, num_steps=num_steps, adjoint=adjoint)
        return mean_squared(model.apply(sol.params, val_inputs), val_targets)

    return outer


def log_penalties(params, value=0.02):
    return jnp.full(len(jax.tree.leaves(params)), jnp.log(value))


def float64(statistics):
    """Batch statistics, which flax makes float32 whatever the parameters are: too coarse for differences."""
    return jax.tree.map(lambda x: x.astype(float), statistics)


@models("equinox")  # linen: `test_linen_batch_norm`
def test_unrolled_hypergradient(make):
    """Penalties of every leaf and the learning rate."""
    model = make()
    h = {"log_penalties": log_penalties(model.params), "log_rate": jnp.log(0.1)}
    outer = trained(model, lambda h: optax.sgd(jnp.exp(h["log_rate"]), momentum=0.9), Unroll(), 10)
    assert jaxhpo.check_hypergradient(outer, h).relative_error <= TOLERANCE


@models("plain pytree", "nnx")
def test_implicit_hypergradient(make):
    """At a converged solution. A penalty of 0.02 adds 0.04 to the curvature, which makes it a strict minimum.

    Momentum 0.9 shrinks the slowest direction by at most √0.9 a step, hence by 1e-22 over 1000 steps.
    """
    model = make()
    h = {"log_penalties": log_penalties(model.params)}
    outer = trained(model, optax.sgd(0.2, momentum=0.9), Implicit(CG(tol=1e-10)), 1000)
    assert jaxhpo.check_hypergradient(outer, h).relative_error <= TOLERANCE


@pytest.mark.slow
def test_linen_batch_norm():
    """Running statistics are model state: the validation loss sees the parameters through them too."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(WIDTH, param_dtype=float)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.8, param_dtype=float)(x)
            return nn.Dense(NUM_OUTPUTS, param_dtype=float)(nn.tanh(x))

    net = Net()
    variables = net.init(jax.random.key(0), inputs, train=False)
    params, start = variables["params"], float64(variables["batch_stats"])

    def train_loss(params, h, batch, stats):
        x, y = batch
        outputs, new = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats")
        return mean_squared(outputs, y) + penalty(params, h["log_penalties"]), new["batch_stats"]

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(jnp.exp(h["log_rate"])), has_state=True)

    def minibatch(t):
        pick = (t % 3) * 4 + jnp.arange(4)
        return inputs[pick], targets[pick]

    def solution(h):
        return jaxhpo.solve(solver, solver.init(params, h, start), h, minibatch, num_steps=10)

    def outer(h):
        sol = solution(h)
        outputs = net.apply({"params": sol.params, "batch_stats": sol.model_state}, val_inputs, train=False)
        return mean_squared(outputs, val_targets)

    h = {"log_penalties": log_penalties(params), "log_rate": jnp.log(0.1)}
    assert jaxhpo.check_hypergradient(outer, h).relative_error <= TOLERANCE
    # The running mean after ten steps is not where it started, so the statistics were really carried.
    assert jnp.all(jnp.abs(jax.jit(solution)(h).model_state["BatchNorm_0"]["mean"]) > 1e-3)


@pytest.mark.slow  # quick: keys that ride in the batches (`test_integer_boolean_and_key_leaves`)
def test_linen_dropout():
    """One typed key a step rides in the batches: the same masks at every call, so that differences make sense."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(nn.Dense(WIDTH, param_dtype=float)(x)))
            return nn.Dense(NUM_OUTPUTS, param_dtype=float)(x)

    net = Net()
    params = net.init(jax.random.key(0), inputs, train=False)["params"]
    keys = jax.random.split(jax.random.key(1), 10)

    def train_loss(params, h, key):
        outputs = net.apply({"params": params}, inputs, train=True, rngs={"dropout": key})
        return mean_squared(outputs, targets) + penalty(params, h["log_penalties"])

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(jnp.exp(h["log_rate"])))

    def outer(h, keys=keys):
        sol = jaxhpo.solve(solver, solver.init(params, h), h, keys)
        return mean_squared(net.apply({"params": sol.params}, val_inputs, train=False), val_targets)

    h = {"log_penalties": log_penalties(params), "log_rate": jnp.log(0.1)}
    assert jaxhpo.check_hypergradient(outer, h).relative_error <= TOLERANCE
    value = jax.jit(outer)
    assert value(h, keys) != value(h, jax.random.split(jax.random.key(2), 10))  # the keys do reach the masks


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(NUM_INPUTS, WIDTH, param_dtype=float, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.8, param_dtype=float, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.last = nnx.Linear(WIDTH, NUM_OUTPUTS, param_dtype=float, rngs=rngs)

    def __call__(self, x, running=False, key=None):
        hidden = nnx.tanh(self.norm(self.first(x), use_running_average=running))
        return self.last(self.dropout(hidden, rngs=key, deterministic=key is None))


@pytest.mark.parametrize(
    "running",
    [
        pytest.param(False, id="batch statistics", marks=pytest.mark.slow),
        pytest.param(True, id="running statistics", marks=pytest.mark.slow),
    ],
)
def test_nnx_batch_norm_and_dropout(running):
    """nnx: parameters are trained, batch statistics are model state, and dropout draws from a key of the batch.

    Unlike linen, nnx stops the gradient of the running statistics (`nnx.BatchNorm` wraps their update in
    `stop_gradient`), so a validation loss that normalises by them misses the part of its hypergradient that flows
    through them, and a warning says so; normalising by the statistics of the validation batch is exact.
    """
    graph, params, start = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    start = float64(start)

    def train_loss(params, h, key, stats):
        net = nnx.merge(graph, params, stats)
        loss = mean_squared(net(inputs, key=key), targets) + penalty(params, h["log_penalties"])
        return loss, nnx.state(net, nnx.BatchStat)

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(jnp.exp(h["log_rate"])), has_state=True)

    def outer(h):
        sol = jaxhpo.solve(solver, solver.init(params, h, start), h, jax.random.split(jax.random.key(1), 10))
        net = nnx.merge(graph, *jax.tree.map(lambda x: x, (sol.params, sol.model_state)))
        return mean_squared(net(val_inputs, running=running), val_targets)

    h = {"log_penalties": log_penalties(params), "log_rate": jnp.log(0.1)}
    if running:
        with pytest.warns(jaxhpo.ZeroHypergradientWarning, match="norm.*mean.*var.*behind `stop_gradient`.*subclass"):
            assert jaxhpo.check_hypergradient(outer, h).relative_error > 1e-3
    else:
        assert jaxhpo.check_hypergradient(outer, h).relative_error <= TOLERANCE


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


QUICK = {"unroll", "cg", "neumann-5"}  # of each kind one


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else [pytest.mark.slow]) for c in RULES]
)
def test_bfloat16_model_with_float32_hyperparameters(case):
    """The model is bfloat16; hypergradients are float32 as the hyperparameters are, and so are linear solves."""
    model, seen = plain_mlp(jnp.bfloat16), []
    adjoint = case.make(SimpleNamespace(step_size=0.1, params=range(6)))
    if case.implicit:
        linear_solver = adjoint.linear_solver

        def spying(matvec, b, x0=None):
            x, info = linear_solver(matvec, b, x0)
            seen.extend(leaf.dtype for leaf in jax.tree.leaves((b, matvec(b), x)))
            return x, info

        adjoint = Implicit(spying, on_failure="keep")  # after ten steps the Hessian is indefinite

    def train_loss(params, h, batch):
        outputs = model.apply(params, inputs.astype(jnp.bfloat16))
        return mean_squared(outputs, targets.astype(jnp.bfloat16)) + penalty(params, h)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1, momentum=0.9))

    def outer(h):
        sol = jaxhpo.solve(solver, solver.init(model.params, h), h, num_steps=10, adjoint=adjoint)
        assert {leaf.dtype for leaf in jax.tree.leaves(sol.params)} == {jnp.dtype(jnp.bfloat16)}
        return mean_squared(model.apply(sol.params, val_inputs), val_targets)

    got = grad(outer)(log_penalties(model.params).astype(jnp.float32))
    assert got.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(got)) and jnp.all(got != 0)
    assert set(seen) == ({jnp.dtype(jnp.float32)} if case.implicit else set())
