"""`SAMA` and `FiniteDifference`: the derivative of the last inner step, by a difference of two gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._adjoint.pullback import Inputs, Pullback, closed_over_names, input_names, not_entering, warn_of_schedules
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import report_fault
from jaxhpo._core.stop_gradient import warn_perturbed
from jaxhpo._core.trace import dependent_results
from jaxhpo._core.tree import (
    add_scaled,
    all_finite,
    cast_like,
    is_inexact,
    mixed_types,
    names,
    norm,
    partition,
    scaled,
    upcast,
)
from jaxhpo._core.types import InnerState, PyTree
from jaxhpo._core.validate import check_settings, describe
from jaxhpo._inner.loop import scan_steps
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class SAMA:
    r"""Last inner step of any optimiser, differentiated by a difference of two gradients of the train loss.

    With w the parameters before that step, g the gradient of the train loss at w, v the cotangent at the solution, and
    :math:`p = (\partial\theta_T/\partial g)^\top v`, pulled back through the optimiser's update:

    .. math:: \Big(\frac{d\theta}{dh}\Big)^\top v = \frac{\|p\|}{2\epsilon} \Big[
        \nabla_h L\big(w + \epsilon \tfrac{p}{\|p\|}, h\big) - \nabla_h L\big(w - \epsilon \tfrac{p}{\|p\|}, h\big)
        \Big] + \Big(\frac{\partial\theta_T}{\partial h}\Big|_g\Big)^\top v, \qquad p = 0 \mapsto 0

    L is taken on the last batch. For plain gradient descent p = −αv, and the rule equals `FiniteDifference(α)`. The
    paper keeps only the diagonal of :math:`\partial\theta_T/\partial g`, and omits the last term, which is the effect
    of h as a setting of the optimiser in that step. If the initial state or an earlier batch is being differentiated, a
    `ZeroHypergradientWarning` says that its hypergradient is zero. No second derivative of the train loss is taken.
    Reverse mode and first order only.

    Adam and similar optimisers need `eps_root > 0`, as for `Unroll()`: a weight whose gradients are all zero makes the
    derivative of their square root infinite, and the hypergradient NaN.

    **Cost and bias**: 1 + 3/T trainings; memory of four copies of θ, for any T. It equals `Unroll(truncate=1)` up to
    O(ε²), exactly where :math:`\nabla_h L` is quadratic in θ, and has the same bias. On a network of 4 800 weights with
    ‖θ‖ = 9, trained by Adam, the error of the difference in float32 was 1e-4 at ε = 0.01, 1e-2 at 0.1, and 94 % at 1.0.
    bfloat16 parameters and hyperparameters are cast to float32 for it.

    Args:
      epsilon: ε above, the distance in units of θ by which the parameters are moved.

    Raises:
      JaxhpoError: if a setting is out of its range, the solver is a `fixed_point` (its step is not a function of a
        gradient), `tol` is given, or a second derivative is asked for.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.5))
      >>> def outer_loss(h):
      ...     start = solver.init(jnp.zeros(2), h)
      ...     sol = jaxhpo.solve(solver, start, h, num_steps=5, adjoint=jaxhpo.SAMA())
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(2))
      [-4. -4.]

    References:
      Choe et al. Making Scalable Meta Learning Practical. 2023. arXiv:2310.05674
    """

    epsilon: float = 0.01

    def __post_init__(self):
        check_settings(self, epsilon="positive")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; its last step's derivative goes through the optimiser to a difference of gradients."""
        return run_last_step(problem, self)


@dataclasses.dataclass(frozen=True)
class FiniteDifference:
    r"""One step of gradient descent on the train loss, differentiated by a difference of two gradients (DARTS).

    With w the parameters before the last inner step, v the cotangent at the solution, and α = `step_size`:

    .. math:: \Big(\frac{d\theta}{dh}\Big)^\top v = -\alpha\, \frac{\|v\|}{2\epsilon} \Big[
        \nabla_h L\big(w + \epsilon \tfrac{v}{\|v\|}, h\big) - \nabla_h L\big(w - \epsilon \tfrac{v}{\|v\|}, h\big)
        \Big], \qquad v = 0 \mapsto 0

    L is taken on the last batch. This is `SAMA` with the update :math:`w - \alpha \nabla_w L` in place of the
    optimiser's own. It sees what enters the train loss. If anything else is being differentiated (settings of the
    optimiser, the initial state, earlier batches), a `ZeroHypergradientWarning` names it. No second derivative is
    taken, so the train loss need not have any. Reverse mode and first order only.

    **Cost and bias**: 1 + 2/T trainings; memory of three copies of θ, for any T. It equals `Unroll(truncate=1)` of
    plain gradient descent up to O(ε²), and exactly where :math:`\nabla_h L` is quadratic in θ. It has the same bias: it
    is exact at a solution whose curvatures are all 1/α. On a network of 4 800 weights with ‖θ‖ = 9, the error of the
    difference in float32 was 4e-5 at ε = 0.01, 2e-4 at 0.001 (rounding, which grows as 1/ε) and 4e-3 at 0.1. bfloat16
    parameters and hyperparameters are cast to float32 for it.

    Args:
      step_size: α above, the inner learning rate.
      epsilon: ε above, the distance in units of θ by which the parameters are moved.

    Raises:
      JaxhpoError: if a setting is out of its range, the solver is a `fixed_point` (which has no train loss), `tol` is
        given, or a second derivative is asked for.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.5))
      >>> def outer_loss(h):
      ...     start = solver.init(jnp.zeros(2), h)
      ...     sol = jaxhpo.solve(solver, start, h, num_steps=5, adjoint=jaxhpo.FiniteDifference(0.5))
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(2))
      [-4. -4.]

    References:
      Liu, Simonyan, Yang. DARTS: Differentiable Architecture Search. 2019. arXiv:1806.09055
    """

    step_size: float
    epsilon: float = 0.01

    def __post_init__(self):
        check_settings(self, step_size="positive", epsilon="positive")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; the derivative of its last step is a difference of two gradients."""
        return run_last_step(problem, self, self.step_size)


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
            first = problem._replace(state=before, inputs=at.inputs, xs=head, num_steps=problem.num_steps - 1)
            before = scan_steps(first)
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
    return Pullback(rule, forward, pull, check, params_only=True).run(problem, (loss_consts, update_consts))


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
        with mixed_types():
            pure, consts = problem.closure_convert(value, *upcast(own))
    except TypeError as error:
        if not low:
            raise
        raise JaxhpoError(
            f"{rule!r} takes differences of gradients, noise in {low[0].dtype}, but the train loss cannot be computed "
            f"in float32: `{error}`. Pass data through `batches`, which are cast too, or use `Unroll(truncate=1)`."
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
    "square root at zero (Adam, RMSProp, Adagrad), whose slope is infinite: write `optax.adam(..., eps_root=1e-6)`."
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
    in_step = [*jax.tree.leaves(seen.inputs[0]), *(i is not None and seen.consts[0][i] for i in in_loss)]
    if not sees_optimiser:
        unseen = [m and not s for m, s in zip(jax.tree.leaves(perturbed.inputs), in_step, strict=True)]
        message = not_entering("the train loss together with the parameters", repr(rule))
        warn_perturbed(input_names(at.inputs), unseen, message)
    elif problem.num_steps > 1:
        message = (
            f"acts through the optimiser alone, and {rule!r} differentiates the last of {problem.num_steps} inner "
            "steps: its effect in the other steps is not in its hypergradient (an entry of a schedule that is used "
            "only there gets exactly zero). `Unroll()` sees all steps."
        )
        warn_of_schedules(problem, at, perturbed, in_step, message)


def _seen(loss, at, perturbed) -> Inputs:
    """`perturbed`, but True only for leaves z for which ∇_z L depends on the parameters, so that ∂_z g may not be 0."""
    leaves, combine = partition(at, perturbed)

    def slopes(params):
        return jax.grad(lambda z: loss(combine(z), at.state, params))(upcast(leaves))

    found = dependent_results(slopes, upcast(at.state.params))
    return partition(jax.tree.map(lambda _: False, perturbed), perturbed)[1](found)
