"""Checks of the arguments of `solve`, made before anything is traced for differentiation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import is_inexact, named_leaves
from jaxhpo._core.types import InnerState, PyTree, Solution, Solver
from jaxhpo._core.validate import (
    check_arrays,
    check_callable,
    check_count,
    check_finite,
    check_hparams,
    check_params,
    describe,
)


def check_solver(solver):
    """Raises unless this is a `Solver`."""
    if not isinstance(solver, Solver):
        is_tx = hasattr(solver, "update") and not isinstance(solver, type)
        hint = "write `jaxhpo.from_optax(train_loss, tx)`" if is_tx else "make one with `from_optax`"
        raise JaxhpoError(f"`solver` got {type(solver).__name__}, not a `jaxhpo.Solver`: {hint}.")


def check_start(solver, state, hparams) -> tuple[PyTree, InnerState]:
    """Returns hyperparameters and state as JAX arrays; raises unless the state is one of this solver, at these."""
    check_solver(solver)
    if not isinstance(state, InnerState):
        hint = "its `.state`" if isinstance(state, Solution) else "`solver.init(params, hparams)`"
        raise JaxhpoError(f"`state` got {type(state).__name__}, not an `InnerState`: pass {hint}.")
    hparams, params = check_hparams(hparams), check_params(state.params, "params")
    check_arrays(state.model_state, "model_state")
    fresh = jax.eval_shape(solver.init, params, hparams, state.model_state).opt_state
    instead = "pass `solver.init(params, hparams)`, or the `.state` of a solution of the same solver and model"
    got, want = jax.tree.structure(state.opt_state), jax.tree.structure(fresh)
    if got != want:
        raise JaxhpoError(
            f"`state.opt_state` has the tree {got}, but this `{solver.name}` solver keeps {want}, so it was made by "
            f"another: {instead}."
        )
    check_arrays(state.opt_state, "state.opt_state")
    for (name, b), a in zip(named_leaves(fresh, "state.opt_state"), jax.tree.leaves(state.opt_state), strict=True):
        if jnp.shape(a) != b.shape:
            raise JaxhpoError(f"`{name}` is {describe(a)}, but these parameters need {describe(b)}: {instead}.")
    return hparams, InnerState(params, *jax.tree.map(jnp.asarray, (state.opt_state, state.model_state)))


def check_steps(batches, num_steps):
    """Returns the number of inner steps; raises where `batches` and `num_steps` do not determine it, or disagree."""
    if num_steps is not None:
        if isinstance(num_steps, Tracer):
            raise JaxhpoError(
                "`num_steps` is traced, but the length of the loop must be known while tracing: pass a Python integer, "
                "or jit with `static_argnames='num_steps'`."
            )
        check_count("num_steps", num_steps)
        num_steps = int(num_steps)
    if batches is None or callable(batches):
        if num_steps is None:
            what = "`batches=None`" if batches is None else "`batches` a function of the step"
            raise JaxhpoError(f"With {what}, it is unknown how many inner steps to take: pass `num_steps=100`, say.")
        return num_steps
    return _check_batches(batches, num_steps)


def _check_batches(batches, num_steps):
    leaves = [batches] if hasattr(batches, "__next__") else jax.tree.leaves(batches)
    if not leaves:
        raise JaxhpoError(f"`batches` got {batches!r}, without leaves: pass arrays, a function of the step, or None.")
    if isinstance(batches, int):
        raise JaxhpoError(f"`batches` got the integer {batches}: for a number of steps write `num_steps={batches}`.")
    is_list = _is_list_of_batches(batches)
    if is_list or any(map(_is_function_or_iterable, leaves)):
        what = f"a list of {len(batches)} batches" if is_list else describe(batches)
        raise JaxhpoError(
            f"`batches` got {what}, but the loop over steps is compiled and slices arrays: stack equal batches along a "
            "leading axis (`jax.tree.map(lambda *b: jnp.stack(b), *batches)`), or pass one function `lambda t: batch`. "
            "(Where one batch consists of several arrays, write them as a tuple.)"
        )
    check_arrays(batches, "batches")
    for name, leaf in named_leaves(batches, "batches"):
        if jnp.ndim(leaf) == 0:
            raise JaxhpoError(
                f"`{name}` is {describe(leaf)}, but every leaf needs a leading axis of length num_steps: add it "
                "(`jnp.broadcast_to(x, (num_steps,))`), or close over the value in the loss."
            )
    lengths = {name: jnp.shape(leaf)[0] for name, leaf in named_leaves(batches, "batches")}
    length = next(iter(lengths.values()))
    if len(set(lengths.values())) > 1:
        problem = (
            f"has leading axes of different lengths, {lengths}, but each leaf needs one slice per inner step: cut them "
            "to the same length, or close over what does not change from step to step"
        )
    elif length == 0:
        problem = "has a leading axis of length 0, so there is no step to take: pass at least one batch"
    elif num_steps not in (None, length):
        problem = (
            f"holds {length} steps, but `num_steps={num_steps}`: omit `num_steps`, or cut the batches (`jax.tree.map("
            f"lambda x: x[:{num_steps}], batches)`); for one batch at every step, pass `lambda t: batch`"
        )
    else:
        check_finite(batches, "batches", allow_infinite=True)
        return length
    raise JaxhpoError(f"`batches` {problem}.")


def _is_list_of_batches(batches) -> bool:
    """True for a list of batches of one structure, whose leading axes are those of the examples, not of the steps."""
    if not isinstance(batches, list) or len(batches) < 2:
        return False
    structures = {jax.tree.structure(b) for b in batches}
    shapes = {tuple(np.shape(x) for x in jax.tree.leaves(b)) for b in batches}
    return len(structures) == 1 and (len(shapes) == 1 or not jax.tree_util.treedef_is_leaf(*structures))


def _is_function_or_iterable(leaf) -> bool:
    return callable(leaf) or (hasattr(leaf, "__iter__") and not hasattr(leaf, "dtype") and not isinstance(leaf, str))


def slices_of(batches, num_steps) -> tuple[PyTree, PyTree, Callable]:
    """The pytrees `xs`, with leading axis T, and `counts`, and the function from a slice to the step's batch."""
    if batches is None or callable(batches):
        return jnp.arange(num_steps), True, checked_batches_function(batches)
    xs = jax.tree.map(jnp.asarray, batches)
    return xs, jax.tree.map(lambda x: False, xs), lambda x: x


def checked_batches_function(batches) -> Callable:
    """The function of the step, None as a function, with a check of what it returns while it is traced."""
    if batches is None:
        return lambda step: None
    check_callable("batches", batches, "batches(step)", 1)

    def take(step):
        try:
            batch = batches(step)
        except jax.errors.TracerArrayConversionError as error:
            raise JaxhpoError(
                "`batches(step)` indexes a NumPy array with a traced step, which NumPy cannot do: hold the data as "
                "`jnp.asarray(data)`."
            ) from error
        if batch is None:
            raise JaxhpoError("`batches(step)` returned None, so every batch is empty: end it with `return batch`.")
        return check_arrays(batch, "batches(step)")

    return take


def check_condition(condition_batch, batch):
    """Returns the condition's batch as JAX arrays; raises unless it has the tree of a step's batch."""
    got, want = jax.tree.structure(check_arrays(condition_batch, "condition_batch")), jax.tree.structure(batch)
    if got != want:
        raise JaxhpoError(f"`condition_batch` has the tree {got}, not {want}: give it the tree of a step's batch.")
    check_finite(condition_batch, "condition_batch", allow_infinite=True)
    return jax.tree.map(jnp.asarray, condition_batch)


def check_same_state(before, after):
    """Raises where a step changes the tree of the state, or the shape or kind of a leaf."""
    check_arrays(after, "state")
    got, want = jax.tree.structure(after), jax.tree.structure(before)
    if got != want:
        raise JaxhpoError(
            f"The inner step changed the tree of the state from {want} to {got}, but a loop needs the same tree at "
            "every step: return the whole model state, and make the state with `solver.init`."
        )
    for (name, b), a in zip(named_leaves(before, "state"), jax.tree.leaves(after), strict=True):
        same_kind = is_inexact(b) == is_inexact(a) and jnp.iscomplexobj(b) == jnp.iscomplexobj(a)
        if b.shape != a.shape or not same_kind:
            raise JaxhpoError(
                f"The inner step changed `{name}` from {describe(b)} to {describe(a)}, but a loop needs the same shape "
                f"and kind at every step: reshape it, or `.astype({b.dtype})`, before returning it."
            )


def check_run(rule, out, start: InnerState) -> tuple[InnerState, jax.Array]:
    """The final state and the number of steps that a rule's `run` returned; raises unless they are that."""
    try:
        (state, steps), like = jax.eval_shape(lambda: (out, start))
        got, want = (jax.tree.flatten(jax.tree.map(lambda x: (x.shape, x.dtype), tree)) for tree in (state, like))
        same = got == want and steps.shape == () and jnp.issubdtype(steps.dtype, jnp.integer)
    except (TypeError, ValueError, AttributeError):  # leaves that are no arrays, or no pair of state and number
        same = False
    if not same:
        raise JaxhpoError(
            f"`run` of {rule!r} must return `(state, steps)`, the number of steps taken being an integer and the state "
            f"like {jax.tree.map(describe, start)}, but it returned {jax.tree.map(describe, out)}."
        )
    return out[0], jnp.asarray(out[1], jnp.int32)
