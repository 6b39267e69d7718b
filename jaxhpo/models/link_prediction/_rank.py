"""How good a model is: where the true answers rank among those that are not known to be true."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo.models.link_prediction._model import Model
from jaxhpo.models.link_prediction._triples import SIDES, Known, concrete_triples

MOST = 2**24  # scores at a time


class Metrics(NamedTuple):
    """Means over the ranks of subjects and objects.

    Attributes:
      mrr: of 1/rank, the mean reciprocal rank.
      hits1: the share of ranks ≤ 1.
      hits3: the share of ranks ≤ 3.
      hits10: the share of ranks ≤ 10.
    """

    mrr: float
    hits1: float
    hits3: float
    hits10: float


class Ranks(NamedTuple):
    """Ranks of the true answers, from 1; column 0 for subjects, column 1 for objects.

    Attributes:
      optimistic: integers (n, 2), where answers of the same score come after the true one.
      pessimistic: likewise, where they come before it.
    """

    optimistic: np.ndarray
    pessimistic: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean rank over all orders of answers with the same score."""
        return (self.optimistic + self.pessimistic) / 2

    def metrics(self, ties: str = "mean") -> Metrics:
        """Mean reciprocal rank and hits, with ties "mean", "optimistic" or "pessimistic"."""
        if ties not in ("mean", *self._fields):
            raise JaxhpoError(f"`ties` got {ties!r}: write 'mean', 'optimistic' or 'pessimistic'.")
        ranks = getattr(self, ties)
        return Metrics(float(np.mean(1 / ranks)), *(float(np.mean(ranks <= k)) for k in (1, 3, 10)))


def ranks(model: Model, params: dict, triples: np.ndarray, known: np.ndarray) -> Ranks:
    """Filtered ranks: of each triple's subject and object among all entities, less other answers known to be true.

    **Cost and bias**: n × entities scores a side, in chunks of 64 MB in float32. An answer whose score is NaN counts as
    a better one, and a true answer with a NaN ranks last, so that a model that has diverged does not look good.

    Args:
      model: such as `DistMult(rank=200)`.
      params: of `model.init`, concrete.
      triples: integers (n, 3), such as the test part.
      known: integers (m, 3), true triples, by custom those of all three parts; without any, m = 0, ranks are raw.

    Returns:
      A `Ranks`.

    Raises:
      JaxhpoError: what is not triples, or out of range; params of another model, or traced.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> model = link_prediction.DistMult(rank=1)
      >>> params = {"entities": jnp.array([[1.0], [2.0], [2.0]]), "relations": jnp.array([[1.0]])}
      >>> triples = np.array([[0, 0, 1]])  # as its object, 1 ties with 2; as its subject, 0 comes last
      >>> link_prediction.ranks(model, params, triples, triples).mean.tolist()
      [[3.0, 1.5]]
    """
    sizes = model.sizes(params)
    if any(isinstance(table, Tracer) for table in params.values()):
        raise JaxhpoError("`params` is traced, but ranks are counted in NumPy: call `ranks` outside `jit` and `grad`.")
    triples = concrete_triples(triples, sizes, "triples")
    known = concrete_triples(known, sizes, "known", least=0)
    chunk = max(1, min(len(triples), MOST // sizes[0]))
    padded = np.concatenate([triples, np.repeat(triples[-1:], -len(triples) % chunk, axis=0)])
    columns = []
    for side in "so":
        index = Known(known, sizes, side)
        parts = padded.reshape(-1, chunk, 3)
        found = [np.asarray(_count(model, params, part, index.mask(part), side)) for part in parts]
        columns.append(1 + np.concatenate(found)[: len(triples)])
    better, worst = np.moveaxis(np.stack(columns, axis=1), 2, 0)
    return Ranks(better, worst)


@functools.partial(jax.jit, static_argnames=("model", "side"))
def _count(model, params, triples, mask, side):
    """Entities that score higher than the answer, and at least as high: (n, 2)."""
    scores = model.scores(params, triples, side)
    answers = triples[:, SIDES.index(side), None]
    truth = jnp.take_along_axis(scores, answers, axis=1)
    others = ~mask & (jnp.arange(scores.shape[1])[None] != answers)
    above = ~(scores <= truth), ~(scores < truth)  # true where either is NaN
    return jnp.stack([jnp.sum(others & higher, axis=1) for higher in above], axis=1)
