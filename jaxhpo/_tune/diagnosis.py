"""Explanations of outer steps: not finite, a hypergradient of zero, solves that did not converge."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.trace import compilable
from jaxhpo._core.transforms import apply_transforms
from jaxhpo._core.tree import all_finite, named_leaves
from jaxhpo._core.types import Info, LinearInfo, LinearStatus, PyTree, Transform
from jaxhpo._diagnostics.not_finite import diagnose
from jaxhpo._diagnostics.origin import find_origin
from jaxhpo._tune.step import OuterState, Step, has_nan, reports_in, solves_finite

INNER = "raise `num_steps` of `solve`, or its `tol`"
LINEAR = (
    "raise the linear solver's `maxiter`, as in `Implicit(CG(maxiter=1000))`, or accept less by its `tol`; where more "
    "iterations change nothing, compute in float64 or add `damping`"
)


def program(step: Step, state: OuterState) -> tuple[Callable, PyTree] | None:
    """The function that a step differentiates, and its argument; None under a `gradient` of the user's."""
    return None if step.gradient else (lambda u: step.objective(u, state.carry, state.key)[0], state.point)


def diagnosis(step: Step, state: OuterState) -> str:
    """Says where the step from `state` ceases to be finite."""
    if step.gradient is not None:
        return (
            "It comes from the `gradient` function that was given. If that is `from_pair`'s, its training may have "
            "diverged: lower the solver's rate, or bound a hyperparameter that makes its steps too long (`box`)."
        )
    key = jax.random.fold_in(state.key, state.step)
    times, by_leaf = step.remedies.accumulate, apply_transforms(lambda found, _: found, step.transforms, state.point)
    transforms = {name: found for name, found in named_leaves(by_leaf, "hparams") if isinstance(found, Transform)}
    objective = jax.value_and_grad(step.objective, has_aux=True)
    run, (*consts, _, _, _) = compilable(objective, state.point, state.carry, key)
    for key in [key] if times == 1 else list(jax.random.split(key, times)):  # noqa: B020 (the keys of `_accumulated`)
        (value, (carry, info)), grad = run(*consts, state.point, state.carry, key)
        if not bool(jnp.isfinite(value) & all_finite(grad) & solves_finite(info)):
            try:
                return diagnose(lambda u, key=key: step.objective(u, state.carry, key)[0], state.point, transforms)
            except JaxhpoError as error:  # of values that are only met outside compiled code
                return str(error)
        if bool(has_nan(carry)):
            return _origin_of(carry, step, state, key)
    return "Loss and hypergradient are finite: look at the optimiser's rate and schedule at this step."


def unconverged(history: dict[str, Any], step: Step) -> str:
    """Says in how many outer steps recorded solves ended before their tolerance, and what to write; "" where none did.

    Linear solvers of a fixed number of terms have no tolerance.
    """
    known = np.isfinite(history["value"])  # not of a member that has ended, and is held
    inner = [(r.converged == 0, r.optimality) for r in reports_in(history["info"], Info) if r.converged is not None]
    linear = [(r.status != LinearStatus.CONVERGED, r.residual) for r in reports_in(history["info"], LinearInfo)]
    if "linear_solves" in history:
        columns = history["linear_solves"]
        linear.append((columns["not_converged"] > 0, columns["residual"]))
    texts = []
    for what, found, instead in (
        ("inner runs ended at `num_steps`, before their `tol` (largest optimality", inner, INNER),
        ("linear solves ended before their tolerance (largest residual", [] if step.truncated else linear, LINEAR),
    ):
        steps, sizes = set[int](), list[float]()
        for missed, size in found:
            counts = known if missed.ndim >= known.ndim else known.any(1)  # a column that members share
            early = missed & counts.reshape(*counts.shape, *(1,) * (missed.ndim - counts.ndim))
            steps |= {*np.nonzero(early)[0].tolist()}
            sizes += size[early].tolist()
        if steps:
            texts.append(f"in {len(steps)} of {len(known)} steps {what} {max(sizes):.1e}): {instead}")
    return "; ".join(texts)


def _origin_of(carry, step, state, key) -> str:
    bad = [bool(has_nan(leaf)) for leaf in jax.tree.leaves(carry)]

    def made(point):
        leaves = jax.tree.leaves(step.objective(point, state.carry, key)[1][0])
        return [leaf for leaf, is_bad in zip(leaves, bad, strict=True) if is_bad]

    origin = find_origin(made, state.point)
    return f"It began {origin}" if origin else "Look for an overflow, or 0/0, in what makes the carry."
