"""`jax_numpy_dtype_promotion="strict"` is for functions of the user: everything of the library runs under it.

Parameters and data are in bfloat16, hyperparameters in float32 or Python floats, under x64; adam's count is an integer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ALL_RULES, PROBLEMS

import jaxhpo
from jaxhpo import HOAG, DrMAD, EvolutionStrategies, Hypernetwork, Implicit, PersistentES, RealTime, Reversible, Unroll

LOW, KEY = jnp.bfloat16, jax.random.key(0)
DATA, START = jnp.arange(12, dtype=LOW).reshape(4, 3) / 10, jnp.ones(3, LOW)
H = {"penalty": jnp.float32(0.1), "rate": 0.1}


def train_loss(w, h, batch):
    return jnp.sum((DATA @ w - 1) ** 2) + jnp.asarray(h["penalty"]).astype(LOW) * jnp.sum(w**2)


def val_loss(solution, h, batch):
    return jnp.sum((solution.params - 1) ** 2).astype(jnp.float32)


SGD, ADAM = (jaxhpo.from_optax(train_loss, tx) for tx in (optax.sgd(0.1), optax.adam(0.1, eps_root=1e-8)))
MOMENTUM = jaxhpo.momentum_sgd(train_loss, lambda h, step: h["rate"], 0.5)
ROOT = jaxhpo.fixed_point(lambda w, h, b: w - jnp.asarray(0.05, LOW) * jax.grad(train_loss)(w, h, b))


def outer_loss(adjoint, solver=SGD):
    def loss(h):
        return val_loss(jaxhpo.solve(solver, solver.init(START, h), h, num_steps=3, key=KEY, adjoint=adjoint), h, None)

    return loss


RULES = {case.name: (case.make(PROBLEMS["ridge"]), SGD) for case in ALL_RULES if case.name != "nystrom"}
RULES |= {"nystrom": (Implicit(jaxhpo.Nystrom(2, 0.1)), SGD), "adam": (Unroll(), ADAM), "cg-adam": (Implicit(), ADAM)}
RULES |= {
    "reversible": (Reversible(), MOMENTUM),
    "drmad-momentum": (DrMAD(), MOMENTUM),
    "momentum": (Unroll(), MOMENTUM),
}
RULES |= {"fixed-point": (Unroll(), ROOT), "direct-fixed-point": (Implicit(jaxhpo.Direct()), ROOT)}
QUICK = ("adam", "cg-adam", "drmad-momentum")
METHODS = [Implicit(), HOAG(), RealTime(), EvolutionStrategies(2, 0.1), PersistentES(2, 0.1, 3)]
METHODS += [Hypernetwork(optax.adam(0.1), scale=0.5)]


@pytest.mark.filterwarnings("ignore::jaxhpo.ZeroHypergradientWarning")  # implicit rules do not see the rate
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in RULES])
def test_every_rule(name):
    loss = outer_loss(*RULES[name])
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(loss), H)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jaxhpo.ZeroHypergradientWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method(method):
    with jax.numpy_dtype_promotion("strict"):
        pair = jaxhpo.hypergradient(method, ADAM, val_loss, num_steps=3)
        for h in (H, jax.tree.map(lambda x: jnp.asarray(x, LOW), H)):
            jax.eval_shape(lambda h, state: pair.update(h, state, key=KEY), h, pair.init(START, h))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")  # under either promotion it is the same program
def test_what_runs_the_outer_loss(tmp_path):
    """The same numbers as without it."""

    def run(folder):
        settings = {"progress": False, "run_dir": folder, "record": ("hypergradient", "linear_solves")}
        settings["remedies"] = jaxhpo.Remedies(clip=1.0, clip_norm=1.0, shrink=0.5)
        transforms = {"penalty": jaxhpo.positive, "rate": jaxhpo.box(0, 1)}
        loss = outer_loss(Unroll(), MOMENTUM)
        result = jaxhpo.tune(loss, H, optax.adam(0.1), num_steps=2, transforms=transforms, **settings)
        check = jaxhpo.check_hypergradient(loss, H)
        rules = [Unroll(checkpoint=None)]  # the reference is `Unroll()`
        comparison = jaxhpo.compare(lambda r: outer_loss(r, MOMENTUM), H, rules, repeats=1, progress=False)
        return result.hparams, check.analytic, [row.relative_error for row in comparison.rows]

    with jax.numpy_dtype_promotion("strict"):
        got = run(tmp_path / "strict")
    jax.tree.map(np.testing.assert_array_equal, got, run(tmp_path / "standard"))


def test_the_user_is_held_to_it():
    solver = jaxhpo.from_optax(lambda w, h, batch: jnp.sum(w * h["penalty"]), optax.sgd(0.1))
    with jax.numpy_dtype_promotion("strict"), pytest.raises(ValueError, match="no available implicit dtype promotion"):
        jaxhpo.solve(solver, solver.init(START, H), H, num_steps=3)
