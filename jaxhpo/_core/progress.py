"""Progress on stderr: a bar in a terminal or a notebook with tqdm, else one plain line every few seconds."""

import contextlib
import sys
import time

EVERY = 5.0  # seconds between plain lines


class Progress(contextlib.ExitStack):
    """Shows the progress of a loop. A context manager that runs on the host, outside compiled code.

    In a terminal or a notebook it draws a bar, where tqdm is installed.

    Args:
      total: number of steps.
      label: what a step is.
      enabled: False shows nothing.
      done: steps taken earlier.
    """

    def __init__(self, total: int, label: str = "step", enabled: bool = True, done: int = 0):
        super().__init__()
        self.total, self.label, self.enabled, self.done = total, label, enabled, done
        self.shown, self.bar = time.perf_counter(), None
        ipython = sys.modules.get("IPython")
        if enabled and (sys.stderr.isatty() or (ipython and ipython.get_ipython())):
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self.bar = self.enter_context(tqdm(total=total, initial=done, desc=label))

    def update(self, text: str = "") -> None:
        """Counts one step; `text` describes its result."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.enabled and (self.done == self.total or time.perf_counter() - self.shown >= EVERY):
            self.shown = time.perf_counter()
            line = f"{self.label} {self.done}/{self.total}"
            print(f"{line}: {text}" if text else line, file=sys.stderr, flush=True)
