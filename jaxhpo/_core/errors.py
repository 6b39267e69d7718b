"""The library's own exceptions and warnings."""

import sys
import warnings

AROUND = ("jaxhpo", "jax", "contextlib")  # packages whose frames lie between the user's line and a warning


class JaxhpoError(ValueError):
    """An argument cannot work; the message says what was given, why it cannot work, and what to write instead."""


class ZeroHypergradientError(JaxhpoError):
    """A hypergradient is exactly zero because the derivative rule, or the problem, cannot see the hyperparameter."""


class NonFiniteError(JaxhpoError):
    """A loss, a parameter or a hypergradient is NaN or infinite; the message names the first place where it is."""


def warn(warning: str | Warning, category: type[Warning] = RuntimeWarning) -> None:
    """Issues a warning at the line of the user's code that called the library."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in AROUND:
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, category, stacklevel=level)


class ZeroHypergradientWarning(UserWarning):
    """A derivative rule treats an input as a constant although it is being differentiated.

    Issued while tracing, when a derivative with respect to that input is taken. The input may still enter the outer
    loss elsewhere, so `solve` only warns; `tune` and `check_hypergradient` see the whole outer loss and raise
    `ZeroHypergradientError`.

    Args:
      message: the text, which names the input, the rule, and a rule that sees the input.
      leaf: the path of the input, such as `hparams['log_lr']`.
      partial: whether only some entries or steps of the input are treated as constants, not the whole leaf.
    """

    def __init__(self, message: str, leaf: str = "", partial: bool = False):
        super().__init__(message)
        self.leaf = leaf
        self.partial = partial
