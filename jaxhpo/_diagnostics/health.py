"""Refusal of hypergradients that are exactly zero or not finite, for `tune`, `check_hypergradient` and `compare`."""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import NonFiniteError, ZeroHypergradientError, ZeroHypergradientWarning, warn
from jaxhpo._core.trace import differentiable_inputs, flat_by
from jaxhpo._core.tree import all_finite, named_leaves
from jaxhpo._core.types import PyTree


def warn_again(caught: Iterable[Any]) -> None:
    """Issues warnings that were caught, at the lines where they arose."""
    for w in caught:
        warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def raise_if_zero(
    hypergrad: PyTree,
    caught: list,
    program: tuple[Callable, PyTree] | None,
    members: np.ndarray | None = None,
    *,
    may_begin: bool = False,
) -> None:
    """Raises for a leaf that is structurally zero, in whole, or in part where a rule cuts it off.

    A leaf that merely happens to be zero at this point (a penalty on weights that are all zero) is warned about.

    Args:
      hypergrad: the hypergradient, concrete, a tree like the hyperparameters.
      caught: what `warnings.catch_warnings(record=True)` caught while it was traced. Issued again, but for those by
        which rules announce a zero in one of the leaves.
      program: the outer loss and its argument, traced only when needed. None if its derivative is not JAX's.
      members: indices of the members of a population to look at, the leading axis of every leaf; None without one.
      may_begin: a leaf may be zero at first, as of a method whose linear system starts at zero: no warning.

    Raises:
      ZeroHypergradientError: names the leaf and, where a rule gave one, the reason.
    """
    reasons, leaves = reasons_for_zero(w.message for w in caught), named_leaves(hypergrad, "hparams")
    warn_again(w for w in caught if getattr(w.message, "leaf", None) not in dict(leaves))
    can_be_nonzero = functools.cache(lambda: differentiable_inputs(*program or ()))
    for i, (name, leaf) in enumerate(leaves):
        reason = reasons.get(name)
        found = [zero_entries(x, reason) for x in ([leaf] if members is None else leaf[members])]
        entries = max(found, key=("", "some entries", "every entry").index)
        if not entries:
            continue
        who = f"`{name}`"
        if members is not None:
            who += f" ({named_members(members[[e == entries for e in found]])})"
        begin = f"The hypergradient of {who} is exactly zero in {entries}"
        if reason:
            raise ZeroHypergradientError(f"{begin}: {reason}")
        if program and not can_be_nonzero()[i]:
            if flat := flat_by(*program)[i]:
                raise ZeroHypergradientError(
                    f"{begin}: the outer loss is piecewise constant in it, through `{'`, `'.join(flat)}` (comparison, "
                    "argmax or rounding), whose derivative is zero. Take a smooth loss, as the cross-entropy in "
                    "place of the accuracy, or `EvolutionStrategies`, which needs no derivative."
                )
            others = "".join(f" ({w})" for w in reasons.values())
            raise ZeroHypergradientError(
                f"{begin}: nothing that the outer loss sees depends on it, or a rule of your own drops its derivative. "
                f"Remove it, or use it in the train loss or the optimiser.{others}"
            )
        if may_begin:
            continue
        text = (
            f"{who} has a hypergradient of exactly zero at this point: start elsewhere if it does not move (a count "
            "of errors is flat: take a smooth loss, or `EvolutionStrategies`)."
        )
        warn(ZeroHypergradientWarning(text, name))


def reasons_for_zero(messages: Iterable[Any]) -> dict[str, ZeroHypergradientWarning]:
    """The warnings by which rules announce a zero, by the name of the leaf."""
    return {w.leaf: w for w in messages if isinstance(w, ZeroHypergradientWarning)}


def zero_entries(leaf: Any, reason: ZeroHypergradientWarning | None) -> str:
    """`"every entry"` if all are zero; `"some entries"` if a rule announces that it cuts some off; else `""`."""
    zero = leaf == 0
    if zero.size and zero.all():
        return "every entry"
    return "some entries" if zero.any() and reason is not None and reason.partial else ""


def named_members(indices: np.ndarray) -> str:
    """Names members of a population: `member 3`, `members 0, 2, 5`; at most ten of them."""
    shown = ", ".join(str(int(i)) for i in indices[:10])
    return f"member{'s' * (len(indices) > 1)} {shown}{', ...' * (len(indices) > 10)}"


def raise_unless_finite(value: jax.Array, hypergrad: PyTree, diagnosis: Callable[[], str]) -> None:
    """Raises with the leaf's path and the diagnosis where the outer loss or the hypergradient is not finite."""
    if not all_finite((value, hypergrad)):
        raise NonFiniteError(f"{what_is_not_finite(value, hypergrad)} {diagnosis()}")


def what_is_not_finite(value: jax.Array, hypergrad: PyTree, point: PyTree = None, carry: PyTree = None) -> str:
    """Names the outer loss, or the leaves of the hypergradient, the carry or the updated point, that are not finite."""
    if not jnp.isfinite(value):
        return f"The outer loss is {float(value)}."
    texts = "the hypergradient of ", "", "the optimiser's update of "
    for tree, root, text in zip((hypergrad, carry, point), ("hparams", "carry", "hparams"), texts, strict=True):
        bad = [name for name, leaf in named_leaves(tree, root) if not all_finite(leaf)]
        if bad:
            return f"The outer loss is finite, but {text}`{'`, `'.join(bad)}` is not."
    return "The outer loss is finite, but an inner solve that `info` reports is not."
