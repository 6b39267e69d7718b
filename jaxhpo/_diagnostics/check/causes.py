"""The cause of a wrong hypergradient, established by taking its possible sources away one after the other."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.processes import agreed, from_first, whole
from jaxhpo._core.record import InnerRun, SolveLog, recording
from jaxhpo._core.trace import compilable, rules_in
from jaxhpo._core.types import InnerState, Schedule
from jaxhpo._core.validate import short_name
from jaxhpo._diagnostics.check.evidence import Evidence
from jaxhpo._diagnostics.origin import stops_in
from jaxhpo._diagnostics.rows import judge
from jaxhpo._diagnostics.tangents import Constant, PlainLoop, Tangents
from jaxhpo._inner.loop import run, scan_steps
from jaxhpo._inner.problem import Problem
from jaxhpo._linear.general import General

MATCH = 0.03  # relative distance at which two vectors are the same, for the purpose of an explanation
BETTER = 1 / 3  # of the error that is left where its source was taken away
LEFT = 0.01  # of the error: what is left of it has a source of its own only above that


@dataclasses.dataclass(frozen=True)
class Exact:
    """`Unroll()`, also of a run that ends at a tolerance: after that its steps change nothing."""

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Takes the steps."""
        if problem.tol is None:
            return Unroll().run(problem)
        number, given = problem.num_steps, ("state", "inputs", "xs", "residual_inputs")
        stopped = {name: jax.lax.stop_gradient(getattr(problem, name)) for name in given}
        _, steps = run(problem._replace(**stopped))

        def advance(state, inputs, x):
            t, x = x
            return jax.lax.cond(t < steps, problem.advance, lambda state, *_: state, state, inputs, x)

        xs, counts = (jnp.arange(number), problem.xs), (True, problem.counts)
        masked = problem._replace(advance=advance, xs=xs, counts=counts)
        return scan_steps(masked, Schedule(math.isqrt(number))), steps


@dataclasses.dataclass(frozen=True)
class Twice:
    """Two runs of the inner steps, the second from the end of the first, to a tenth of the tolerance."""

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Takes the steps."""
        tol = None if problem.tol is None else problem.tol / 10
        return run(problem._replace(state=run(problem)[0], tol=tol))


def _is_ours(rule: Any) -> bool:
    return type(rule).__module__.startswith(f"{__name__.partition('.')[0]}.")


class Inquiry:
    """Experiments with an outer loss whose hypergradient differs from the reference, to find out why."""

    def __init__(self, evidence: Evidence):
        self.value, self.flat, self.key, self.own = evidence.value, evidence.flat, evidence.key, evidence.own
        self.layout, self.rows, self.exact = evidence.layout, evidence.rows, evidence.tangents is not None
        self.log, self.statuses = evidence.log, evidence.statuses
        self.given, self.reference = evidence.given.mean(0), evidence.wanted.mean(0)
        self.error = self._error(self.given)

    def causes(self) -> tuple[str, ...]:
        """The causes in words, the likeliest first, each with its remedy."""
        with warnings.catch_warnings(action="ignore"):
            exact = None if self.own or not self.log.adjoints else self._under(lambda rule: Exact())
            explained = exact is not None and self._explains(exact)
            if explained or (self.log.adjoints and not self.exact):
                found = [text for rule in dict.fromkeys(self.log.adjoints) if (text := self._of_rule(rule))]
                if exact is None or not explained:
                    return tuple(found)
                if self._error(exact) > max(MATCH, LEFT * self.error):
                    found += self._of_program(exact)
                elif all(map(_is_ours, self.log.adjoints)):
                    return tuple(found)
            elif self.log.roots:
                found = [self._of_root()]
            else:
                found = self._of_program(self.given)
            return (*found, *self._by_leaf())

    # --- the parts of the answer ---

    def _of_rule(self, rule: Any) -> str:
        """The part of a rule in the error; "" for one that is exact."""
        if isinstance(rule, Implicit):
            return self._of_implicit(rule)
        if isinstance(rule, Unroll) and rule.truncate is not None:
            return (
                f"`{short_name(rule)}` differentiates the last {rule.truncate} inner steps alone; `Unroll()`, which "
                "differentiates all, is right here. Take more, until the hypergradient no longer changes."
            )
        if isinstance(rule, Unroll) and rule.hvp_fraction in (None, 1):
            return ""
        if not _is_ours(rule):
            return (
                f"`{short_name(rule)}`, a rule of your own, is wrong: `Unroll()` in its place is right here. Look at "
                "what its backward pass computes, and at which batch and state."
            )
        return (
            f"`{short_name(rule)}` is approximate, and this is its bias: `Unroll()` in its place is right here. Its "
            "docstring says what the bias depends on."
        )

    def _of_implicit(self, rule: Implicit) -> str:
        exactly = dataclasses.replace(rule, linear_solver=General(), curvature="hessian", on_failure="keep")
        solved = self._under(lambda other: exactly if other == rule else other)
        bad = sorted({status.name for status in self.statuses if status})
        if solved is not None and self._explains(solved):
            ended = f"its linear solve ended {', '.join(bad)}" if bad else "its linear solve is rough"
            return (
                f"`{short_name(rule)}`: {ended}, and this is its bias; with `Implicit(General())` the relative error "
                f"is {self._error(solved):.1e}. Take that, or `CG()` or `GMRES()` with enough iterations."
            )
        runs, more = self._runs(PlainLoop()), self._runs(Twice())
        if not runs or len(runs) != len(more):
            return f"`{short_name(rule)}` is right where the inner problem has converged: look at `info.optimality`."
        first, second = max(zip(runs, more, strict=True), key=lambda pair: pair[0].end / (pair[0].start or 1.0))
        went = f"the norm of its condition went from {first.start:.2g} to {first.end:.2g} in {first.num_steps} steps"
        if second.end <= 0.9 * first.end:
            return (
                f"The inner run has not converged: {went}, and {second.num_steps} more bring it to {second.end:.2g}. "
                "Take more inner steps, or a smaller `tol` (under decoupled weight decay, clipping or projection it "
                "may never be zero: put the decay into the loss), or `Unroll()`, which differentiates the steps as "
                "they are."
            )
        if first.end <= 1e-6 * first.start:
            return (
                f"`{short_name(rule)}` sees what enters the condition at the end, and the run depends on more: on its "
                "start, or on hyperparameters of the optimiser. `Unroll()` sees these."
            )
        return (
            f"The condition is not zero where the optimiser stops: {went}, and {second.num_steps} more leave it at "
            f"{second.end:.2g}. It may have another fixed point than the train loss (decoupled weight decay, clipping, "
            "projection: put the decay into the loss, or use `fixed_point(step)`), or minibatches keep it away (lower "
            "the rate, pass the whole data as `condition_batch=`). `Unroll()` agrees with the reference."
        )

    def _of_root(self) -> str:
        bad = sorted({status.name for status in self.statuses if status})
        if bad:
            return f"The linear solve of `implicit` ended {', '.join(bad)}: take `General()`, or more iterations."
        return (
            "The derivative of `implicit` is right where `condition(params, args)` is zero and holds all that the "
            "solution depends on."
        )

    def _of_program(self, given: np.ndarray) -> list[str]:
        """Derivative rules and `stop_gradient` in the outer loss, the inner steps and the model.

        Args:
          given: components of a hypergradient whose rule is exact.
        """
        plain = Tangents(self.value, self.flat, self.key)
        lines = stops_in(plain.traced)
        kept = self._tangents(stops=False) if lines else None
        if kept is not None and self._error(kept, given) <= BETTER * self._error(given):
            return [
                f"`stop_gradient` ({'; '.join(lines)}) keeps a derivative from the rule: past it the "
                "derivative is that of the reference. Remove it, or accept the bias."
            ]
        own = [f"`{name}` ({place})" for name, _, place in (s.partition(" at ") for s in rules_in(plain.traced))]
        if own:
            return [f"{', '.join(own)}: a derivative rule that is not the derivative of its function. Look there."]
        if self.own:
            return [
                "The hypergradient comes from `gradient`: its method is approximate, a term of it is wrong, or it "
                "holds what earlier calls left in `carry` (as `RealTime` does), which is constant in the reference."
            ]
        return [
            "The rule is exact, and is given another function: look for a derivative rule of your own in the losses or "
            "the model, and for what differs between two calls."
        ]

    def _by_leaf(self) -> list[str]:
        """The leaves whose hypergradient is a multiple of the true one, or lacks one of its two terms."""
        direct, found = self._tangents(rule=Constant(), stops=False) if self.log.adjoints else None, []
        for i, name in enumerate(self.layout.names):
            at = (self.rows.leaves == i) | (len(self.layout.names) == 1)
            given, wanted = self.given[at], self.reference[at]
            size = np.linalg.norm(wanted)
            if at.sum() < 2 and self.layout.parts[i].stop - self.layout.parts[i].start > 1:
                continue
            if not size or np.linalg.norm(given - wanted) <= MATCH * size:
                continue
            factor = float(given @ wanted / size**2)
            terms = None if direct is None else direct[at]
            near = lambda x, y, size=size: np.linalg.norm(x - y) <= MATCH * size  # noqa: E731
            if terms is not None and near(given, wanted - terms) and not near(0, terms):
                text = "lacks its direct term, through the outer loss alone"
            elif terms is not None and near(given, terms):
                text = "is its direct term alone: what acts through the training is missing"
            elif near(given, factor * wanted) and len(given) > 1:
                text = f"is {factor:.3g} times the true one"
            elif factor < 0:
                text = "has the opposite sign"
            else:
                continue
            found.append(f"The hypergradient of `{name}` {text}.")
        return found[:4]

    # --- measurements ---

    def _error(self, given, of=None) -> float:
        return judge(self.layout, self.rows, given, self.reference if of is None else of).agreement.relative_error

    def _explains(self, other: np.ndarray) -> bool:
        """True if these components are near the reference where the hypergradient's are not."""
        return self._error(other) <= BETTER * self.error

    def _under(self, rule: Callable[[Any], Any]) -> np.ndarray | None:
        """The components of the hypergradient with other rules; None where these raise."""
        try:
            with recording(rule=rule):
                program, args = agreed(lambda: compilable(jax.grad(self.value), self.flat, self.key))
                grad = whole(program(*args))
        except Exception:  # whatever a rule refuses, or memory that is short
            return None
        return self.rows.directions @ np.asarray(grad, float)

    def _tangents(self, **settings: Any) -> np.ndarray | None:
        try:
            return agreed(lambda: Tangents(self.value, self.flat, self.key, **settings).along(self.rows.directions)[1])
        except Exception:  # no forward mode
            return None

    def _runs(self, rule: Any) -> list[InnerRun]:
        """Runs the inner solves with a rule; returns how far each comes."""
        log = SolveLog(runs=True, schedules=False)
        with recording(rule=lambda _: rule, solves=log):
            program, args = compilable(self.value, self.flat, self.key)
            jax.block_until_ready(program(*args))
        return from_first(lambda: log.runs)
