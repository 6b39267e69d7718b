"""The verdict on a hypergradient that seems to differ from its reference, and why."""

import numpy as np

from jaxhpo._core.trace import equations
from jaxhpo._core.tree import is_inexact
from jaxhpo._diagnostics.check.causes import Inquiry
from jaxhpo._diagnostics.check.evidence import Evidence
from jaxhpo._diagnostics.check.result import AGREES, percent
from jaxhpo._diagnostics.differences import UNRELIABLE

SMALL = 0.1  # a standard error at which the mean of some draws is a reliable estimate
FEW_LEAVES = 8  # that are examined one by one where the whole differs


def examine(evidence: Evidence, number: int) -> tuple[str, ...]:
    """The verdict, and its causes.

    Args:
      evidence: with a hypergradient that seems to differ.
      number: random directions to take in each leaf.
    """
    error, noise = evidence.judged().agreement.relative_error, evidence.noise()
    if error <= 2 * noise:
        one = evidence.relative(np.sqrt(np.mean((evidence.given - evidence.wanted) ** 2, axis=0)))
        text = f"One draw is off by {percent(one)}, by chance: averages of more draws are nearer."
        if noise <= SMALL:
            return "agrees", text, *evidence.notes
        return "cannot tell", f"{text} Raise `repeats`, or the rule's own number of samples."
    if evidence.tangents is None:
        if error <= 2 * evidence.numeric_error:
            return "cannot tell", f"The differences are not reliable here: {UNRELIABLE}.", *evidence.notes
    else:
        if excused := _excused(evidence, error):
            return excused
        if 1 < len(evidence.layout.parts) <= FEW_LEAVES and evidence.judged_by_slopes():
            evidence.refer_by_leaf(evidence.tangents, number)
    return "differs", *Inquiry(evidence).causes(), *evidence.notes


def _excused(evidence, error) -> tuple[str, ...]:
    """A verdict by other runs and by rounding errors; nothing where these do not explain the error."""
    loss, plain = evidence.loss, evidence.plain_loss
    if abs(loss - plain) > 1e-3 * max(abs(loss), abs(plain)):
        return (
            "differs",
            f"The outer loss is {loss:.6g} with the rule, and {plain:.6g} by the plain steps: randomness differs "
            "between calls (it is drawn outside of `key`), or the rule runs other steps.",
        )
    low = _has_16_bits(evidence.tangents.program)
    moved, by_leaf = evidence.rounding(evidence.tangents), evidence.judged().by_leaf
    apart = {name: max(off, 1.0) for name, off in by_leaf.items() if off > AGREES}
    if error <= AGREES and all(moved.by_leaf.get(name, 0.0) >= off / 3 for name, off in apart.items()):
        zero = f"Up to rounding errors, the hypergradient of `{'`, `'.join(apart)}` is zero."
        return "agrees", *[zero] * bool(apart), *evidence.notes
    if (rounding := moved.agreement.relative_error) >= error / (10 if low else 3):
        higher = "numbers of 16 bits were met" if low else "`jax.config.update('jax_enable_x64', True)`"
        return (
            "cannot tell",
            f"Rounding errors move the hypergradient, or its reference, by {percent(rounding)}: compute in a "
            f"higher precision ({higher}), or train for fewer steps, at a lower rate.",
        )
    return ()


def _has_16_bits(program) -> bool:
    return any(
        is_inexact(v.aval) and v.aval.dtype.itemsize == 2 for equation in equations(program) for v in equation.outvars
    )
