"""`check_hypergradient`: compares a hypergradient with the exact derivative, and says why it differs."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.mesh import ravel
from jaxhpo._core.outer import in_one_form, is_deterministic
from jaxhpo._core.processes import from_first, together, whole
from jaxhpo._core.progress import EVERY, Progress
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.trace import compilable, equations
from jaxhpo._core.tree import is_inexact
from jaxhpo._core.types import LinearStatus, PyTree
from jaxhpo._core.validate import check_arrays, check_count, check_key, check_params, check_positive, check_switch
from jaxhpo._diagnostics.causes import Inquiry
from jaxhpo._diagnostics.differences import (
    DIFFERENCES,
    TANGENTS,
    UNRELIABLE,
    Differences,
    central_differences,
    difference_along,
)
from jaxhpo._diagnostics.health import raise_if_zero, raise_unless_finite
from jaxhpo._diagnostics.not_finite import diagnose
from jaxhpo._diagnostics.predictivity import Predictivity, retrain
from jaxhpo._diagnostics.rows import (
    ALL,
    COORDINATE,
    RANDOM,
    SLOPE,
    Judged,
    Layout,
    Rows,
    coordinate_rows,
    joined,
    judge,
    leaf_rows,
    slope_rows,
)
from jaxhpo._diagnostics.tangents import Tangents, if_forward

AGREES = 3e-3  # a relative error up to which a hypergradient is called right: below that of products in bfloat16
COARSE = 1e-2  # the same, at most, where differences are the reference
FAR = 1e-2  # of a solution's length: as much as linear solves may be off
SMALL = 0.1  # a standard error at which the mean of some draws is a reliable estimate
FEW_LEAVES = 8  # that are examined one by one where the whole differs
FORETELLS = 0.9  # a correlation of predicted and real change below which remedies are named
SEEDS = 1.37, 0.83  # of the cotangent and the tangents of other evaluations: no powers of two, whose products are exact


@dataclasses.dataclass(frozen=True)
class HypergradientCheck:
    """A hypergradient compared with its reference; prints as a short report, the verdict first.

    Attributes:
      verdict: "agrees", "differs" or "cannot tell".
      relative_error: ‖ĝ − g‖ / ‖g‖, of the hypergradient ĝ and its reference g.
      interval: its 95 % confidence interval; both ends are equal where every coordinate was taken.
      cosine: cosine of the angle between the two.
      norm_ratio: ‖ĝ‖ / ‖g‖.
      by_leaf: the relative error of every leaf; without all coordinates and without `by_leaf`, along its slope alone.
      reference: "exact tangents" of the steps that were run, or "central differences" of the outer loss.
      numeric_error: estimated relative error of the reference itself: of tangents by rounding, where it was measured,
        else the precision of their type.
      analytic: directional derivatives by the rule, shape (directions,).
      numeric: the same of the reference.
      coordinates: the name of each direction where they are coordinates, else None.
      draws: hypergradients that were drawn, with different keys, and averaged.
      noise: of several draws, the relative standard error of their mean; else 0.
      linear_statuses: how the linear solves of the hypergradient ended, as `LinearStatus`.
      causes: why it differs, and what to write instead, the likeliest first.
      predictivity: with `step`, how well it foretells steps of that size, and of a third of it.
    """

    verdict: str
    relative_error: float
    interval: tuple[float, float]
    cosine: float
    norm_ratio: float
    by_leaf: dict[str, float]
    reference: str
    numeric_error: float
    analytic: np.ndarray
    numeric: np.ndarray
    coordinates: tuple[str, ...] | None
    draws: int = 1
    noise: float = 0.0
    linear_statuses: tuple[int, ...] = ()
    causes: tuple[str, ...] = ()
    predictivity: tuple[Predictivity, ...] = ()

    def __str__(self) -> str:
        low, high = self.interval
        between = f" ({_percent(low)} to {_percent(high)})" if high > low else ""
        size, causes = f"{_percent(self.relative_error)}{between}", self.causes
        head = {"agrees": f"agrees, to {size}: ", "differs": f"differs by {size}: "}.get(self.verdict, "")
        if not head:
            head, causes = f"cannot tell, because {causes[0][0].lower()}{causes[0][1:]}\n  ", causes[1:]
        kind = "coordinates" if self.coordinates else "directions"
        text = (
            f"{head}hypergradient against {self.reference} along {len(self.numeric)} {kind}: relative error "
            f"{self.relative_error:.1e}, cosine {self.cosine:.6f}, norm ratio {self.norm_ratio:.4f}"
        )
        if self.reference == DIFFERENCES:
            text += f" (differences good to {self.numeric_error:.0e})"
        if self.draws > 1:
            text += f"\n  mean of {self.draws} draws, with a standard error of {_percent(self.noise)}."
        bad = sorted({LinearStatus(status).name for status in self.linear_statuses if status})
        if bad:
            text += f"\n  The linear solve of an implicit rule ended {', '.join(bad)}."
        for cause in causes:
            text += f"\n  {cause}"
        for foretold in self.predictivity:
            text += f"\n  It {foretold}."
        if any(foretold.correlation < FORETELLS for foretold in self.predictivity):
            text += (
                "\n  What raises that: a lower outer rate; under Adam `eps_root=1e-6` or more; a decaying inner rate, "
                "fewer inner steps; a penalty in the loss; tanh or gelu for ReLU."
            )
        if self.verdict == "agrees":
            return text
        worst = int(np.argmax(np.abs(self.analytic - self.numeric)))
        where = f" at {self.coordinates[worst]}" if self.coordinates else ""
        text += f"\n  worst{where}: {self.analytic[worst]:.4g} by the rule, {self.numeric[worst]:.4g} by the reference."
        apart = {name: error for name, error in self.by_leaf.items() if error > AGREES}
        if len(self.by_leaf) > 1 and apart:
            some = sorted(apart, key=lambda name: -apart[name])[:4]
            text += f"\n  by leaf: {', '.join(f'{name} {_percent(apart[name])}' for name in some)}."
        return text


@together()
def check_hypergradient(
    outer_loss: Callable | None,
    hparams: PyTree,
    *,
    num_directions: int | None = None,
    by_leaf: bool = False,
    repeats: int = 8,
    step_size: float | None = None,
    step: float | None = None,
    gradient: Callable | None = None,
    carry: PyTree = None,
    key: jax.Array | None = None,
) -> HypergradientCheck:
    r"""Compares a hypergradient with the exact derivative of the outer loss, and says why they differ.

    The reference is the derivative :math:`g = dF/dh` of the steps that were run: directional derivatives by forward
    mode through the plain loop of every `solve`, whatever rule it asks for, past `stop_gradient` and derivative rules
    of your own. They have no step size, so float32 is no trouble. Up to 64 hyperparameters every coordinate is taken.
    Else the component of g along the hypergradient of each leaf, :math:`\hat g_l`, is exact, and the rest of g is
    measured along random directions, with a 95 % interval by :math:`\chi^2`.

    Where nothing can be differentiated forward (callbacks), where `implicit` stands around a solver of your own, or
    where differences contradict the tangents (integer arithmetic), the reference are central differences of fourth
    order; their own error is estimated from two step sizes.

    A hypergradient that differs is taken apart: rounding (a second evaluation with other roundings), `Unroll()` in the
    place of the rule, a better linear solver, as many inner steps again, `stop_gradient` kept. What takes the
    difference away is the cause.

    **Cost and bias**: one hypergradient, 1 + 1.3 k trainings for k directions (8 together share the run), where k is
    the number of hyperparameters up to 64, else 8 and one a leaf; where it differs, about 4 hypergradients and twice
    the directions more. Differences cost 4 trainings a direction, `step` 17 trainings. What takes longer than 5 s shows
    its progress on stderr.

    Args:
      outer_loss: `hparams -> scalar`, or `(hparams, carry, key) -> (scalar, carry, info)`, as for `tune`. None where
        `gradient` is given, whose own value is then differentiated.
      hparams: where to check, a pytree of floating-point arrays.
      num_directions: random directions, or coordinates where there are no more; None takes all coordinates up to 64
        hyperparameters, else 8.
      by_leaf: takes as many random directions in each leaf too. (Up to 8 leaves are, where the whole differs.)
      repeats: draws, each with a key of its own, of a hypergradient that has a key and differs: their mean is compared
        with the mean of the references, and their spread is told from a bias.
      step_size: of central differences, relative to each hyperparameter's scale: its size, at most 1 (where it is zero,
        its leaf's root mean square, or 1). None takes :math:`\epsilon^{1/5}`, 7e-4 in float64 and 0.04 in float32, of
        that scale or of the size itself, whichever has the smaller error.
      step: also measures predictivity: the correlation of predicted and real change of the outer loss over 8 random
        steps, by which each hyperparameter moves with this standard deviation (about the rate of the outer optimiser),
        and over 8 of a third of it. None does not.
      gradient: `(hparams, carry, key) -> (value, hypergradient, carry, info)`, as for `tune`: `from_pair(pair)`, or a
        hypergradient of your own.
      carry: what the outer loss, or `gradient`, is given.
      key: for the directions and the outer loss; `jax.random.key(0)` when None.

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
      >>> jaxhpo.check_hypergradient(outer_loss, jnp.ones(2)).verdict
      'agrees'

    References:
      Griewank, Walther. Evaluating Derivatives. 2008.
      Fornberg. Generation of Finite Difference Formulas on Arbitrarily Spaced Grids. 1988.
    """
    loss, own = in_one_form(outer_loss, gradient)
    hparams = check_params(hparams, "hparams")
    carry = jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
    if num_directions is not None:
        check_count("num_directions", num_directions)
    check_switch("by_leaf", by_leaf)
    check_count("repeats", repeats)
    for what, value in (("step_size", step_size), ("step", step)):
        if value is not None:
            check_positive(what, value)
    direction_key, loss_key = jax.random.split(jax.random.key(0) if key is None else check_key(key))
    with Progress(2, "check_hypergradient", delay=EVERY) as bar:
        comparison = _Comparison(loss, own, hparams, carry, loss_key, direction_key, bar)
        comparison.draw()
        comparison.refer(num_directions, by_leaf, step_size)
        if step is not None:
            comparison.foretell(step)
        if comparison.agrees():
            return comparison.report("agrees", *comparison.notes)
        if not is_deterministic(outer_loss, gradient):
            comparison.repeat(repeats)
        return comparison.examine(num_directions or 8)


class _Comparison:
    """A hypergradient, its reference, and what explains their difference.

    Attributes:
      keys: of the draws.
      grads: (draws, m) hypergradients.
      rows: the directions.
      given: (draws, n) components of the hypergradients along them.
      wanted: (draws, n) those of the references.
      tangents: the reference; None for central differences.
      numeric_error: estimated relative error of the reference.
      notes: on the reference, in words.
    """

    def __init__(self, loss, own, hparams, carry, loss_key, direction_key, bar):
        self.hparams, self.key, self.direction_key, self.bar = hparams, loss_key, direction_key, bar
        self.flat, self.unravel = ravel(hparams)
        self.layout, self.own = Layout(hparams), own is not None
        self.log, self.statuses, self.notes = SolveLog(schedules=False, distances=True), (), ()
        self.numeric_error = float(jnp.finfo(self.flat.dtype).eps)
        self.tangents: Tangents | None = None
        self.predictivity: tuple[Predictivity, ...] = ()

        def loss_of(hparams, key):
            return (loss or own)(hparams, carry, key)[0]

        def value(flat, key):
            return loss_of(self.unravel(flat), key)

        def value_and_grad(flat, key):
            if own is None:
                return jax.value_and_grad(value)(flat, key)
            value_, grad, _, _ = own(self.unravel(flat), carry, key)
            return value_, ravel(grad)[0]

        self.loss_of, self.value, self.value_and_grad = loss_of, value, value_and_grad

    # --- measurement ---

    def draw(self) -> None:
        """Computes the hypergradient; raises where it is not finite, or zero."""
        solves = []
        records = recording(solves=self.log, linear_solves=solves)
        with warnings.catch_warnings(record=True, action="always") as caught, records:
            self.program, self.args = compilable(self.value_and_grad, self.flat, self.key)
            loss, grad = self.program(*self.args)
        self._check_finite(loss, grad, self.key)
        self.bar.update()
        program = None if self.own else (functools.partial(self.loss_of, key=self.key), self.hparams)
        raise_if_zero(self.unravel(grad), caught, program)
        found = from_first(lambda: [solve.status for solve in solves])  # callbacks report to process 0 alone
        self.statuses = tuple(map(LinearStatus, found))
        far = from_first(lambda: max(self.log.distances, default=0.0))
        if far > FAR:
            self.notes = (
                f"The condition given to `implicit` is not zero at the solution: Newton's step from there is {far:.1e} "
                "of its length, and the derivative is that of neither point. Write the gradient of what the solver "
                "minimises (scikit-learn's `C`, halves, sums or means over examples), or give it a smaller tolerance.",
            )
        self.keys, self.loss = [self.key], float(whole(loss))
        self.grads = np.asarray(whole(grad), float)[None]

    def _check_finite(self, loss, grad, key) -> None:
        loss_of = functools.partial(self.loss_of, key=key)
        raise_unless_finite(loss, self.unravel(grad), lambda: diagnose(loss_of, self.hparams))

    def refer(self, num_directions, by_leaf, step_size) -> None:
        """Computes the reference: by tangents, or where these do not exist or are contradicted by differences."""
        self.settings = num_directions, step_size
        grad, number = self.grads[0], num_directions or 8
        # All coordinates cost no more than the slopes and directions where these are as many.
        every = self.layout.size <= (ALL if num_directions is None else min(ALL, number + len(self.layout.parts)))
        rows = coordinate_rows(self.layout) if every else slope_rows(self.layout, grad, number, self.direction_key)
        if by_leaf and not every:
            rows = joined(rows, leaf_rows(self.layout, grad, number, jax.random.fold_in(self.direction_key, 1)))

        def by_tangents():
            tangents = Tangents(self.value, self.flat, self.key)
            return tangents, *tangents.along(rows.directions)

        # The rule of `implicit` is all that is known of a solver of the user's.
        found = None if self.log.roots else if_forward(by_tangents)
        if found is None or not np.isfinite(found[2]).all():
            self._by_differences()
        else:
            self.tangents, self.plain_loss, wanted = found
            rounded = bool(found[0].rounded)
            self.rows, self.given, self.wanted = rows, self.grads @ rows.directions.T, wanted[None]
            if (rounded or not self.agrees()) and self._contradicted(rounded):
                self._by_differences()
        self.bar.update()

    def _by_differences(self) -> None:
        self.tangents, (number, step_size) = None, self.settings
        number = number or (None if self.layout.size <= ALL else 16)

        def differences(key) -> Differences:
            loss = functools.partial(self.value, key=key)
            return central_differences(loss, self.hparams, number, step_size, self.direction_key)

        found = [differences(key) for key in self.keys]
        for each in found:
            each.check()
        directions = found[0].directions
        kinds = np.full(len(directions), RANDOM)
        random = Rows(directions, kinds, kinds * 0 - 1)
        self.rows = random if number else coordinate_rows(self.layout)
        self.given, self.wanted = self.grads @ directions.T, np.array([each.numeric for each in found])
        self.numeric_error = float(np.mean([each.error for each in found]))

    def _contradicted(self, rounded: bool) -> bool:
        """True where differences along one direction, that of the largest doubt, side with the hypergradient."""
        given, wanted = self.given[0], self.wanted[0]
        doubt = np.abs(given) if self.agrees() else np.abs(given - wanted)
        j, at = int(np.argmax(doubt)), functools.partial(self.value, key=self.key)
        found, error = difference_along(at, self.hparams, self.rows.directions[j], self.settings[1])
        if self.agrees():
            return abs(found - wanted[j]) > max(3 * error, 0.03 * doubt[j])
        if 3 * max(error, abs(found - given[j])) >= doubt[j]:
            return False
        if not rounded:
            self.notes = (
                f"The exact derivative of the steps, {wanted[j]:.3g} along one direction, does not foretell a finite "
                f"step ({found:.3g}): under Adam write `eps_root=1e-6`; a smooth activation and a lower rate help.",
            )
        return True

    def repeat(self, repeats) -> None:
        """Draws more hypergradients, with their references."""
        self.keys = [self.key, *jax.random.split(self.key, repeats - 1)] if repeats > 1 else [self.key]
        for key in self.keys[1:]:
            loss, grad = self.program(*self.args[:-1], key)
            self._check_finite(loss, grad, key)
            self.grads = np.concatenate([self.grads, np.asarray(whole(grad), float)[None]])
            if (self.grads == self.grads[0]).all():  # nothing is drawn
                self.keys, self.grads = self.keys[:1], self.grads[:1]
                return
        self.given = self.grads @ self.rows.directions.T
        if self.tangents is None:
            self._by_differences()
        else:
            rows = self.rows.directions
            self.wanted = np.array([self.tangents.along(rows, self.flat, key)[1] for key in self.keys])

    def foretell(self, step) -> None:
        """Measures predictivity."""
        key = jax.random.fold_in(self.direction_key, 3)
        retrained = retrain(self.value, self.flat, step, key, self.key)
        self.predictivity = tuple(each.predictivity(self.grads[0]) for each in retrained)

    # --- judgement ---

    def judged(self) -> Judged:
        """The error of the mean of the draws."""
        return judge(self.layout, self.rows, self.given.mean(0), self.wanted.mean(0))

    def agrees(self) -> bool:
        """True where the hypergradient is right, as far as the reference is good."""
        return self.judged().within(AGREES if self.tangents else max(AGREES, min(3 * self.numeric_error, COARSE)))

    def noise(self) -> float:
        """The relative standard error of the mean of the draws."""
        if len(self.keys) == 1:
            return 0.0
        error = np.std(self.given - self.wanted, axis=0, ddof=1) / np.sqrt(len(self.keys))
        return self._relative(error)

    def _moved(self, off) -> Judged:
        """The error of a hypergradient that is the reference but for `off`."""
        wanted = self.wanted.mean(0)
        return judge(self.layout, self.rows, wanted + off, wanted)

    def _relative(self, off) -> float:
        return self._moved(off).agreement.relative_error

    def examine(self, number) -> HypergradientCheck:
        """The verdict on a hypergradient that seems to differ, and its causes."""
        error, noise = self.judged().agreement.relative_error, self.noise()
        if error <= 2 * noise:
            one = self._relative(np.sqrt(np.mean((self.given - self.wanted) ** 2, axis=0)))
            text = f"One draw is off by {_percent(one)}, by chance: averages of more draws are nearer."
            if noise <= SMALL:
                return self.report("agrees", text, *self.notes)
            return self.report("cannot tell", f"{text} Raise `repeats`, or the rule's own number of samples.")
        if self.tangents is None:
            if error <= 2 * self.numeric_error:
                return self.report("cannot tell", f"The differences are not reliable here: {UNRELIABLE}.", *self.notes)
        else:
            if abs(self.loss - self.plain_loss) > 1e-3 * max(abs(self.loss), abs(self.plain_loss)):
                return self.report(
                    "differs",
                    f"The outer loss is {self.loss:.6g} with the rule, and {self.plain_loss:.6g} by the plain steps: "
                    "randomness differs between calls (it is drawn outside of `key`), or the rule runs other steps.",
                )
            low = _has_16_bits(self.tangents.program)
            moved, by_leaf = self._rounding(self.tangents), self.judged().by_leaf
            apart = {name: max(off, 1.0) for name, off in by_leaf.items() if off > AGREES}
            if error <= AGREES and all(moved.by_leaf.get(name, 0.0) >= off / 3 for name, off in apart.items()):
                zero = f"Up to rounding errors, the hypergradient of `{'`, `'.join(apart)}` is zero."
                return self.report("agrees", *[zero] * bool(apart), *self.notes)
            if (rounding := moved.agreement.relative_error) >= error / (10 if low else 3):
                higher = "numbers of 16 bits were met" if low else "`jax.config.update('jax_enable_x64', True)`"
                return self.report(
                    "cannot tell",
                    f"Rounding errors move the hypergradient, or its reference, by {_percent(rounding)}: compute in a "
                    f"higher precision ({higher}), or train for fewer steps, at a lower rate.",
                )
            if 1 < len(self.layout.parts) <= FEW_LEAVES and self.judged_by_slopes():
                rows = leaf_rows(self.layout, self.grads.mean(0), number, jax.random.fold_in(self.direction_key, 1))
                wanted = np.array([self.tangents.along(rows.directions, self.flat, key)[1] for key in self.keys])
                self.rows, self.wanted = joined(self.rows, rows), np.concatenate([self.wanted, wanted], axis=1)
                self.given = self.grads @ self.rows.directions.T
        means = self.given.mean(0), self.wanted.mean(0)
        inquiry = Inquiry(
            self.value,
            self.flat,
            self.key,
            self.own,
            self.tangents is not None,
            self.layout,
            self.rows,
            *means,
            self.log,
            self.statuses,
        )
        return self.report("differs", *inquiry.causes(), *self.notes)

    def judged_by_slopes(self) -> bool:
        """True where leaves are judged along one direction alone."""
        return bool((self.rows.kinds == SLOPE).any() and not (self.rows.leaves[self.rows.kinds == RANDOM] >= 0).any())

    def _rounding(self, tangents) -> Judged:
        """The distance of other evaluations of hypergradient and reference, whose roundings differ: the larger of two.

        Both are linear in the cotangent and the directions, and continuous in h.
        """
        eps, probes = float(jnp.finfo(self.flat.dtype).eps), []

        def scaled(flat, seed, key):
            if self.own:
                return self.value_and_grad(flat, key)[1]

            def loss(flat):
                value = self.value(flat, key)
                return seed.astype(value.dtype) * value

            return jax.grad(loss)(flat) / seed

        with warnings.catch_warnings(action="ignore"):
            program, args = compilable(scaled, self.flat, jnp.asarray(1.0, self.flat.dtype), self.key)
        for i, seed in enumerate(SEEDS):
            signs = jax.random.rademacher(
                jax.random.fold_in(self.direction_key, 4 + i), self.flat.shape, self.flat.dtype
            )
            near = self.flat * (1 + 2 * eps * signs)
            given = near, jnp.asarray(seed, self.flat.dtype), self.key
            grad = np.asarray(whole(program(*args[: -len(given)], *given)), float)
            _, wanted = tangents.along(seed * self.rows.directions, near, self.key)
            probes.append((grad @ self.rows.directions.T - self.given[0], wanted / seed - self.wanted[0]))
        self.numeric_error = max(self._relative(by_reference) for _, by_reference in probes)
        return self._moved(np.maximum(*(np.hypot(*probe) for probe in probes)))

    def report(self, verdict: str, *causes: str) -> HypergradientCheck:
        """The result."""
        judged = self.judged()
        given, wanted = self.given.mean(0), self.wanted.mean(0)
        lengths = np.linalg.norm(self.rows.directions, axis=1)
        lengths[lengths == 0] = 1.0  # one hyperparameter leaves no room beside its slope
        every = bool((self.rows.kinds == COORDINATE).all())
        return HypergradientCheck(
            verdict,
            judged.agreement.relative_error,
            judged.interval,
            judged.agreement.cosine,
            judged.agreement.norm_ratio,
            judged.by_leaf,
            DIFFERENCES if self.tangents is None else TANGENTS,
            self.numeric_error,
            given / lengths,
            wanted / lengths,
            self.layout.coordinates if every else None,
            len(self.keys),
            self.noise(),
            self.statuses,
            causes,
            self.predictivity,
        )


def _has_16_bits(program) -> bool:
    return any(
        is_inexact(v.aval) and v.aval.dtype.itemsize == 2 for equation in equations(program) for v in equation.outvars
    )


def _percent(x: float) -> str:
    """A part as a percentage of two digits, where that reads well."""
    if x >= 10:
        return f"{x:.2g} times"
    return f"{100 * x:.3g} %" if x >= 1 else f"{100 * x:.2g} %" if x >= 1e-4 else f"{x:.0e}"
