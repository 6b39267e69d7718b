"""Where a number that is not finite began, and why: runs whose every inner step reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.record import StepLog, recording
from jaxhpo._core.tree import all_finite, is_inexact, names, norm, partition, scaled, upcast, vdot
from jaxhpo._core.types import PyTree
from jaxhpo._diagnostics.origin import find_origin

POWER_ITERATIONS = 40


class Growth(NamedTuple):
    """What an inner step does to a small error.

    Attributes:
      factor: by which it multiplies one along its worst direction.
      turns: whether it turns it round, as too long a step does.
      drivers: hyperparameters by which the factor can be changed most, with their values where they are numbers.
    """

    factor: float
    turns: bool
    drivers: list[str]


def diagnose(fn: Callable, hparams: PyTree) -> str:
    """Runs `jax.value_and_grad(fn)(hparams)` with every inner step reporting; says in words where a NaN began, and why.

    Costs a run that reports, and another in which the number is followed back to the operation that made it.
    """
    recorder = StepLog()
    with recording(steps=recorder):
        try:
            value, _ = jax.block_until_ready(jax.jit(jax.value_and_grad(fn))(hparams))
        except TypeError:  # of a rule that pushes directions forward, where there is no backward pass to be watched
            value = jax.block_until_ready(jax.jit(fn)(hparams))
    if recorder.faults:
        return recorder.faults[0]
    where, why = _place(recorder, bool(jnp.isfinite(value)))
    origin = _attempted(lambda: find_origin(jax.value_and_grad(fn), hparams))
    if recorder.forward and (origin is None or origin.overflows):
        why = _attempted(lambda: _growing(recorder)) or (f"It began {origin}" if origin else why)
    elif origin is not None:
        why = f"It began {origin}"
    return f"{where} {why}"


def _attempted(explain: Callable) -> Any:
    """None where a program cannot be run in pieces, or differentiated once more: what is to be told is told anyway."""
    try:
        return explain()
    except Exception:
        return None


def _place(recorder, value_is_finite) -> tuple[str, str]:
    """The first inner step that went wrong and the leaf; and the likeliest cause, where no more is known."""
    entered = {(i, t) for i, t, _ in recorder.before} - {(i, t + 1) for i, t, _ in recorder.forward}
    # A later solve may be given what an earlier one made: who comes first is at fault.
    begun = min((n for (i, t, _), n in recorder.before.items() if (i, t) in entered), default=math.inf)
    if entered and begun < min(recorder.forward.values(), default=math.inf):
        index, step = min(entered, key=lambda e: (e[1], e[0]))
        leaves = sorted(name for i, t, name in recorder.before if (i, t) == (index, step))
        leaf = _first(leaves, "batches", "hparams", "state.params")
        return (
            f"{_which(recorder, index)}`{leaf}` is not finite before inner step {step}: `solve` was given it so.",
            "Mend what makes it in the outer loss.",
        )
    if recorder.forward:
        index, step, _ = min(recorder.forward, key=recorder.forward.__getitem__)
        leaves = sorted(name for i, t, name in recorder.forward if (i, t) == (index, step))
        leaf = _first(leaves, "the train loss", "state.params")
        where = f"the train loss is not finite at inner step {step}"
        if leaf != "the train loss":
            where = f"`{leaf}` is not finite after inner step {step}"
        return (
            f"{_which(recorder, index)}{where[0].upper() + where[1:]}.",
            "The inner run diverges. The likeliest cause is an inner learning rate above 2 / curvature, to which a "
            "penalty in the train loss adds: lower the rate, bound the penalty, or clip the inner gradients.",
        )
    # The backward pass meets the last step first; what already arrives there broken was broken by the outer loss.
    broken = {(i, t) for i, t, _ in recorder.backward} - {(i, t) for i, t, _ in recorder.arriving}
    if broken and value_is_finite:
        index, step = max(broken, key=lambda e: (e[1], -e[0]))
        leaves = sorted(name for i, t, name in recorder.backward if (i, t) == (index, step))
        leaf = _first(leaves, "state.opt_state")
        return (
            f"{_which(recorder, index)}The inner run is finite, but the derivative of inner step {step} with respect "
            f"to `{leaf}` is not.",
            "The likeliest cause is a square root at zero, whose derivative is infinite (Adam, RMSProp, Adagrad, a "
            "norm): write `optax.adam(..., eps_root=1e-8)`, or `sqrt(x + eps)`.",
        )
    return (
        "No inner step is at fault, so the outer loss itself, or the linear solve of an implicit rule, is.",
        "Look for a logarithm or a square root at zero, or an overflow, in the outer loss, or raise the solver's "
        "`damping`.",
    )


def _growing(recorder) -> str | None:
    """In words, by how much inner steps multiply an error, where that is more than one, and what drives it."""
    index, _, _ = min(recorder.forward, key=recorder.forward.__getitem__)
    if index not in recorder.first:  # of a solve within a differentiated scan JAX drops what is told under a condition
        return None
    state, inputs, x = recorder.first[index]
    growth = measure_growth(recorder.advance[index], state, inputs, x)
    if (growth is None or growth.factor <= 1) and index in recorder.broken:
        state, x = recorder.broken[index]
        growth = measure_growth(recorder.advance[index], state, inputs, x)
    if growth is None or growth.factor <= 1:
        return None
    factor = -growth.factor if growth.turns else growth.factor
    text = f"The inner run diverges: a step multiplies an error along the worst direction by {factor:.3g}"
    if growth.turns:
        text += f" (in gradient descent, learning rate x curvature is {1 + growth.factor:.3g}, above 2)"
    if growth.drivers:
        text += f". That is driven by {' and '.join(growth.drivers)}"
    return f"{text}: lower the inner learning rate, bound the penalty, or clip the inner gradients."


def measure_growth(advance: Callable, state: PyTree, inputs: PyTree, x: PyTree) -> Growth | None:
    r"""The step's spectral radius, by power iteration :math:`v \leftarrow J^\top v` on its Jacobian in the state.

    Its drivers are the leaves h of the hyperparameters with the largest :math:`|h\, \partial_h \log \|J^\top v\||`,
    down to half of the largest.
    """
    floats = jax.tree.map(is_inexact, state)
    perturbed, combine = partition(state, floats)
    if not perturbed or not bool(all_finite((perturbed, inputs))):
        return None

    def pulled(hparams, v):
        def step(perturbed):
            return partition(advance(combine(perturbed), (hparams, *inputs[1:]), x), floats)[0]

        return jax.vjp(step, perturbed)[1](v)[0]

    def turn(v, _):
        after = pulled(inputs[0], v)
        size = _norm(after)
        return scaled(1 / size, after), (size, vdot(v, after))

    keys = jax.random.split(jax.random.key(0), len(perturbed))
    v = [jax.random.normal(key, m.shape, m.dtype) for key, m in zip(keys, perturbed, strict=True)]
    v, (sizes, products) = jax.lax.scan(turn, v, None, POWER_ITERATIONS)
    # Complex eigenvalues make the norms swing; their mean over many turns does not.
    factor = float(jnp.exp(jnp.mean(jnp.log(sizes[POWER_ITERATIONS // 2 :]))))
    if not math.isfinite(factor):
        return None
    slopes = jax.grad(lambda h: jnp.log(_norm(pulled(h, v))))(inputs[0])
    shares = [float(jnp.sum(jnp.abs(h * g))) for h, g in zip(*map(jax.tree.leaves, (inputs[0], slopes)), strict=True)]
    leaf_names = names(inputs[0], "hparams")
    is_number = lambda h: h.size == 1 and jnp.issubdtype(h.dtype, jnp.floating)  # noqa: E731
    values = [f" = {h.item():.3g}" if is_number(h) else "" for h in jax.tree.leaves(inputs[0])]
    told = zip(leaf_names, values, shares, strict=True)
    drivers = [f"`{name}`{value}" for name, value, s in told if s > 0 and s >= max(shares) / 2]
    return Growth(factor, bool(products[-1] < 0), drivers)


def _norm(leaves: list) -> jax.Array:
    """The Euclidean norm, where squares of the entries overflow too."""
    largest = jnp.stack([jnp.max(jnp.abs(jax.lax.stop_gradient(x)), initial=0.0) for x in upcast(leaves)]).max()
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * norm(scaled(1 / unit, upcast(leaves)))


def _which(recorder, index) -> str:
    return f"Inner problem {index}: " if recorder.num_problems > 1 else ""


def _first(leaves, *preferred) -> str:
    return next((name for start in preferred for name in leaves if name.startswith(start)), leaves[0])
