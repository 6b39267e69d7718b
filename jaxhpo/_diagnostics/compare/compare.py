"""`compare`: error, time and memory of hypergradient methods on the user's own problem, and a recommendation."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxhpo._adjoint.checkpointing import LITTLE
from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.pushforward import Forward
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._core.cost import fastest, temporary_bytes
from jaxhpo._core.errors import JaxhpoError, ZeroHypergradientWarning
from jaxhpo._core.mesh import ravel
from jaxhpo._core.outer import in_one_form, in_search_units
from jaxhpo._core.processes import AnotherProcessError, together
from jaxhpo._core.progress import EVERY, Progress, say
from jaxhpo._core.record import SolveLog
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import names
from jaxhpo._core.types import Hypergradient, PyTree
from jaxhpo._core.validate import (
    check_arrays,
    check_callable,
    check_count,
    check_key,
    check_params,
    check_positive,
    check_scalar,
    describe,
    short_name,
)
from jaxhpo._diagnostics.compare.measure import (
    CALLS,
    Measured,
    RuleNotUsed,
    first_words,
    measure,
    measure_pair,
    run_once,
)
from jaxhpo._diagnostics.compare.reference import Standard, directional_derivatives, standard
from jaxhpo._diagnostics.compare.result import Comparison, MethodRow, ProblemSize
from jaxhpo._diagnostics.compare.verdict import failures, recommend
from jaxhpo._diagnostics.health import raise_unless_finite
from jaxhpo._diagnostics.not_finite import diagnose
from jaxhpo._diagnostics.predictivity import retrain
from jaxhpo._inner.problem import Adjoint, check_adjoint
from jaxhpo._linear.cg import CG
from jaxhpo._linear.direct import Direct
from jaxhpo._linear.gmres import GMRES
from jaxhpo._linear.neumann import Neumann

WORST_LAST = ("converged", "max iterations", "stalled", "indefinite", "not finite")  # of `LinearStatus`


@together()
def compare(
    make_outer_loss: Callable[[Any], Callable[[PyTree], jax.Array]],
    hparams: PyTree,
    adjoints: Sequence[Adjoint] | Mapping[str, Adjoint] | None = None,
    *,
    pairs: Mapping[str, tuple[Callable, PyTree]] | None = None,
    reference: Adjoint | str | None = None,
    num_directions: int = 16,
    repeats: int | None = None,
    step: float | None = None,
    transforms: PyTree = None,
    key: jax.Array | None = None,
    progress: bool = True,
) -> Comparison:
    r"""Measures hypergradient methods on your own problem, and recommends one of them.

    For each method it reports the relative error :math:`\|g - g^*\| / \|g^*\|`, the cosine and the norm ratio against
    the exact hypergradient :math:`g^*`, the time in inner gradient steps, the peak memory in copies of the parameters,
    and how its linear solves ended. The exact hypergradient is that of reverse mode through all steps, checked against
    exact tangents, as `check_hypergradient` takes them; where it does not fit into memory, or is wrong, these take its
    place, or central differences where forward mode does not exist.

    **Cost and bias**: one compilation and 1 + `repeats` hypergradients per method (one more compilation for rules with
    an iterative linear solve), and 5 + 1.3 to 2 `num_directions` trainings for the tangents, or 4 a direction for
    differences. Times are those of this machine, measured by calling all programs in turn; errors are those at
    `hparams` alone. Where the reference is the exact rule, or a derivative along every coordinate, an error is exact;
    along random directions it has a 95 % interval (Pitman's, of a ratio of two standard deviations). A random method
    is judged by 8 draws, a rule's of the key that `make_outer_loss` gives it with 7 numbers folded in (one more
    compilation, 7 hypergradients): the error is their root mean square, with an interval for log-normal errors.

    Args:
      make_outer_loss: `adjoint -> (hparams -> scalar)`: your outer loss, passing the rule on to `solve`.
      hparams: where to compare, a pytree of floating-point arrays, in natural units.
      adjoints: the rules, in a sequence or as `{name: rule}`; None takes those without required settings.
      pairs: stateful methods beside the rules, as `{name: (gradient, carry)}`, for instance `{"HOAG": (from_pair(pair),
        pair.init(params, hparams))}`, with the same start and data as the outer loss. Each is called 6 times at
        `hparams` (and 7 more where it is random), and its row is of the last call, in which warm starts have settled;
        that of the first is in the notes. With a warm start the last is no derivative of the steps from the first
        start, but nears it where the inner run converges.
      reference: the rule taken to be exact, or `"differences"`; `Unroll()` when None.
      num_directions: random directions of tangents or differences; up to as many hyperparameters are taken one by one.
      repeats: timed calls of each program, of which the fastest counts; None takes five, and more of short ones:
        three seconds in all.
      step: also measures predictivity, as `check_hypergradient` does: the correlation of the change that each method's
        hypergradient foretells with the real one, over 8 random steps by which each hyperparameter moves with this
        standard deviation, the same for all methods; 9 trainings. None does not.
      transforms: as for `tune`: hypergradients, errors and `step` are then those of the unconstrained hyperparameters,
        which the outer optimiser moves.
      key: for the random directions; `jax.random.key(0)` when None.
      progress: shows progress on stderr, also within what takes longer than 5 s.

    Returns:
      A `Comparison`; `print` it, or draw it with `jaxhpo.plot.comparison`. The row of a method that raises holds the
      error.

    Raises:
      NonFiniteError: the outer loss, or the differences where nothing else can be the reference, are not finite.
      ZeroHypergradientError: no hyperparameter affects the outer loss.
      JaxhpoError: an invalid input; an outer loss that does not use the rule that it is given.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum(jnp.exp(h) * (p - 1) ** 2), optax.sgd(0.1))
      >>> def make_outer_loss(adjoint):
      ...     def outer_loss(h):
      ...         start = solver.init(jnp.zeros(2), h)
      ...         return jnp.sum((jaxhpo.solve(solver, start, h, num_steps=3, adjoint=adjoint).params - 3.0) ** 2)
      ...     return outer_loss
      >>> rules = [jaxhpo.Unroll(), jaxhpo.Implicit(jaxhpo.Identity(0.1))]
      >>> comparison = jaxhpo.compare(make_outer_loss, jnp.zeros(2), rules, repeats=1)
      >>> comparison.recommended
      'Unroll()'
      >>> print(f"{comparison['Implicit(Identity(0.1))'].relative_error:.3f}")  # 1 - 0.8 / 3
      0.733

    References:
      Lorraine, Vicol, Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation. 2020.
      arXiv:1911.02590
      Grazzi, Franceschi, Pontil, Salzo. On the Iteration Complexity of Hypergradient Computation. 2020.
      arXiv:2006.16218
    """
    check_callable("make_outer_loss", make_outer_loss, "make_outer_loss(adjoint)", 1)
    hparams = check_params(hparams, "hparams")
    check_count("num_directions", num_directions)
    if repeats is not None:
        check_count("repeats", repeats)
    if step is not None:
        check_positive("step", step)
    direction_key = jax.random.key(0) if key is None else check_key(key)
    given = {} if adjoints is None else _named(adjoints)
    pairs = {} if pairs is None else _checked_pairs(pairs, transforms)
    if isinstance(reference, str) and reference != "differences":
        raise JaxhpoError(f"`reference` got {reference!r}, which is no rule: write 'differences', or pass `Unroll()`.")
    exact = None if isinstance(reference, str) else Unroll() if reference is None else reference
    if exact is not None:
        check_adjoint(exact)
    point = to_unconstrained(transforms, hparams)
    flat, unravel = ravel(point)

    def make_loss(rule):
        try:
            outer_loss = make_outer_loss(rule)
            check_callable("make_outer_loss(adjoint)", outer_loss, "outer_loss(hparams)", 1)
        except Exception as error:
            if not _is_outer_loss(make_outer_loss, hparams):
                raise
            raise RuleNotUsed(
                "`make_outer_loss` got the outer loss itself, a function of the hyperparameters, but `compare` must "
                "pass a rule on to `solve`: write `lambda adjoint: lambda hparams: ...`, with "
                "`solve(..., adjoint=adjoint)` inside."
            ) from error
        return lambda flat: check_scalar(outer_loss(to_natural(transforms, unravel(flat))), "make_outer_loss(adjoint)")

    if progress:
        say("compare: compiling and running the outer loss")
    plain = _run_plain(make_loss, [exact or Unroll(), *given.values(), Implicit()], flat)
    raise_unless_finite(plain.result, (), lambda: diagnose(make_outer_loss(plain.rule), hparams))
    methods = given or _named(default_adjoints(plain.log, flat.size, isinstance(plain.rule, Unroll)))
    if both := methods.keys() & pairs.keys():
        raise JaxhpoError(f"`pairs` got the name {min(both)!r}, which a rule has: give it another.")
    with Progress(len(methods) + len(pairs) + 3, "compare", progress) as bar:
        found: dict[str, Measured] = {}
        for name, rule in methods.items():
            bar.note(f"compiling and running {name}")
            found[name] = measure(make_loss, rule, flat)
            bar.update(name)
        for name, (pair, carry) in pairs.items():
            bar.note(f"compiling and running {name}")
            found[name] = measure_pair(pair, carry, point, jax.random.fold_in(direction_key, 2))
            bar.update(name)
        of_exact = next((measured for measured in found.values() if measured.rule == exact), None)
        if exact is not None and of_exact is None:
            bar.note(f"compiling and running {short_name(exact)}, the reference")
            of_exact = measure(make_loss, exact, flat)
        bar.update("reference")
        bar.note("derivatives along directions")
        directions = None if flat.size <= num_directions else num_directions
        with Progress(directions or flat.size, "direction", progress, delay=EVERY) as tried:
            loss = make_loss(plain.rule)
            by_rule = None if of_exact is None or of_exact.error else np.asarray(of_exact.result[1], float)
            forward = exact is not None and not plain.log.roots
            differences = directional_derivatives(
                loss, point, directions, direction_key, forward, by_rule, tried.update
            )
        bar.update("derivatives along directions")
        retrained = None if step is None else retrain(loss, flat, (step,), jax.random.fold_in(direction_key, 1))[0]
        programs = [functools.partial(m.program, *m.args) for m in (plain, *found.values()) if m.error is None]
        # By its clock one process would call oftener than another, which then waits for it.
        at_least = 0.0 if repeats or jax.process_count() > 1 else 3.0
        bar.note("timing each of them")
        times, turns = [], repeats or 5
        with Progress(turns, "timing", progress, delay=EVERY) as timed:
            for _ in range(turns):
                times.append(fastest(programs, repeats=1, seconds=at_least / turns))
                timed.update()
        seconds = iter(np.min(times, axis=0).tolist())
        bar.update("times")
    against = standard(short_name(exact), of_exact, differences)
    problem = _size(plain, flat.size, next(seconds))
    ends = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(hparams))])
    # The place of each leaf in the flat vector.
    parts = {name: slice(*ends[i : i + 2]) for i, name in enumerate(names(hparams, "hparams"))}
    shared = against, parts, retrained, seconds, problem, plain
    rows = tuple(_row(name, measured, *shared) for name, measured in found.items())
    return Comparison(rows, against.reference, problem, *recommend(rows, against.reference, problem))


def _is_outer_loss(function, hparams) -> bool:
    """Returns whether a function takes hyperparameters to one number."""
    try:
        return jax.eval_shape(function, hparams).shape == ()
    except Exception:  # whatever a function raises that was made for something else
        return False


def _named(adjoints) -> dict[str, Adjoint]:
    """Each method under a name of its own."""
    if isinstance(adjoints, Mapping):
        methods = {str(name): rule for name, rule in adjoints.items()}
    elif isinstance(adjoints, Sequence) and not isinstance(adjoints, str):
        every = list(map(short_name, adjoints))
        again = [f" #{every[: i + 1].count(name)}" if name in every[:i] else "" for i, name in enumerate(every)]
        methods = {name + number: rule for name, number, rule in zip(every, again, adjoints, strict=True)}
    else:
        raise JaxhpoError(
            f"`adjoints` got {short_name(adjoints)}, but several methods are compared: write a list of rules such as "
            "`[Unroll(), Implicit(CG())]`, or a dict of them by name."
        )
    if not methods:
        raise JaxhpoError("`adjoints` is empty, so there is nothing to compare: pass at least one rule, or None.")
    for rule in methods.values():
        check_adjoint(rule)
    return methods


def _checked_pairs(pairs, transforms) -> dict[str, tuple[Callable, PyTree]]:
    """Each pair's gradient by the unconstrained hyperparameters, in the form that checks its results, and its carry."""
    wanted = "`{name: (gradient, carry)}`, such as `{'HOAG': (from_pair(pair), pair.init(params, hparams))}`"
    if not isinstance(pairs, Mapping):
        raise JaxhpoError(f"`pairs` got {describe(pairs)}, but a method needs a name and a state: write {wanted}.")
    found = {}
    for name, given in pairs.items():
        if not isinstance(given, tuple) or isinstance(given, Hypergradient) or len(given) != 2:
            raise JaxhpoError(f"`pairs[{name!r}]` got {describe(given)}: write {wanted}.")
        gradient: Any = in_search_units(transforms, *in_one_form(None, given[0]))[1]
        found[str(name)] = gradient, check_arrays(given[1], "carry")
    return found


def default_adjoints(log: SolveLog, num_hparams: int, unrolls: bool) -> list[Adjoint]:
    """The rules without required settings that suit the problem."""
    rules: list[Adjoint] = []
    longest = log.longest
    if unrolls:
        rules.append(Unroll())
        if any(row.num_steps * (row.state + row.residuals) > LITTLE for row in log.schedules):
            rules.append(Unroll(checkpoint="sqrt"))  # below that it is the same program
        rules += [Unroll(truncate=longest // 10)] if longest >= 10 else []
        rules += [Forward()] if num_hparams <= 16 else []
    if log.symmetric:
        rules += [Implicit(CG()), Implicit(CG(maxiter=5))]
    else:
        rules += [Implicit(GMRES()), Implicit(Neumann(20, 1.0))]
    return rules + ([Implicit(Direct())] if log.num_params <= 256 else [])


def _run_plain(make_loss, rules, flat) -> Measured:
    """Runs the outer loss, without derivative, under the first rule that allows it; else raises the first error."""
    errors = []
    for rule in rules:
        try:
            return run_once(make_loss, rule, flat, runs=True)
        except (RuleNotUsed, AnotherProcessError):
            raise
        except Exception as error:  # such as `tol`, which only implicit rules allow
            errors.append(error)
    raise errors[0]


def _size(plain, num_hparams, seconds) -> ProblemSize:
    log = plain.log
    worst = max(log.runs, key=lambda run: run.end / run.start if run.start else 0.0)  # the least converged
    num_steps = sum(run.num_steps for run in log.runs)
    return ProblemSize(num_hparams, log.num_params, num_steps, worst.start, worst.end, seconds)


def _row(name, measured: Measured, against: Standard, parts, retrained, seconds: Iterator, problem, plain) -> MethodRow:
    """One method's row; `seconds` gives the time of the next method that ran."""
    if measured.error is not None:
        return MethodRow(name, measured.rule, error=measured.error, notes=(f"It raised {measured.error}",))
    grad, took, temporary = measured.result[1], next(seconds), temporary_bytes(measured.program)
    finite, solves = bool(np.all(np.isfinite(measured.draws))), measured.linear_solves
    fields: dict[str, Any] = against.scores(measured.draws, parts, measured.warnings) if finite else {}
    fields["draws"] = len(measured.draws)
    if measured.first is not None and np.all(np.isfinite(measured.first)):
        fields["first_error"] = against.error(np.asarray(measured.first, float))
    if solves:
        statuses = [solve.status.name.lower().replace("_", " ") for solve in solves]
        fields["linear_status"] = max(statuses, key=WORST_LAST.index)
        fields["linear_residual"] = max(solve.residual for solve in solves)
        fields["linear_iterations"] = max(solve.num_iterations for solve in solves)
    if finite and retrained is not None:
        fields["predictivity"] = retrained.predictivity(np.asarray(grad, float)).correlation
    fields |= {"gradients": took * problem.num_steps / problem.seconds, "seconds": took, "finite": finite}
    fields["copies"] = None if temporary is None else temporary / plain.log.param_bytes
    row = MethodRow(name, measured.rule, **fields)
    mean_error = against.error(measured.draws.mean(0)) if finite else None
    return row._replace(notes=tuple(_notes(row, measured, mean_error, problem, float(plain.result))))


def _notes(row, measured, mean_error, problem, plain_value) -> Iterator[str]:
    for reason in failures(row, problem):
        yield f"{reason[0].upper()}{reason[1:]}."
    if row.first_error is not None and row.relative_error is not None:
        first, last = row.first_error, row.relative_error
        yield f"Its first call has the relative error {first:.1e}, the {CALLS}th, which is in the table, {last:.1e}."
    if row.draws > 1:
        yield f"A random estimate, judged by {row.draws} draws, whose mean has the relative error {mean_error:.1e}."
    value, _ = measured.result
    if abs(value - plain_value) > 1e-3 * max(abs(plain_value), 1e-30):
        yield f"Its outer loss is {value:.6g}, that of the plain run {plain_value:.6g}."
    for warning in measured.warnings:
        if not isinstance(warning, ZeroHypergradientWarning):
            yield f"It warns: {first_words(str(warning))}"
