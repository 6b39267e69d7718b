"""A user's code as a type checker sees it: the types of ten calls, and what must be an error.

`pyright` checks it against the sources, and `.ci/run` again against the installed wheel, whose types count only by its
`py.typed`. Nothing here is run.
"""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax

import jaxhpo
import jaxhpo.data


def train_loss(params: jax.Array, hparams: dict[str, jax.Array], batch: None) -> jax.Array:
    return jnp.sum(jnp.exp(hparams["log_penalty"]) * params**2)


hparams = {"log_penalty": jnp.zeros(3)}
solver = assert_type(jaxhpo.from_optax(train_loss, optax.sgd(0.1)), jaxhpo.Solver)
solution = assert_type(
    jaxhpo.solve(solver, solver.init(jnp.ones(3), hparams), hparams, num_steps=3, adjoint=jaxhpo.Implicit(jaxhpo.CG())),
    jaxhpo.Solution,
)
assert_type(solution.info, jaxhpo.Info)
assert_type(solution.state, jaxhpo.InnerState)


def outer_loss(hparams: Any) -> jax.Array:
    return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.ones(3), hparams), hparams, num_steps=3).params)


result = assert_type(jaxhpo.tune(outer_loss, hparams, optax.adam(0.1), num_steps=3), jaxhpo.TuneResult)
assert_type(result.status, str)
assert_type(jaxhpo.load("runs/1"), jaxhpo.TuneResult)
assert_type(jaxhpo.check_hypergradient(outer_loss, hparams).relative_error, float)
assert_type(jaxhpo.memory_plan(outer_loss, hparams).rows, tuple[jaxhpo.PlanRow, ...])
assert_type(jaxhpo.compare(lambda adjoint: outer_loss, hparams)["Unroll()"], jaxhpo.MethodRow)
pair = assert_type(
    jaxhpo.hypergradient(jaxhpo.HOAG(), solver, lambda solution, hparams, batch: jnp.sum(solution.params)),
    jaxhpo.Hypergradient,
)
assert_type(jaxhpo.error_bar(outer_loss)(hparams), jaxhpo.ErrorBar)
assert_type(jaxhpo.data.digits(0).train, jaxhpo.data.Examples)

# These are wrong, and pyright says so: a comment that silences nothing is an error itself.
assert_type(result.status, int)  # pyright: ignore[reportAssertTypeFailure]
jaxhpo.Unroll(chekpoint=3)  # pyright: ignore[reportCallIssue]
jaxhpo.CG(maxiter="100")  # pyright: ignore[reportArgumentType]
_ = jaxhpo.sovle  # pyright: ignore[reportAttributeAccessIssue]
