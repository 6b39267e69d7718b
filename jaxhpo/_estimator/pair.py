"""Helpers of stateful methods: the start of an inner run, random perturbations, and the check of their state."""

from typing import Any

import jax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import InnerState, PyTree, Solver
from jaxhpo._core.validate import require_key


def inner_start(solver: Solver, inner: InnerState, hparams: PyTree, warm_start: bool) -> InnerState:
    """Return where an inner run starts: at `inner`, or without warm start at a new state of the same parameters.

    A new state is made at the present hyperparameters, on which the optimiser's first state may depend.
    """
    return inner if warm_start else solver.init(inner.params, hparams, inner.model_state)


def drawn(condition_batch: Any, key: Any) -> PyTree:
    """Return the batch of the condition: the one given, or drawn by the key of an update; None for the last step's."""
    if not callable(condition_batch):
        return condition_batch
    # The rule, if it is random, draws from the key itself.
    batch = condition_batch(jax.random.fold_in(require_key(key, "condition_batch"), 1))
    if batch is None:
        raise JaxhpoError(
            "`condition_batch(key)` returned None, but it draws the batch of the linear system: end it with `return "
            "batch`, or omit it for the last step's."
        )
    return batch


def check_pair_state(state: Any, kind: type, method: Any) -> None:
    """Raise unless the state given to a pair's `update` is of the type that its `init` returns."""
    if not isinstance(state, kind):
        raise JaxhpoError(
            f"`state` got {type(state).__name__}, but the pair of {method!r} keeps a {kind.__name__}: pass what "
            "`pair.init(params, hparams)` or the last `update` returned (to `tune`, `carry=pair.init(...)`)."
        )


def check_warm_start(warm_start: bool, method: Any, instead: str) -> None:
    """Raise where the state of a method must continue from update to update, but `warm_start` is False."""
    if not warm_start:
        raise JaxhpoError(
            f"`warm_start=False` with {method!r}, whose state always continues from update to update: omit it, or "
            f"write `hypergradient({instead}, ..., warm_start=False)`."
        )
