"""The few types that every part of the library shares."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax

PyTree = Any


class InnerState(NamedTuple):
    """What the inner optimisation carries from step to step.

    Attributes:
      params: the inner parameters θ, a pytree of floating-point arrays.
      opt_state: the inner optimiser's state.
      model_state: batch-norm statistics and the like; None without `has_state`.
    """

    params: PyTree
    opt_state: PyTree = None
    model_state: PyTree = None


class Info(NamedTuple):
    """How the inner solve ended. Not differentiated; free under `jit` when unused.

    Attributes:
      optimality: Euclidean norm of the condition (for `from_optax` the gradient of the train loss) at the solution,
        on `condition_batch`, else on the last batch. Implicit rules are exact as it goes to zero. If it stays large
        while the parameters no longer move, the optimiser has another fixed point than the train loss (decoupled
        weight decay, clipping, projection): put the decay into the loss, or use `fixed_point(step)`.
      num_steps: inner steps taken (int32).
      finite: whether every parameter and the condition are finite (bool).
    """

    optimality: jax.Array
    num_steps: jax.Array
    finite: jax.Array


class Solution(NamedTuple):
    """The result of `solve`.

    Attributes:
      params: the trained parameters, differentiable by the chosen rule.
      opt_state: the optimiser's final state.
      model_state: the final model state.
      info: how the solve ended.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    info: Info

    @property
    def state(self) -> InnerState:
        """The `InnerState` from which a next solve can be warm-started."""
        return InnerState(self.params, self.opt_state, self.model_state)


class Solver(NamedTuple):
    """An inner problem: pure functions made by `from_optax`, `momentum_sgd` or `fixed_point`.

    Attributes:
      init: `(params, hparams, model_state=None) -> InnerState`.
      step: `(InnerState, hparams, batch) -> InnerState`, the map Φ of the papers.
      condition: `(params, hparams, batch, model_state) -> pytree like params`, zero at the solution.
      name: how it was made, for messages.
      symmetric: whether the condition's Jacobian in `params` is symmetric, as a gradient's is.
      loss: `(params, hparams, batch, model_state) -> (scalar, model_state)`, the train loss; None where there is none.
      apply: `(InnerState, hparams, batch, (value, model_state), grad) -> InnerState`, the step that takes `grad` for
        the gradient of the train loss, whose results come with it; None where a step is no function of a gradient.
      rates: `(params, hparams, count) -> (learning rates, momenta)`, two trees like `params` of arrays that broadcast
        to its leaves; None but for `momentum_sgd`.
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
    """What of the inner steps is kept for the backward pass.

    Attributes:
      segment: steps between states that are kept; None keeps whatever plain autodiff keeps.
      gradients: whether the inner gradient is kept of every step whose state is, so that it need not be redone.
      slots: the number of states that are kept by binomial checkpointing, in place of segments.
    """

    segment: int | None = None
    gradients: bool = False
    slots: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether steps are differentiated in mixed mode.

        A kept gradient is worth its memory only if its derivative needs nothing else of the forward pass; and where
        memory is tightest, so that states are redone several times over, the activations of two passes are too much.
        """
        return self.gradients or self.slots is not None


@runtime_checkable
class StatefulMethod(Protocol):
    """A hypergradient method that carries state between outer steps: the `method` of `hypergradient`.

    What has a `run` too is taken for a derivative rule.
    """

    def pair(
        self, solver: Solver, outer_loss: Callable[..., tuple], num_steps: int | None, warm_start: bool
    ) -> Hypergradient:
        """Returns the pair for `outer_loss(solution, hparams, outer_batch) -> (value, metrics)`."""
        ...


class Hypergradient(NamedTuple):
    """A hypergradient method that carries state between outer steps: two pure functions, as in optax.

    Attributes:
      init: `(params, hparams, model_state=None) -> state`.
      update: `(hparams, state, batches=None, outer_batch=None, key=None) -> (hypergradient, state, info)`.
    """

    init: Callable[..., PyTree]
    update: Callable[..., tuple[PyTree, PyTree, HypergradientInfo]]


class HypergradientInfo(NamedTuple):
    """What an update of a `Hypergradient` reports.

    Attributes:
      value: the outer loss, before the hyperparameters move.
      metrics: what the outer loss returned beside it, or None.
      solution: the inner solve's `Info`.
      linear: the `LinearInfo` of the backward linear solve; None for methods without one.
      tolerance: the relative tolerance of the inner run and the linear solve; None for methods without one.
    """

    value: jax.Array
    metrics: PyTree
    solution: Info
    linear: LinearInfo | None = None
    tolerance: jax.Array | None = None


class LinearStatus(enum.IntEnum):
    """How a linear solve ended.

    Attributes:
      CONVERGED: the measured residual is within the tolerance.
      MAX_ITERATIONS: all iterations, terms or directions were used: the answer is that of K iterations, which is legal.
      INDEFINITE: a direction of negative curvature was met, where the method needs a positive definite matrix.
      NOT_FINITE: products, right-hand side or answer are not finite; the answer is NaN, never zero.
      STALLED: the residual no longer falls, above the tolerance: rounding, a breakdown, a singular matrix, or a series
        that does not converge. The answer is the best iterate met.
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    INDEFINITE = 2
    NOT_FINITE = 3
    STALLED = 4


class LinearInfo(NamedTuple):
    """Diagnostics of a linear solve A x = b.

    Attributes:
      residual: ‖b − A x‖ / ‖b‖ (0 where b = 0), measured at the answer.
      num_iterations: products with A, less those that only measure a residual.
      status: a `LinearStatus` value, int32.
    """

    residual: jax.Array
    num_iterations: jax.Array
    status: jax.Array


@runtime_checkable
class LinearSolver(Protocol):
    """Solves A x = b for pytrees b, with A given by its products.

    Any function `(matvec, b, x0=None) -> (x, LinearInfo)` will do. A class that inherits from this one can also declare
    what it needs.

    Attributes:
      needs_key: it is called with `key=`, the key given to `solve`.
      needs_symmetry: it suits symmetric matrices only, and `Implicit` refuses it for a condition of another kind.
    """

    needs_key: ClassVar[bool] = False
    needs_symmetry: ClassVar[bool] = False

    def __call__(self, matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None) -> tuple[PyTree, LinearInfo]:
        """Solves the system."""
        ...


@runtime_checkable
class Transform(Protocol):
    """Maps between a hyperparameter's natural values and the unconstrained ones of the search; both differentiable."""

    def forward(self, unconstrained: jax.Array) -> jax.Array:
        """Returns the natural values, in the shape and type of the unconstrained ones."""
        ...

    def inverse(self, natural: jax.Array) -> jax.Array:
        """Returns the unconstrained values."""
        ...
