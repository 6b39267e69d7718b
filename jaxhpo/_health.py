"""What `tune` and `check_hypergradient` refuse: hypergradients that are exactly zero, or not finite."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._errors import NonFiniteError, ZeroHypergradientError, ZeroHypergradientWarning
from jaxhpo._tree import all_finite, names
from jaxhpo._types import PyTree


def forget_if_jitted(fn: Callable | None) -> None:
    """Has a jitted function traced again: JAX would reuse its derivative, and no rule would be asked to warn."""
    if hasattr(fn, "lower"):
        jax.clear_caches()


def raise_if_zero(
    hypergrad: PyTree, messages: list, leaf_names: list[str], structure: Callable[[], list[bool]] | None = None
) -> None:
    """Raises for a leaf that is zero throughout and cannot be otherwise, or in part where a rule cuts it off.

    A leaf that merely happens to be zero at this point (a penalty on weights that are all zero) is warned about.

    Args:
      hypergrad: the hypergradient, concrete.
      messages: the warnings met while tracing it.
      leaf_names: the leaves' names.
      structure: for each leaf, whether its derivative can be non-zero at all; asked only when needed.

    Raises:
      ZeroHypergradientError: names the leaf and, where a rule said so, the reason.
    """
    reasons = {w.leaf: w for w in messages if isinstance(w, ZeroHypergradientWarning)}

    seen = functools.cache(structure) if structure else None
    for i, (name, leaf) in enumerate(zip(leaf_names, jax.tree.leaves(hypergrad), strict=True)):
        reason, zero = reasons.get(name), leaf.size > 0 and not jnp.any(leaf != 0)
        if reason and zero:
            raise ZeroHypergradientError(f"The hypergradient of `{name}` is exactly zero in every entry: {reason}")
        if reason and reason.partial and bool(jnp.any(leaf == 0)):
            raise ZeroHypergradientError(f"The hypergradient of `{name}` is exactly zero in some entries: {reason}")
        if zero and seen and not seen()[i]:
            told = " ".join(f"({w})" for w in messages if isinstance(w, ZeroHypergradientWarning))
            raise ZeroHypergradientError(
                f"The hypergradient of `{name}` is exactly zero in every entry: nothing that the outer loss sees "
                f"depends on it. Remove it, or use it in the train loss or the optimiser. {told}".rstrip()
            )
        if zero:
            text = "has a hypergradient of exactly zero at this point: start elsewhere if it does not move (a count of "
            text += "errors is flat: take a smooth loss, or `EvolutionStrategies`)."
            warnings.warn(ZeroHypergradientWarning(f"`{name}` {text}", name), stacklevel=3)


def raise_unless_finite(value: jax.Array, hypergrad: PyTree, diagnosis: Callable[[], str]) -> None:
    """Raises with the leaf's path and the diagnosis where the outer loss or the hypergradient is not finite."""
    if bool(jnp.isfinite(value)) and bool(all_finite(hypergrad)):
        return
    raise NonFiniteError(f"{what_is_not_finite(value, hypergrad)} {diagnosis()}")


def what_is_not_finite(value: jax.Array, hypergrad: PyTree) -> str:
    """Names the outer loss, or the leaves of the hypergradient, that are not finite."""
    if not bool(jnp.isfinite(value)):
        return f"The outer loss is {float(value)}."
    bad = [
        name
        for name, leaf in zip(names(hypergrad, "hparams"), jax.tree.leaves(hypergrad), strict=True)
        if not bool(jnp.all(jnp.isfinite(leaf)))
    ]
    return f"The outer loss is finite, but the hypergradient of `{'`, `'.join(bad)}` is not."
