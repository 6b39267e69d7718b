"""Handwritten digits from scikit-learn, without a download."""

from __future__ import annotations

import numpy as np

from jaxhpo._core.extra import needs_extra
from jaxhpo.data._split import Examples, Split, split


def digits(seed: int = 0, *, train: int = 200, validation: int = 300, test: int | None = None) -> Split:
    """1797 handwritten digits, 8×8 pixels (UCI "Optical Recognition of Handwritten Digits", test part).

    Args:
      seed: integer ≥ 0; the same seed gives the same split on every machine.
      train: number of training images.
      validation: number of validation images.
      test: number of test images; None takes all that remain.

    Returns:
      A `Split` of `Examples`: inputs float32 (n, 64) in [0, 1], row by row; targets int32 (n,) in 0..9.

    Raises:
      ImportError: without scikit-learn.
      JaxhpoError: a size that is not a positive integer, or parts that together need more than 1797 images.

    Example:
      >>> from jaxhpo.data import digits
      >>> parts = digits(seed=0, train=200, validation=300)
      >>> parts.train.inputs.shape, parts.test.targets.shape
      ((200, 64), (1297,))
    """
    with needs_extra("`jaxhpo.data.digits` needs scikit-learn", "demo"):
        from sklearn.datasets import load_digits
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    everything = Examples((pixels / 16).astype(np.float32), labels.astype(np.int32))
    return split(everything, seed, train=train, validation=validation, test=test)
