"""Random parts of minibatches, on which the Hessian products of a mean loss are estimated without bias."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.mesh import rows
from jaxhpo._core.record import report_fault
from jaxhpo._core.tree import add_scaled, normal
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import count_examples
from jaxhpo._inner.problem import Problem

_PURPOSE = "`Unroll(hvp_fraction=...)` takes part of each minibatch"


def subsample(batch: PyTree, key: jax.Array, fraction: float) -> PyTree:
    """A random part of the examples, without replacement."""
    total = count_examples(batch, _PURPOSE)
    chosen = jax.random.permutation(key, total)[: max(1, round(fraction * total))]
    return _rows(batch, chosen)


def is_mean(loss: Callable[[PyTree], jax.Array], batch: PyTree, precision: float) -> jax.Array:
    """True where a loss is a mean over the examples, plus terms that depend on no example.

    Tested on two halves: with n₁ + n₂ = n examples, L(all) = (n₁ L(first) + n₂ L(second)) / n. A sum, a contrastive
    loss and batch statistics fail; the tolerance is the rounding error at the precision of the model.
    """
    total = count_examples(batch, _PURPOSE)
    if total < 2:
        return jnp.asarray(True)
    half = total // 2
    parts = jnp.stack([loss(_rows(batch, np.arange(half))), loss(_rows(batch, np.arange(half, total)))])
    weighted = parts * jnp.asarray([half, total - half], parts.dtype) / total
    whole = loss(batch)
    error, size = jnp.abs(whole - jnp.sum(weighted)), jnp.sum(jnp.abs(weighted))
    close = error <= min(0.05, 100 * max(precision, float(jnp.finfo(parts.dtype).eps))) * size
    # A loss that is not finite has another fault, which is reported elsewhere.
    return close | ~jnp.isfinite(whole) | ~jnp.isfinite(size)


def _rows(batch, index):
    return jax.tree.map(lambda x: rows(x, index) if jnp.ndim(x) else x, batch)


def nan_unless_mean(problem: Problem) -> Problem:
    """The problem, started at NaN if its train loss is not a mean over the examples, so that no part represents it."""
    train_loss: Any = problem.solver.loss

    def holds(state, hparams, batch):
        precision = max(float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(state.params))

        def holds_at(params):
            loss = lambda batch: train_loss(params, hparams, batch, state.model_state)[0]  # noqa: E731
            return is_mean(loss, batch, precision)

        # At special points, such as weights that are all zero, the loss may not depend on the batch.
        return holds_at(state.params) & holds_at(_perturbed(state.params))

    pure, consts = problem.closure_convert(holds)
    first = jax.tree.map(lambda x: x[0], problem.xs)
    good = pure(consts, *jax.lax.stop_gradient((problem.state, problem.inputs[0])), first)
    report_fault(~good, _NOT_A_MEAN)
    params = jax.tree.map(lambda p: jnp.where(good, p, jnp.nan), problem.state.params)
    return problem._replace(state=problem.state._replace(params=params))


def _perturbed(params):
    """Params plus N(0, 0.1²) noise, to leave special points such as zero."""
    return add_scaled(params, 0.1, normal(jax.random.key(0), params))


_NOT_A_MEAN = (
    "`Unroll(hvp_fraction=...)`: the train loss on the first minibatch is not the mean of the losses on its halves. "
    "So it is not a mean over the examples (but a sum, or contrastive, or it normalises over the batch, or draws "
    "random numbers for the batch as a whole), and a part of them has another Hessian. Write a mean, with a key for "
    "each example if there is dropout, or omit `hvp_fraction`."
)
