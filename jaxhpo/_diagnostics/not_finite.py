"""Diagnosis of numbers that are not finite: the inner step, the leaf, the operation and the likely cause."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.processes import from_first
from jaxhpo._core.record import StepLog, recording
from jaxhpo._core.trace import compilable
from jaxhpo._core.transforms import box
from jaxhpo._core.tree import all_finite, is_inexact, named_leaves, norm, partition, scaled, upcast, vdot
from jaxhpo._core.types import PyTree, Transform
from jaxhpo._diagnostics.origin import ADVICE, find_origin

POWER_ITERATIONS = 100
REMEDY = "lower the inner learning rate, bound the penalty, or clip the inner gradients."


def diagnose(fn: Callable, hparams: PyTree, transforms: dict[str, Transform] | None = None) -> str:
    """Runs `jax.value_and_grad(fn)(hparams)` with instrumented inner steps; says in words where and why a NaN began.

    Costs one instrumented run, and one more in which the number is followed back to the operation that made it. What
    is known of the range of a hyperparameter in the train loss are the transforms, by the name of the leaf.
    """
    log = StepLog()
    with recording(steps=log):
        try:
            program, args = compilable(jax.value_and_grad(fn), hparams)
            value, _ = jax.block_until_ready(program(*args))
        except TypeError:  # a forward-mode rule has no backward pass to instrument
            program, args = compilable(fn, hparams)
            value = jax.block_until_ready(program(*args))
    finite = bool(jnp.isfinite(value))
    if jax.process_count() > 1:  # callbacks report to process 0 alone, and others would not follow it
        return from_first(lambda: log.faults[0] if log.faults else " ".join(_place(log, finite)))
    if log.faults:
        return log.faults[0]
    where, why = _place(log, finite)
    origin = _attempted(lambda: find_origin(jax.value_and_grad(fn), hparams))
    if origin is not None:
        why = f"It began {origin}"
    if log.forward and (origin is None or origin.overflows):
        why = _attempted(lambda: _divergence(log, transforms)) or why
    return f"{where} {why}"


def _attempted(explain: Callable) -> Any:
    """The explanation, or None where the program cannot be run in pieces or differentiated once more."""
    try:
        return explain()
    except Exception:
        return None


def _place(log, value_is_finite) -> tuple[str, str]:
    """The first inner step and leaf that went wrong, and the likeliest cause if no more is found out.

    The log's keys are `(inner problem, inner step, leaf)`, its values the order of arrival.
    """

    def places(events) -> set:
        return {key[:2] for key in events}

    def leaf_of(events, *preferred) -> str:
        leaves = sorted(leaf for *key, leaf in events if tuple(key) == place)
        return next((leaf for start in preferred for leaf in leaves if leaf.startswith(start)), leaves[0])

    # A step may be given a number that is not finite by the step before, or from outside the solve.
    entered = places(log.before) - {(index, step + 1) for index, step in places(log.forward)}
    # A later solve may be given the result of an earlier one: the first to arrive is at fault.
    begun = min((order for key, order in log.before.items() if key[:2] in entered), default=math.inf)
    # The backward pass begins at the last step; a cotangent that arrives there broken comes from the outer loss.
    broken = places(log.backward) - places(log.arriving)
    if begun < min(log.forward.values(), default=math.inf):
        place = min(entered, key=lambda at: (at[1], at[0]))
        leaf = leaf_of(log.before, "batches", "hparams", "state.params")
        where = f"`{leaf}` is not finite before inner step {place[1]}: it was passed to `solve` that way."
        why = "Correct the part of the outer loss that computes it."
    elif log.forward:
        place = min(log.forward, key=log.forward.__getitem__)[:2]
        leaf = leaf_of(log.forward, "the train loss", "state.params")
        where = f"`{leaf}` is not finite after" if leaf != "the train loss" else "The train loss is not finite at"
        where += f" inner step {place[1]}."
        why = f"The inner run diverges, likely at a rate above 2 / curvature, to which a penalty adds: {REMEDY}"
    elif broken and value_is_finite:
        place = max(broken, key=lambda at: (at[1], -at[0]))
        leaf = leaf_of(log.backward, "state.opt_state")
        where = f"The inner run is finite, but the derivative of inner step {place[1]} with respect to `{leaf}` is not."
        why = f"Likely it {ADVICE['derivative of sqrt']}"
    else:
        return (
            "No inner step is at fault, so the outer loss itself, or the linear solve of an implicit rule, is.",
            "Look there for a logarithm or a square root at zero, or an overflow; or raise the solver's `damping`.",
        )
    return f"Inner problem {place[0]}: {where}" if log.num_problems > 1 else where, why


def _divergence(log, transforms) -> str | None:
    """In words, the growth of an error from step to step, and what drives it; None where errors do not grow."""
    index, _, _ = min(log.forward, key=log.forward.__getitem__)
    if index not in log.first:  # within a differentiated scan JAX drops callbacks under a condition
        return None
    state, inputs, x = log.first[index]
    factor, drivers = measure_growth(log.advance[index], state, inputs, x, transforms)
    if abs(factor) <= 1 and index in log.broken:
        state, x = log.broken[index]
        factor, drivers = measure_growth(log.advance[index], state, inputs, x, transforms)
    if abs(factor) <= 1:
        return None
    text = f"The inner run diverges: a step multiplies an error along the worst direction by {factor:.3g}"
    if factor < 0:
        # Gradient descent multiplies an error along a curvature c by 1 − rate · c.
        text += f" (in gradient descent, learning rate x curvature is {1 - factor:.3g}, above 2)"
    if drivers:
        text += f". That is driven by {' and '.join(drivers)}"
    return f"{text}: {REMEDY}"


def measure_growth(
    advance: Callable, state: PyTree, inputs: PyTree, x: PyTree, transforms: dict[str, Transform] | None = None
) -> tuple[float, list[str]]:
    r"""The factor by which a step multiplies a small error along the worst direction, and what drives it.

    Its magnitude is the step's spectral radius, by power iteration :math:`v \leftarrow J^\top v` on its Jacobian in the
    state. It is negative where the error changes its sign, as with too large a learning rate, and 0 where it cannot be
    measured. Its drivers are the leaves of the hyperparameters whose change, within their range and against the slope
    of the factor, brings it below one when it is measured again; with their values where they are numbers. If no leaf
    does that alone, they are those that do it together.
    """
    floats = jax.tree.map(is_inexact, state)
    perturbed, combine = partition(state, floats)
    if not perturbed or not bool(all_finite((perturbed, inputs))):
        return 0.0, []

    def pulled(hparams, v):
        """Jᵀ v, with J = ∂Φ(θ, h)/∂θ."""

        def step(perturbed):
            return partition(advance(combine(perturbed), (hparams, *inputs[1:]), x), floats)[0]

        return jax.vjp(step, perturbed)[1](v)[0]

    @jax.jit
    def growth(hparams):
        def turn(v, _):
            after = pulled(hparams, v)  # w = Jᵀ v
            size = _norm(after)  # ‖w‖ → |λ₁| for a real dominant eigenvalue λ₁, as ‖v‖ = 1
            return scaled(1 / size, after), (size, vdot(v, after))  # v ← w / ‖w‖;  ⟨v, Jᵀ v⟩ → λ₁, with its sign

        keys = jax.random.split(jax.random.key(0), len(perturbed))
        v = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, perturbed, strict=True)]
        v, (sizes, products) = jax.lax.scan(turn, v, None, POWER_ITERATIONS)
        # For complex eigenvalues r e^±iφ the norms oscillate, but ‖(Jᵀ)ⁿ v‖^(1/n), their geometric mean, tends to r.
        return v, jnp.exp(jnp.mean(jnp.log(sizes[POWER_ITERATIONS // 2 :]))), products[-1]

    leaves, structure = jax.tree.flatten(inputs[0])
    v, factor, product = growth(inputs[0])
    factor = float(factor)
    if not math.isfinite(factor):
        return 0.0, []
    slopes = jax.tree.leaves(jax.grad(lambda h: jnp.log(_norm(pulled(h, v))))(inputs[0]))
    paths = [
        _within_range(h, slope, (transforms or {}).get(name))
        for (name, h), slope in zip(named_leaves(inputs[0], "hparams"), slopes, strict=True)
    ]

    def prevent(*moved: int) -> bool:
        """Returns whether the factor falls below one as these leaves move, by steps, to the ends of their ranges."""
        for places in zip(*(paths[i] for i in moved), strict=True):
            trial = list(leaves)
            for i, place in zip(moved, places, strict=True):
                trial[i] = place
            # Along a flat direction errors are kept, so one will do. But where the inner loss is not convex, any
            # rate s times as large leaves s times the excess above one, which is no cure: a tenth of that is asked.
            share = min(float(jnp.min(jnp.abs(trial[i] / leaves[i]), initial=1.0, where=leaves[i] != 0)) for i in moved)
            if float(growth(jax.tree.unflatten(structure, trial))[1]) - 1 <= share / 10 * (factor - 1):
                return True
        return False

    movable = [i for i, slope in enumerate(slopes) if factor > 1 and bool(jnp.any(slope != 0))]
    alone = [i for i in movable if prevent(i)]
    together = movable if len(movable) > 1 and not alone and prevent(*movable) else []
    drivers = [
        f"`{name}` = {h.item():.3g}" if h.size == 1 and jnp.issubdtype(h.dtype, jnp.floating) else f"`{name}`"
        for i, (name, h) in enumerate(named_leaves(inputs[0], "hparams"))
        if i in (alone or together)
    ]
    return -factor if product < 0 else factor, drivers


def _within_range(h: jax.Array, slope: jax.Array, transform: Transform | None) -> list[jax.Array]:
    """Values of a leaf within its range, ever farther from h, each entry moved against the slope.

    In the units of a transform by up to six decades down (for a logarithm) or towards a bound, and by one up. Without
    one, towards zero, or away from it by the entry's own size; beyond zero only what may be the logarithm of a rate.
    """
    if transform is None:
        beyond = jnp.where(jnp.abs(h) >= 1, -h, 1e-3 * h)
        return [jnp.where(slope * h > 0, end, 2 * h) for end in (h / 2, h / 10, h / 100, h / 1e3, h / 1e6, beyond)]
    u = transform.inverse(h)
    most = 6 if isinstance(transform, box) else 1
    moves = [jnp.where(slope > 0, -d, min(d, most)) * math.log(10) for d in (0.3, 1, 2, 3, 6, 6)]
    return [transform.forward(u + jnp.where(slope == 0, 0, move).astype(u.dtype)) for move in moves]


def _norm(leaves: list) -> jax.Array:
    """The Euclidean norm as s ‖x / s‖ with s the largest entry, so that no square overflows."""
    largest = jnp.stack([jnp.max(jnp.abs(jax.lax.stop_gradient(x)), initial=0.0) for x in upcast(leaves)]).max()
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * norm(scaled(1 / unit, upcast(leaves)))
