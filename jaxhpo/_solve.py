"""`solve` runs an inner optimisation; a derivative rule determines how its result is differentiated."""

from typing import Any

import jax

from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.record import active, report_solve
from jaxhpo._core.types import InnerState, PyTree, Solution, Solver
from jaxhpo._inner.inputs import check_run
from jaxhpo._inner.problem import Adjoint, check_adjoint, info_of, make_problem


def solve(
    solver: Solver,
    state: InnerState,
    hparams: PyTree,
    batches: Any = None,
    *,
    num_steps: int | None = None,
    tol: float | None = None,
    condition_batch: PyTree = None,
    key: jax.Array | None = None,
    adjoint: Adjoint = Unroll(),  # noqa: B008 (a frozen dataclass)
) -> Solution:
    r"""Trains the inner parameters; the result is differentiable with respect to the hyperparameters.

    Runs :math:`\theta_{t+1} = \Phi_t(\theta_t, h)` for `num_steps` steps from `state`. `jax.grad` of any function of
    the result (of `info`: zero) is a hypergradient, computed by the rule `adjoint`. `jit`, `vmap`, `grad` of `grad`,
    `scan`, sharding and nesting work as for any JAX function, and so does `jacfwd(grad(f))`; for `jvp` use `Forward()`.

    **Cost and bias**: T inner gradients for the forward run; the backward pass costs what the rule says.

    Args:
      solver: the inner problem, from `from_optax`, `momentum_sgd` or `fixed_point`.
      state: the initial state: `solver.init(params, hparams)`, or an earlier solution's `.state` (warm start).
      hparams: pytree of floating-point hyperparameters, passed to the loss and to `tx`; None or `{}` if all are closed
        over.
      batches: a pytree whose leaves have a leading axis of length `num_steps`, or a pure function of the step index
        (`lambda t: data[jax.random.randint(jax.random.fold_in(key, t), ...)]`), which makes memory independent of T;
        with None the loss gets `batch=None`.
      num_steps: inner steps T; may be omitted when `batches` is a pytree.
      tol: under `Implicit`, stop below this norm of the condition (a gradient more a step); `num_steps` is the maximum.
      condition_batch: the batch on which the condition is evaluated, for `tol`, `info` and the implicit derivative; the
        last batch if None.
      key: a PRNG key, for rules that draw random numbers.
      adjoint: the derivative rule: `Unroll(...)`, `Implicit(...)`, `Forward(...)` ...

    Returns:
      A `Solution`: `params`, `opt_state`, `model_state`, `info`; `.state` to warm-start from.

    Raises:
      JaxhpoError: an invalid argument; the message names it and says what to write instead.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50)
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(3))
      [-4. -4.]

    References:
      Franceschi, Frasconi, Salzo, Grazzi, Pontil. Bilevel Programming for Hyperparameter Optimization and
      Meta-Learning. 2018. arXiv:1806.04910
    """
    adjoint = active().rule(adjoint)
    check_adjoint(adjoint)
    problem = make_problem(
        solver, state, hparams, batches, num_steps=num_steps, tol=tol, condition_batch=condition_batch, key=key
    )
    final, steps = check_run(adjoint, adjoint.run(problem), problem.state)
    info = info_of(problem, final, steps)
    report_solve(problem, adjoint, info)
    return Solution(*final, info)
