"""The benchmarks' suite of problems: each is made and traced; it covers what it is for."""

import jax
import jax.numpy as jnp
import pytest
from suite import NAMES, make
from suite.__main__ import convergence

import jaxhpo


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def traced(problem):
    """The abstract value and gradient."""
    return jax.eval_shape(jax.value_and_grad(problem.make_outer_loss(jaxhpo.Unroll())), problem.hparams)


def test_a_problem_is_a_function_of_name_and_seed():
    one, same, other = (make("outliers", seed) for seed in (1, 1, 2))
    loss = [float(problem.make_outer_loss(jaxhpo.Unroll())(problem.hparams)) for problem in (one, same, other)]
    assert loss[0] == loss[1] != loss[2]


def test_every_problem_is_traced():
    for name in NAMES:
        problem = make(name)
        value, gradient = traced(problem)
        assert problem.name == name and value.shape == () and value.dtype == jnp.result_type(float)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), gradient) == jax.tree.map(
            lambda x: (x.shape, jnp.result_type(float)), problem.hparams
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_flags_are_measured(name):
    problem = make(name)
    assert problem.converged == (convergence(problem) <= 1e-4)  # the definition of the flag
