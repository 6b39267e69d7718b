"""The verdict of a comparison in plain words: why a method fails on this problem, and which one to use."""

import math
from collections.abc import Sequence

from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.pushforward import ForwardGradient, Smoothing
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._diagnostics.compare.result import MethodRow, ProblemSize, Reference
from jaxhpo._linear.identity import Identity
from jaxhpo._linear.neumann import Neumann

CONVERGED = 1e-3  # condition at the end / at the start; above this ratio the inner run has visibly not converged


def failures(row: MethodRow, problem: ProblemSize) -> tuple[str, ...]:
    """The reasons why a method is not reliable here, one clause each; none for an accurate method."""
    solver = row.rule.linear_solver if isinstance(row.rule, Implicit) else None
    if row.error is not None:
        return ("it raised an error",)
    if not row.finite:
        if isinstance(solver, Neumann):
            return ("its series diverges to NaN: `step_size` is above 2 / the largest curvature",)
        return ("its hypergradient is not finite",)
    unseen = [leaf for leaf in row.blind if leaf not in row.partly_blind]
    words = {"it cannot see": unseen, "it sees only some entries of": row.partly_blind}
    found = [f"{begin} {_and([f'`{leaf}`' for leaf in leaves])}" for begin, leaves in words.items() if leaves]
    seen = [error for leaf, error in (row.leaf_errors or {}).items() if leaf not in row.blind]
    if row.accurate or (row.blind and seen and max(seen) <= 1e-2):
        return tuple(found)
    if solver is not None:
        found += _implicit(row, solver, problem)
    elif isinstance(row.rule, (ForwardGradient, Smoothing)):
        found.append("one draw of so few directions is noise")
    elif isinstance(row.rule, Unroll) and row.rule.truncate is not None:
        found.append(f"the last {row.rule.truncate} inner steps carry only part of the hypergradient")
    elif row.first_error is not None and row.first_error <= 1e-2:
        found.append("right at its first call, it continues from its last run, which is not that of the outer loss")
    else:
        found.append("its approximation is too rough")
    return tuple(found)


def _implicit(row, solver, problem) -> list[str]:
    """The faults of the point reached, then of the linear solve there."""
    found = []
    if row.linear_status == "indefinite":
        found.append("the Hessian at the point reached is not positive definite")
    elif row.linear_status in ("max iterations", "stalled") and (row.linear_residual or 0) > 1e-2:
        found.append(f"its linear solve stopped at a relative residual of {row.linear_residual:.1e}")
    elif isinstance(solver, Neumann) and (row.norm_ratio or 0) > 10:
        found.append("its series grows instead of converging")
    elif isinstance(solver, (Neumann, Identity)):
        found.append("it approximates the inverse Hessian too roughly")
    elif row.linear_status is None and problem.end <= CONVERGED * problem.start:
        found.append("its linear solve, whose report is not seen here, may be too rough")
    if found and problem.end <= CONVERGED * problem.start:
        return found
    # If the linear solve is good, nothing else can be wrong.
    unconverged = f"the norm of its condition went from {problem.start:.2g} to {problem.end:.2g}"
    return [f"the inner run has not converged: {unconverged}, and implicit rules are right where it is zero", *found]


def recommend(rows: Sequence[MethodRow], reference: Reference, problem: ProblemSize) -> tuple[str | None, str]:
    """The name of the method to use, or None, and the reason in plain words.

    Among accurate methods the fastest (among equally fast ones the more accurate, then the smaller); else the nearest
    one with the right direction; else none.
    """
    accurate = [row for row in rows if row.accurate]
    near = [row for row in rows if row.usable and (row.cosine or 0.0) >= 0.9]
    exact = "" if reference.is_directional else f" The reference, `{reference.name}`, is exact: use that."
    if accurate:
        least = min(map(_time, accurate))
        # Times within a tenth of each other are equal, as far as a clock can tell.
        fast = [row for row in accurate if _time(row) <= 1.1 * least]
        row = min(fast, key=lambda row: (max(row.relative_error or 0.0, 1e-6), row.copies or 0.0))
        text = _praise(row, accurate)
    elif near:
        row = min(near, key=lambda row: row.relative_error or 0.0)
        text = (
            f"No method in the list is accurate here. Use `{row.name}`, the nearest: its hypergradient points in the "
            f"right direction (cosine {row.cosine:.3f}) but is off by {row.relative_error:.1%} of the length. That is "
            f"enough to descend, not to find the optimum.{exact}"
        )
    else:
        row, text = None, f"Trust none of these methods here.{exact}"
    text += _doubts(rows, problem)
    if not reference.trusted:
        text += " Read all of this with care: the derivatives along directions do not confirm the reference."
    return row.name if row else None, text


def _praise(row, accurate) -> str:
    """The recommended method's merits; where memory is short, also one with a tenth of it in nearly the same time."""
    text = f"Use `{row.name}`: its hypergradient is "
    if row.relative_error == 0:  # the reference itself
        text += "exact for the steps taken"
    else:
        text += f"right here (relative error {row.relative_error:.1e}, cosine {row.cosine:.4f})"
    if len(accurate) == 1:
        text += ", and no other method in the list is accurate."
    else:
        text += f", and none of the {len(accurate)} accurate ones beats its {row.gradients:.3g} gradients by a tenth."
    small = [other for other in accurate if other.copies is not None and other.copies <= (row.copies or 0.0) / 10]
    thrifty = min(small, key=_time, default=row)
    if thrifty is not row and _time(thrifty) <= 1.5 * _time(row):
        text += (
            f" It needs {row.copies:.3g} copies of the parameters: where memory is short, `{thrifty.name}` needs "
            f"{thrifty.copies:.3g} and takes {_time(thrifty) / _time(row):.2g} times as long."
        )
    return text


def _doubts(rows, problem) -> str:
    """The methods that are not reliable, grouped by their first reason; the notes hold the others."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        for reason in failures(row, problem)[:1]:
            groups.setdefault(reason, []).append(f"`{row.name}`")
    clauses = [f"{_and(names)} ({reason})" for reason, names in groups.items()]
    text = f" Not to be trusted here: {'; '.join(clauses)}." if clauses else ""
    if any(row.linear_status == "indefinite" and not row.accurate for row in rows):
        text += " The Hessian at the point reached is not positive definite."
    return text


def _time(row) -> float:
    return math.inf if row.gradients is None else row.gradients


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
