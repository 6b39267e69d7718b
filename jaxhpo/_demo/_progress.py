"""Progress on stderr: a bar where one can be drawn, else one plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any


def track(items: Any, name: str, *, interval: float = 5.0) -> Iterator:
    """Yields the items of a sequence, showing how far the caller is.

    Args:
      items: a sequence, or an array, whose rows are the items.
      name: what is being done.
      interval: seconds between plain lines.

    Example:
      >>> sum(track([1, 2, 3], "adding"))
      6
    """
    bar = _bar(len(items), name)
    start = shown = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if bar is not None:
            bar.update()
        elif done == len(items) or now - shown >= interval:
            shown = now
            print(f"{name}: {done}/{len(items)}, {now - start:.1f} s", file=sys.stderr, flush=True)
    if bar is not None:
        bar.close()


def _bar(total: int, name: str):
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=f"{name:<22}", file=sys.stderr, unit="", ncols=88)
