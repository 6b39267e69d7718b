"""The last inner step of any optimiser, differentiated by a difference of two gradients (SAMA)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxhpo._adjoint.last_step import last, run_one_step
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.record import report_fault
from jaxhpo._core.tree import all_finite, cast_like, partition, upcast
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_positive
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class SAMA:
    r"""The last inner step of any optimiser, differentiated by a difference of two gradients of the train loss.

    With w the parameters before that step, g their gradient, v the cotangent at the solution, and
    :math:`p = (\partial\theta_T/\partial g)^\top v` pulled back through the optimiser's update:

    .. math:: \Big(\frac{d\theta}{dh}\Big)^\top v = \frac{\|p\|}{2\epsilon} \Big[
        \nabla_h L\big(w + \epsilon \tfrac{p}{\|p\|}, h\big) - \nabla_h L\big(w - \epsilon \tfrac{p}{\|p\|}, h\big)
        \Big] + \Big(\frac{\partial\theta_T}{\partial h}\Big|_g\Big)^\top v, \qquad p = 0 \mapsto 0

    L is taken on the last batch. For plain gradient descent, p = −αv, and it is `FiniteDifference(α)`. The paper keeps
    the diagonal of :math:`\partial\theta_T/\partial g` alone, and not the last term, which is what h does as a setting
    of the optimiser in that step. For the initial state and earlier batches, a `ZeroHypergradientWarning` says where
    they are being differentiated that they get zero. No second derivative of the train loss is taken. Reverse mode
    and first order only.

    Adam and its kin need `eps_root > 0`, as for `Unroll()`: a weight whose gradients are all zero makes the derivative
    of their square root infinite, and the hypergradient NaN.

    **Cost and bias**: 1 + 3/T trainings; memory of four copies of θ, whatever T. It is `Unroll(truncate=1)` up to
    O(ε²), exactly so where :math:`\nabla_h L` is quadratic in θ, with the bias of that. On a network of 4 800 weights
    and ‖θ‖ = 9, trained by Adam, the difference erred by 1e-4 in float32 at ε = 0.01, by 1e-2 at 0.1, and by 94 % at
    1.0. bfloat16 parameters and hyperparameters are cast to float32 for it.

    Args:
      epsilon: ε above, the distance, in the units of θ, by which the parameters are moved.

    Raises:
      JaxhpoError: a setting out of its range, a `fixed_point` solver (its step is no function of a gradient), `tol`, a
        second derivative.

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
        check_positive("SAMA(epsilon=...)", self.epsilon)

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop; its last step's derivative goes through the optimiser to a difference of gradients."""
        solver: Any = problem.solver
        if solver.loss is None or solver.apply is None:
            raise JaxhpoError(
                f"{self!r} differentiates the optimiser's step with respect to the gradient of the train loss, but a "
                f"`{solver.name}` solver takes no gradient: make it with `from_optax` or `momentum_sgd`, or "
                "use `Unroll(truncate=1)`."
            )

        def after(state, hparams, batch, grad):
            out = solver.loss(state.params, hparams, batch, state.model_state)  # an optimiser may look at the value
            return solver.apply(state, hparams, batch, out, grad).params

        update, consts = problem.closure_convert(after, problem.state.params)

        def direction(inputs, perturbed, loss, before, v):
            grad = jax.grad(lambda w: loss(inputs, before, w))(upcast(before.params))
            moved, combine = partition(inputs, perturbed)

            def step(grad, moved):
                at = combine(moved)
                return update(at.consts[1], before, at.inputs[0], last(at.xs), grad)

            _, pullback = jax.vjp(step, cast_like(grad, before.params), moved)
            p, direct = pullback(v)
            report_fault(~all_finite(p) & all_finite((v, grad)), f"`{self!r}`: {_NOT_FINITE}")
            return p, direct

        return run_one_step(problem, self, direction, consts, sees_optimiser=True)


_NOT_FINITE = (
    "the inner run is finite, but the derivative of the optimiser's last update is not. The likeliest cause is a "
    "square root at zero, whose derivative is infinite (Adam, RMSProp, Adagrad): write `optax.adam(..., "
    "eps_root=1e-8)`."
)
