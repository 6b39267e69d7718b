"""From a comparison's numbers to plain words: why a method fails on this problem, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence

from jaxhpo._adjoint.forward_gradient import ForwardGradient
from jaxhpo._adjoint.implicit import Implicit
from jaxhpo._adjoint.smoothing import Smoothing
from jaxhpo._adjoint.unroll import Unroll
from jaxhpo._diagnostics.compare.result import MethodRow, Problem, Reference
from jaxhpo._linear.identity import Identity
from jaxhpo._linear.neumann import Neumann

CONVERGED = 1e-3  # of the condition's norm at the start: above it, the inner run has visibly not converged


def failures(row: MethodRow, problem: Problem) -> tuple[str, ...]:
    """Why a method is not to be trusted here, one clause a reason; nothing for an accurate method."""
    if row.error is not None:
        return ("it raised an error",)
    if not row.finite:
        return (_not_finite(row.rule),)
    found = []
    if row.blind:
        found.append(f"it cannot see {_list(f'`{leaf}`' for leaf in row.blind)}")
    if not row.accurate and not _right_where_it_sees(row):
        found += _approximation(row, problem)
    return tuple(found)


def _right_where_it_sees(row) -> bool:
    seen = [error for leaf, error in (row.leaf_errors or {}).items() if leaf not in row.blind]
    return bool(row.blind and seen) and max(seen) <= 1e-2


def _not_finite(rule) -> str:
    if isinstance(rule, Implicit) and isinstance(rule.linear_solver, Neumann):
        return "its series diverges to NaN: `step_size` is above 2 / the largest curvature"
    return "its hypergradient is not finite"


def _approximation(row, problem) -> list[str]:
    if isinstance(row.rule, (ForwardGradient, Smoothing)):
        return ["one draw of so few directions is noise"]
    if isinstance(row.rule, Implicit):
        return _implicit(row, problem)
    if isinstance(row.rule, Unroll) and row.rule.truncate is not None:
        return [f"the last {row.rule.truncate} inner steps carry only part of the hypergradient"]
    return ["its approximation is too rough"]


def _implicit(row, problem) -> list[str]:
    """The point reached first, then what the linear solve made of it."""
    found = []
    solver, status = row.rule.linear_solver, row.linear_status
    if status == "indefinite":
        found.append("the Hessian at the point reached is not positive definite")
    elif status in ("max iterations", "stalled") and (row.linear_residual or 0) > 1e-2:
        found.append(f"its linear solve stopped at a relative residual of {row.linear_residual:.1e}")
    elif isinstance(solver, Neumann) and (row.norm_ratio or 0) > 10:
        found.append("its series grows instead of converging")
    elif isinstance(solver, (Neumann, Identity)):
        found.append("it stands in too roughly for the inverse Hessian")
    if problem.end > CONVERGED * problem.start or not found:
        # With its linear solve done well, nothing else is left that could be wrong.
        found.insert(
            0,
            f"the inner run has not converged: the norm of its condition went from {problem.start:.2g} to "
            f"{problem.end:.2g}, and implicit rules are right where it is zero",
        )
    return found


def recommend(rows: Sequence[MethodRow], reference: Reference, problem: Problem) -> tuple[str | None, str]:
    """The name of the method to take, or None, and the reason in plain words.

    Among accurate methods the fastest (among equally fast ones the more accurate, then the smaller); else the nearest
    one that has the direction right; else none.
    """
    accurate = [row for row in rows if row.accurate]
    near = [row for row in rows if row.usable and (row.cosine or 0.0) >= 0.9]
    if accurate:
        least = min(map(_time, accurate))
        # Times within a tenth of each other are equal, as far as a clock can tell.
        fast = [row for row in accurate if _time(row) <= 1.1 * least]
        row = min(fast, key=lambda row: (max(row.relative_error or 0.0, 1e-6), row.copies or 0.0))
        text = _praise(row, accurate)
    elif near:
        row = min(near, key=lambda row: row.relative_error or 0.0)
        text = (
            f"No method in the list is accurate here. Use `{row.name}`, the nearest: its hypergradient points the "
            f"right way (cosine {row.cosine:.3f}) but is off by {row.relative_error:.1%} of the length. It will do to "
            f"go downhill, not to find the optimum.{_exact(reference)}"
        )
    else:
        row, text = None, f"Trust none of these methods here.{_exact(reference)}"
    sentences = [text, _doubts(rows, problem)]
    if not reference.trusted:
        sentences.append("Read all of this with care: the central differences do not confirm the reference.")
    return row.name if row else None, " ".join(sentence for sentence in sentences if sentence)


def _praise(row, accurate) -> str:
    right = (
        "its hypergradient is exact for the steps taken"
        if row.relative_error == 0  # it is the reference itself
        else f"its hypergradient is right here (relative error {row.relative_error:.1e}, cosine {row.cosine:.4f})"
    )
    if len(accurate) == 1:
        why = "and no other method in the list is accurate"
    else:
        count, gradients = len(accurate), f"{row.gradients:.3g} gradients"
        why = f"and none of the {count} accurate methods beats its {gradients} by more than a tenth"
    return f"Use `{row.name}`: {right}, {why}.{_thrift(row, accurate)}"


def _thrift(row, accurate) -> str:
    """Where memory is dear, an accurate method that takes a tenth of it in nearly the same time."""
    if row.copies is None:
        return ""
    thrifty = [
        other
        for other in accurate
        if other.copies is not None and other.copies <= row.copies / 10 and _time(other) <= 1.5 * _time(row)
    ]
    if not thrifty:
        return ""
    other = min(thrifty, key=_time)
    return (
        f" It needs {row.copies:.3g} copies of the parameters: where memory is short, `{other.name}` needs "
        f"{other.copies:.3g} and takes {_time(other) / _time(row):.2g} times as long."
    )


def _exact(reference) -> str:
    if reference.name == "differences":
        return ""
    return f" The reference, `{reference.name}`, is exact: use that."


def _doubts(rows, problem) -> str:
    """The methods that are not to be trusted, those of one chief reason together; the notes hold the others."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        for reason in failures(row, problem)[:1]:
            groups.setdefault(reason, []).append(f"`{row.name}`")
    clauses = [f"{_list(names)} ({reason})" for reason, names in groups.items()]
    text = f"Not to be trusted here: {'; '.join(clauses)}." if clauses else ""
    if any(row.linear_status == "indefinite" and not row.accurate for row in rows):
        text += " The Hessian at the point reached is not positive definite."
    return text


def _time(row) -> float:
    return row.gradients if row.gradients is not None else float("inf")


def _list(words) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
