"""Scores of triples (s, p, o) from the embeddings of subject, relation and object."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast
from jaxhpo._core.validate import check_count, check_key, check_positive
from jaxhpo.models.link_prediction._triples import check_side

NOWHERE = 2**30  # beyond the rows of every table


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
        if not isinstance(self.reciprocal, bool):
            raise JaxhpoError(f"`reciprocal` got {self.reciprocal!r}: write True or False.")

    def init(self, key: jax.Array, num_entities: int, num_relations: int, dtype=float) -> dict[str, jax.Array]:
        """Normal embeddings: a dict of tables, one row per entity or relation, pure in the key."""
        check_count("num_entities", num_entities)
        check_count("num_relations", num_relations)
        if dtype is not float and not jnp.issubdtype(dtype, jnp.floating):
            raise JaxhpoError(f"`dtype` got {dtype!r}, but embeddings are real: write jnp.float32.")
        rows = self._rows(num_entities, num_relations * (1 + self.reciprocal))
        keys = jax.random.split(check_key(key), len(rows))
        return {
            name: float(self.scale) * jax.random.normal(k, (n, self._width()), dtype)
            for k, (name, n) in zip(keys, rows.items(), strict=True)
        }

    def tables(self, params: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings of subjects, relations and objects; entities have one for both roles, but in `CP`."""
        return params["entities"], params["relations"], params["entities"]

    def sizes(self, params: dict) -> tuple[int, int]:
        """Numbers of entities and of relations (inverses not counted).

        Raises:
          JaxhpoError: params of another model.
        """
        names = self._rows(1, 1)
        if not isinstance(params, dict) or params.keys() != names.keys():
            given = sorted(params) if isinstance(params, dict) else type(params).__name__
            raise JaxhpoError(f"`params` got {given}, but {self} has the tables {list(names)}: take `model.init`'s.")
        shapes = {name: jnp.shape(table) for name, table in params.items()}
        if any(len(shape) != 2 or shape[1] != self._width() for shape in shapes.values()):
            raise JaxhpoError(
                f"`params` has the shapes {shapes}, but the rows of {self} are {self._width()} long: take "
                "`model.init`'s, of the model that they were made by."
            )
        rows = {name: shape[0] for name, shape in shapes.items()}
        if rows["relations"] % (1 + self.reciprocal) or rows.get("objects", rows["entities"]) != rows["entities"]:
            raise JaxhpoError(
                f"`params` has tables of {rows} rows, but {self} has as many objects as entities, and where it is "
                "reciprocal two rows a relation: take `model.init`'s."
            )
        return rows["entities"], rows["relations"] // (1 + self.reciprocal)

    def scores(self, params: dict, triples: jax.Array, side: str) -> jax.Array:
        """Scores of all that could stand at one side of each triple, "s", "p" or "o": (n, entities or relations).

        NaN where the triple holds a number that the tables do not have.
        """
        check_side(side)
        subjects, relations, objects = self.tables(params)
        _, num_relations = sizes = self.sizes(params)
        s, p, o = in_range(triples, sizes).T
        if side == "o":
            return self._match(self._query(_rows_of(subjects, s), _rows_of(relations, p), None), objects)
        if side == "p":
            query = self._query(_rows_of(subjects, s), None, _rows_of(objects, o))
            return self._match(query, relations[:num_relations])
        if self.reciprocal:
            query = self._query(_rows_of(subjects, o), _rows_of(relations, p + num_relations), None)
            return self._match(query, objects)
        return self._match(self._query(None, _rows_of(relations, p), _rows_of(objects, o)), subjects)

    def norms(self, table: jax.Array, power: int) -> jax.Array:
        """Sums of the components' moduli to the power 2 or 3, of each row: (rows,), float32 or wider."""
        if power not in (2, 3):
            raise JaxhpoError(f"`power` got {power!r}, but it is 2 (F2) or 3 (N3): write one of them.")
        return self._powers(upcast(table), power)

    def _powers(self, table, power):
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

    def _powers(self, table, power):
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

    **Cost and bias**: distances are summed up component by component, and differentiated by matrix products. (By one
    product, as :math:`\|q\|^2 - 2 q \cdot o + \|o\|^2`, small distances would be rounding noise.)

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
        return -jnp.sqrt(_squared_distances(query, table) + 1e-6)


def in_range(triples, sizes: tuple[int, int]) -> jax.Array:
    """int32 triples, with `NOWHERE` for what is out of range: traced ones cannot be refused."""
    triples = jnp.asarray(triples).astype(jnp.int32)  # of eight bits, inverse relations may have no number
    bounds = jnp.array([[sizes[0], sizes[1], sizes[0]]], jnp.int32)
    return jnp.where((triples >= 0) & (triples < bounds), triples, NOWHERE)


def _rows_of(table, index):
    return table.at[index].get(mode="fill", fill_value=jnp.nan)


@jax.custom_jvp
def _squared_distances(a, b):
    """Of each row of a from each row of b: (rows of a, rows of b)."""

    def add(total, component):
        of_a, of_b = component
        return total + (of_a[:, None] - of_b[None]) ** 2, None

    return jax.lax.scan(add, jnp.zeros((len(a), len(b)), a.dtype), (a.T, b.T), unroll=8)[0]


@_squared_distances.defjvp
def _squared_distances_jvp(primals, tangents):
    r"""The derivative 2 (a − b)·(da − db), multiplied out: its rounding is that of a − b, and not of its square."""
    (a, b), (da, db) = primals, tangents
    product = functools.partial(jnp.matmul, precision="highest")
    own = jnp.sum(a * da, axis=1)[:, None] + jnp.sum(b * db, axis=1)[None]
    return _squared_distances(a, b), 2 * (own - product(a, db.T) - product(da, b.T))


def _product(a, b):
    (a, c), (b, d) = jnp.split(a, 2, axis=1), jnp.split(b, 2, axis=1)
    return jnp.concatenate([a * b - c * d, a * d + c * b], axis=1)


def _conjugate(a):
    re, im = jnp.split(a, 2, axis=1)
    return jnp.concatenate([re, -im], axis=1)
