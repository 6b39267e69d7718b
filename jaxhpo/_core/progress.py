"""Lines of text for any stream; progress on stderr, which never ends the work that it shows."""

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

EVERY = 5.0  # seconds between plain lines
FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # without tqdm's estimate, which counts compilation


def write(text: str, stream) -> None:
    """Prints a line, with escapes for the characters that the stream's encoding lacks; None takes nothing."""
    if stream is None:  # of a process without a console
        return
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        print(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding), file=stream, flush=True)


def text_table(corner: str, heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """Returns the lines of a table: a head, a rule, and rows, each a name and its figures."""
    cells = [(corner, *heads), *((name, *figures) for name, figures in rows)]
    name, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = [f"{row[0]:{name}}" + "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths, strict=True)) for row in cells]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def say(text: str) -> None:
    """Prints a line on stderr; where that is closed, broken or full, does without."""
    with contextlib.suppress(Exception):
        write(text, sys.stderr)


class Progress(contextlib.ExitStack):
    """Shows the progress of a loop. A context manager that runs on the host, outside compiled code.

    In a terminal or a notebook it draws a bar, where tqdm is installed; else it prints a line every few seconds. Either
    has an estimate of the time that remains, by the mean of the steps but the first, which compiles.

    Args:
      total: number of steps.
      label: what a step is.
      enabled: False shows nothing.
      done: steps taken earlier.
      delay: seconds in which nothing is shown: work that ends within them is silent.
    """

    def __init__(self, total: int, label: str = "step", enabled: bool = True, done: int = 0, delay: float = 0.0):
        super().__init__()
        self.total, self.label, self.enabled, self.done = total, label, enabled, done
        self.shown, self.first = time.perf_counter(), None
        self.begins = self.shown + delay
        self.bar: Any = None
        self.callback(self._close)
        with contextlib.suppress(Exception):  # tqdm is absent, or stderr is None, closed, or no terminal
            ipython = sys.modules.get("IPython")
            if enabled and ((ipython and ipython.get_ipython()) or sys.stderr.isatty()):
                from tqdm.auto import tqdm

                self.bar = tqdm(total=total, initial=done, desc=label, bar_format=FORMAT, delay=delay)

    def note(self, text: str) -> None:
        """Shows at once what is going on before the next step ends."""
        self._show("", text, 0)

    def update(self, text: str = "", steps: int = 1) -> None:
        """Counts steps; `text` describes their result."""
        self.done += steps
        now, left = time.perf_counter(), ""
        before, since = self.first = self.first or (self.done, now)
        if before < self.done < self.total:
            left = f"{_duration((self.total - self.done) * (now - since) / (self.done - before))} left"
        self._show(left, text, steps)

    def _show(self, left: str, text: str, steps: int) -> None:
        """Shows a text after so many more steps: in the bar, or, at the end, after a while or without a step, alone."""
        if self.bar is not None:
            try:
                self.bar.set_postfix_str(", ".join(filter(None, (left, text))), refresh=not steps)
                self.bar.update(steps)
                return
            except Exception:
                self._close()  # and goes on with lines
        now = time.perf_counter()
        if self.enabled and now >= self.begins and (not steps or self.done == self.total or now - self.shown >= EVERY):
            self.shown = now
            line = f"{self.label} {self.done}/{self.total}{f' ({left})' * bool(left)}"
            say(f"{line}: {text}" if text else line)

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # also of None
            self.bar.close()
        self.bar = None


def _duration(seconds: float) -> str:
    """Returns a rough duration in one unit."""
    unit, size = next((unit for unit in (("h", 3600), ("min", 60)) if seconds >= 1.5 * unit[1]), ("s", 1))
    return f"about {max(1, round(seconds / size))} {unit}"
