"""Scores of triples (s, p, o) from the embeddings of subject, relation and object."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast
from jaxhpo._core.validate import check_count, check_key, check_positive, check_switch
from jaxhpo.models.link_prediction._triples import SIDES, check_side, check_sizes

OUT_OF_RANGE = 2**30  # an index beyond the rows of every table


@dataclasses.dataclass(frozen=True)
class Model:
    """Base class of `DistMult`, `ComplEx`, `CP` and `TransE`, which define the score of three embeddings.

    Attributes:
      rank: components of an embedding. Those of `ComplEx` are complex, and its rows twice as long.
      reciprocal: give each relation p an inverse with an embedding of its own, in row p + number of relations. The
        subjects of (?, p, o) are then scored as the objects of (o, inverse of p, ?).
      scale: standard deviation of the initial embeddings.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> model = link_prediction.DistMult(rank=8, reciprocal=True)
      >>> params = model.init(jax.random.key(0), num_entities=5, num_relations=2)
      >>> isinstance(model, link_prediction.Model), model.sizes(params), params["relations"].shape
      (True, (5, 2), (4, 8))
    """

    rank: int = 100
    reciprocal: bool = False
    scale: float = 1e-3

    def __post_init__(self):
        check_count("rank", self.rank)
        check_positive("scale", self.scale)
        check_switch("reciprocal", self.reciprocal)

    def init(self, key: jax.Array, num_entities: int, num_relations: int, dtype=float) -> dict[str, jax.Array]:
        """Draw normal embeddings: a dict of tables, one row per entity or relation."""
        check_sizes(num_entities, num_relations)
        if dtype is not float and not jnp.issubdtype(dtype, jnp.floating):
            raise JaxhpoError(f"`dtype` got {dtype!r}, but embeddings are real: write jnp.float32.")
        shapes = self._shapes(num_entities, num_relations)
        keys = jax.random.split(check_key(key), len(shapes))
        return {
            name: float(self.scale) * jax.random.normal(k, shape, dtype)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def tables(self, params: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embeddings of subjects, relations and objects; except in `CP`, subjects and objects share one table."""
        return params["entities"], params["relations"], params.get("objects", params["entities"])

    def sizes(self, params: dict) -> tuple[int, int]:
        """Numbers of entities and of relations; inverse relations are not counted.

        Raises:
          JaxhpoError: params of another model.
        """
        if not isinstance(params, dict):
            raise JaxhpoError(f"`params` got {type(params).__name__}: give the dict of tables from `init`.")
        shapes = {name: jnp.shape(table) for name, table in params.items()}
        num_entities, num_rows = ((shapes.get(name) or (1,))[0] for name in ("entities", "relations"))
        num_relations = num_rows // (1 + self.reciprocal)
        expected = self._shapes(num_entities, num_relations)
        if shapes != expected:
            inverses = ", with two rows per relation" if self.reciprocal else ""
            raise JaxhpoError(
                f"`params` has the tables {shapes}, but {self} has {expected}{inverses}: take them from its `init`."
            )
        return num_entities, num_relations

    def scores(self, params: dict, triples: jax.Array, side: str) -> jax.Array:
        """Scores of all candidates for one side, "s", "p" or "o", of each triple: (n, entities or relations).

        They are NaN where the triple holds an index that the tables do not have.
        """
        check_side(side)
        tables, sizes = self.tables(params), self.sizes(params)
        s, p, o = in_range(triples, sizes).T
        if side == "s" and self.reciprocal:  # (?, p, o) is (o, inverse of p, ?)
            s, p, side = o, p + sizes[1], "o"
        rows = [
            None if name == side else table.at[index].get(mode="fill", fill_value=jnp.nan)
            for name, table, index in zip(SIDES, tables, (s, p, o), strict=True)
        ]
        candidates = tables[1][: sizes[1]] if side == "p" else tables[SIDES.index(side)]
        return self._match(self._query(*rows), candidates)

    def norms(self, table: jax.Array, power: int) -> jax.Array:
        r"""For each row :math:`\sum_i |x_i|^q` with power q = 2 or 3: (rows,), float32 or wider."""
        if power not in (2, 3):
            raise JaxhpoError(f"`power` got {power!r}: write 2 (F2) or 3 (N3).")
        return jnp.sum(upcast(table) ** 2, axis=1) if power == 2 else self._cubes(upcast(table))

    def _cubes(self, table):
        return jnp.sum(jnp.abs(table) ** 3, axis=1)

    def _shapes(self, num_entities, num_relations):
        """The shape of each table."""
        width = self._width()
        return {"entities": (num_entities, width), "relations": (num_relations * (1 + self.reciprocal), width)}

    def _width(self):
        """The length of a row."""
        return self.rank

    def _query(self, s, p, o):
        """The vector q with score(s, p, o) = match(q, x), where x is the embedding that is None."""
        # Σᵢ sᵢ pᵢ oᵢ is linear in each embedding: q is the product of the other two.
        first, second = (x for x in (s, p, o) if x is not None)
        return first * second

    def _match(self, query, table):
        """Scores of every query (n, width) with every row of the table: (n, rows)."""
        return query @ table.T


class DistMult(Model):
    r"""The score :math:`\sum_i s_i p_i o_i`.

    **Cost and bias**: the scores of one side are one matrix product. Unless `reciprocal`, (s, p, o) and (o, p, s) have
    the same score.

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

    A row holds the real parts, then the imaginary parts. The cost is that of `DistMult` at twice the rank.

    Args:
      rank, reciprocal, scale: see `Model`.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> params = {"entities": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "relations": jnp.array([[0.0, 1.0]])}
      >>> model = link_prediction.ComplEx(rank=1)  # of the entities 1 and i, and the relation i
      >>> print(model.scores(params, jnp.array([[0, 0, 1], [1, 0, 0]]), "o"))  # (0, 0, 1) has 1, and (1, 0, 0) has −1
      [[ 0.  1.]
       [-1.  0.]]

    References:
      Trouillon, Welbl, Riedel, Gaussier, Bouchard. Complex Embeddings for Simple Link Prediction. 2016.
      arXiv:1606.06357
    """

    def _cubes(self, table):
        # |z|³ = (|z|²)^(3/2). Its first two derivatives at 0 are 0, but those of the square root are infinite. Below
        # the bound, where they would overflow and |z|³ < 1e-33, the value is set to 0. The inner `where` keeps the
        # infinite derivative out of the branch that is not taken, as 0 · ∞ = NaN.
        re, im = jnp.split(table, 2, axis=1)
        square = re**2 + im**2
        small = square < jnp.finfo(square.dtype).tiny ** 0.6
        safe = jnp.where(small, 1, square)
        return jnp.sum(jnp.where(small, 0, safe * jnp.sqrt(safe)), axis=1)

    def _width(self):
        return 2 * self.rank

    def _query(self, s, p, o):
        # The dot product of the rows of q and x is Re Σᵢ qᵢ x̄ᵢ = Re Σᵢ q̄ᵢ xᵢ. Hence
        #     for x = o:  Re Σ (s p) ō         q = s p
        #     for x = s:  Re Σ (p ō) s         q = conj(p ō) = p̄ o
        #     for x = p:  Re Σ (s ō) p         q = conj(s ō) = s̄ o
        if o is None:
            return _complex_product(s, p)
        return _complex_product(_conjugate(p if s is None else s), o)


class CP(Model):
    r"""The score :math:`\sum_i s_i p_i o'_i`, where an entity has one embedding as subject and another, o', as object.

    The cost is that of `DistMult`. Use it with `reciprocal`: otherwise little ties the two embeddings of an entity to
    each other.

    Args:
      rank, reciprocal, scale: see `Model`.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> model = link_prediction.CP(rank=8, reciprocal=True)
      >>> params = model.init(jax.random.key(0), num_entities=5, num_relations=2)
      >>> {name: table.shape for name, table in params.items()}
      {'entities': (5, 8), 'relations': (4, 8), 'objects': (5, 8)}

    References:
      Lacroix, Usunier, Obozinski. Canonical Tensor Decomposition for Knowledge Base Completion. 2018. arXiv:1806.07297
    """

    def _shapes(self, num_entities, num_relations):
        return super()._shapes(num_entities, num_relations) | {"objects": (num_entities, self._width())}


class TransE(Model):
    r"""The score :math:`-\|s + p - o\|_2`, with :math:`10^{-6}` added to the square, which makes it smooth.

    **Cost and bias**: distances are summed component by component, and differentiated by matrix products. (With one
    product, as :math:`\|q\|^2 - 2 q \cdot o + \|o\|^2`, small distances would be rounding noise.)

    Args:
      rank, reciprocal, scale: see `Model`.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> params = {"entities": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "relations": jnp.array([[-1.0, 1.0]])}
      >>> scores = link_prediction.TransE(rank=2).scores(params, jnp.array([[0, 0, 1]]), "o")
      >>> [f"{score:.3f}" for score in scores[0]]  # s + p is the second entity, and √2 away from the first
      ['-1.414', '-0.001']

    References:
      Bordes, Usunier, Garcia-Durán, Weston, Yakhnenko. Translating Embeddings for Modeling Multi-relational Data. 2013.
    """

    def _query(self, s, p, o):
        # s + p − o = 0 solved for the embedding that is None; the norm does not depend on the sign.
        if o is None:
            return s + p
        return o - (p if s is None else s)

    def _match(self, query, table):
        return -jnp.sqrt(_squared_distances(query, table) + 1e-6)


def in_range(triples, sizes: tuple[int, int]) -> jax.Array:
    """int32 triples with `OUT_OF_RANGE` for every invalid index, as traced values cannot be refused."""
    triples = jnp.asarray(triples).astype(jnp.int32)  # in int8, the index of an inverse relation could overflow
    bounds = jnp.array([[sizes[0], sizes[1], sizes[0]]], jnp.int32)
    return jnp.where((triples >= 0) & (triples < bounds), triples, OUT_OF_RANGE)


@jax.custom_jvp
def _squared_distances(a, b):
    """‖aᵢ − bⱼ‖² for all rows aᵢ and bⱼ: (rows of a, rows of b)."""

    # Σₖ (aᵢₖ − bⱼₖ)², one component k per step: the differences are exact where a and b are close, and no array of
    # (rows of a, rows of b, components) is made.
    def add(total, component):
        of_a, of_b = component
        return total + (of_a[:, None] - of_b[None]) ** 2, None

    return jax.lax.scan(add, jnp.zeros((len(a), len(b)), a.dtype), (a.T, b.T), unroll=8)[0]


@_squared_distances.defjvp
def _squared_distances_jvp(primals, tangents):
    (a, b), (da, db) = primals, tangents
    product = functools.partial(jnp.matmul, precision="highest")
    # d‖aᵢ − bⱼ‖² = 2 (aᵢ − bⱼ)·(daᵢ − dbⱼ) = 2 (aᵢ·daᵢ + bⱼ·dbⱼ − aᵢ·dbⱼ − daᵢ·bⱼ). Unlike the distance, it can be
    # multiplied out: the rounding error is of order ε‖a‖, as in aᵢ − bⱼ itself, not of order ε‖a‖².
    own = jnp.sum(a * da, axis=1)[:, None] + jnp.sum(b * db, axis=1)[None]
    return _squared_distances(a, b), 2 * (own - product(a, db.T) - product(da, b.T))


def _complex_product(a, b):
    # (a + ic)(b + id) = (ab − cd) + i (ad + cb)
    (a, c), (b, d) = jnp.split(a, 2, axis=1), jnp.split(b, 2, axis=1)
    return jnp.concatenate([a * b - c * d, a * d + c * b], axis=1)


def _conjugate(a):
    re, im = jnp.split(a, 2, axis=1)
    return jnp.concatenate([re, -im], axis=1)
