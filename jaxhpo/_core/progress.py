"""Progress on stderr: a bar in a terminal or a notebook with tqdm, else one plain line every few seconds."""

from __future__ import annotations

import contextlib
import sys
import time


class Progress:
    """Shows the progress of a loop. A context manager that runs on the host, outside compiled code.

    Args:
      total: number of steps.
      label: what a step is.
      enabled: False shows nothing.
      every: seconds between plain lines.
      done: steps taken earlier.
    """

    def __init__(self, total: int, label: str = "step", enabled: bool = True, every: float = 5.0, done: int = 0):
        self.total, self.label, self.enabled, self.every, self.done = total, label, enabled, every, done
        self.shown, self.bar = time.perf_counter(), None

    def __enter__(self) -> Progress:
        """Draws the bar, in a terminal or a notebook where tqdm is installed."""
        if self.enabled and (sys.stderr.isatty() or _in_notebook()):
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self.bar = tqdm(total=self.total, initial=self.done, desc=self.label)
        return self

    def update(self, text: str = "") -> None:
        """Counts one step; `text` describes its result."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.enabled and (self.done == self.total or time.perf_counter() - self.shown >= self.every):
            self.shown = time.perf_counter()
            line = f"{self.label} {self.done}/{self.total}"
            print(f"{line}: {text}" if text else line, file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
