"""Seeded, disjoint train/validation/test splits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import check_count


class Examples(NamedTuple):
    """Inputs with their targets; unpacks as `inputs, targets`.

    Attributes:
      inputs: array with leading axis "example".
      targets: array with the same leading axis.
    """

    inputs: np.ndarray
    targets: np.ndarray


class Split(NamedTuple):
    """Three parts of one data set that share no example.

    Attributes:
      train: what the inner problem trains on.
      validation: what the outer problem, the choice of hyperparameters, looks at.
      test: what is looked at once, at the end.
    """

    train: Examples
    validation: Examples
    test: Examples


def split(examples: Examples, seed: int = 0, *, train: int, validation: int, test: int | None = None) -> Split:
    """Deals shuffled examples into three disjoint parts.

    Args:
      examples: the whole data set.
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training examples.
      validation: number of validation examples.
      test: number of test examples; None takes all that remain.

    Returns:
      A `Split`.

    Raises:
      JaxhpoError: if a size is no positive integer, or the parts together need more examples than there are.

    Example:
      >>> import numpy as np
      >>> from jaxhpo.data import Examples, split
      >>> parts = split(Examples(np.arange(10.0), np.arange(10)), train=5, validation=3)
      >>> [len(part.targets) for part in parts]
      [5, 3, 2]
    """
    check_count("seed", seed, 0)
    check_count("train", train)
    check_count("validation", validation)
    size = len(examples.targets)
    rest = size - train - validation
    if test is None:
        test = rest
    else:
        check_count("test", test)
    if test < 1 or test > rest:
        asked = "the rest" if test == rest else test
        raise JaxhpoError(
            f"`train={train}, validation={validation}, test={asked}` do not fit into {size} examples: the three parts "
            f"are disjoint and none may be empty. Write sizes whose sum is at most {size}, leaving 1 or more for test."
        )
    order = np.random.default_rng(seed).permutation(size)
    bounds = (0, train, train + validation, train + validation + test)
    picks = [order[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    return Split(*(Examples(examples.inputs[pick], examples.targets[pick]) for pick in picks))
