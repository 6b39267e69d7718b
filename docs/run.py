"""Runs the examples of pages, and compares or renews what the pages say that they print.

The Python blocks of a page run in their order, in one new process, in an empty folder, with warnings as errors. A text
block right after a Python block is what that one prints. Lines may be broken elsewhere, and numbers may differ by a
tenth, as between machines; times by anything.

    python docs/run.py [PAGE ...] [--write]
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
# Pages whose script needs several processes, and the test that runs it.
ELSEWHERE = {"several_hosts.md": "tests/tune/faults/test_processes.py"}

MADE = {"_build", "api", "notebooks", "repository"}  # folders of pages that `sources.py` and Sphinx write

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```(?:\n|\Z))?", re.DOTALL | re.MULTILINE)
# Every fence that says that it is Python: of those that BLOCK does not match, `blocks` says so.
FENCE = re.compile(r"^ *(?:```|:::)+ *(?:\{.*\} *)?(?:python|py|pycon)", re.MULTILINE)
NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
TIME = re.compile(r"\d+(?:\.\d+)? ?(?:s|ms|min|h|seconds?|minutes?)\b")
TOLERANCE = 0.1  # relative, and absolute for numbers below one

# Reads blocks, runs them, writes what each printed. A page's own process, so that it starts from nothing.
DRIVER = """
import contextlib, io, json, pathlib, sys
exchange, printed, names = pathlib.Path(sys.argv[1]), [], {"__name__": "__main__"}
blocks = json.loads(exchange.read_text())
for number, block in enumerate(blocks, 1):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, f"{sys.argv[2]}, block {number}", "exec"), names)
    printed.append(out.getvalue())
exchange.with_name("printed.json").write_text(json.dumps(printed))
"""


def pages() -> list[pathlib.Path]:
    """The README and all pages with examples that run by themselves."""
    found = [ROOT / "README.md", *written()]
    return [page for page in found if BLOCK.search(page.read_text()) and page.name not in ELSEWHERE]


def written() -> list[pathlib.Path]:
    """The pages that are written by hand."""
    return [page for page in sorted(DOCS.rglob("*.md")) if not MADE & set(page.relative_to(DOCS).parts)]


def blocks(page: pathlib.Path) -> list[re.Match]:
    """The Python blocks of a page, each with the text block below it.

    Raises:
      ValueError: where a fence of Python is written so that its block would be left out.
    """
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    if outside := {match.start() for match in FENCE.finditer(text)} - {match.start() for match in found}:
        line = text[: min(outside)].count("\n") + 1
        raise ValueError(f"the block at line {line} would not run: write ```python at a line's start")
    return found


def run(page: pathlib.Path) -> list[str]:
    """Run the Python blocks of a page, and return what each prints."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = pathlib.Path(folder) / "blocks.json"
        exchange.write_text(json.dumps([match[1] for match in blocks(page)]))
        (empty := pathlib.Path(folder) / "empty").mkdir()
        command = [sys.executable, "-W", "error", "-c", DRIVER, str(exchange), page.name]
        subprocess.run(command, cwd=empty, check=True)
        return json.loads(exchange.with_name("printed.json").read_text())


def difference(shown: str, printed: str) -> str | None:
    """What differs between a text block and what is printed, but for line ends and for what numbers may differ by."""
    there, here = (" ".join(TIME.sub("some time", text).split()) for text in (shown, printed))
    if NUMBER.sub("#", there) != NUMBER.sub("#", here):
        return f"the page has\n{shown}\nand it prints\n{printed}"
    for a, b in zip(NUMBER.findall(there), NUMBER.findall(here), strict=True):
        x, y = (float(text.replace("−", "-")) for text in (a, b))
        if abs(x - y) > TOLERANCE * max(1.0, abs(x)):
            return f"the page has {a} where it prints {b}, in\n{printed}"
    return None


def main() -> int:
    """Check or renew pages; returns 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=pathlib.Path, metavar="PAGE", help="files (default: all)")
    parser.add_argument("--write", action="store_true", help="renew the text blocks")
    given = parser.parse_args()
    failed = 0
    for page in given.pages or pages():
        if not page.is_file():
            parser.error(f"`{page}` is not a file")
        try:
            found, printed = blocks(page), run(page)
            shown = [got for match, got in zip(found, printed, strict=True) if match[2] is not None]
            if any(line.startswith("```") for got in shown for line in got.splitlines()):
                raise ValueError("an example prints a fence, which would end its text block: print it indented")
        except (subprocess.CalledProcessError, FileNotFoundError):  # told by the traceback, or the page ended by itself
            failed = 1
            print(f"{page}: an example raised", file=sys.stderr)
        except ValueError as error:
            failed = 1
            print(f"{page}: {error}", file=sys.stderr)
        else:
            if given.write:
                renew(page, printed)
                continue
            for match, got in zip(found, printed, strict=True):
                if match[2] is not None and (differs := difference(match[2], got)):
                    failed = 1
                    print(f"{page}: {differs}", file=sys.stderr)
    return failed


def renew(page: pathlib.Path, printed: list[str]) -> None:
    """Write what the blocks print into their text blocks; nothing else of the page changes."""
    prints, crlf = iter(printed), b"\r\n" in page.read_bytes()

    def renewed(match: re.Match) -> str:
        text = next(prints)
        return match[0] if match[2] is None else f"```python\n{match[1]}```\n\n```text\n{text.rstrip()}\n```\n"

    page.write_text(BLOCK.sub(renewed, page.read_text()), newline="\r\n" if crlf else "\n")


if __name__ == "__main__":
    raise SystemExit(main())
