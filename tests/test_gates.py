"""What unrolled hypergradients may cost at most, at the sizes of benchmarks/unroll.py: counted, and as compiled."""

import pathlib
import sys

import jax
import pytest

import jaxhpo
from jaxhpo._cost import count_arithmetic, temporary_bytes

pytestmark = pytest.mark.slow
RULES = {"default": jaxhpo.Unroll(), "reversible": jaxhpo.Reversible()}


@pytest.fixture
def unroll(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(pathlib.Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import unroll

    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield unroll


def cost(case, name):
    """Matrix products in plain trainings, and compiled memory in copies of the parameters."""
    function = jax.value_and_grad(case.losses[name])
    training = count_arithmetic(case.training, *case.args, elementwise=False)
    counted = count_arithmetic(function, *case.args, elementwise=False, unknown_length=1) / training
    memory = temporary_bytes(jax.jit(function).lower(*case.args).compile())
    return counted, memory / sum(leaf.nbytes for leaf in jax.tree.leaves(case.args[1]))


def test_transformer(unroll):
    """Under Adam: at 16 steps 11/3 trainings and 140 copies; at 200, 14/3 and 120 copies above one step's own."""
    model = unroll.language_model()
    arithmetic, memory = cost(unroll.make_case(model, "adam", 16, "all", RULES), "default")
    assert arithmetic <= 3.75 and memory <= 140
    _, one_step = cost(unroll.make_case(model, "adam", 1, "all", RULES), "default")
    arithmetic, memory = cost(unroll.make_case(model, "adam", 200, "all", RULES), "default")
    assert arithmetic <= 4.75 and memory <= 120 + one_step


def test_network(unroll):
    """Under SGD with momentum at 1000 steps."""
    arithmetic, memory = cost(unroll.make_case(unroll.mlp(), "sgd", 1000, "all", RULES), "default")
    assert arithmetic <= 4.4 and memory <= 160


def test_reversal(unroll):
    """The same, run backwards: a buffer of 5.0 copies (152 bits a weight, and words), four of state, the step's own."""
    arithmetic, memory = cost(unroll.make_case(unroll.mlp(), "momentum", 1000, "all", RULES), "reversible")
    assert arithmetic <= 4.2 and memory <= 20
