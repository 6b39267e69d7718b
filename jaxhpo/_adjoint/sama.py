"""`SAMA`: the last inner step of any optimiser, differentiated by a difference of two gradients."""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo._adjoint.last_step import run_last_step
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_settings
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
