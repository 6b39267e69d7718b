"""The benchmarks' suite of problems: each is made and traced; together they cover what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite import NAMES, make
from suite.__main__ import convergence, main, size

import jaxhpo

QUICK = ("ridge-1",)  # fast to trace


@pytest.fixture(scope="module")
def problems():
    return {name: make(name) for name in NAMES}


def curvature(problem, params):
    """The largest modulus of an eigenvalue of the train loss's Hessian, by power iteration."""
    gradient = jax.grad(lambda params: problem.train_loss(params, problem.hparams))

    def step(v, _):
        product = jax.jvp(gradient, (params,), (v,))[1]
        norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(product)))
        return jax.tree.map(lambda x: x / norm, product), norm

    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    start = structure.unflatten([jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
    return float(jax.jit(lambda: jax.lax.scan(step, start, length=30)[1][-1])())


def test_a_problem_is_a_function_of_name_and_seed():
    one, same, other = (make("ridge-1", seed) for seed in (1, 1, 2))
    loss = [float(problem.make_outer_loss(jaxhpo.Unroll())(problem.hparams)) for problem in (one, same, other)]
    assert loss[0] == loss[1] != loss[2]


@pytest.mark.slow
def test_the_problems_cover_what_the_suite_is_for(problems):
    def count(holds):
        return sum(map(holds, problems.values()))

    assert len(set(NAMES)) == len(NAMES) >= 30
    assert all(problem.name == name and problem.title for name, problem in problems.items())
    assert len({problem.title for problem in problems.values()}) == len(NAMES)
    assert count(lambda p: not p.convex) >= 12
    assert count(lambda p: size(p.hparams) >= 20) >= 12
    assert count(lambda p: p.convex or p.converged) >= 10
    assert count(lambda p: p.convex and not p.converged) >= 3 and count(lambda p: p.converged and not p.convex) >= 2
    assert count(lambda p: p.test_loss is not None) >= 28  # all but the two of `jaxhpo.testing`
    assert {1.0, 1e2, 1e4, 1e6} <= {problem.condition for problem in problems.values()}
    leaves = jax.tree.leaves([(p.params, p.hparams) for p in problems.values()])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.result_type(float))}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_a_problem_is_traced(problems, name):
    problem = problems[name]
    value, gradient = jax.eval_shape(
        jax.value_and_grad(problem.make_outer_loss(jaxhpo.Unroll(checkpoint=1))), problem.hparams
    )
    scalar = jax.ShapeDtypeStruct((), jnp.result_type(float))
    assert value == scalar
    assert gradient == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), problem.hparams)
    assert problem.test_loss is None or jax.eval_shape(problem.test_loss, problem.hparams) == scalar


# Left out, as they take two minutes: network and step size are those of lenet-penalties and transformer-penalties.
ALIKE = {"lenet-augmentation", "transformer-schedule", "transformer-sources"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE])
def test_convergence_and_step_size_are_as_stated(problems, name):
    problem = problems[name]
    assert problem.converged == (convergence(problem) <= 1e-4)  # the definition of the flag
    trained = jax.jit(problem.train)(problem.hparams)
    # Gradient descent is stable up to a product of 2.
    assert problem.step_size * max(curvature(problem, at) for at in (problem.params, trained)) < 2


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ridge-1") or name == "kernel-ridge"])
def test_condition_is_that_of_the_hessian(problems, name):
    problem = problems[name]
    hessian = jax.jit(jax.hessian(problem.train_loss))(problem.params, problem.hparams)
    eigenvalues = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(eigenvalues[-1] / eigenvalues[0], problem.condition, rtol=1e-6)
    assert problem.step_size * eigenvalues[-1] < 2


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_problem(capsys):
    main(["--quick", "--problems", "ridge-1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["problem", "ridge-1", "a"]
