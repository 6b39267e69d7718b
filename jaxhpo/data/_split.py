"""Seeded, disjoint train/validation/test splits."""

from typing import NamedTuple

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.validate import check_count


class Examples(NamedTuple):
    """Inputs with their targets; unpacks as `inputs, targets`.

    Attributes:
      inputs: array with one example per entry of the leading axis.
      targets: array with the same leading axis.

    Example:
      >>> from jaxhpo.data import Examples
      >>> inputs, targets = Examples(np.zeros((10, 3)), targets=np.arange(10))
      >>> inputs.shape, targets.shape
      ((10, 3), (10,))
    """

    inputs: np.ndarray
    targets: np.ndarray


class Split(NamedTuple):
    """Three disjoint parts of one data set.

    Attributes:
      train: for the inner problem, the training of parameters.
      validation: for the outer problem, the choice of hyperparameters.
      test: for one final evaluation.

    Example:
      >>> from jaxhpo.data import Examples, split
      >>> parts = split(Examples(np.arange(10.0), np.arange(10)), train=5, validation=3)
      >>> sorted(np.concatenate([part.targets for part in parts]).tolist())  # each example is in one of them
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
      >>> parts.validation.inputs.shape
      (3,)
    """

    train: Examples
    validation: Examples
    test: Examples


def split(examples: Examples, seed: int = 0, *, train: int, validation: int, test: int | None = None) -> Split:
    """Shuffle examples and deal them into three disjoint parts.

    Args:
      examples: the whole data set.
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training examples.
      validation: number of validation examples.
      test: number of test examples; None takes all that remain.

    Returns:
      A `Split`.

    Raises:
      JaxhpoError: a size that is not a positive integer, or parts that together need more examples than there are.

    Example:
      >>> import numpy as np
      >>> from jaxhpo.data import Examples, split
      >>> parts = split(Examples(np.arange(10.0), np.arange(10)), train=5, validation=3)
      >>> [len(part.targets) for part in parts]
      [5, 3, 2]
    """
    check_sizes(seed, train, validation, test)
    size = len(examples.targets)
    rest = size - train - validation
    if rest < (test or 1):
        raise JaxhpoError(
            f"`train={train}, validation={validation}, test={test}` do not fit into {size} examples: the three parts "
            f"are disjoint and none may be empty. Write sizes whose sum is at most {size}, leaving 1 or more for test."
        )
    return Split(*deal(examples, np.random.default_rng(seed), train, validation, test or rest))


def deal(examples: Examples, rng: np.random.Generator, *sizes: int) -> list[Examples]:
    """Draw disjoint parts of these sizes."""
    picks = np.split(rng.permutation(len(examples.targets))[: sum(sizes)], np.cumsum(sizes)[:-1])
    return [Examples(examples.inputs[pick], examples.targets[pick]) for pick in picks]


def check_sizes(seed: int, train: int, validation: int, test: int | None) -> None:
    """Raise unless the seed is an integer ≥ 0 and the sizes are positive integers; `test` may be None."""
    check_count("seed", seed, 0)
    for name, size in {"train": train, "validation": validation, "test": test}.items():
        if size is not None or name != "test":
            check_count(name, size)
