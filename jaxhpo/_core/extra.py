"""Imports of optional packages."""

import contextlib


@contextlib.contextmanager
def needs_extra(who: str, extra: str, otherwise: str = ""):
    """Adds to an `ImportError` within it who needs the package, and which extra of this library installs it.

    Args:
      who: the beginning of the message, such as "`jaxhpo.plot` draws with matplotlib".
      extra: such as "demo".
      otherwise: the end of the message: what to do instead.
    """
    try:
        yield
    except ImportError as error:
        message = f"{who}, which cannot be imported ({error}). Install it: pip install 'jaxhpo[{extra}]'{otherwise}"
        raise ImportError(message) from error
