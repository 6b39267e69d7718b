"""The derivative rules of a run: what `Auto` chose, and what `on_error` put in the place of a rule that misled."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import numpy as np

from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.last_step import SAMA, FiniteDifference
from jaxhpo._adjoint.pushforward import Forward, ForwardGradient, Smoothing
from jaxhpo._adjoint.reversible import Reversible
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.mesh import ravel
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.validate import short_name
from jaxhpo._diagnostics.auto import Auto, choose, listed
from jaxhpo._diagnostics.rows import Layout
from jaxhpo._linear.direct import Direct
from jaxhpo._linear.general import General
from jaxhpo._tune.population import Compiled
from jaxhpo._tune.step import OuterState

STALL = 8  # outer steps without a lower outer loss after which `Auto` chooses anew
MEASURED = 6  # moves on which `on_error` decides
DOWNHILL = 0.05  # the mean cosine of moves and the exact descent direction, below which they go nowhere
ROUGH = 0.3  # relative error of a hypergradient below which it cannot be at fault


class Unchosen(Exception):
    """`Auto` was met, and has not chosen."""


class Rules:
    """The rules that take the place of those of a run's outer loss.

    Args:
      compiled: the compiled step, whose `step.place` this becomes.
      on_error: None, "tighten" or "stop".

    Attributes:
      chosen: the rule that `Auto` chose; None before.
      probed: the outer step before which it chose.
      wait: steps without a lower outer loss after which it chooses anew.
      level: how many times rules were tightened.
      since: the outer step before which they were last.
      longest: inner steps of the longest solve, where rules were tightened.
      said: what was chosen and tightened, in words.
    """

    def __init__(self, compiled: Compiled, on_error: str | None):
        self.compiled, self.on_error = compiled, on_error
        self.chosen: Any = None
        self.probed, self.wait, self.level, self.since, self.longest = 0, STALL, 0, 0, 0
        self.said: list[str] = []
        compiled.step.place = self.place

    def place(self, rule: Any) -> Any:
        """The rule that a solve takes when it asks for `rule`."""
        if isinstance(rule, Auto):
            if self.compiled.size is not None or self.compiled.step.gradient is not None:
                return rule
            if self.chosen is None:
                raise Unchosen
            rule = self.chosen
        for _ in range(self.level):
            rule = stronger(rule, self.longest) or rule
        return rule

    @contextlib.contextmanager
    def as_asked(self) -> Iterator[None]:
        """While active, solves take the rules that they ask for."""
        self.compiled.step.place = lambda rule: rule
        try:
            yield
        finally:
            self.compiled.step.place = self.place

    # --- what a checkpoint holds ---

    def saved(self) -> dict[str, Any]:
        """Returns the choices so far, for `restore`."""
        kept = ("probed", "wait", "level", "since", "longest", "said")
        chosen = None if self.chosen is None else repr(self.chosen)
        return {name: getattr(self, name) for name in kept} | {"chosen": chosen}

    def restore(self, saved: dict[str, Any], state: OuterState) -> None:
        """Takes up the rules of an earlier call; a choice that is in the list no more is made anew."""
        chosen = saved.pop("chosen")
        for name, value in saved.items():
            setattr(self, name, value)
        if chosen is not None:
            with self.as_asked(), warnings.catch_warnings(action="ignore"):
                every = [Auto(), *listed(*self._outer_loss(state))]
            self.chosen = next((rule for rule in every if repr(rule) == chosen), None)
        self.compiled.renew()

    # --- decisions ---

    def choose(self, state: OuterState, rows: int) -> str:
        """The choice of `Auto` at a state, in words, and from now on in use; empty where it is the same as before."""
        with self.as_asked(), warnings.catch_warnings(action="ignore"):
            choice = choose(*self._outer_loss(state), Layout(state.point).parts)
        same, self.probed = choice.rule == self.chosen, rows
        self.wait = 2 * self.wait if same else STALL
        self.chosen = choice.rule
        if same:
            return ""
        self.level = 0
        self.compiled.renew()
        return self._say(choice.why, rows)

    def has_stalled(self, rows: list[dict[str, Any]]) -> bool:
        """Returns whether `Auto` is to choose anew: no lower outer loss for `wait` steps, or all that was gained lost.

        The latter at once, as a training that becomes unstable has no steps to spare; but not where the last choice
        changed nothing.
        """
        if self.chosen is None or len(rows) == self.probed:
            return False
        values = [float(row["value"]) for row in rows]
        if self.wait == STALL and values[-1] > values[0] > min(values) and values[-1] > values[self.probed]:
            return True
        return len(values) - self.probed >= self.wait and min(values[-self.wait :]) >= min(
            values[: -self.wait], default=math.inf
        )

    def misleads(self, rows: list[dict[str, Any]]) -> str:
        """Returns why the hypergradients of the last steps are not to be followed, in words; empty where they are.

        Moves Δ whose mean cosine with the exact descent direction −g is below a twentieth, with hypergradients that are
        off by 30 % or more.
        """
        if self.on_error is None or len(rows) - self.since < MEASURED:
            return ""
        # A derivative that is exactly zero has no direction: of a value that does not depend on the hyperparameters.
        own = [row for row in rows[self.since :] if np.isfinite(row["measured_slope"]) and row["measured_norm"] > 0]
        if len(own) < MEASURED or own[-1] is not rows[-1]:
            return ""
        own = own[-MEASURED:]
        cosine = -float(np.mean([row["measured_slope"] / row["measured_norm"] for row in own]))
        error, norm, exact = (float(own[-1][name]) for name in ("error", "hypergradient_norm", "measured_norm"))
        if not (cosine < DOWNHILL and error > ROUGH * norm):
            return ""
        return (
            f"the last {MEASURED} measured moves go nowhere (mean cosine {cosine:.2f} with the exact descent "
            f"direction; the hypergradient, of length {norm:.2g}, is {error:.2g} from the exact one, of length "
            f"{exact:.2g})"
        )

    def tighten(self, state: OuterState, rows: int, why: str) -> str:
        """Takes stronger rules; returns them in words, empty where there are none."""
        if self.on_error == "stop" or self.compiled.step.gradient is not None:
            return ""
        log = SolveLog(schedules=False)
        with self.as_asked(), recording(solves=log), warnings.catch_warnings(action="ignore"):
            value, flat = self._outer_loss(state)
            jax.eval_shape(value, flat)
        self.longest, before = log.longest, [self.place(rule) for rule in log.adjoints]
        self.level, possible = self.level + 1, False
        try:
            after = [self.place(rule) for rule in log.adjoints]
            possible = after != before and self._possible(state)
        finally:  # a Ctrl-C must not leave the rule to a checkpoint
            self.level -= not possible
        if not possible:
            return ""
        self.since = rows
        self.compiled.renew()
        changed = [f"{_name(a)} becomes {_name(b)}" for a, b in zip(before, after, strict=True) if a != b]
        changes = ", ".join(dict.fromkeys(changed))
        return self._say(f"{why}: {changes}, and the optimiser begins anew, but for its schedules", rows)

    def _possible(self, state) -> bool:
        value, flat = self._outer_loss(state)
        try:
            with warnings.catch_warnings(action="ignore"):
                jax.eval_shape(jax.grad(value), flat)
        except Exception:  # whatever a rule refuses, as a run to a `tol`
            return False
        return True

    def _outer_loss(self, state) -> tuple[Callable, jax.Array]:
        step, key = self.compiled.step, jax.random.fold_in(state.key, state.step)
        flat, unravel = ravel(state.point)
        return lambda flat: step.objective(unravel(flat), state.carry, key)[0], flat

    def _say(self, text, rows) -> str:
        self.said.append(f"before step {rows}: {text}" if rows else text)
        return self.said[-1]


def _name(rule) -> str:
    name = short_name(rule)
    return type(rule).__name__ if " at 0x" in name else name  # an address differs from process to process


def stronger(rule: Any, longest: int) -> Any:
    """The next rule that is nearer to the exact one; None for an exact one.

    Args:
      rule: the present one.
      longest: inner steps of the longest solve.
    """
    if isinstance(rule, Unroll):
        if rule.truncate is not None and 10 * rule.truncate < longest:
            return dataclasses.replace(rule, truncate=10 * rule.truncate)
        if rule.truncate is None and rule.hvp_fraction in (None, 1):
            return None
        return dataclasses.replace(rule, truncate=None, hvp_fraction=None)
    if isinstance(rule, Reversible | Forward | Auto):
        return None
    if isinstance(rule, ForwardGradient) and rule.num_directions < 64:
        return ForwardGradient(8 * rule.num_directions)
    if isinstance(rule, Smoothing) and rule.num_pairs < 64:
        return dataclasses.replace(rule, num_pairs=8 * rule.num_pairs)
    if isinstance(rule, Implicit):
        solver: Any = rule.linear_solver
        if rule.curvature == "hessian" and (solver == Implicit().linear_solver or isinstance(solver, General | Direct)):
            return Unroll()
        # A series is not made longer: conjugate gradients are nearer after as many products, and have no step to be too
        # long, by which a series diverges.
        number = getattr(solver, "maxiter", None)
        if dataclasses.is_dataclass(solver) and isinstance(number, int) and number < 100:
            replace = cast(Any, dataclasses.replace)
            return replace(rule, linear_solver=replace(solver, maxiter=10 * number))
        return Implicit()
    return Implicit() if isinstance(rule, SAMA | FiniteDifference) else Unroll()
