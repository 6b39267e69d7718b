"""The same hypergradient on one device and on eight, data-parallel or with one inner problem per device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxhpo
from jaxhpo import CG, SAMA, Direct, DrMAD, FiniteDifference, Forward, Identity, Implicit, Neumann, Unroll

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


# 1e-12 is the figure asked for between one device and eight.
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sharded_data_under_jit(rule, mesh):
    fn = jax.jit(jax.grad(outer_loss), static_argnums=3)
    rows = NamedSharding(mesh, P("data"))
    got = fn(H, jax.device_put(X, rows), jax.device_put(Y, rows), rule)
    assert relative_error(got, fn(H, X, Y, rule)) <= 1e-12


@pytest.mark.parametrize("where", ["grad of shard_map", "shard_map of grad"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_data_parallel_shard_map(rule, where, mesh):
    def mean(v):
        return jax.lax.pmean(v, "data")

    def loss(h, x, y):
        return outer_loss(h, x, y, rule, mean)

    specs = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    if where == "grad of shard_map":
        fn = jax.grad(jax.shard_map(loss, **specs))
    else:
        fn = jax.shard_map(jax.grad(loss), **specs)
    assert relative_error(jax.jit(fn)(H, X, Y), jax.grad(outer_loss)(H, X, Y, rule)) <= 1e-12


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_inner_problem_per_device(rule, mesh):
    """Hyperparameters that vary over devices: eight separate inner problems, none mixed into another."""
    hs = H[None] + 0.1 * jnp.arange(8.0)[:, None]
    grads = jax.vmap(jax.grad(outer_loss), in_axes=(0, None, None, None))(hs, X, Y, rule)
    fn = jax.shard_map(
        lambda h, x, y: jax.grad(outer_loss)(h[0], x, y, rule)[None],
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=P("data"),
    )
    assert relative_error(jax.jit(fn)(hs, X, Y), grads) <= 1e-12
