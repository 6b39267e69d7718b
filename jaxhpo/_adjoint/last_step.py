"""What the rules share that differentiate the last inner step alone, by first derivatives of the train loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxhpo._adjoint.pullback import Inputs, closed_over_names, run_with_pullback, used_in_steps, warn_perturbed
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import add_scaled, is_inexact, names, norm, partition, upcast
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import describe
from jaxhpo._inner.inputs import refuse_tol
from jaxhpo._inner.loop import scan_steps
from jaxhpo._inner.problem import Problem


def run_one_step(
    problem: Problem, adjoint: Any, direction: Callable, consts: PyTree = (), *, sees_optimiser: bool
) -> tuple[InnerState, jax.Array]:
    r"""Runs the inner problem; its last step alone is differentiated, and without second derivatives.

    That step moves the parameters by a function of :math:`g = \nabla_w L(w, h)`. With v the cotangent of the new
    parameters, p that of g: :math:`(d\theta/dh)^\top v = (\partial_h g)^\top p` plus what h does otherwise.

    Args:
      problem: the inner problem.
      adjoint: the rule, which has an `epsilon`.
      direction: `(inputs, moving, loss, state before the step, v) -> (p, direct)`, where `direct` lists the cotangents
        of the moving leaves other than through g, or is None; `loss(inputs, state, params)`.
      consts: what `direction` closes over; it finds them in `inputs.consts[1]`.
      sees_optimiser: whether `direct` holds the settings of the optimiser.

    Returns:
      The final state, and the number of steps taken.
    """
    refuse_tol(problem, adjoint)
    loss, loss_consts = _hoist_loss(problem, adjoint)

    def forward(at):
        head, before = jax.tree.map(lambda x: x[:-1], at.xs), at.state
        if problem.num_steps > 1:
            before = scan_steps(lambda s, x: problem.advance(s, at.inputs, x), before, head, problem.num_steps - 1)
        return problem.advance(before, at.inputs, last(at.xs)), before

    def pull(at, perturbed, before, cotangent):
        p, direct = direction(at, perturbed, loss, before, cotangent.params)
        moved, combine = partition(at, perturbed)
        # In float32 at least: differences of 16-bit gradients would be noise.
        params, z, p = upcast((before.params, moved, p))
        mixed = mixed_product(lambda w, z: loss(combine(z), before, w), params, z, p, adjoint.epsilon)
        return mixed if direct is None else jax.tree.map(jnp.add, mixed, upcast(direct))

    in_loss = [next((i for i, o in enumerate(loss_consts) if o is c), None) for c in problem.inputs[1]]
    check = functools.partial(_check, problem, adjoint, loss, in_loss, sees_optimiser)
    return run_with_pullback(problem, adjoint, forward, pull, check, (loss_consts, consts), params_only=True)


def last(xs: PyTree) -> PyTree:
    """The slice of the last step."""
    return jax.tree.map(lambda x: x[-1], xs)


def mixed_product(loss: Callable, params: PyTree, z: list, p: PyTree, epsilon: float) -> list:
    r"""(∂g/∂z)ᵀ p for g = ∇_w L(w, z), without second derivatives.

    .. math:: (\partial_z g)^\top p = \nabla_z (g^\top p) = \frac{\|p\|}{2\epsilon} \Big[\nabla_z L\big(w + \epsilon
        \tfrac{p}{\|p\|}, z\big) - \nabla_z L\big(w - \epsilon \tfrac{p}{\|p\|}, z\big)\Big] + O(\epsilon^2)

    p = 0 gives 0, and an entry of p that is not finite gives NaN.
    """
    # Divided by its largest entry first, so that the squares of tiny cotangents do not vanish.
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(p)))
    p = _divided(p, largest)
    length = norm(p)
    unit = _divided(p, length)
    scale = largest * length / (2 * epsilon)

    def slope(z, sign):
        # Scaled inside: under `shard_map`, where the scale differs, the gradient is a sum over devices.
        return scale * loss(add_scaled(params, jnp.asarray(sign * epsilon), unit), z)

    return jax.tree.map(jnp.subtract, jax.grad(slope)(z, 1), jax.grad(slope)(z, -1))


def _divided(p, size):
    return jax.tree.map(lambda x: x / jnp.where(size > 0, size, 1).astype(x.dtype), p)


def _hoist_loss(problem, rule):
    """`loss(inputs, state, params)` at the last batch, in float32 at least, and what it closes over."""
    train_loss = problem.solver.loss
    if train_loss is None:
        raise JaxhpoError(
            f"{rule!r} takes differences of gradients of the train loss, but a `{problem.solver.name}` solver has "
            f"none: make it with `from_optax` or `momentum_sgd`, or use `Unroll(truncate=1)`."
        )

    def value(state, hparams, batch, params, own):
        return upcast(train_loss(params, own, upcast(batch), upcast(state.model_state))[0])

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
        return pure(at.consts[0], state, at.inputs[0], last(at.xs), params, upcast(at.inputs[0]))

    return loss, consts


def _check(problem, rule, loss, in_loss, sees_optimiser, at, perturbed):
    """Warns of what is being differentiated and the last step cannot see; refuses what it would see badly."""
    warn_perturbed(
        names(at.state, "state"),
        perturbed.state,
        f"is an initial value, and {rule!r} differentiates the last inner step alone, so its hypergradient through "
        "this solve is exactly zero. `Unroll()` sees it.",
    )
    xs_names = names(at.xs, "batches")
    if problem.num_steps > 1:
        warn_perturbed(
            xs_names,
            perturbed.xs,
            f"is being differentiated, and {rule!r} differentiates the last inner step alone: all batches but the last "
            "have a hypergradient of exactly zero. `Unroll()` sees them.",
            partial=True,
        )
    data_names = [*xs_names, *closed_over_names(at.consts[0])]
    _refuse_low(rule, data_names, (at.xs, at.consts[0]), (perturbed.xs, perturbed.consts[0]))
    _check_inputs(problem, rule, _seen(loss, at, perturbed), in_loss, sees_optimiser, at, perturbed)


def _check_inputs(problem, rule, seen, in_loss, sees_optimiser, at, perturbed):
    """Warns of hyperparameters and closed-over values that act through the optimiser alone, or not at all."""
    hparams, closed_over = at.inputs
    every = [*names(hparams, "hparams"), *closed_over_names(closed_over)]
    in_step = [*jax.tree.leaves(seen.inputs[0]), *(i is not None and seen.consts[0][i] for i in in_loss)]
    unseen = [m and not s for m, s in zip(jax.tree.leaves(perturbed.inputs), in_step, strict=True)]
    if not sees_optimiser:
        warn_perturbed(
            every,
            unseen,
            f"does not enter the train loss together with the parameters, so under {rule!r} its hypergradient through "
            "this solve is exactly zero. If it is a setting of the optimiser (a learning rate, a momentum), `Unroll()` "
            "sees it; if nothing uses it, remove it; if it enters the outer loss directly, that part is still right.",
        )
    elif problem.num_steps > 1:
        # An entry of a schedule may be used in an early step alone; what is one number is used in every step.
        used, leaves = used_in_steps(problem, at, perturbed), jax.tree.leaves(at.inputs)
        warn_perturbed(
            every,
            [a and b and x.ndim > 0 for a, b, x in zip(unseen, used, leaves, strict=True)],
            f"acts through the optimiser alone, and {rule!r} differentiates the last of {problem.num_steps} inner "
            f"steps: what it did in the others is not in its hypergradient (an entry of a schedule used only there "
            "gets exactly zero). `Unroll()` sees all steps.",
            partial=True,
        )


def _refuse_low(rule, leaf_names, tree, perturbed):
    for name, x, m in zip(leaf_names, jax.tree.leaves(tree), jax.tree.leaves(perturbed), strict=True):
        if m and x.dtype.itemsize < 4:
            raise JaxhpoError(
                f"{name} is {describe(x)} and being differentiated, but {rule!r} takes a difference of two gradients, "
                f"which in 16 bits is noise: pass it in float32, or within `hparams`, which are cast."
            )


def _seen(loss, at, perturbed) -> Inputs:
    """For each moving leaf, whether the loss's gradient in it depends on the parameters at all; False for others."""
    moved, combine = partition(at, perturbed)

    def grad(params):
        return jax.grad(lambda z: loss(combine(z), at.state, params))(upcast(moved))

    jaxpr = jax.make_jaxpr(grad)(upcast(at.state.params)).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jex.Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    found = [not isinstance(v, jex.Literal) and v in reached for v in jaxpr.outvars]
    return partition(jax.tree.map(lambda _: False, perturbed), perturbed)[1](found)
