"""Derivative of the last inner step alone, by a difference of two gradients: `SAMA` and `FiniteDifference`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.pullback import Inputs, closed_over_names, run_with_pullback, used_in_steps, warn_perturbed
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import report_fault
from jaxhpo._core.trace import dependent_results
from jaxhpo._core.tree import add_scaled, all_finite, cast_like, is_inexact, names, norm, partition, scaled, upcast
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.loop import scan_steps
from jaxhpo._inner.problem import Problem


def run_last_step(problem: Problem, rule: Any, step_size: float | None = None) -> tuple[InnerState, jax.Array]:
    r"""Runs the inner problem and differentiates its last step alone, without second derivatives.

    That step is :math:`\theta = U(w, g, h)`, a function of the gradient :math:`g = \nabla_w L(w, h)`. With v the
    cotangent of θ:

    .. math:: \Big(\frac{d\theta}{dh}\Big)^\top v = (\partial_h g)^\top p + (\partial_h U)^\top v, \qquad
        p = (\partial_g U)^\top v

    Args:
      problem: the inner problem.
      rule: the derivative rule, which has an `epsilon`.
      step_size: α of the update :math:`U = w - \alpha g`, differentiated in place of the optimiser's; None
        differentiates the optimiser's own update.

    Returns:
      The final state, and the number of steps taken.
    """
    refuse_tol(problem, rule)
    sees_optimiser = step_size is None
    if problem.solver.loss is None or (sees_optimiser and problem.solver.apply is None):
        raise JaxhpoError(
            f"{rule!r} takes differences of gradients of the train loss, but a `{problem.solver.name}` solver takes no "
            "such gradient: make it with `from_optax` or `momentum_sgd`, or use `Unroll(truncate=1)`."
        )
    loss, loss_consts = _convert_loss(problem, rule)
    update, update_consts = _convert_update(problem) if sees_optimiser else (None, [])

    def forward(at):
        before = at.state
        if problem.num_steps > 1:
            head = jax.tree.map(lambda x: x[:-1], at.xs)
            before = scan_steps(lambda s, x: problem.advance(s, at.inputs, x), before, head, problem.num_steps - 1)
        return problem.advance(before, at.inputs, _last(at.xs)), before

    def pull(at, perturbed, before, cotangent):
        if step_size is not None:  # U = w − α g: p = −α v, and ∂_h U = 0
            p, direct = scaled(-step_size, cotangent.params), None
        else:
            p, direct = _pull_update(rule, loss, update, at, perturbed, before, cotangent.params)
        leaves, combine = partition(at, perturbed)
        # In float32 at least: differences of 16-bit gradients are noise.
        w, z, p = upcast((before.params, leaves, p))
        mixed = _mixed_product(lambda w, z: loss(combine(z), before, w), w, z, p, rule.epsilon)
        return mixed if direct is None else jax.tree.map(jnp.add, mixed, upcast(direct))

    # For each value that the step closes over, its position among those that the loss closes over, or None.
    in_loss = [next((i for i, o in enumerate(loss_consts) if o is c), None) for c in problem.inputs[1]]
    check = functools.partial(_check, problem, rule, loss, in_loss, sees_optimiser)
    consts = loss_consts, update_consts
    return run_with_pullback(problem, rule, forward, pull, check, consts, params_only=True)


def _last(xs):
    """The slice of the last step."""
    return jax.tree.map(lambda x: x[-1], xs)


def _convert_loss(problem, rule):
    """`loss(inputs, state, params)` on the last batch, in float32 at least, and the values that it closes over."""

    def value(state, hparams, batch, params, own):
        return upcast(problem.solver.loss(params, own, upcast(batch), upcast(state.model_state))[0])

    own = problem.state.params, problem.inputs[0]
    low = [x for x in jax.tree.leaves(own) if is_inexact(x) and x.dtype.itemsize < 4]
    try:
        pure, consts = problem.closure_convert(value, *upcast(own))
    except TypeError as error:
        if not low:
            raise
        raise JaxhpoError(
            f"{rule!r} takes differences of gradients, which are noise in {low[0].dtype}, but the train loss cannot be "
            f"computed with parameters in float32: `{error}`. Pass data through `batches`, which are cast too, or use "
            "`Unroll(truncate=1)`."
        ) from error

    def loss(at, state, params):
        return pure(at.consts[0], state, at.inputs[0], _last(at.xs), params, upcast(at.inputs[0]))

    return loss, consts


def _convert_update(problem):
    """`update(inputs, state, grad)`, the optimiser's U on the last batch, and the values that it closes over."""
    solver = problem.solver

    def after(state, hparams, batch, grad):
        out = solver.loss(state.params, hparams, batch, state.model_state)  # an optimiser may read the value
        return solver.apply(state, hparams, batch, out, grad).params

    pure, consts = problem.closure_convert(after, problem.state.params)
    return lambda at, state, grad: pure(at.consts[1], state, at.inputs[0], _last(at.xs), grad), consts


def _pull_update(rule, loss, update, at, perturbed, before, v):
    """p = (∂_g U)ᵀ v, and (∂_h U)ᵀ v at fixed g for each perturbed leaf."""
    grad = jax.grad(lambda w: loss(at, before, w))(upcast(before.params))
    leaves, combine = partition(at, perturbed)
    grad = cast_like(grad, before.params)
    _, pullback = jax.vjp(lambda g, leaves: update(combine(leaves), before, g), grad, leaves)
    p, direct = pullback(v)
    report_fault(~all_finite(p) & all_finite((v, grad)), f"`{rule!r}`: {_NOT_FINITE}")
    return p, direct


_NOT_FINITE = (
    "the inner run is finite, but the derivative of the optimiser's last update is not. The likeliest cause is a "
    "square root at zero, whose derivative is infinite (Adam, RMSProp, Adagrad): write `optax.adam(..., "
    "eps_root=1e-8)`."
)


def _mixed_product(loss: Callable, w: PyTree, z: list, p: PyTree, epsilon: float) -> list:
    r"""(∂_z g)ᵀ p for g = ∇_w L(w, z), without second derivatives.

    .. math:: (\partial_z g)^\top p = \nabla_z (g^\top p) = \frac{\|p\|}{2\epsilon} \Big[\nabla_z L\big(w + \epsilon
        \tfrac{p}{\|p\|}, z\big) - \nabla_z L\big(w - \epsilon \tfrac{p}{\|p\|}, z\big)\Big] + O(\epsilon^2)

    p = 0 gives 0, and an entry of p that is not finite gives NaN.
    """
    # u = p / ‖p‖ and ‖p‖, with p first divided by its largest entry, as the squares of tiny entries would be zero.
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(p)))
    p = _divided(p, largest)
    length = norm(p)
    unit = _divided(p, length)
    # ∇_z L(w ± εu, z) = ∇_z L ± ε (∂_z g)ᵀ u + …: the difference of the two is 2ε (∂_z g)ᵀ u, and p = ‖p‖ u.
    scale = largest * length / (2 * epsilon)

    def slope(z, sign):
        # Scaled before the gradient: under `shard_map` that is a sum over devices, and the scale differs between them.
        return scale * loss(add_scaled(w, jnp.asarray(sign * epsilon), unit), z)

    return jax.tree.map(jnp.subtract, jax.grad(slope)(z, 1), jax.grad(slope)(z, -1))


def _divided(p, size):
    return jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1).astype(x.dtype), p)


def _check(problem, rule, loss, in_loss, sees_optimiser, at, perturbed):
    """Warns of perturbed leaves that the last step does not see; refuses 16-bit ones, which are not cast."""
    alone = f"and {rule!r} differentiates the last inner step alone"
    initial = f"is an initial value, {alone}: its hypergradient through this solve is exactly zero. `Unroll()` sees it."
    warn_perturbed(names(at.state, "state"), perturbed.state, initial)
    data_names = names(at.xs, "batches")
    if problem.num_steps > 1:
        data = f"is being differentiated, {alone}: all batches but the last get exactly zero. `Unroll()` sees them."
        warn_perturbed(data_names, perturbed.xs, data, partial=True)
    data_names += closed_over_names(at.consts[0])
    data, marks = jax.tree.leaves((at.xs, at.consts[0])), jax.tree.leaves((perturbed.xs, perturbed.consts[0]))
    for name, x, m in zip(data_names, data, marks, strict=True):
        if m and x.dtype.itemsize < 4:
            raise JaxhpoError(
                f"{name} is {describe(x)} and being differentiated, but {rule!r} takes a difference of two gradients, "
                "which is noise in 16 bits: pass it in float32, or within `hparams`, which are cast."
            )
    _check_inputs(problem, rule, _seen(loss, at, perturbed), in_loss, sees_optimiser, at, perturbed)


def _check_inputs(problem, rule, seen, in_loss, sees_optimiser, at, perturbed):
    """Warns of hyperparameters and closed-over values that act through the optimiser alone, or not at all."""
    every = [*names(at.inputs[0], "hparams"), *closed_over_names(at.inputs[1])]
    in_step = [*jax.tree.leaves(seen.inputs[0]), *(i is not None and seen.consts[0][i] for i in in_loss)]
    unseen = [m and not s for m, s in zip(jax.tree.leaves(perturbed.inputs), in_step, strict=True)]
    if not sees_optimiser:
        message = (
            f"does not enter the train loss together with the parameters, so under {rule!r} its hypergradient through "
            "this solve is exactly zero. If it is a setting of the optimiser (a learning rate, a momentum), `Unroll()` "
            "sees it; if nothing uses it, remove it; if it enters the outer loss directly, that part is still right."
        )
        warn_perturbed(every, unseen, message)
    elif problem.num_steps > 1:
        # An entry of a schedule may be used in an early step alone; a single number is used in every step.
        used, leaves = used_in_steps(problem, at, perturbed), jax.tree.leaves(at.inputs)
        schedules = [a and b and x.ndim > 0 for a, b, x in zip(unseen, used, leaves, strict=True)]
        message = (
            f"acts through the optimiser alone, and {rule!r} differentiates the last of {problem.num_steps} inner "
            "steps: its effect in the other steps is not in its hypergradient (an entry of a schedule that is used "
            "only there gets exactly zero). `Unroll()` sees all steps."
        )
        warn_perturbed(every, schedules, message, partial=True)


def _seen(loss, at, perturbed) -> Inputs:
    """`perturbed`, but True only for leaves z for which ∇_z L depends on the parameters, so that ∂_z g may not be 0."""
    leaves, combine = partition(at, perturbed)

    def slopes(params):
        return jax.grad(lambda z: loss(combine(z), at.state, params))(upcast(leaves))

    found = dependent_results(slopes, upcast(at.state.params))
    return partition(jax.tree.map(lambda _: False, perturbed), perturbed)[1](found)
