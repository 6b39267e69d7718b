"""The command line: `jaxhpo demo`, `jaxhpo compare`, `jaxhpo show`, `jaxhpo plot`."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import pathlib
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence

import numpy as np

import jaxhpo
from jaxhpo import plot
from jaxhpo._cli import demo, problems
from jaxhpo._core.progress import say, text_table, write
from jaxhpo._tune import table

QUICK = {"seeds": 2, "ablations": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: such as `["demo", "--quick"]`; None takes those of the process.

    Returns:
      The exit code: 0 on success, 1 on an error, 130 after Ctrl-C.

    Raises:
      SystemExit: with code 2 for invalid arguments, and 0 after `--help` or `--version`.

    Example:
      >>> from jaxhpo._cli.main import main
      >>> main(["demo", "--quick", "--out", "/tmp/jaxhpo-demo"])  # doctest: +SKIP
      0
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.name is None:
        parser.error("name a COMMAND: demo, compare, show or plot")
    try:
        parsed.command(parsed)
        return 0
    except BrokenPipeError:  # as of `jaxhpo show runs/1 | head -1`: what is left goes nowhere, also at the exit
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 1
    except (ImportError, OSError, jaxhpo.JaxhpoError) as error:
        say(f"jaxhpo {parsed.name}: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"\njaxhpo {parsed.name}: interrupted.")
        return 130


# --- arguments --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that ends its help with examples, and names the choice or option nearest to a misspelt one."""

    def __init__(self, *, description: str, examples: Sequence[str] = (), more: str = "", **settings):
        lines = ["examples:", *(f"  jaxhpo {example}" for example in examples), *(["", _filled(more)] if more else [])]
        settings |= {"description": _filled(description), "epilog": "\n".join(lines)}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses what this command does not know, with its own usage, where argparse shows that of all commands."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = re.findall(r"--[\w-]+", self.format_help())
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_near(unknown[0].split('=')[0], options)}")
        return found, unknown

    def error(self, message):
        """Prints the message and exits with code 2."""
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        super().error(message + _near(found[1], re.findall(r"[\w-]+", found[2])) if found else message)


def _near(given: str, known: Collection[str]) -> str:
    """Asks for what is nearest to what was given, if anything is near."""
    near = difflib.get_close_matches(given, known, 1)
    return f". Did you mean {near[0]}?" if near else ""


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 79, break_on_hyphens=False)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jaxhpo",
        description="Hyperparameters by their gradient: a demo, a comparison of methods, and runs of jaxhpo.tune.",
        examples=["demo --quick", "compare --problem ridge", "show runs/1"],
        more="`jaxhpo COMMAND --help` has the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"jaxhpo {jaxhpo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="name")

    def add(command: Callable[[argparse.Namespace], None], *examples: str, more: str = "") -> argparse.ArgumentParser:
        summary, _, text = (command.__doc__ or "").partition("\n\n")  # no docstrings under `python -OO`
        name = command.__name__[1:]
        own = [f"{name} {example}" for example in examples]
        added = commands.add_parser(name, help=summary, description=text, examples=own, more=more)
        added.set_defaults(command=command)
        return added

    of_demo = add(_demo, "--quick", "--seeds 4 --out demo-of-4-seeds")
    for name, minimum, text in (
        ("seeds", 2, "repetitions, each with its own split, initial weights and minibatches"),
        ("outer_steps", 1, "hypergradient steps; the other methods get as many training steps"),
        ("seed", 0, "seed of the first repetition; the others follow it"),
    ):
        reason = ", since standard errors are taken across seeds" if name == "seeds" else ""
        text = f"{text} (default: {getattr(demo.Settings, name)})"
        _add_count(of_demo, f"--{name.replace('_', '-')}", text, minimum, argparse.SUPPRESS, reason)
    _add_out(of_demo, "jaxhpo-demo")
    text = f"half the work: {QUICK['seeds']} seeds, without penalties and schedule alone"
    of_demo.add_argument("--quick", action="store_true", help=text)

    methods = f"methods: {', '.join(problems.METHODS)}; without --methods {', '.join(problems.USUAL)}"
    of_compare = add(_compare, "--problem ridge", "--problem mlp --methods unroll,cg,neumann", more=methods)
    of_compare.add_argument("--problem", required=True, choices=list(problems.PROBLEMS), help="mlp needs scikit-learn")
    names = "comma-separated names, of those below"
    of_compare.add_argument("--methods", type=_methods, default=problems.USUAL, metavar="NAMES", help=names)
    _add_count(of_compare, "--num-steps", "inner steps (default: the problem's own)")
    _add_count(of_compare, "--seed", "seed of the data and initial weights (default: %(default)s)", 0, 0)
    _add_out(of_compare, "jaxhpo-compare")

    of_show, of_plot = add(_show, "runs/1", "runs/1 --rows 50"), add(_plot, "runs/1", "runs/1 --out run.pdf")
    for of_run in (of_show, of_plot):
        of_run.add_argument("run_dir", type=pathlib.Path, metavar="RUN_DIR", help="the run_dir of jaxhpo.tune")
    _add_count(of_show, "--rows", "rows of the table (default: %(default)s)", 1, 10)
    text = "a .png, .pdf or .svg (default: RUN_DIR/run.png)"
    of_plot.add_argument("--out", type=pathlib.Path, metavar="FILE", help=text)
    return parser


def _add_out(parser, folder: str) -> None:
    text = "folder to write into (default: %(default)s)"
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(folder), metavar="DIR", help=text)


def _add_count(parser, flag: str, text: str, minimum: int = 1, default=None, reason: str = "") -> None:
    def convert(given: str) -> int:
        with contextlib.suppress(ValueError):
            if int(given) >= minimum:
                return int(given)
        raise argparse.ArgumentTypeError(f"got {given!r}: write an integer, {minimum} or more{reason}")

    parser.add_argument(flag, type=convert, default=default, metavar="N", help=text)


def _methods(text: str) -> tuple[str, ...]:
    """Argument type: names of methods."""
    names = tuple(name for name in text.replace(" ", "").split(",") if name)
    unknown = [name for name in names if name not in problems.METHODS]
    if unknown or not names:
        got = f"got the unknown method {unknown[0]!r}" if unknown else "got no name"
        near = _near(unknown[0], problems.METHODS) if unknown else ""
        raise argparse.ArgumentTypeError(f"{got}: write some of {', '.join(problems.METHODS)}, with commas{near}")
    return tuple(dict.fromkeys(names))


# --- commands ---------------------------------------------------------------------------------------------------------


def _demo(parsed: argparse.Namespace) -> None:
    """Tune about 5000 hyperparameters, and compare (about a minute).

    Trains a small network on scikit-learn's handwritten digits (no download). Tunes one penalty per weight and a
    learning-rate schedule by the gradient of the validation loss through training. Compares with untuned defaults, a
    grid and random search of as many training steps. Prints a table and writes report.json and demo.png.
    """
    given = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(demo.Settings) if f.name in parsed}
    _make_folder(parsed.out, "report.json and demo.png")
    demo.run(demo.Settings(**(QUICK if parsed.quick else {}) | given), parsed.out)


def _compare(parsed: argparse.Namespace) -> None:
    """Measure hypergradient methods on a ready-made problem.

    Measures the error, time and memory of hypergradient methods on a small ready-made problem, and recommends one.
    Prints a table and writes comparison.json and comparison.png. For your own problem, call jaxhpo.compare.
    """
    _make_folder(parsed.out, "comparison.json and comparison.png")
    plot.figure()  # raises now, not after the work, if matplotlib is missing
    steps = () if parsed.num_steps is None else (parsed.num_steps,)
    problem = problems.PROBLEMS[parsed.problem](parsed.seed, *steps)
    rules = [problems.METHODS[name](problem) for name in parsed.methods]
    comparison = jaxhpo.compare(problem.make_outer_loss, problem.hparams, rules)
    report = {"problem_name": parsed.problem, "title": problem.title, "seed": parsed.seed} | comparison.to_dict()
    text = json.dumps(report, indent=2, allow_nan=False)
    (parsed.out / "comparison.json").write_text(text + "\n", encoding="utf-8")
    plot.comparison(comparison, parsed.out / "comparison.png")
    _print(
        f"{parsed.problem}: {problem.title}.",
        comparison,
        f"\nWritten: {parsed.out / 'comparison.json'}, {parsed.out / 'comparison.png'}.",
    )


def _show(parsed: argparse.Namespace) -> None:
    """Print the state of a run of jaxhpo.tune, finished or not.

    Prints the last outer steps of a run, its best one, and the counts of remedies.
    """
    columns, which = table.columns_of_best(parsed.run_dir)
    steps, score = len(columns["value"]), columns["score"]
    shown = _fitting({name: x for name, x in columns.items() if x.ndim == 1 and not name.startswith("remedies")})
    rows = range(max(0, steps - parsed.rows), steps)
    lines = text_table("step", list(shown), ((f"{i:4}", [f"{float(x[i]):.6g}" for x in shown.values()]) for i in rows))
    lines += [f"\n{which}"] * bool(which)
    best = int(np.nanargmin(score)) if not np.isnan(score).all() else None
    found = "no step had a score" if best is None else f"best: {score[best]:.6g} at step {best}"
    lines.append(f"\n{steps} outer steps in {columns['seconds'][-1]:.3g} s; {found}")
    lines.append(table.standing(parsed.run_dir, steps))
    if len(shown) < len(columns):
        lines.append(f"{len(columns) - len(shown)} further columns: jaxhpo.history_table({str(parsed.run_dir)!r})")
    counts = {name[len("remedies['") : -2]: int(x.sum()) for name, x in columns.items() if name.startswith("remedies")}
    if any(counts.values()):
        lines.append("remedies: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n))
    _print(*lines)


def _print(*lines) -> None:
    write("\n".join(map(str, lines)), sys.stdout)


def _fitting(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Choose the columns that fit into the width of the terminal, the most informative first."""
    first = ["value", "score", "hypergradient_norm", "seconds"]
    if np.array_equal(columns["score"], columns["value"], equal_nan=True):
        first.remove("score")
    rest = sorted(columns.keys() - {*first, "score", "peak_bytes"})
    room, shown = shutil.get_terminal_size().columns - 6, {}
    for name in [*first, *rest]:
        room -= _width(name) + 2
        if room < 0:
            break
        shown[name] = columns[name]
    return shown


def _width(name: str) -> int:
    return max(11, len(name))


def _plot(parsed: argparse.Namespace) -> None:
    """Draw the history of a run of jaxhpo.tune, finished or not.

    Draws convergence, the norm of the hypergradient, and the paths of the hyperparameters.
    """
    path = parsed.out or parsed.run_dir / "run.png"
    if parsed.out:
        path.parent.mkdir(parents=True, exist_ok=True)
    plot.run(parsed.run_dir, path)
    _print(f"Written: {path}.")


def _make_folder(path: pathlib.Path, files: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise jaxhpo.JaxhpoError(f"--out got the file {path}: name a folder, to hold {files}.") from None


if __name__ == "__main__":
    raise SystemExit(main())
