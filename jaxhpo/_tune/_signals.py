"""What a machine says before it takes itself away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def noting_sigterm(enabled: bool) -> Iterator[Callable[[], bool]]:
    """While active, SIGTERM is noted and does nothing else; gives a function that tells whether it came.

    The handler that was there is restored. Only the main thread of Python may set one: in another, and where what is
    there was not set by Python, nothing is noted.
    """
    noted: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    if not enabled or before is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGTERM, before)
