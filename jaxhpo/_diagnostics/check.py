"""`check_hypergradient`: compares a hypergradient with central differences of the outer loss."""

import dataclasses
import warnings
from collections.abc import Callable

import jax
import numpy as np

from jaxhpo._adjoint.pushforward import Forward
from jaxhpo._adjoint.reversible import Reversible
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.mesh import ravel
from jaxhpo._core.processes import from_first
from jaxhpo._core.progress import EVERY, Progress
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.trace import STOP, compilable, equations
from jaxhpo._core.types import LinearStatus, PyTree
from jaxhpo._core.validate import check_callable, check_count, check_key, check_params, check_positive, check_scalar
from jaxhpo._diagnostics.differences import UNRELIABLE, agreement, central_differences
from jaxhpo._diagnostics.health import raise_if_zero, raise_unless_finite
from jaxhpo._diagnostics.not_finite import diagnose
from jaxhpo._diagnostics.origin import is_ours, place_of

LARGE = 1e-3  # a relative error that is explained


@dataclasses.dataclass(frozen=True)
class HypergradientCheck:
    """A hypergradient compared with central differences; prints as a short report.

    Attributes:
      relative_error: ‖analytic − numeric‖ / ‖numeric‖ over the directions tried.
      cosine: cosine of the angle between the two.
      norm_ratio: ‖analytic‖ / ‖numeric‖.
      numeric_error: estimated relative error of the central differences themselves, for a smooth outer loss; a relative
        error of this size does not count against the rule.
      analytic: directional derivatives by the rule, shape (directions,).
      numeric: the same by central differences.
      coordinates: the name of each direction where they are coordinates, else None (random directions).
      linear_statuses: how the linear solves of the hypergradient ended, as `LinearStatus`.
      exact: whether every solve was differentiated by a rule that is exact wherever training ends, as `Unroll()`.
      stops: the lines of `stop_gradient` in the program, where the relative error is large.
    """

    relative_error: float
    cosine: float
    norm_ratio: float
    numeric_error: float
    analytic: np.ndarray
    numeric: np.ndarray
    coordinates: tuple[str, ...] | None
    linear_statuses: tuple[int, ...] = ()
    exact: bool = False
    stops: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "coordinates" if self.coordinates else "random directions"
        text = (
            f"hypergradient against central differences along {len(self.numeric)} {kind}: relative error "
            f"{self.relative_error:.1e} (differences good to {self.numeric_error:.0e}), cosine {self.cosine:.6f}, norm "
            f"ratio {self.norm_ratio:.4f}"
        )
        bad = sorted({LinearStatus(status).name for status in self.linear_statuses if status})
        if bad:
            text += f"\n  The linear solve of an implicit rule ended {', '.join(bad)}."
        if self.relative_error <= LARGE:
            return text
        if self.numeric_error > 1e-2:
            text += f"\n  Neither the differences nor this comparison is reliable here: {UNRELIABLE}."
            text += " Another `step_size` may help."
        worst = int(np.argmax(np.abs(self.analytic - self.numeric)))
        where = f" at {self.coordinates[worst]}" if self.coordinates else ""
        text += f"\n  worst{where}: {self.analytic[worst]:.4g} by the rule, {self.numeric[worst]:.4g} by differences."
        if self.stops:
            text += f"\n  `stop_gradient` ({'; '.join(self.stops)}) keeps a derivative from the rule alone."
        if self.exact:
            return (
                f"{text}\n  The rule is exact: look for a `stop_gradient` or a `custom_vjp` in the losses or the model "
                "state, and for randomness that differs between calls."
            )
        return (
            f"{text}\n  If the rule is approximate (truncated, Neumann, Identity), this is its bias. Under `Implicit`, "
            "look at the solution's `info.optimality`: the inner problem may not have converged, or its optimiser may "
            "have another fixed point than the train loss (decoupled weight decay, clipping, projection: put the decay "
            "into the loss, or use `fixed_point(step)`). Another cause is randomness that differs between calls."
        )


def check_hypergradient(
    outer_loss: Callable[[PyTree], jax.Array],
    hparams: PyTree,
    *,
    num_directions: int | None = None,
    step_size: float | None = None,
    key: jax.Array | None = None,
) -> HypergradientCheck:
    r"""Compares `jax.grad(outer_loss)` with central differences.

    Differences are fourth order, :math:`(8 F(h+sd) - 8 F(h-sd) - F(h+2sd) + F(h-2sd)) / 12s`, along every coordinate
    for up to 64 hyperparameters, else along random directions.

    **Cost and bias**: one hypergradient, and four outer losses per direction, compiled once: 4m for m ≤ 64
    hyperparameters, else 64, each a whole training. What takes longer than 5 s shows its progress on stderr. The
    differences err by :math:`O(s^4)` and by rounding errors over s; `numeric_error` estimates both where the outer loss
    is smooth.

    Args:
      outer_loss: `hparams -> scalar`, deterministic.
      hparams: where to check, a pytree of floating-point arrays.
      num_directions: random unit directions to try; None takes all coordinates up to 64 hyperparameters, else 16
        directions.
      step_size: s above, relative to each hyperparameter's scale: its size, at most 1 (where it is zero, its leaf's
        root mean square, or 1). None takes :math:`\epsilon^{1/5}`, 7e-4 in float64 and 0.04 in float32.
      key: for the directions; `jax.random.key(0)` when None.

    Returns:
      A `HypergradientCheck`; `print` it.

    Raises:
      ZeroHypergradientError: the rule cannot see a leaf, or some of its entries, and gives exactly zero for them.
      NonFiniteError: the outer loss or the hypergradient is not finite; names the inner step at which that began.
      JaxhpoError: an invalid input.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50)
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> check = jaxhpo.check_hypergradient(outer_loss, jnp.ones(2))
      >>> check.relative_error < 1e-3
      True

    References:
      Fornberg. Generation of Finite Difference Formulas on Arbitrarily Spaced Grids. 1988.
    """
    check_callable("outer_loss", outer_loss, "outer_loss(hparams)", 1)
    hparams = check_params(hparams, "hparams")
    if num_directions is not None:
        check_count("num_directions", num_directions)
    if step_size is not None:
        check_positive("step_size", step_size)
    direction_key = jax.random.key(0) if key is None else check_key(key)
    flat, unravel = ravel(hparams)

    def loss(flat):
        return check_scalar(outer_loss(unravel(flat)), "outer_loss")

    solves, log = [], SolveLog(schedules=False)
    tried = None if num_directions is None and flat.size <= 64 else num_directions or 16
    with Progress(1 + (tried or flat.size), "check_hypergradient", delay=EVERY) as bar:
        records = recording(solves=log, linear_solves=solves)
        with warnings.catch_warnings(record=True, action="always") as caught, records:
            program, args = compilable(jax.value_and_grad(loss), flat)
            value, grad = program(*args)
        raise_unless_finite(value, unravel(grad), lambda: diagnose(outer_loss, hparams))
        bar.update()
        differences = central_differences(loss, hparams, tried, step_size, direction_key, bar.update)
    raise_if_zero(unravel(grad), caught, (outer_loss, hparams))
    differences.check()
    analytic, numeric = differences.along(grad), differences.numeric
    found = from_first(lambda: [solve.status for solve in solves])  # callbacks report to process 0 alone
    statuses = tuple(map(LinearStatus, found))
    agreed, stops = agreement(analytic, numeric), set()
    if agreed.relative_error > LARGE:
        found = equations(jax.make_jaxpr(loss)(flat).jaxpr)
        stops = {place_of(e) for e in found if e.primitive.name == STOP and not is_ours(e)}
    measured = differences.error, analytic, numeric, differences.coordinates
    exact = all(map(_is_exact, log.adjoints))
    return HypergradientCheck(*agreed, *measured, statuses, exact, tuple(sorted(stops - {""})))


def _is_exact(rule) -> bool:
    """Returns whether a rule is exact wherever training ends."""
    if isinstance(rule, Unroll):
        return rule.truncate is None and rule.hvp_fraction in (None, 1)
    return isinstance(rule, (Forward, Reversible))
