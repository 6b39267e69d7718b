"""Scores of triples (s, p, o) from the embeddings of subject, relation and object."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxhpo._validate import check_count, check_key, check_positive


@dataclasses.dataclass(frozen=True)
class Model:
    """What the four models share: `DistMult`, `ComplEx`, `CP` and `TransE` say how three embeddings make a score.

    Attributes:
      rank: components of an embedding; complex ones in `ComplEx`, whose rows are as long again.
      reciprocal: each relation p has an inverse with an embedding of its own, row p + number of relations; subjects of
        (?, p, o) are then scored as objects of (o, inverse of p, ?).
      scale: standard deviation of the embeddings at the start.
    """

    rank: int = 100
    reciprocal: bool = False
    scale: float = 1e-3

    def __post_init__(self):
        check_count("rank", self.rank)
        check_positive("scale", self.scale)

    def init(self, key: jax.Array, num_entities: int, num_relations: int, dtype=float) -> dict[str, jax.Array]:
        """Normal embeddings: a dict of tables, one row per entity or relation, pure in the key."""
        check_count("num_entities", num_entities)
        check_count("num_relations", num_relations)
        rows = self._rows(num_entities, num_relations * (1 + self.reciprocal))
        keys = jax.random.split(check_key(key), len(rows))
        return {
            name: self.scale * jax.random.normal(k, (n, self._width()), dtype)
            for k, (name, n) in zip(keys, rows.items(), strict=True)
        }

    def tables(self, params: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings of subjects, relations and objects; entities have one for both roles, but in `CP`."""
        return params["entities"], params["relations"], params["entities"]

    def sizes(self, params: dict) -> tuple[int, int]:
        """Numbers of entities and of relations (inverses not counted)."""
        _, relations, objects = self.tables(params)
        return len(objects), len(relations) // (1 + self.reciprocal)

    def scores(self, params: dict, triples: jax.Array, side: str) -> jax.Array:
        """Scores of all that could stand at one side of each triple, "s", "p" or "o": (n, entities or relations)."""
        subjects, relations, objects = self.tables(params)
        _, num_relations = self.sizes(params)
        s, p, o = triples.T
        if side == "o":
            return self._match(self._query(subjects[s], relations[p], None), objects)
        if side == "p":
            return self._match(self._query(subjects[s], None, objects[o]), relations[:num_relations])
        if self.reciprocal:
            return self._match(self._query(subjects[o], relations[p + num_relations], None), objects)
        return self._match(self._query(None, relations[p], objects[o]), subjects)

    def norms(self, table: jax.Array, power: int) -> jax.Array:
        """Sums of the components' moduli to the power 2 or 3, of each row: (rows,)."""
        return jnp.sum(table**2 if power == 2 else jnp.abs(table) ** 3, axis=1)

    def _rows(self, num_entities, num_relations):
        return {"entities": num_entities, "relations": num_relations}

    def _width(self):
        return self.rank

    def _query(self, s, p, o):
        """What `_match` compares with the embedding that is None."""
        s, p, o = (1.0 if x is None else x for x in (s, p, o))
        return s * p * o

    def _match(self, query, table):
        return query @ table.T


class DistMult(Model):
    r"""The score :math:`\sum_i s_i p_i o_i`.

    **Cost and bias**: scores of one side are one matrix product. (s, p, o) and (o, p, s) have the same score, but with
    `reciprocal`.

    Args:
      rank, reciprocal, scale: see `Model`.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> model = link_prediction.DistMult(rank=8)
      >>> params = model.init(jax.random.key(0), 5, 2)
      >>> model.scores(params, jnp.array([[0, 1, 3]]), "o").shape
      (1, 5)

    References:
      Yang, Yih, He, Gao, Deng. Embedding Entities and Relations for Learning and Inference in Knowledge Bases. 2014.
      arXiv:1412.6575
    """


class ComplEx(Model):
    r"""The score :math:`\mathrm{Re} \sum_i s_i p_i \bar o_i` of complex embeddings.

    A row holds the real parts, then the imaginary parts. Cost as of `DistMult` at twice the rank.

    Args:
      rank, reciprocal, scale: see `Model`.

    References:
      Trouillon, Welbl, Riedel, Gaussier, Bouchard. Complex Embeddings for Simple Link Prediction. 2016.
      arXiv:1606.06357
    """

    def norms(self, table: jax.Array, power: int) -> jax.Array:
        """Sums of the components' moduli to the power 2 or 3, of each row: (rows,)."""
        if power == 2:
            return jnp.sum(table**2, axis=1)
        re, im = jnp.split(table, 2, axis=1)
        square = re**2 + im**2
        # |z|³ has two derivatives at 0, both zero, but those of the root are infinite. It is left out where they would
        # overflow; there |z|³ is below 1e-33.
        small = square < jnp.finfo(square.dtype).tiny ** 0.6
        safe = jnp.where(small, 1, square)
        return jnp.sum(jnp.where(small, 0, safe * jnp.sqrt(safe)), axis=1)

    def _width(self):
        return 2 * self.rank

    def _query(self, s, p, o):
        # Re(q conj(t)) is the rows' dot product: q = sp for the object, conj(p) o for the subject, conj(s) o for p.
        if o is None:
            return _product(s, p)
        return _product(_conjugate(p if s is None else s), o)


class CP(Model):
    r"""The score :math:`\sum_i s_i p_i o'_i`, where an entity has one embedding as subject and another, o', as object.

    Cost as of `DistMult`. With `reciprocal`, else the two embeddings of an entity hardly know of each other.

    Args:
      rank, reciprocal, scale: see `Model`.

    References:
      Lacroix, Usunier, Obozinski. Canonical Tensor Decomposition for Knowledge Base Completion. 2018. arXiv:1806.07297
    """

    def tables(self, params: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings of subjects, relations and objects."""
        return params["entities"], params["relations"], params["objects"]

    def _rows(self, num_entities, num_relations):
        return super()._rows(num_entities, num_relations) | {"objects": num_entities}


class TransE(Model):
    r"""The score :math:`-\|s + p - o\|_2`, with :math:`10^{-6}` added to the square, so that it is smooth.

    Cost as of `DistMult`: distances come from one matrix product, :math:`\|q\|^2 - 2 q \cdot o + \|o\|^2`.

    Args:
      rank, reciprocal, scale: see `Model`.

    References:
      Bordes, Usunier, Garcia-Durán, Weston, Yakhnenko. Translating Embeddings for Modeling Multi-relational Data. 2013.
    """

    def _query(self, s, p, o):
        if o is None:
            return s + p
        return o - (p if s is None else s)

    def _match(self, query, table):
        squares = jnp.sum(query**2, axis=1)[:, None] - 2 * query @ table.T + jnp.sum(table**2, axis=1)[None]
        return -jnp.sqrt(jnp.maximum(squares, 0) + 1e-6)


def _product(a, b):
    (a, c), (b, d) = jnp.split(a, 2, axis=1), jnp.split(b, 2, axis=1)
    return jnp.concatenate([a * b - c * d, a * d + c * b], axis=1)


def _conjugate(a):
    re, im = jnp.split(a, 2, axis=1)
    return jnp.concatenate([re, -im], axis=1)
