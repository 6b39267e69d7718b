"""Upper bounds on the cost of unrolled hypergradients at the sizes of benchmarks/unroll.py, counted and as compiled."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from helpers import enable_x64
from jax.flatten_util import ravel_pytree

import jaxhpo
from jaxhpo._core.cost import count_and_peak, count_arithmetic, temporary_bytes, with_memory

codegen, slow = pytest.mark.codegen, pytest.mark.slow  # as compiled; counted or drawn
RULES = {"sqrt": jaxhpo.Unroll(checkpoint="sqrt"), "reversible": jaxhpo.Reversible()}


@pytest.fixture
def unroll(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(pathlib.Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import unroll

    with jax.numpy_rank_promotion("allow"), enable_x64(False):
        yield unroll


def cost(case, name):
    """Matrix products in plain trainings, and compiled memory in copies of the parameters."""
    function = jax.value_and_grad(case.losses[name])
    training = count_arithmetic(case.training, *case.args, elementwise=False)
    counted = count_arithmetic(function, *case.args, elementwise=False, unknown_length=1) / training
    memory = temporary_bytes(jax.jit(function).lower(*case.args).compile())
    return counted, memory / sum(leaf.nbytes for leaf in jax.tree.leaves(case.args[1]))


@codegen
def test_transformer(unroll):
    """Under Adam: at 16 steps 11/3 trainings and 140 copies; at 200, 14/3 and 120 copies above one step's own."""
    model = unroll.language_model()
    arithmetic, memory = cost(unroll.make_case(model, "adam", 16, "all", RULES), "sqrt")
    assert arithmetic <= 3.75 and memory <= 140
    _, one_step = cost(unroll.make_case(model, "adam", 1, "all", RULES), "sqrt")
    arithmetic, memory = cost(unroll.make_case(model, "adam", 200, "all", RULES), "sqrt")
    assert arithmetic <= 4.75 and memory <= 120 + one_step


@codegen
def test_network(unroll):
    """Under SGD with momentum at 1000 steps."""
    arithmetic, memory = cost(unroll.make_case(unroll.mlp(), "sgd", 1000, "all", RULES), "sqrt")
    assert arithmetic <= 4.4 and memory <= 160


@slow
@pytest.mark.parametrize(
    ("model", "optimiser", "num_steps"),
    [("small_language_model", "adam", 100), ("language_model", "adam", 16), ("mlp", "sgd", 1000)],
)
def test_default_takes_the_fastest_schedule_below_a_gibibyte(unroll, model, optimiser, num_steps):
    """At most 1.1 times its operations and memory traffic, and no more than 1 GiB; the memory as predicted."""
    names = ("checkpoint=None", "checkpoint=1", "checkpoint='sqrt'", "default")  # 'binomial' does more than 'sqrt'
    rules = {name: unroll.RULES[name] for name in names}
    case = unroll.make_case(getattr(unroll, model)(), optimiser, num_steps, "all", rules)
    costs = {name: count_and_peak(jax.grad(case.losses[name]), *case.args) for name in rules}
    below = [with_memory(*cost) for cost in costs.values() if cost[1] <= 2**30]
    assert with_memory(*costs["default"]) <= 1.1 * min(below) and costs["default"][1] <= 2**30


@codegen
def test_reversal(unroll):
    """The same, run backwards: a buffer of 5.0 copies (152 bits a weight, and words), four of state, the step's own."""
    arithmetic, memory = cost(unroll.make_case(unroll.mlp(), "momentum", 1000, "all", RULES), "reversible")
    assert arithmetic <= 4.2 and memory <= 20


@slow
def test_a_quarter_of_each_minibatch(unroll):
    """Of the transformer, with memory for two levels: two passes forward and a quarter of 8/3 are 2.67 trainings."""
    case = unroll.make_case(unroll.language_model(), "adam", 200, "all", {"f": jaxhpo.Unroll(hvp_fraction=0.25)})
    counted = count_arithmetic(jax.grad(case.losses["f"]), *case.args, elementwise=False)
    assert counted / count_arithmetic(case.training, *case.args, elementwise=False) <= 3.0


@slow
def test_a_quarter_of_each_minibatch_is_unbiased(unroll, monkeypatch):
    """200 draws for a small transformer: within 3 standard errors along the exact hypergradient and 8 directions."""
    model = unroll.language_model(layers=2, width=32, heads=2, vocabulary=64, length=8, batch=8)

    def hypergradient(rule, key):
        monkeypatch.setattr(unroll, "KEY", key)
        case = unroll.make_case(model, "adam", 6, "all", {"f": rule})
        return ravel_pytree(jax.grad(case.losses["f"])(*case.args))[0]

    exact = np.asarray(jax.jit(lambda: hypergradient(jaxhpo.Unroll(), None))(), np.float64)
    draw = jax.jit(jax.vmap(lambda key: hypergradient(jaxhpo.Unroll(checkpoint=2, hvp_fraction=0.25), key)))
    keys = jax.random.split(jax.random.key(5), 200).reshape(10, 20)
    draws = np.concatenate([np.asarray(draw(twenty), np.float64) for twenty in keys])
    directions = np.concatenate([exact[None], np.random.default_rng(0).normal(size=(8, exact.size))])
    errors = (draws - exact) @ directions.T
    assert (np.abs(errors.mean(0)) <= 3 * errors.std(0, ddof=1) / 200**0.5).all()
