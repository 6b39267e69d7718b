"""Checks of triples, and masks of the other known answers to their questions."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import check_count, describe

SIDES = "spo"  # side i is column i of the triples


def masks(
    triples: np.ndarray, known: np.ndarray, num_entities: int, num_relations: int, sides: str = "so"
) -> dict[str, np.ndarray]:
    """Mark known true answers other than the triple's own, which masked losses and filtered ranks leave out.

    **Cost and bias**: n × entities bytes per side, in NumPy. Use it for minibatches of a large graph, or small graphs.

    Args:
      triples: integers (n, 3), concrete.
      known: integers (m, 3), m ≥ 0, the known triples, such as those of the training and validation parts.
      num_entities: number of entities.
      num_relations: number of relations.
      sides: the sides asked for, any of "s", "p" and "o".

    Returns:
      For each side a boolean array (n, entities), or (n, relations) for "p". It is False at the triple's own answer.

    Raises:
      JaxhpoError: arrays that are not triples, an index out of range, an unknown side.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> known = np.array([[0, 0, 1], [0, 0, 2]])
      >>> link_prediction.masks(known[:1], known, 3, 1, sides="o")["o"].tolist()
      [[False, False, True]]
    """
    sizes = check_sizes(num_entities, num_relations)
    triples = concrete_triples(triples, sizes, "triples")
    known = concrete_triples(known, sizes, "known", least=0)
    return {side: Known(known, sizes, side).mask(triples) for side in check_sides(sides)}


class Known:
    """Known triples, sorted by the question that one side of them answers."""

    def __init__(self, known: np.ndarray, sizes: tuple[int, int], side: str):
        self.side, self.sizes = side, sizes
        questions = self._questions(known)
        order = np.argsort(questions, kind="stable")
        self.questions, self.answers = questions[order], known[order, SIDES.index(side)]

    def _questions(self, triples) -> np.ndarray:
        """One number per triple, the same for two triples that differ only in the answer."""
        s, p, o = triples.astype(np.int64).T
        num_entities, num_relations = self.sizes
        return {"s": p * num_entities + o, "p": s * num_entities + o, "o": s * num_relations + p}[self.side]

    def mask(self, triples: np.ndarray) -> np.ndarray:
        """Mark the known answers other than the triple's own: bool (n, answers)."""
        asked = self._questions(triples)
        first, last = (np.searchsorted(self.questions, asked, end) for end in ("left", "right"))
        mask = np.zeros((len(triples), self.sizes[self.side == "p"]), bool)
        for row, i, j in zip(mask, first, last, strict=True):
            row[self.answers[i:j]] = True
        mask[np.arange(len(triples)), triples[:, SIDES.index(self.side)]] = False
        return mask


def check_sizes(num_entities: int, num_relations: int) -> tuple[int, int]:
    """Both numbers; raise unless they are positive integers."""
    check_count("num_entities", num_entities)
    check_count("num_relations", num_relations)
    return num_entities, num_relations


def check_side(side: str) -> None:
    """Raise unless `side` is "s", "p" or "o"."""
    if side not in tuple(SIDES):
        raise JaxhpoError(f"`side` got {side!r}: write 's' for subjects, 'p' for relations, 'o' for objects.")


def check_sides(sides: str) -> str:
    """The sides; raise unless they are some of "s", "p" and "o", each at most once."""
    if not isinstance(sides, str) or not sides or set(sides) - set(SIDES) or len(set(sides)) < len(sides):
        raise JaxhpoError(f"`sides` got {sides!r}, but it names subjects, relations and objects: write 'so' or 'spo'.")
    return sides


def check_triples(triples, sizes: tuple[int, int], what: str, least: int = 1):
    """The triples; raise unless they are integers (n, 3), in range where they are concrete."""
    is_array = isinstance(triples, (np.ndarray, jnp.ndarray)) and jnp.issubdtype(triples.dtype, np.integer)
    if not is_array or triples.shape[1:] != (3,) or len(triples) < least:
        raise JaxhpoError(
            f"`{what}` got {describe(triples)}: give integers (n, 3), n at least {least}: subjects, relations, objects."
        )
    if not isinstance(triples, Tracer):  # traced triples that are out of range score NaN
        host, bounds = np.asarray(triples), np.array([sizes[0], sizes[1], sizes[0]])
        bad = np.flatnonzero(((host < 0) | (host >= bounds)).any(1))
        if bad.size:
            raise JaxhpoError(
                f"`{what}` holds {host[bad[0]].tolist()} in row {bad[0]}, but there are {sizes[0]} entities and "
                f"{sizes[1]} relations: number them from 0, or enlarge the tables."
            )
    return triples


def concrete_triples(triples, sizes: tuple[int, int], what: str, least: int = 1) -> np.ndarray:
    """The triples as int32, for use in NumPy; raise where `check_triples` does, and where they are traced."""
    if isinstance(triples, Tracer):
        raise JaxhpoError(f"`{what}` is traced, but NumPy needs values: call this outside `jit`, `grad` and `vmap`.")
    return np.asarray(check_triples(triples, sizes, what, least), np.int32)
