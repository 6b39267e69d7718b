"""Filtered ranks of the true answers, and their usual summaries."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo.models.link_prediction._model import Model
from jaxhpo.models.link_prediction._triples import SIDES, Known, concrete_triples

MAX_SCORES = 2**24  # scores computed at a time: 64 MB in float32


class Metrics(NamedTuple):
    """Means over the ranks of subjects and objects.

    Attributes:
      mrr: mean reciprocal rank.
      hits1: share of ranks ≤ 1.
      hits3: share of ranks ≤ 3.
      hits10: share of ranks ≤ 10.

    Example:
      >>> from jaxhpo.models.link_prediction import Ranks
      >>> metrics = Ranks(optimistic=np.array([[1, 2]]), pessimistic=np.array([[1, 4]])).metrics()
      >>> print(f"MRR {metrics.mrr:.3f}, Hits@1 {metrics.hits1:.0%}, Hits@3 {metrics.hits3:.0%}")
      MRR 0.667, Hits@1 50%, Hits@3 100%
    """

    mrr: float
    hits1: float
    hits3: float
    hits10: float


class Ranks(NamedTuple):
    """Ranks of the true answers, from 1; column 0 for subjects, column 1 for objects.

    Attributes:
      optimistic: integers (n, 2), with answers of equal score ranked after the true one.
      pessimistic: integers (n, 2), with answers of equal score ranked before the true one.

    Example:
      >>> from jaxhpo.models.link_prediction import Ranks
      >>> ranks = Ranks(optimistic=np.array([[1, 2]]), pessimistic=np.array([[1, 4]]))
      >>> ranks.mean.tolist(), ranks.metrics("pessimistic").mrr  # (1 / 1 + 1 / 4) / 2
      ([[1.0, 3.0]], 0.625)
    """

    optimistic: np.ndarray
    pessimistic: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean rank over all orders of answers with equal score."""
        return (self.optimistic + self.pessimistic) / 2

    def metrics(self, ties: str = "mean") -> Metrics:
        """Mean reciprocal rank and hits, with ties "mean", "optimistic" or "pessimistic"."""
        if ties not in ("mean", *self._fields):
            raise JaxhpoError(f"`ties` got {ties!r}: write 'mean', 'optimistic' or 'pessimistic'.")
        ranks = getattr(self, ties)
        return Metrics(float(np.mean(1 / ranks)), *(float(np.mean(ranks <= k)) for k in (1, 3, 10)))


def ranks(model: Model, params: dict, triples: np.ndarray, known: np.ndarray) -> Ranks:
    r"""Rank each triple's subject and object among all entities, without the other answers known to be true.

    With f the score, t the true answer and C the entities that are left, t among them,

    .. math:: \text{optimistic} = 1 + \#\{c \in C: f_c > f_t\}, \qquad
              \text{pessimistic} = \#\{c \in C: f_c \ge f_t\}

    **Cost and bias**: n × entities scores per side, in chunks of 64 MB in float32. An answer whose score is NaN counts
    as better, and a true answer whose score is NaN ranks last, so a diverged model does not look good.

    Args:
      model: such as `DistMult(rank=200)`.
      params: from `model.init`, concrete.
      triples: integers (n, 3), such as the test part.
      known: integers (m, 3), true triples, by custom those of all three parts. With m = 0, ranks are raw.

    Returns:
      A `Ranks`.

    Raises:
      JaxhpoError: arrays that are not triples, an index out of range, params of another model, traced params.

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
    chunk = max(1, min(len(triples), MAX_SCORES // sizes[0]))
    padded = np.concatenate([triples, np.repeat(triples[-1:], -len(triples) % chunk, axis=0)])  # chunks of one shape
    columns = []
    for side in "so":
        others = Known(known, sizes, side)
        parts = padded.reshape(-1, chunk, 3)
        above = [np.asarray(_count_above(model, params, part, others.mask(part), side)) for part in parts]
        columns.append(1 + np.concatenate(above)[: len(triples)])
    return Ranks(*np.stack(columns, axis=2).swapaxes(0, 1))


@functools.partial(jax.jit, static_argnames=("model", "side"))
def _count_above(model, params, triples, mask, side):
    """The candidates that score higher than the answer, and at least as high: (n, 2)."""
    scores = model.scores(params, triples, side)
    answers = triples[:, SIDES.index(side), None]
    truth = jnp.take_along_axis(scores, answers, axis=1)
    others = ~mask & (jnp.arange(scores.shape[1])[None] != answers)
    # > and ≥ are written as negations: comparisons with NaN are false, so a NaN on either side counts as above.
    above = ~(scores <= truth), ~(scores < truth)
    return jnp.stack([jnp.sum(others & higher, axis=1) for higher in above], axis=1)
