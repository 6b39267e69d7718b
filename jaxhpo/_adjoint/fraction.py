"""Random parts of minibatches, on which the Hessian products of a mean loss are estimated without bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.types import PyTree, Solver
from jaxhpo._core.validate import count_examples

_PURPOSE = "`Unroll(hvp_fraction=...)` takes part of each minibatch"


def check_fraction(rule: Any, solver: Solver) -> None:
    """Raises where a rule with an `hvp_fraction` has no train loss to take products of."""
    if solver.apply is None:
        raise JaxhpoError(
            f"{rule!r} estimates Hessian products of a train loss, and `{solver.name}` has none: write "
            "`from_optax(loss, tx)`, or leave `hvp_fraction` away."
        )


def subsample(batch: PyTree, key: jax.Array, fraction: float) -> PyTree:
    """A random part of the examples, without replacement."""
    total = count_examples(batch, _PURPOSE)
    chosen = jax.random.permutation(key, total)[: max(1, round(fraction * total))]
    return _rows(batch, chosen)


def is_mean(loss: Callable[[PyTree], jax.Array], batch: PyTree, precision: float) -> jax.Array:
    """Whether a loss is a mean over the examples, plus what depends on none: whether that of two parts is its own.

    A sum, a contrastive loss or batch statistics are found out; rounding at the precision of the model is allowed for.
    """
    total = count_examples(batch, _PURPOSE)
    if total < 2:
        return jnp.asarray(True)
    half = total // 2
    parts = jnp.stack([loss(_rows(batch, slice(None, half))), loss(_rows(batch, slice(half, None)))])
    weighted = parts * jnp.asarray([half, total - half], parts.dtype) / total
    whole = loss(batch)
    error, size = jnp.abs(whole - jnp.sum(weighted)), jnp.sum(jnp.abs(weighted))
    close = error <= min(0.05, 100 * max(precision, float(jnp.finfo(parts.dtype).eps))) * size
    # A loss that is not finite has another fault, which is told elsewhere.
    return close | ~jnp.isfinite(whole) | ~jnp.isfinite(size)


def _rows(batch, index):
    return jax.tree.map(lambda x: x[index] if jnp.ndim(x) else x, batch)
