"""Checks of `tune` and `check_hypergradient`: hypergradients that are exactly zero, or not finite."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import NonFiniteError, ZeroHypergradientError, ZeroHypergradientWarning
from jaxhpo._core.tree import all_finite, is_inexact, names
from jaxhpo._core.types import PyTree


def raise_if_zero(
    hypergrad: PyTree,
    messages: list,
    leaf_names: list[str],
    structure: Callable[[], list[bool]] | None = None,
    members: np.ndarray | None = None,
) -> None:
    """Raises for a leaf that is zero throughout and cannot be otherwise, or in part where a rule cuts it off.

    A leaf that merely happens to be zero at this point (a penalty on weights that are all zero) is warned about.

    Args:
      hypergrad: the hypergradient, concrete.
      messages: the warnings issued while tracing it.
      leaf_names: the leaves' names.
      structure: for each leaf, whether its derivative can be non-zero at all; called only when needed.
      members: indices of the members of a population to look at, the leading axis of every leaf; None without one.

    Raises:
      ZeroHypergradientError: names the leaf and, where a rule said so, the reason.
    """
    reasons = {w.leaf: w for w in messages if isinstance(w, ZeroHypergradientWarning)}
    seen = functools.cache(structure) if structure else None
    for i, (name, leaf) in enumerate(zip(leaf_names, jax.tree.leaves(hypergrad), strict=True)):
        if not leaf.size:
            continue
        rows = leaf.reshape(1, -1) if members is None else leaf.reshape(len(leaf), -1)[members]
        is_zero = rows == 0
        zero, cut = np.asarray(is_zero.all(1)), np.asarray(is_zero.any(1))
        reason = reasons.get(name)
        which = cut if reason and reason.partial and not zero.any() else zero
        who = f"`{name}`" if members is None else f"`{name}` ({named_members(members[which])})"
        if reason and zero.any():
            raise ZeroHypergradientError(f"The hypergradient of {who} is exactly zero in every entry: {reason}")
        if reason and which.any():
            raise ZeroHypergradientError(f"The hypergradient of {who} is exactly zero in some entries: {reason}")
        if zero.any() and seen and not seen()[i]:
            reported = " ".join(f"({w})" for w in messages if isinstance(w, ZeroHypergradientWarning))
            raise ZeroHypergradientError(
                f"The hypergradient of {who} is exactly zero in every entry: nothing that the outer loss sees "
                f"depends on it. Remove it, or use it in the train loss or the optimiser. {reported}".rstrip()
            )
        if zero.any():
            text = "has a hypergradient of exactly zero at this point: start elsewhere if it does not move (a count of "
            text += "errors is flat: take a smooth loss, or `EvolutionStrategies`)."
            warnings.warn(ZeroHypergradientWarning(f"{who} {text}", name), stacklevel=3)


def named_members(indices: np.ndarray) -> str:
    """Names members of a population: `member 3`, `members 0, 2, 5`; at most ten of them."""
    shown = ", ".join(str(int(i)) for i in indices[:10])
    return f"member{'s' * (len(indices) > 1)} {shown}{', …' * (len(indices) > 10)}"


def raise_unless_finite(value: jax.Array, hypergrad: PyTree, diagnosis: Callable[[], str]) -> None:
    """Raises with the leaf's path and the diagnosis where the outer loss or the hypergradient is not finite."""
    if bool(jnp.isfinite(value)) and bool(all_finite(hypergrad)):
        return
    raise NonFiniteError(f"{what_is_not_finite(value, hypergrad)} {diagnosis()}")


def what_is_not_finite(value: jax.Array, hypergrad: PyTree, point: PyTree = None, carry: PyTree = None) -> str:
    """Names the outer loss, or the leaves of the hypergradient, the updated point or the carry, that are not finite."""
    if not bool(jnp.isfinite(value)):
        return f"The outer loss is {float(value)}."
    for tree, root, text in (
        (hypergrad, "hparams", "the hypergradient of "),
        (carry, "carry", ""),
        (point, "hparams", "the optimiser's update of "),
    ):
        if found := _not_finite(tree, root):
            return f"The outer loss is finite, but {text}`{'`, `'.join(found)}` is not."
    return "The outer loss is finite, but an inner solve that `info` reports is not."


def _not_finite(tree, root) -> list[str]:
    leaves = zip(names(tree, root), jax.tree.leaves(tree), strict=True)
    return [name for name, leaf in leaves if is_inexact(leaf) and not bool(jnp.all(jnp.isfinite(leaf)))]
