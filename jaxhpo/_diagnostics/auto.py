"""`Auto`: the derivative rule that suits a problem, chosen by measurement."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.cost import SAFE_PART, available_bytes, count_and_peak, with_memory
from jaxhpo._core.errors import ZeroHypergradientWarning
from jaxhpo._core.record import SolveLog, recording
from jaxhpo._core.tree import is_inexact, partition
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import short_name
from jaxhpo._diagnostics.compare.compare import default_adjoints
from jaxhpo._diagnostics.compare.measure import measure
from jaxhpo._diagnostics.tangents import Tangents, if_defined
from jaxhpo._inner.problem import Adjoint, Problem

CLEARLY = 0.8  # of the cost of `Unroll()`: rules above it are not tried
NEARLY = 0.99  # of the exact hypergradient, after which no more rules are tried
TRUSTED = 0.95  # of it, below which a rule is not taken: what it lacks may be what a run needs in the end


@dataclasses.dataclass(frozen=True)
class Auto:
    r"""The derivative rule that suits the problem: an exact one, or under `tune` the one that descends most cheaply.

    Under `jax.grad` it is `Unroll()`, which sees everything and is exact; with `"binomial"` checkpoints where that does
    not fit into memory, and `Implicit()` where neither does, or where the run ends at a `tol`.

    Under `tune`, before the first outer step, each rule of `compare`'s list that sees every hyperparameter, fits into
    memory and costs clearly less than the exact one is tried once, the cheapest first, until one gives 99 % of the
    exact hypergradient. The one that explains most for its cost is taken, and 95 % at least: with :math:`\hat g_l` and
    :math:`g_l` its hypergradient and the exact one of leaf l, it explains
    :math:`\min_l 1 - \|\hat g_l - g_l\|^2 / \|g_l\|^2`. (In a run to a `tol`, where reverse mode is not exact, the
    squared slope along :math:`\hat g`, relative to the largest.) It is chosen anew where the outer loss has not fallen
    for 8 steps, and at once where it rises above that of the start; after a choice that changes nothing, for twice as
    many. The choice and its reasons are printed, and in the result's `message`. Of a `population` all take the exact
    rule.

    **Cost and bias**: that of the rule; each choice costs the exact hypergradient and those that are tried (mostly one
    to three, of 1.1 to 1.5 trainings), and a compilation of each, which is most of a run whose steps take
    milliseconds: take `Unroll()` there. Costs are counted operations and predicted memory, the same on every machine. A
    rule that is chosen may be biased, by what it does not explain: `compare`, which judges values and not descent, may
    list it as not to be trusted.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     start = solver.init(jnp.zeros(2), h)
      ...     sol = jaxhpo.solve(solver, start, h, num_steps=100, adjoint=jaxhpo.Auto())
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> print(jax.grad(outer_loss)(jnp.ones(2)).round(3))
      [-4. -4.]
      >>> result = jaxhpo.tune(outer_loss, jnp.ones(2), optax.sgd(0.1), num_steps=2, progress=False)
      >>> result.message.partition(";")[0]
      'Auto: ...'

    References:
      Lorraine, Vicol, Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation. 2020.
      arXiv:1911.02590
    """

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop by an exact rule that fits."""
        if problem.tol is not None:
            return Implicit().run(problem)
        exact = Unroll(), Unroll(checkpoint="binomial")
        return next((rule for rule in exact if _fits(rule, problem)), Implicit()).run(problem)


def _fits(rule, problem) -> bool:
    given = problem.state, problem.inputs
    values, combine = partition(given, jax.tree.map(is_inexact, given))

    def pulled(values):
        def run(values):
            state, inputs = combine(values)
            return rule.run(problem._replace(state=state, inputs=inputs))[0].params

        params, pullback = jax.vjp(run, values)
        return pullback(params)

    return count_and_peak(pulled, values, unknown_length=1)[1] <= SAFE_PART * available_bytes()


class Tried(NamedTuple):
    """A rule that was tried.

    Attributes:
      rule: the rule.
      explains: the part of the exact hypergradient that it gives, of the leaf where that is least.
      cost: of a hypergradient, in operations, as `with_memory` counts.
    """

    rule: Adjoint
    explains: float
    cost: float


class Choice(NamedTuple):
    """The rule that was chosen, and why.

    Attributes:
      rule: the rule; `Auto()` itself where none of the list can be trusted.
      why: in words.
      tried: the rules that were tried.
    """

    rule: Adjoint
    why: str
    tried: Sequence[Tried]


def listed(value: Callable[[jax.Array], jax.Array], flat: jax.Array) -> list[Adjoint]:
    """The rules from which `Auto` chooses for an outer loss, a function of the flat hyperparameters."""
    log = SolveLog()
    with recording(solves=log):
        jax.eval_shape(jax.grad(value), flat)
    return default_adjoints(log, flat.size, unrolls=bool(log.schedules))


def choose(value: Callable[[jax.Array], jax.Array], flat: jax.Array, parts: Sequence[slice]) -> Choice:
    """Tries the rules of `listed` at a point.

    Args:
      value: the outer loss, a function of the flat hyperparameters.
      flat: the point.
      parts: the place of each leaf in it.
    """
    rules = listed(value, flat)
    tried = _tried(value, rules, flat, parts)
    exact = next((row for row in tried if row.rule == Unroll()), None)
    trusted = [row for row in tried if row.explains >= TRUSTED]
    best = max(trusted, key=lambda row: (row.explains / row.cost, row is exact), default=None)
    if best is None:
        return Choice(Auto(), "Auto: the rule of `jax.grad`, as no other can be trusted here", tried)

    def words(row):
        part = "" if exact is None else f" at {row.cost / exact.cost:.2f} of its cost"
        return f"{short_name(row.rule)} {100 * row.explains:.0f} %{part}"

    others = [words(row) for row in tried if row is not exact]
    why = f"Auto: {short_name(best.rule)}"
    if others:
        whole = "the exact hypergradient" if exact else "the largest slope"
        why += f", which explains most of {whole} for its cost ({', '.join(others)}; {100 * TRUSTED:.0f} % at least)"
    return Choice(best.rule, why, tried)


def _tried(value, rules, flat, parts) -> list[Tried]:
    """The rules that see every hyperparameter; after `Unroll()`, the cheapest first, those that cost clearly less.

    No more are tried after one that gives nearly all of the exact hypergradient: they cost more.
    """

    def make(rule):
        def outer_loss(flat):
            with recording(rule=lambda other: rule if isinstance(other, Auto) else other):
                return value(flat)

        return outer_loss

    found, limit = [], np.inf
    least = {rule: _cost(make, rule, flat, 1) for rule in rules}
    for rule in sorted(rules, key=lambda rule: (rule != Unroll(), least[rule])):
        if least[rule] >= CLEARLY * limit:
            continue
        measured = measure(make, rule, flat)
        if measured.error is not None or any(isinstance(w, ZeroHypergradientWarning) for w in measured.warnings):
            continue
        grad = np.asarray(measured.result[1], float)
        if np.isfinite(grad).all() and grad.any():
            products = max((solve.num_iterations for solve in measured.linear_solves), default=1)
            found.append((rule, grad, _cost(make, rule, flat, products)))
            limit = found[-1][2] if rule == Unroll() else limit
            if rule != Unroll() and np.isfinite(limit) and _explains(grad, found[0][1], parts) >= NEARLY:
                break
    if not found:
        return []
    grads = np.stack([grad for _, grad, _ in found])
    if np.isfinite(limit):
        explain = [_explains(grad, grads[0], parts) for grad in grads]
    else:
        units = grads / np.linalg.norm(grads, axis=1, keepdims=True)
        slopes = if_defined(lambda: Tangents(value, flat).along(units)[1])
        explain = [0.0] * len(found) if slopes is None else (np.maximum(slopes, 0) / (slopes.max() or 1.0)) ** 2
    return [Tried(rule, float(part), cost) for (rule, _, cost), part in zip(found, explain, strict=True)]


def _explains(grad, exact, parts) -> float:
    """The part of the exact hypergradient that another gives, of the leaf where it is least."""
    left = [np.sum((grad[at] - exact[at]) ** 2) / np.sum(exact[at] ** 2) for at in parts if exact[at].any()]
    return max(0.0, 1 - float(max(left)))


def _cost(make, rule, flat, products) -> float:
    try:
        return with_memory(*count_and_peak(jax.value_and_grad(make(rule)), flat, unknown_length=max(1, products)))
    except Exception:  # whatever a rule refuses
        return float("inf")
