"""Richardson's iteration, from where it stood."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._core.tree import add_scaled, all_finite, scaled
from jaxhpo._core.types import LinearSolver
from jaxhpo._core.validate import check_settings
from jaxhpo._linear.report import relative_norm, report, residual_of, series_status


@dataclasses.dataclass(frozen=True)
class Richardson(LinearSolver):
    r"""K steps of Richardson's iteration for a linear system, from the last solution.

    .. math:: x \leftarrow x + \alpha (b - H x),

    which is gradient descent on :math:`\tfrac12 x^\top H x - b^\top x`. From x = 0, as under `jax.grad` of a `solve`,
    it equals `Neumann(K, α)`. Between the updates of a pair x goes on from where it stood, so that a step or two of
    each follow a training: `hypergradient(Implicit(Richardson(rate)), ..., num_steps=1)` is SOBA with constant steps,
    and with several of both AmIGO. `condition_batch=` of `hypergradient` gives the system a minibatch of its own.
    It converges for :math:`0 < \alpha < 2 / \lambda_{\max}(H)`, symmetric or not, and diverges beyond.

    The report's status is CONVERGED where the residual is negligible, MAX_ITERATIONS where it fell, and STALLED where
    it did not: as it may by chance where H and b are those of another minibatch than at the last update, and always
    where α is too large.

    **Cost and bias**: `num_steps` Hessian products of two to three gradients each, one less from x = 0; memory of one
    linearisation. The error is :math:`(I - \alpha H)^K` times that of the start: along a direction of curvature
    :math:`\lambda` it falls by :math:`1 - \alpha\lambda` a step.

    Args:
      step_size: α above, the inner learning rate as a rule. For one that falls from update to update, as optax's
        schedules do, take `single_loop.SOBA` or `AmIGO`, whose v has an optimiser.
      num_steps: K above.

    Raises:
      JaxhpoError: K is not a positive integer, or α not a positive number.

    Example:
      >>> matrix, b = jnp.diag(jnp.array([1.0, 4.0])), jnp.array([1.0, 4.0])
      >>> solver, x = jaxhpo.Richardson(step_size=0.25), jnp.zeros(2)
      >>> for _ in range(20):
      ...     x, info = solver(lambda v: matrix @ v, b, x)
      >>> print(x.round(2))  # one product a call
      [1. 1.]

    References:
      Dagréou, Ablin, Vaiter, Moreau. A framework for bilevel optimization that enables stochastic and global variance
      reduction algorithms. 2022. arXiv:2201.13409
      Arbel, Mairal. Amortized Implicit Differentiation for Stochastic Bilevel Optimization. 2022. arXiv:2111.14580
    """

    step_size: float
    num_steps: int = 1

    def __post_init__(self):
        check_settings(self, step_size="positive", num_steps="count")

    def __call__(self, matvec, b, x0=None):
        """Return `(x, LinearInfo)` after `num_steps` steps from `x0`."""
        if x0 is None:
            x, before, done = scaled(self.step_size, b), jnp.ones_like(relative_norm(b, b)), 1
        else:
            x, before, done = x0, residual_of(matvec, x0, b), 0

        def step(x, _):
            return add_scaled(x, self.step_size, jax.tree.map(jnp.subtract, b, matvec(x))), None

        x, _ = jax.lax.scan(step, x, length=self.num_steps - done)
        residual = residual_of(matvec, x, b)
        return x, report(residual, self.num_steps - done, series_status(before, residual), failed=~all_finite(x))
