"""The library's own exceptions and warnings."""

import sys
import warnings

AROUND = ("jaxhpo", "jax", "contextlib")  # packages whose frames lie between the user's line and a warning


class JaxhpoError(ValueError):
    """An argument cannot work; the message says what was given, why it cannot work, and what to write instead.

    Example:
      >>> try:
      ...     jaxhpo.Unroll(truncate=0)
      ... except jaxhpo.JaxhpoError as error:
      ...     print(error)
      `Unroll(truncate=...)` got 0, but it must be at least 1: write 1 or more.
    """


class ZeroHypergradientError(JaxhpoError):
    """A hypergradient is exactly zero because the derivative rule, or the problem, cannot see the hyperparameter.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, rate, batch: (p - 1.0) ** 2, lambda rate: optax.sgd(rate))
      >>> def outer_loss(rate):  # where training converges, the rate no longer matters
      ...     start = solver.init(0.0, rate)
      ...     return jaxhpo.solve(solver, start, rate, num_steps=3, adjoint=jaxhpo.Implicit(jaxhpo.CG())).params
      >>> try:
      ...     jaxhpo.tune(outer_loss, 0.1, optax.sgd(0.1), num_steps=1, progress=False)
      ... except jaxhpo.ZeroHypergradientError as error:
      ...     print(error)
      The hypergradient of `hparams` is exactly zero in every entry: hparams does not enter the condition ...
    """


class NonFiniteError(JaxhpoError):
    """A loss, a parameter or a hypergradient is NaN or infinite; the message names the first place where it is.

    Example:
      >>> try:
      ...     jaxhpo.tune(lambda h: jnp.log(h), -1.0, optax.sgd(0.1), num_steps=1, progress=False)
      ... except jaxhpo.NonFiniteError as error:
      ...     print(error)
      Outer step 0: The outer loss is nan. ... It began where `log` ... took the logarithm of -1: ...
    """


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

    Example:
      >>> import warnings
      >>> solver = jaxhpo.from_optax(lambda p, rate, batch: (p - 1.0) ** 2, lambda rate: optax.sgd(rate))
      >>> def outer_loss(rate):
      ...     start = solver.init(0.0, 0.1)
      ...     return jaxhpo.solve(solver, start, rate, num_steps=3, adjoint=jaxhpo.Implicit(jaxhpo.CG())).params
      >>> with warnings.catch_warnings(record=True, action="always") as caught:
      ...     hypergrad = jax.grad(outer_loss)(0.1)
      >>> print(hypergrad == 0, caught[0].message.leaf)
      True hparams
    """

    def __init__(self, message: str, leaf: str = "", partial: bool = False):
        super().__init__(message)
        self.leaf = leaf
        self.partial = partial
