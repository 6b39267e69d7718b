"""Measurements of a check: a hypergradient, its reference, and their distance."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.mesh import ravel
from jaxhpo._core.processes import from_first, whole
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.trace import compilable
from jaxhpo._core.types import LinearStatus
from jaxhpo._diagnostics.check.remedies import try_remedies
from jaxhpo._diagnostics.check.result import AGREES, HypergradientCheck
from jaxhpo._diagnostics.differences import DIFFERENCES, TANGENTS, Differences, central_differences, difference_along
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
from jaxhpo._diagnostics.tangents import Tangents, if_defined

COARSE = 1e-2  # a relative error that is called right, at most, where differences are the reference
FAR = 1e-2  # of a solution's length: as much as linear solves may be off
SEEDS = 1.37, 0.83  # of the cotangent and the tangents of other evaluations: no powers of two, whose products are exact


class Evidence:
    """A hypergradient, its reference, and how far they are apart.

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
        self.remedies: dict[str, Predictivity] = {}

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
                "minimises (scikit-learn's `C`, halves, sums or means over examples), for |w| the fixed point of a "
                "proximal step, or give the solver a smaller tolerance.",
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
        found = None if self.log.roots else if_defined(by_tangents)
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

    def refer_by_leaf(self, tangents, number) -> None:
        """Adds random directions in every leaf."""
        rows = leaf_rows(self.layout, self.grads.mean(0), number, jax.random.fold_in(self.direction_key, 1))
        wanted = np.array([tangents.along(rows.directions, self.flat, key)[1] for key in self.keys])
        self.rows, self.wanted = joined(self.rows, rows), np.concatenate([self.wanted, wanted], axis=1)
        self.given = self.grads @ self.rows.directions.T

    def foretell(self, step) -> None:
        """Measures predictivity, and where it is low also that of other trainings."""
        key = jax.random.fold_in(self.direction_key, 3)
        retrained = retrain(self.value, self.flat, (step, step / 3), key, self.key)
        self.predictivity = tuple(each.predictivity(self.grads[0]) for each in retrained)
        if self.log.adjoints and self.predictivity[0].low:
            self.remedies = try_remedies(self.value, self.value_and_grad, self.flat, step, key, self.key)

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
        return self.relative(error)

    def _moved(self, off) -> Judged:
        """The error of a hypergradient that is the reference but for `off`."""
        wanted = self.wanted.mean(0)
        return judge(self.layout, self.rows, wanted + off, wanted)

    def relative(self, off) -> float:
        """The relative error that `off`, along the rows, amounts to."""
        return self._moved(off).agreement.relative_error

    def judged_by_slopes(self) -> bool:
        """True where leaves are judged along one direction alone."""
        return bool((self.rows.kinds == SLOPE).any() and not (self.rows.leaves[self.rows.kinds == RANDOM] >= 0).any())

    def rounding(self, tangents) -> Judged:
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
        self.numeric_error = max(self.relative(by_reference) for _, by_reference in probes)
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
            self.remedies,
        )
