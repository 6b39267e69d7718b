"""Types that all parts of the library share: states, solvers, reports, and the protocols of user extensions."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax

PyTree = Any


class InnerState(NamedTuple):
    """State of the inner optimisation, carried from step to step.

    Attributes:
      params: the inner parameters θ, a pytree of floating-point arrays.
      opt_state: the inner optimiser's state.
      model_state: batch-norm statistics and the like; None without `has_state`.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> state = solver.init(1.0, 3.0)  # of the parameter 1, for the hyperparameter 3
      >>> print(solver.step(state, 3.0, None).params)  # p ← p − (p − h) / 2
      2.0
    """

    params: PyTree
    opt_state: PyTree = None
    model_state: PyTree = None


class Info(NamedTuple):
    """Report of an inner solve. Not differentiated; costs nothing under `jit` when unused.

    Attributes:
      optimality: Euclidean norm of the condition (for `from_optax` the gradient of the train loss) at the solution,
        on `condition_batch`, else on the last batch. The error of implicit rules goes to zero with it. If it stays
        large while the parameters no longer change, the fixed point of the optimiser is not a minimum of the train loss
        (decoupled weight decay, clipping, projection): put the decay into the loss, or use `fixed_point(step)`.
      num_steps: inner steps taken (int32).
      finite: whether every parameter and the condition are finite (bool).
      converged: whether the run ended below its `tol` (bool); None where none was given.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> info = jaxhpo.solve(solver, solver.init(0.0, 1.0), 1.0, num_steps=3).info
      >>> print(info.optimality, info.num_steps, info.finite)  # |2 (p − h)| = 2 · 0.5³
      0.25 3 True
    """

    optimality: jax.Array
    num_steps: jax.Array
    finite: jax.Array
    converged: jax.Array | None = None


class Solution(NamedTuple):
    """The result of `solve`.

    Attributes:
      params: the trained parameters, differentiable by the chosen rule.
      opt_state: the optimiser's final state.
      model_state: the final model state.
      info: the report of the solve.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> solution = jaxhpo.solve(solver, solver.init(0.0, 1.0), 1.0, num_steps=3)
      >>> more = jaxhpo.solve(solver, solution.state, 1.0, num_steps=3)  # goes on from there
      >>> print(solution.params, more.params)  # 1 − 0.5³ and 1 − 0.5⁶
      0.875 0.984375
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    info: Info

    @property
    def state(self) -> InnerState:
        """The `InnerState` for a warm start of the next solve."""
        return InnerState(self.params, self.opt_state, self.model_state)


class Solver(NamedTuple):
    """An inner problem: pure functions made by `from_optax`, `momentum_sgd` or `fixed_point`.

    Attributes:
      init: `(params, hparams, model_state=None) -> InnerState`.
      step: `(InnerState, hparams, batch) -> InnerState`, the map Φ of the papers.
      condition: `(params, hparams, batch, model_state) -> pytree like params`, zero at the solution.
      name: the function that made it, for messages.
      symmetric: whether the condition's Jacobian in `params` is symmetric, as a gradient's is.
      loss: `(params, hparams, batch, model_state) -> (scalar, model_state)`, the train loss; None where there is none.
      apply: `(InnerState, hparams, batch, (value, model_state), grad) -> InnerState`, the step that takes `grad` for
        the gradient of the train loss, where `(value, model_state)` are the results of the loss; None where a step is
        not a function of a gradient.
      rates: `(params, hparams, count) -> (learning rates, momenta)`, two trees like `params` of arrays that broadcast
        to its leaves; only for `momentum_sgd`, else None.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: h * (p - batch) ** 2, optax.sgd(0.25))
      >>> h, state = 1.0, solver.init(0.0, 1.0)
      >>> for batch in (1.0, 2.0, 3.0):
      ...     state = solver.step(state, h, batch)  # p ← p − (p − batch) / 2
      >>> print(state.params, solver.condition(state.params, h, 3.0, None))  # and 2 (p − 3)
      2.125 -1.75
    """

    init: Callable[..., InnerState]
    step: Callable[[InnerState, PyTree, PyTree], InnerState]
    condition: Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]
    name: str = "Solver"
    symmetric: bool = True
    loss: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]] | None = None
    apply: Callable[[InnerState, PyTree, PyTree, tuple, PyTree], InnerState] | None = None
    rates: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]] | None = None


class Schedule(NamedTuple):
    """Checkpoints of the inner steps for the backward pass.

    Attributes:
      segment: steps between checkpointed states; None keeps what plain autodiff keeps.
      gradients: whether the inner gradient of every step with a checkpoint is kept too, instead of recomputed.
      slots: number of states that binomial checkpointing keeps, in place of segments.
    """

    segment: int | None = None
    gradients: bool = False
    slots: int | None = None

    @property
    def mixed(self) -> bool:
        """True where steps are differentiated in mixed mode.

        A kept gradient is worth its memory only if its derivative needs nothing else of the forward pass. Binomial
        checkpointing is for the least memory, where the activations of two passes are too much.
        """
        return self.gradients or self.slots is not None


@runtime_checkable
class StatefulMethod(Protocol):
    """A hypergradient method that carries state between outer steps: the `method` argument of `hypergradient`.

    Any object with a method `pair` is one, unless it also has `run`: then it is a derivative rule (`Adjoint`).
    `hypergradient` calls `pair` once, checks the hyperparameters and the key at every call of `update`, and passes all
    five arguments by position.

    Example:
      >>> class OneStep:  # Unroll() through `num_steps` inner steps, then continue from where they end
      ...     def pair(self, solver, outer_loss, num_steps, warm_start):
      ...         def update(hparams, state, batches, outer_batch, key):
      ...             def loss(hparams):
      ...                 solution = jaxhpo.solve(solver, state, hparams, batches, num_steps=num_steps, key=key)
      ...                 value, metrics = outer_loss(solution, hparams, outer_batch)
      ...                 return value, (metrics, solution)
      ...             (value, (metrics, solution)), grad = jax.value_and_grad(loss, has_aux=True)(hparams)
      ...             info = jaxhpo.HypergradientInfo(value, metrics, solution.info)
      ...             return grad, solution.state if warm_start else state, info
      ...         return jaxhpo.Hypergradient(solver.init, update)
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> pair = jaxhpo.hypergradient(OneStep(), solver, lambda solution, h, batch: solution.params**2, num_steps=1)
      >>> h = jnp.array(1.0)
      >>> hypergrad, state, info = pair.update(h, pair.init(0.0, h))
      >>> print(hypergrad, state.params)  # p₁ = h/2, so d(p₁²)/dh = h/2
      0.5 0.5
    """

    def pair(
        self, solver: Solver, outer_loss: Callable[..., tuple], num_steps: int | None, warm_start: bool
    ) -> Hypergradient:
        """Returns the two functions for one problem.

        Args:
          solver: the inner problem.
          outer_loss: `(solution, hparams, outer_batch) -> (value, metrics)`, where `metrics` may be None.
          num_steps: inner steps per update; None where the batches determine it.
          warm_start: whether an update continues from the parameters of the last one.

        Returns:
          A `Hypergradient(init, update)` with `update(hparams, state, batches, outer_batch, key)`, which returns
          `(hypergradient, state, HypergradientInfo)`. The hypergradient has the tree of `hparams`; the state is a
          pytree that keeps its structure, shapes and dtypes from update to update.
        """
        ...


class Hypergradient(NamedTuple):
    """A stateful method applied to a problem: two pure functions, as in optax.

    Attributes:
      init: `(params, hparams, model_state=None) -> state`.
      update: `(hparams, state, batches=None, outer_batch=None, key=None) -> (hypergradient, state, info)`.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def outer_loss(solution, h, batch):
      ...     return solution.params**2
      >>> pair = jaxhpo.hypergradient(jaxhpo.Unroll(), solver, outer_loss, num_steps=1)
      >>> h, state, update = 1.0, pair.init(0.0, 1.0), jax.jit(pair.update)
      >>> for _ in range(3):
      ...     hypergrad, state, info = update(h, state)  # trains on from the last parameters
      >>> print(hypergrad, info.value)  # p = 1 − 0.5³, and dp²/dh = p by one step
      0.875 0.765625
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree, HypergradientInfo]]


class HypergradientInfo(NamedTuple):
    """Report of an update of a `Hypergradient`.

    Attributes:
      value: the outer loss at the given hyperparameters.
      metrics: the metrics that the outer loss returned with its value, or None.
      solution: the inner solve's `Info`.
      linear: the `LinearInfo` of the backward linear solve; None for methods without one.
      tolerance: the relative tolerance of the inner run and the linear solve; None for methods without one.
      standard_error: of the hypergradient, a length, for means over random pairs; None for other methods.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: (p - h) ** 2, optax.sgd(0.25))
      >>> def outer_loss(solution, h, batch):
      ...     return solution.params**2
      >>> pair = jaxhpo.hypergradient(jaxhpo.Implicit(jaxhpo.CG()), solver, outer_loss, num_steps=3)
      >>> _, _, info = pair.update(1.0, pair.init(0.0, 1.0))
      >>> print(info.value, info.solution.optimality, info.linear.num_iterations)  # p = 1 − 0.5³
      0.765625 0.25 1
    """

    value: jax.Array
    metrics: PyTree
    solution: Info
    linear: LinearInfo | None = None
    tolerance: jax.Array | None = None
    standard_error: jax.Array | None = None


class LinearStatus(enum.IntEnum):
    """Status of a linear solve.

    Attributes:
      CONVERGED: the measured residual is within the tolerance.
      MAX_ITERATIONS: all iterations, terms or directions were used; the answer of K iterations may be what is wanted.
      INDEFINITE: the method needs a positive definite matrix and found a direction of negative curvature.
      NOT_FINITE: products, right-hand side or answer are not finite; the answer is NaN, never zero.
      STALLED: the residual is above the tolerance and no longer falls: rounding, a breakdown, a singular matrix, or a
        series that does not converge. Where no tolerance was given also: the residual is small, but the matrix so
        ill-conditioned that the answer may be wrong by more than 1 %. The answer is the best iterate.

    Example:
      >>> _, info = jaxhpo.CG(maxiter=1)(lambda v: jnp.array([1.0, 2.0]) * v, jnp.ones(2))
      >>> jaxhpo.LinearStatus(int(info.status)).name
      'MAX_ITERATIONS'
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    INDEFINITE = 2
    NOT_FINITE = 3
    STALLED = 4


class LinearInfo(NamedTuple):
    """Report of a linear solve A x = b.

    Attributes:
      residual: ‖b − A x‖ / ‖b‖ (0 where b = 0), measured at the answer.
      num_iterations: products with A, without those that only measure a residual; 0 where a solver of your own does not
        say.
      status: a `LinearStatus` value, int32.
      failed: whether the answer is no solution, not even a rough one: indefinite, not finite, no better than x = 0, or
        of a dense solver whose residual is above √ε. `Implicit` then gives NaN. An answer that was stopped early has
        not failed. None, in a solver of your own, leaves it to the others: INDEFINITE, NOT_FINITE, or CONVERGED at a
        residual of 1 or more; then CONVERGED is checked, too (see `LinearSolver`).

    Example:
      >>> x, info = jaxhpo.CG()(lambda v: jnp.array([1.0, 2.0]) * v, jnp.ones(2))
      >>> print(x.round(3), info.num_iterations, info.residual < 1e-5, info.failed)
      [1.  0.5] 2 True False
    """

    residual: Any = None
    num_iterations: Any = None
    status: Any = None
    failed: Any = None


@runtime_checkable
class LinearSolver(Protocol):
    """Solver of a linear system A x = b, where A is given by its products.

    Any function `(matvec, b, x0=None) -> (x, LinearInfo)` is one. A class that inherits from `LinearSolver` can also
    declare its needs. `Implicit` calls it while tracing, with A the Jacobian of the condition in the parameters (for
    `from_optax` the Hessian of the train loss) and b a pytree like the parameters, in float32 or float64. It is never
    differentiated: derivatives, reverse mode and second ones too, are those of the equation A x = b, each by one more
    call, with Aᵀ for A where reverse mode transposes it. So any algorithm will do, also an iteration that ends by a
    tolerance.

    Its report is checked, unless that sets `failed`: the residual is measured, and CONVERGED becomes STALLED where one
    more solve, with the residual as b, finds an error of x above 1 %. Where it has no status, or is None, or an array
    as functions of `jax.scipy.sparse.linalg` return, the status is CONVERGED where that error is below 1 %, and the
    solve has failed where the residual is not below that of x = 0. Under `jit` the second solve is free where nobody
    reads the status, as under plain `jax.grad`; in a pair it doubles the cost of the linear solve.

    On a mesh of `Explicit` axes it runs with them made `Auto`, so it must not close over JAX arrays that are made or
    sharded on that mesh: pass them as keywords, `functools.partial(solver, name=array)`. NumPy arrays may be closed
    over. Under `shard_map` b may vary over mesh axes, so loops start from `jnp.zeros_like(b)`, not from `jnp.zeros`.

    Attributes:
      needs_key: whether the solver is called with `key=`, the key given to `solve`.
      needs_symmetry: whether A must be symmetric; then `Implicit` refuses conditions whose Jacobian is not.

    Example:
      >>> class Dense(jaxhpo.LinearSolver):  # for parameters that are one vector
      ...     needs_symmetry = False
      ...     def __call__(self, matvec, b, x0=None):
      ...         matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(b.size, dtype=b.dtype))
      ...         x = jnp.linalg.solve(matrix, b)
      ...         residual = jnp.linalg.norm(b - matvec(x)) / jnp.linalg.norm(b)
      ...         status = jnp.asarray(jaxhpo.LinearStatus.CONVERGED, jnp.int32)
      ...         return x, jaxhpo.LinearInfo(residual, jnp.asarray(b.size, jnp.int32), status)
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum(jnp.array([1.0, 2.0]) * (p - h) ** 2), optax.sgd(0.2))
      >>> def outer_loss(h):
      ...     rule = jaxhpo.Implicit(Dense())
      ...     return jnp.sum(jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50, adjoint=rule).params)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(6))  # the solution is h
      [1. 1.]
    """

    needs_key: ClassVar[bool] = False
    needs_symmetry: ClassVar[bool] = False

    def __call__(self, matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None) -> tuple[PyTree, LinearInfo]:
        """Solves the system.

        Args:
          matvec: v ↦ A v, for pytrees like `b`. Linear and traceable.
          b: the right-hand side.
          x0: a start for iterative solvers, or None; a solver may ignore it.

        Returns:
          x, in the structure and shapes of `b`, and a report, which may be None, as may each of its fields.
        """
        ...


def declared(linear_solver: Any) -> Any:
    """The object on which to read `needs_key` and `needs_symmetry`: the protocol's defaults for a plain function."""
    return linear_solver if isinstance(linear_solver, LinearSolver) else LinearSolver


@runtime_checkable
class Transform(Protocol):
    """Map between the natural values of a hyperparameter and the unconstrained values of the search.

    Any object with these two methods is one. They are called with one leaf at a time, an array of any shape: `inverse`
    on the start of a search, and `forward` on every outer step, while it is traced and differentiated. Both must be
    differentiable and keep shape and dtype.

    Example:
      >>> class Softplus:
      ...     def forward(self, unconstrained):
      ...         return jax.nn.softplus(unconstrained)
      ...     def inverse(self, natural):
      ...         return natural + jnp.log(-jnp.expm1(-natural))
      >>> result = jaxhpo.tune(
      ...     lambda h: (h["l2"] - 0.5) ** 2, {"l2": 2.0}, optax.sgd(1.0), num_steps=20,
      ...     transforms={"l2": Softplus()}, progress=False,
      ... )
      >>> print(result.hparams["l2"].round(2))
      0.5
    """

    def forward(self, unconstrained: jax.Array) -> jax.Array:
        """Returns the natural values, in the shape and dtype of the unconstrained ones."""
        ...

    def inverse(self, natural: jax.Array) -> jax.Array:
        """Returns the unconstrained values, in the shape and dtype of the natural ones."""
        ...
