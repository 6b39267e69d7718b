"""Cross-entropy against all answers, and penalties with a weight per embedding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_count, check_key, describe, is_array
from jaxhpo.models.link_prediction._model import OUT_OF_RANGE, Model, in_range
from jaxhpo.models.link_prediction._triples import SIDES, check_sides, check_sizes, check_triples, concrete_triples

MAX_ANSWERS = 2**28  # entries of `Grouped.answers`: 1 GB


class Grouped(NamedTuple):
    """A full batch of triples with equal questions merged, made by `group`. Its losses are those of the triples.

    Attributes:
      queries: for each side "s", "p", "o", int32 (q, 3), one triple of each question.
      answers: for each side, float32 (q, entities or relations), the number of times that this is the answer.
      counts: occurrences of entities as subjects, of relations, and of entities as objects, float32.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> batch = link_prediction.group(np.array([[0, 0, 1], [0, 0, 2]]), num_entities=3, num_relations=1)
      >>> len(batch.queries["o"]), batch.counts[0].tolist()  # (0, 0, ?) is asked once; 0 is the subject twice
      (1, [2.0, 0.0, 0.0])
    """

    queries: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]
    counts: tuple[np.ndarray, np.ndarray, np.ndarray]


def group(triples: np.ndarray, num_entities: int, num_relations: int) -> Grouped:
    """Merge the triples of a full batch that ask the same question, such as (s, p, ?), which is then scored once.

    **Cost and bias**: losses are exact. Three times as fast on Nations, where 1592 triples ask for objects in 471 ways
    and for subjects in 438. Holds questions × answers numbers.

    Args:
      triples: integers (n, 3), concrete.
      num_entities: number of entities.
      num_relations: number of relations.

    Returns:
      A `Grouped`, which `cross_entropy` and `penalty` take in place of the triples.

    Raises:
      JaxhpoError: an array that is not triples, an index out of range, a graph too large for full batches.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> batch = link_prediction.group(np.array([[0, 0, 1], [0, 0, 2]]), 3, 1)
      >>> batch.queries["o"].tolist(), batch.answers["o"].tolist()
      ([[0, 0, 1]], [[0.0, 1.0, 1.0]])
    """
    sizes = check_sizes(num_entities, num_relations)
    triples = concrete_triples(triples, sizes, "triples")
    queries, answers = {}, {}
    for column, side in enumerate(SIDES):
        _, first, which = np.unique(np.delete(triples, column, axis=1), axis=0, return_index=True, return_inverse=True)
        num_answers = sizes[side == "p"]
        if len(first) * num_answers > MAX_ANSWERS:
            raise JaxhpoError(
                f"`triples` ask {len(first)} questions of {num_answers} answers each, too many for full batches: train "
                "on minibatches (`minibatches(key, triples, batch_size, num_steps)`)."
            )
        queries[side], answers[side] = triples[first], np.zeros((len(first), num_answers), np.float32)
        np.add.at(answers[side], (which.reshape(-1), triples[:, column]), 1)
    s, p, o = (answers[side].sum(0) for side in SIDES)
    return Grouped(queries, answers, (s, p, o))


def minibatches(key: jax.Array, examples: PyTree, batch_size: int, num_steps: int) -> PyTree:
    """Shuffled minibatches, epoch after epoch; the last examples of an epoch, fewer than a batch, are dropped.

    Args:
      key: decides the order; may be traced, or mapped over.
      examples: a pytree of arrays with one leading axis, such as triples, or triples and their masks.
      batch_size: examples per minibatch.
      num_steps: number of minibatches.

    Returns:
      A pytree with leading axes (num_steps, batch_size), the `batches` of `jaxhpo.solve`.

    Raises:
      JaxhpoError: a batch larger than the examples; leaves that are not arrays, or differ in length.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> link_prediction.minibatches(jax.random.key(0), jnp.zeros((10, 3), int), batch_size=4, num_steps=7).shape
      (7, 4, 3)
    """
    check_count("batch_size", batch_size)
    check_count("num_steps", num_steps)
    leaves = jax.tree.leaves(examples)
    arrays = all(isinstance(leaf, (np.ndarray, jax.Array)) and leaf.ndim for leaf in leaves)
    lengths = {len(leaf) for leaf in leaves} if arrays else set()
    if len(lengths) != 1:
        raise JaxhpoError(f"`examples` got {_described(examples)}: give arrays (np.array) with one leading axis.")
    (total,) = lengths
    per_epoch = total // batch_size
    if not per_epoch:
        raise JaxhpoError(f"`batch_size` got {batch_size}, but there are {total} examples: write at most that.")
    if key is None:
        raise JaxhpoError("`key` got None, but it decides the order: write jax.random.key(0).")
    keys = jax.random.split(check_key(key), -(-num_steps // per_epoch))
    orders = jax.vmap(lambda key: jax.random.permutation(key, total)[: per_epoch * batch_size])(keys)
    orders = orders.reshape(-1, batch_size)[:num_steps]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[orders], examples)


def cross_entropy(model: Model, params: dict, batch: Any, sides: str = "so", masks: dict | None = None) -> jax.Array:
    r"""Softmax cross-entropy of each triple's answer among all answers: the mean over triples, summed over sides.

    .. math:: \frac1B \sum_b \Big[ \log \sum_{o'} e^{f(s_b, p_b, o')} - f(s_b, p_b, o_b)
              + \log \sum_{s'} e^{f(s', p_b, o_b)} - f(s_b, p_b, o_b) \Big]

    **Cost and bias**: per side one product of the queries with the table, and logits of shape (B, entities).

    Args:
      model: such as `DistMult(rank=200)`.
      params: from `model.init`.
      batch: integers (B, 3), or a `Grouped`. Traced indices that are out of range give NaN.
      sides: the sides asked for: "s", "p" and "o", in any combination.
      masks: for each side, bool (B, answers), True where the logits are −∞, made by `masks`. Not with a `Grouped`.

    Returns:
      A scalar, float32 or wider.

    Raises:
      JaxhpoError: an invalid batch, or one of other sizes than params; an unknown side, a side without a mask, masks of
        another shape, masks with a `Grouped`.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> model = link_prediction.ComplEx(rank=4)
      >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), 14, 2))
      >>> print(round(float(link_prediction.cross_entropy(model, params, jnp.array([[0, 1, 3]]))), 3))  # 2 log 14
      5.278

    References:
      Lacroix, Usunier, Obozinski. Canonical Tensor Decomposition for Knowledge Base Completion. 2018. arXiv:1806.07297
    """
    check_sides(sides)
    sizes = model.sizes(params)
    batch = _check_batch(batch, sizes)
    if isinstance(batch, Grouped):
        if masks is not None:
            raise JaxhpoError("`masks` belong to single triples, but `batch` is a `Grouped`: pass the triples instead.")
        return jnp.stack([_grouped_cross_entropy(model, params, batch, side) for side in sides]).sum()
    if masks is not None:
        _check_masks(masks, sides, len(batch), sizes)
    losses = []
    for side in sides:
        logits = upcast(model.scores(params, batch, side))
        if masks is not None:
            logits = jnp.where(masks[side], -jnp.inf, logits)
        # mean over b of log Σ_x exp f(b, x) − f(b, own answer), where x runs over all answers
        truth = jnp.take_along_axis(logits, batch[:, SIDES.index(side), None], axis=1, mode="fill")[:, 0]
        losses.append(jnp.mean(jax.nn.logsumexp(logits, axis=1) - truth))
    return jnp.stack(losses).sum()


def _grouped_cross_entropy(model, params, batch, side):
    # With n_qx triples of question q and answer x, and n_q = Σ_x n_qx, the sum over triples is one over questions:
    #     Σ_b [log Z_b − f_b] = Σ_q [n_q log Z_q − Σ_x n_qx f_qx],   Z_q = Σ_x exp f_qx
    logits = upcast(model.scores(params, jnp.asarray(batch.queries[side]), side))
    answers = jnp.asarray(batch.answers[side], logits.dtype)
    per_question = answers.sum(1) * jax.nn.logsumexp(logits, axis=1) - jnp.sum(answers * logits, axis=1)
    return jnp.sum(per_question) / jnp.sum(answers)


def _check_batch(batch, sizes):
    """A `Grouped` as it is, or int32 triples; raise unless it fits the tables."""
    if not isinstance(batch, Grouped):
        return in_range(check_triples(batch, sizes, "batch"), sizes)
    grouped_for = tuple(len(count) for count in batch.counts[:2])
    if grouped_for != sizes:
        raise JaxhpoError(
            f"`batch` was grouped for {grouped_for[0]} entities and {grouped_for[1]} relations, but `params` has "
            f"{sizes[0]} and {sizes[1]}: write `group(triples, {sizes[0]}, {sizes[1]})`."
        )
    return batch


def _check_masks(masks, sides, num_triples, sizes):
    shapes = {side: (num_triples, sizes[side == "p"]) for side in sides}

    def fits(mask, shape):
        return is_array(mask) and jnp.result_type(mask) == jnp.bool_ and jnp.shape(mask) == shape

    if not isinstance(masks, dict) or not all(fits(masks.get(side), shape) for side, shape in shapes.items()):
        raise JaxhpoError(
            f"`masks` got {_described(masks)}, but a dict of booleans of the shapes {shapes} is needed, one row per "
            "triple of `batch`: make it with `masks` from the same triples and sides."
        )


def _described(tree):
    return jax.tree.map(describe, tree, is_leaf=lambda x: x is None)


def penalty(model: Model, params: dict, weights: Any, batch: Any, power: int = 2) -> jax.Array:
    r"""A penalty on the embeddings of each triple, with a weight per entity and relation: F2 or N3.

    .. math:: \frac1B \sum_b \left[ \lambda_{s_b} \|s_b\|_q^q + \lambda_{p_b} \|p_b\|_q^q + \lambda_{o_b} \|o_b\|_q^q
              \right] = \sum_e \frac{n_e}{B} \lambda_e \|e\|_q^q + \sum_p \frac{n_p}{B} \lambda_p \|p\|_q^q

    It is computed by the sum on the right, over tables instead of triples. An embedding that occurs n times is
    penalised with :math:`n \lambda / B`, one that does not occur is not penalised. With `reciprocal`, a triple counts
    together with its inverse.

    **Cost and bias**: one pass over the tables. Two derivatives are finite everywhere, also at zero.

    Args:
      model: such as `DistMult(rank=200)`.
      params: from `model.init`.
      weights: λ ≥ 0, one number for all, or `{"entities": ..., "relations": ...}`, each either one number or one per
        entity or relation, (entities,) and (relations,).
      batch: integers (B, 3), or a `Grouped`.
      power: q, 2 for F2 (squares, without a factor 1/2), 3 for N3 (cubed moduli).

    Returns:
      A scalar, float32 or wider.

    Raises:
      JaxhpoError: an invalid batch, or one of other sizes than params; weights of another shape, another power.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> model = link_prediction.DistMult(rank=4)
      >>> params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0), 3, 2))
      >>> weights = {"entities": jnp.array([1.0, 10.0, 100.0]), "relations": 0.5}
      >>> print(link_prediction.penalty(model, params, weights, jnp.array([[0, 1, 2]])))  # 4 (1 + 0.5 + 100)
      406.0

    References:
      Lacroix, Usunier, Obozinski. Canonical Tensor Decomposition for Knowledge Base Completion. 2018. arXiv:1806.07297
    """
    num_entities, num_relations = sizes = model.sizes(params)
    batch = _check_batch(batch, sizes)
    if isinstance(batch, Grouped):
        counts = batch.counts
    else:  # an index that is out of range is in no count
        lengths = num_entities, num_relations, num_entities
        counts = [jnp.bincount(column, length=n) for column, n in zip(batch.T, lengths, strict=True)]
    s, p, o = (model.norms(table, power) for table in model.tables(params))  # ‖·‖_q^q of every row
    n_s, n_p, n_o = (jnp.asarray(count, norms.dtype) for count, norms in zip(counts, (s, p, o), strict=True))
    total = jnp.sum(n_p)  # B
    if not isinstance(batch, Grouped):
        total = jnp.where(jnp.max(batch) < OUT_OF_RANGE, total, jnp.nan)
    if model.reciprocal:  # (o, inverse of p, s) is a triple too
        n_s = n_o = n_s + n_o
    # The rows of the relations, and after them, if reciprocal, those of their inverses, which share n_p and λ_p.
    p = p.reshape(-1, num_relations).sum(0)
    entities, relations = _check_weights(weights, num_entities, num_relations)
    # (1/B) [Σ_e λ_e (n_e,s ‖e‖ + n_e,o ‖e'‖) + Σ_p λ_p n_p ‖p‖], where e' = e except in CP
    return (jnp.sum(entities * (n_s * s + n_o * o)) + jnp.sum(relations * n_p * p)) / total


def _check_weights(weights, num_entities, num_relations):
    """The weights of entities and of relations; raise unless each is a real number or one per row."""
    sizes = {"entities": num_entities, "relations": num_relations}
    both = weights if isinstance(weights, dict) else dict.fromkeys(sizes, weights)
    if both.keys() != sizes.keys() or not all(
        is_array(weight) and not jnp.iscomplexobj(weight) and jnp.shape(weight) in ((), (sizes[name],))
        for name, weight in both.items()
    ):
        raise JaxhpoError(
            f"`weights` got {_described(weights)}, but there are {num_entities} entities and {num_relations} "
            'relations: write one number, or {"entities": w, "relations": v}, each one number or one per row.'
        )
    return both["entities"], both["relations"]
