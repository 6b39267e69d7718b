"""Triples as arrays: checks, and which other answers to their questions are known."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import check_count, describe

SIDES = "spo"


def masks(
    triples: np.ndarray, known: np.ndarray, num_entities: int, num_relations: int, sides: str = "so"
) -> dict[str, np.ndarray]:
    """Where another answer than a triple's own is known to be true: what a masked loss and filtered ranks leave out.

    **Cost and bias**: n × entities bytes a side, in NumPy, so for minibatches of a large graph, or small graphs.

    Args:
      triples: integers (n, 3), concrete.
      known: integers (m, 3), the triples that are known, such as those of the training and validation parts; m ≥ 0.
      num_entities: in all.
      num_relations: in all.
      sides: which of "s", "p" and "o" are asked for.

    Returns:
      For each side a boolean (n, entities, or relations for "p"); never true at the triple's own answer.

    Raises:
      JaxhpoError: what is not triples, or out of range; an unknown side.

    Example:
      >>> from jaxhpo.models import link_prediction
      >>> known = np.array([[0, 0, 1], [0, 0, 2]])
      >>> link_prediction.masks(known[:1], known, 3, 1, sides="o")["o"].tolist()
      [[False, False, True]]
    """
    check_count("num_entities", num_entities)
    check_count("num_relations", num_relations)
    sizes = num_entities, num_relations
    triples = concrete_triples(triples, sizes, "triples")
    known = concrete_triples(known, sizes, "known", least=0)
    return {side: Known(known, sizes, side).mask(triples) for side in check_sides(sides)}


class Known:
    """Known triples, sorted by the question that one side of them answers."""

    def __init__(self, known: np.ndarray, sizes: tuple[int, int], side: str):
        self.side, self.sizes = side, sizes
        questions = self._question(known)
        order = np.argsort(questions, kind="stable")
        self.questions, self.answers = questions[order], known[order, SIDES.index(side)]

    def _question(self, triples) -> np.ndarray:
        s, p, o = triples.astype(np.int64).T
        num_entities, num_relations = self.sizes
        return {"s": p * num_entities + o, "p": s * num_entities + o, "o": s * num_relations + p}[self.side]

    def mask(self, triples: np.ndarray) -> np.ndarray:
        """Where another answer than the triple's own is known: bool (n, answers)."""
        asked = self._question(triples)
        first, last = (np.searchsorted(self.questions, asked, end) for end in ("left", "right"))
        count = last - first
        rows = np.repeat(np.arange(len(asked)), count)
        places = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
        mask = np.zeros((len(asked), self.sizes[self.side == "p"]), bool)
        mask[rows, self.answers[places]] = True
        mask[np.arange(len(asked)), triples[:, SIDES.index(self.side)]] = False
        return mask


def check_side(side: str) -> None:
    """Raises unless this is "s", "p" or "o"."""
    if side not in tuple(SIDES):
        raise JaxhpoError(f"`side` got {side!r}: write 's' for subjects, 'p' for relations, 'o' for objects.")


def check_sides(sides: str) -> str:
    """Raises unless these are some of "s", "p" and "o"."""
    if not isinstance(sides, str) or not sides or set(sides) - set(SIDES) or len(set(sides)) < len(sides):
        raise JaxhpoError(f"`sides` got {sides!r}, but it names subjects, relations and objects: write 'so' or 'spo'.")
    return sides


def check_triples(triples, sizes: tuple[int, int], what: str, least: int = 1):
    """Raises unless these are triples of integers, in range where they are concrete; returns them."""
    is_array = isinstance(triples, (np.ndarray, jnp.ndarray)) and jnp.issubdtype(triples.dtype, np.integer)
    if not is_array or triples.shape[1:] != (3,) or len(triples) < least:
        raise JaxhpoError(
            f"`{what}` got {describe(triples)}, but triples are an array of integers (n, 3), n ≥ {least}: subject, "
            "relation, object."
        )
    if not isinstance(triples, Tracer):  # traced ones that are out of range score NaN
        host = np.asarray(triples)
        bounds = np.array([sizes[0], sizes[1], sizes[0]])
        bad = np.flatnonzero(((host < 0) | (host >= bounds)).any(1))
        if bad.size:
            raise JaxhpoError(
                f"`{what}` holds {host[bad[0]].tolist()} in row {bad[0]}, but there are {sizes[0]} entities and "
                f"{sizes[1]} relations, counted from 0: number them so, or make the tables larger."
            )
    return triples


def concrete_triples(triples, sizes: tuple[int, int], what: str, least: int = 1) -> np.ndarray:
    """The same for what is counted or searched in NumPy: int32, not traced."""
    if isinstance(triples, Tracer):
        raise JaxhpoError(f"`{what}` is traced, but is looked up in NumPy: call this outside `jit`, `grad` and `vmap`.")
    return np.asarray(check_triples(triples, sizes, what, least), np.int32)
