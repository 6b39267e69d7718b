"""The same hypergradient on one device and on eight, data-parallel or with one inner problem per device."""

import functools
import types

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from helpers import ALL_RULES, relative_error
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxhpo
from jaxhpo import (
    CG,
    GMRES,
    HOAG,
    SAMA,
    BiCGStab,
    Direct,
    DrMAD,
    EvolutionStrategies,
    FiniteDifference,
    Forward,
    ForwardGradient,
    Hypernetwork,
    Identity,
    Implicit,
    Neumann,
    NormalCG,
    PersistentES,
    RealTime,
    Reversible,
    Smoothing,
    Unroll,
    from_lineax,
)

RULES = [
    Unroll(),
    Implicit(CG(tol=1e-12)),
    *(
        pytest.param(rule, marks=pytest.mark.slow)
        for rule in (
            Unroll(checkpoint=None),
            Unroll(checkpoint=7, truncate=20),
            Implicit(Direct()),
            Implicit(Neumann(30, 0.3)),
            Implicit(Identity(0.3)),
            Forward(),
            FiniteDifference(0.3),
            SAMA(),
            DrMAD(),
            DrMAD(10),
        )
    ),
]
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 5)))
Y = X @ jnp.asarray(RNG.normal(size=5)) + 0.1 * jnp.asarray(RNG.normal(size=32))
H = jnp.linspace(-3.0, -2.0, 5)


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def outer_loss(h, x, y, rule, mean=lambda v: v):
    """`mean` averages over devices where each holds a part of the data."""

    def train_loss(w, h, batch):
        x, y = batch
        return 0.5 * mean(jnp.mean((x @ w - y) ** 2)) + 0.5 * jnp.sum(jnp.exp(h) * w**2)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.3, momentum=0.5))
    sol = jaxhpo.solve(solver, solver.init(jnp.zeros(5), h), h, lambda t: (x, y), num_steps=40, adjoint=rule)
    return mean(0.5 * jnp.mean((x @ sol.params - 1.0) ** 2))


HS = H[None] + 0.1 * jnp.arange(8.0)[:, None]  # the first of which is H


@functools.cache
def on_one_device(rule):
    """The hypergradients at `HS`."""
    return jax.jit(jax.vmap(jax.grad(functools.partial(outer_loss, rule=rule)), in_axes=(0, None, None)))(HS, X, Y)


# 1e-12 is the figure asked for between one device and eight.
@pytest.mark.parametrize("where", ["grad of shard_map", "shard_map of grad"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_data_parallel_shard_map(rule, where, mesh, like=None):
    """`like` is a rule of the same hypergradient."""

    def mean(v):
        return jax.lax.pmean(v, "data")

    def loss(h, x, y):
        return outer_loss(h, x, y, rule, mean)

    specs = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    if where == "grad of shard_map":
        fn = jax.grad(jax.shard_map(loss, **specs))
    else:
        fn = jax.shard_map(jax.grad(loss), **specs)
    assert relative_error(jax.jit(fn)(H, X, Y), on_one_device(like or rule)[0]) <= 1e-12


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_inner_problem_per_device(rule, mesh, like=None):
    """Hyperparameters that vary over devices: eight separate inner problems, none mixed into another."""
    fn = jax.shard_map(
        lambda h, x, y: jax.grad(outer_loss)(h[0], x, y, rule)[None],
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=P("data"),
    )
    assert relative_error(jax.jit(fn)(HS, X, Y), on_one_device(like or rule)) <= 1e-12


# --- everything sharded, where the compiler chooses the sharding, and where it is part of the type --------------------

STEPS = 4
# Kernel, bias and scale; every entry of a kernel or bias has a penalty of its own.
PARAMS = {"w": jnp.asarray(0.3 * RNG.normal(size=(6, 4))), "b": jnp.zeros(4), "s": jnp.ones(())}
HPARAMS = {"w": jnp.asarray(RNG.normal(size=(6, 4)) - 2), "b": jnp.full(4, -1.0), "s": jnp.asarray(-1.0)}
BATCHES = (jnp.asarray(RNG.normal(size=(STEPS, 6, 6))), jnp.asarray(RNG.normal(size=(STEPS, 6, 4))))
WEIGHTS = {"w": P(None, "model"), "b": P("model"), "s": P()}
SPECS = (WEIGHTS, WEIGHTS, (P(None, "data"), P(None, "data", "model")))
START = types.SimpleNamespace(step_size=0.1, params=ravel_pytree(PARAMS)[0])


def train_loss(w, h, batch):
    x, y = batch
    penalty = sum(jnp.sum(jnp.exp(h[name]) * w[name] ** 2) for name in w)
    return 0.5 * jnp.mean((w["s"] * (x @ w["w"]) + w["b"][None] - y) ** 2) + 0.5 * penalty


def val_loss(w):
    return sum(jnp.sum((x - 0.3) ** 2) for x in jax.tree.leaves(w))


def sharded(args, kind):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])
    return mesh, jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), args, SPECS)


def by_rule(rule, momentum=False):
    """The gradient through `solve`, jitted."""
    solver = jaxhpo.momentum_sgd(train_loss, 0.1, 0.5) if momentum else jaxhpo.from_optax(train_loss, optax.sgd(0.1))

    def loss(h, w, batches, key):
        start = solver.init(w, h)
        return val_loss(jaxhpo.solve(solver, start, h, batches, num_steps=STEPS, adjoint=rule, key=key).params)

    return jax.jit(jax.grad(loss))


def by_pair(method):
    """The second hypergradient of a stateful method, and its value; its functions are jitted."""
    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))

    def outer(solution, h, batch):
        return val_loss(solution.params)

    pair = jaxhpo.hypergradient(method, solver, outer, num_steps=STEPS)
    init, update = jax.jit(pair.init), jax.jit(pair.update)

    def run(h, w, batches, key):
        state = update(h, init(w, h), batches, key=key)[1]
        grad, _, info = update(h, state, batches, key=key)
        return grad, info.value

    return run


def second_order(rule):
    grad = by_rule(rule)
    return jax.jit(jax.grad(lambda *args: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(*args)))))


# In four steps "unroll" keeps all, and the last five are all: these two are the same program as it.
REPEATED = ("unroll-plain", "unroll-truncated")
EVERYTHING = {
    **{case.name: by_rule(case.make(START)) for case in ALL_RULES if case.name not in REPEATED},
    "cg": by_rule(Implicit(CG(), on_failure="keep")),  # of an indefinite Hessian: the iterate reached
    # To a residual below the figure of the test: two solves differ by as much as their tolerance allows.
    "gmres": by_rule(Implicit(GMRES(tol=1e-14))),
    "bicgstab": by_rule(Implicit(BiCGStab(tol=1e-14))),
    "normal-cg": by_rule(Implicit(NormalCG(tol=1e-14))),
    "lineax": by_rule(Implicit(from_lineax(lineax.GMRES(rtol=1e-14, atol=1e-14)))),
    "reversible": by_rule(Reversible(), momentum=True),
    "forward-gradient": by_rule(ForwardGradient(num_directions=2)),
    "smoothing": by_rule(Smoothing(num_pairs=2, sigma=0.1)),
    "drmad-3": by_rule(DrMAD(3)),
    # Of 6 examples, over two devices: parts of equal size, and a part that cannot be split.
    "fraction-4": by_rule(Unroll(hvp_fraction=2 / 3)),
    "fraction-3": by_rule(Unroll(hvp_fraction=1 / 2)),
    "hoag": by_pair(HOAG()),
    "real-time": by_pair(RealTime()),
    "implicit-pair": by_pair(Implicit(GMRES(tol=1e-14))),
    "evolution": by_pair(EvolutionStrategies(num_pairs=2, sigma=0.1)),
    "persistent": by_pair(PersistentES(num_pairs=2, sigma=0.1, horizon=2 * STEPS)),
    "hypernetwork": by_pair(Hypernetwork(optax.sgd(0.01), 0.1)),
    "second-order-binomial": second_order(Unroll(checkpoint="binomial")),
    "second-order-gmres": second_order(Implicit(GMRES(tol=1e-14))),
}
QUICK = ("unroll", "direct", "real-time")
# Of rules with the same hypergradient, what one of them gives on one device: fewer programs to compile.
SAME = dict.fromkeys(["unroll-every", "unroll-7", "unroll-binomial", "forward", "forward-chunks"], "unroll")
SAME |= dict.fromkeys(["gmres", "bicgstab", "normal-cg", "general", "lineax"], "direct")
# The train loss is quadratic in each weight by its penalty, so these differences have no error.
SAME |= dict.fromkeys(["finite-difference", "sama"], "unroll-truncated-1")
CHEAPER = {
    "implicit-pair": by_pair(Implicit(Direct())),
    "reversible": by_rule(Unroll(checkpoint=None), momentum=True),
    "second-order-binomial": second_order(Unroll(checkpoint=None)),
    "second-order-gmres": second_order(Implicit(Direct())),
}


@functools.cache
def unsharded(name):
    fn = CHEAPER.get(name, EVERYTHING[name])
    return ravel_pytree(fn(HPARAMS, PARAMS, BATCHES, jax.random.key(0)))[0]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in EVERYTHING])
def test_parameters_hyperparameters_and_minibatches_sharded(name):
    fn, want = EVERYTHING[name], unsharded(SAME.get(name, name))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh, placed = sharded((HPARAMS, PARAMS, BATCHES), kind)
        with jax.set_mesh(mesh):
            got = fn(*placed, jax.random.key(0))
        assert relative_error(ravel_pytree(jax.device_get(got))[0], want) <= 1e-12, kind
        grad = got[0] if isinstance(got, tuple) else got
        for leaf, like in zip(jax.tree.leaves(grad), jax.tree.leaves(placed[0]), strict=True):
            assert kind == AxisType.Auto or leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def test_closed_over_parameters_sharded():
    """JAX forgets the sharding of `zeros_like` of a constant: momenta are sharded after a step, but not before it."""
    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1, momentum=0.5))

    def outer_loss(h, w, batches):
        return val_loss(jaxhpo.solve(solver, solver.init(w, h), h, batches).params)

    want = jax.jit(jax.grad(outer_loss))(HPARAMS, PARAMS, BATCHES)
    mesh, (h, w, batches) = sharded((HPARAMS, PARAMS, BATCHES), AxisType.Explicit)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(lambda h: outer_loss(h, w, batches)))(h)
    assert relative_error(ravel_pytree(jax.device_get(got))[0], ravel_pytree(want)[0]) <= 1e-12


@pytest.mark.codegen  # how the compiler divides a program, and sums
def test_reversal_adds_the_same_gradient_on_auto_axes():
    """Of 40 random networks this one's gradient had another sharding on the way back, so a sum had another order."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def train_loss(w, h, batch):
        x, y = batch
        off = w["s"] * (jnp.tanh(x @ w["w"] + w["b"][None]) @ w["u"]) - y
        penalty = sum(jnp.sum(jnp.exp(h[name]) * w[name] ** 2) for name in w)
        return 0.03 * jnp.mean(jnp.sum(off**2, 1)) + 0.5 * penalty

    def gradient(h, w, batches):
        solver = jaxhpo.momentum_sgd(train_loss, 0.1, 0.9)

        def outer_loss(h):
            start = solver.init(w, h)
            return val_loss(jaxhpo.solve(solver, start, h, batches, num_steps=10, adjoint=Reversible()).params)

        return jax.value_and_grad(outer_loss)(h)

    weights = {"w": P(("data", "model")), "b": P("model"), "u": P(), "s": P()}
    specs = (weights | {"w": P("data"), "u": P(("data", "model"))}, weights, (P(None, "model"), P()))
    with jax.enable_x64(False):
        params = {"w": normal(24, 24) / 5, "b": jnp.zeros(24), "u": normal(24, 32) / 5, "s": jnp.ones(())}
        args = jax.tree.map(lambda p: p - 4, params), params, (normal(10, 16, 24), normal(10, 16, 32))
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
        placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), args, specs)
        got, want = (ravel_pytree(jax.device_get(jax.jit(gradient)(*each)))[0] for each in (placed, args))
    # Ten steps there and back, of numbers of 2^-24.
    assert relative_error(got, want) <= 20 * 2**-24
