"""Methods of one loop end where the published code ended, on the same minibatches in the same order.

`published.npz` has the starts, the ends and the order of minibatches of 30 to 200 updates of the solvers of
benchmark_bilevel (github.com/benchopt/benchmark_bilevel), recorded in float32: logistic regression on the first rows of
ijcnn1, 64 a minibatch, with a penalty for each of the 22 features. Steps of θ, v are .1, those of h .2.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo
import jaxhpo.data
from jaxhpo.single_loop import (
    F2SA,
    SABA,
    SARAH,
    SOBA,
    STORM,
    FiniteSum,
    InTurn,
    PerVariable,
    SingleLoop,
    StocBiO,
    series_sums,
)

FOLDER = pathlib.Path(os.environ.get("JAXHPO_DATA_DIR", ""), "libsvm")
RECORDED = np.load(pathlib.Path(__file__).parent / "published.npz")


@pytest.fixture(scope="module")
def rows():
    return jaxhpo.data.ijcnn1()


def logistic(z, batch):
    return jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ z)))


def power(first, exponent, every=1):
    """The published schedules: first / (t + 1)^exponent, t the updates before, of so many inner steps each."""
    return lambda count: first * (count // every + 1.0) ** -exponent


def from_zero(state):
    """MRBO's code takes zero for the first direction and for the point before."""
    memories = tuple((direction, jnp.asarray(True)) for direction, _ in state.memories)
    return state._replace(before=jax.tree.map(jnp.zeros_like, state.before), memories=memories)


def h_from_zero(state):
    """FSLA's code does so for h alone."""
    *others, memories = state.memories
    memories = tuple((direction, jnp.asarray(True)) for direction, _ in memories)
    point = state.before[2]._replace(hparams=jnp.zeros_like(state.before[2].hparams))
    return state._replace(before=(None, None, point), memories=(*others, memories))


def theta(state):
    return state.inner.params


CASES = {
    "soba": (SOBA, power(0.1, 1 / 2), power(0.2, 1 / 2), None, None, theta),
    "saba": (SABA, 0.1, 0.2, None, None, theta),
    "srba": (lambda *sums: SingleLoop(*sums, SARAH(30)), 0.1, 0.2, None, None, theta),
    "fsla": (
        lambda *sums: InTurn(*sums, PerVariable(hparams=STORM(power(0.1, 1 / 2)))),
        power(0.1, 1 / 2),
        power(0.2, 1 / 2),
        None,
        h_from_zero,
        theta,
    ),
    "stocbio": (lambda *sums: StocBiO(*sums, step_size=0.1), 0.1, 0.2, 10, None, theta),
    "mrbo": (
        lambda *sums: SingleLoop(*sums, STORM(power(0.5, 2 / 3)), series_sums(10, 0.1)),
        power(0.1, 1 / 3),
        power(0.2, 1 / 3),
        None,
        from_zero,
        theta,
    ),
    "f2sa": (
        lambda *sums: F2SA(*sums, optax.sgd(power(0.1, 5 / 7, every=10)), growth=power(0.1, 1 / 7)),
        power(0.1, 4 / 7, every=10),
        power(0.2, 4 / 7),
        10,
        None,
        lambda state: state.auxiliary.params,  # the code's first variable is the penalised one
    ),
}


@pytest.mark.skipif(not (FOLDER / "ijcnn1.trn.bz2").exists(), reason="JAXHPO_DATA_DIR has no libsvm/ijcnn1.trn.bz2")
@pytest.mark.parametrize("name", CASES)
def test_ends_where_the_published_code_ends(name, rows):
    make, inner_rate, outer_rate, num_steps, change, read = CASES[name]
    recorded = {key.removeprefix(f"{name}_"): jnp.asarray(RECORDED[key]) for key in RECORDED if key.startswith(name)}
    sums = [
        FiniteSum.of((part.inputs[:num], part.targets[:num]), 64, lambda n, order=order: recorded[order][n])
        for part, num, order in ((rows.train, 2560, "inner_minibatch"), (rows.test, 1280, "outer_minibatch"))
    ]

    def train_loss(z, x, batch):
        return logistic(z, batch) + 0.5 * jnp.sum(jnp.exp(x) * z**2)

    solver = jaxhpo.from_optax(train_loss, optax.sgd(inner_rate))
    pair = jaxhpo.hypergradient(
        make(*sums), solver, lambda solution, x, batch: logistic(solution.params, batch), num_steps=num_steps
    )
    tx = optax.sgd(outer_rate)

    def update(carry, _):
        x, state, tx_state = carry
        hypergradient, state, _ = pair.update(x, state)
        moves, tx_state = tx.update(hypergradient, tx_state)
        return (optax.apply_updates(x, moves), state, tx_state), None

    x0 = recorded["x0"].astype(jnp.float32)
    state = pair.init(recorded["z0"].astype(jnp.float32), x0)
    state = state if change is None else change(state)
    length = int(recorded["iterations"])
    x, state, _ = jax.lax.scan(update, (x0, state, tx.init(x0)), length=length)[0]
    # Recorded in float32: its rounding over 200 updates reaches 2e-7 here; 1e-5 leaves room for other processors.
    np.testing.assert_allclose(read(state), recorded["z"], rtol=0, atol=1e-5 * np.linalg.norm(recorded["z"]))
    np.testing.assert_allclose(x, recorded["x"], rtol=0, atol=1e-5 * np.linalg.norm(recorded["x"]))
