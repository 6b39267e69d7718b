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
from collections.abc import Callable, Sequence

import numpy as np

import jaxhpo
from jaxhpo import plot
from jaxhpo._cli import demo, problems
from jaxhpo._core.progress import say, write
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
    parsed = _parser().parse_args(arguments)
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
    """A parser that names the choice nearest to a misspelt one."""

    def error(self, message):
        """Prints the message and exits with code 2."""
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), 1) if found else []
        super().error(f"{message}. Did you mean {near[0]}?" if near else message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxhpo", description="Gradient-based hyperparameter optimisation in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxhpo {jaxhpo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="name")

    def add(command: Callable[[argparse.Namespace], None], **more) -> argparse.ArgumentParser:
        summary, _, description = (command.__doc__ or "").partition("\n\n")  # no docstrings under `python -OO`
        added = commands.add_parser(command.__name__[1:], help=summary, description=description, **more)
        added.set_defaults(command=command)
        return added

    of_demo = add(_demo)
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

    of_compare = add(_compare, epilog="methods: " + ", ".join(problems.METHODS))
    of_compare.add_argument("--problem", required=True, choices=list(problems.PROBLEMS), help="mlp needs scikit-learn")
    names = f"comma-separated names (default: {','.join(problems.USUAL)})"
    of_compare.add_argument("--methods", type=_methods, default=problems.USUAL, metavar="NAMES", help=names)
    _add_count(of_compare, "--num-steps", "inner steps (default: the problem's own)")
    _add_count(of_compare, "--seed", "seed of the data and initial weights (default: %(default)s)", 0, 0)
    _add_out(of_compare, "jaxhpo-compare")

    of_show, of_plot = add(_show), add(_plot)
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
        raise argparse.ArgumentTypeError(f"{got}: write some of {', '.join(problems.METHODS)}, separated by commas")
    return tuple(dict.fromkeys(names))


# --- commands ---------------------------------------------------------------------------------------------------------


def _demo(parsed: argparse.Namespace) -> None:
    """Tune about 5000 hyperparameters of a digit classifier by their gradient, and compare (about a minute).

    Trains a small network on scikit-learn's handwritten digits (no download). Tunes one penalty per weight and a
    learning-rate schedule by the gradient of the validation loss through training. Compares with untuned defaults, a
    grid and random search of as many training steps. Prints a table and writes report.json and demo.png.
    """
    given = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(demo.Settings) if f.name in parsed}
    _make_folder(parsed.out, "report.json and demo.png")
    demo.run(demo.Settings(**(QUICK if parsed.quick else {}) | given), parsed.out)


def _compare(parsed: argparse.Namespace) -> None:
    """Measure hypergradient methods on a ready-made problem, and recommend one.

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
    """Print the state of a run of tune, finished or not.

    Prints the last outer steps of a run, its best one, and the counts of remedies.
    """
    columns, which = table.columns_of_best(parsed.run_dir)
    steps, score = len(columns["value"]), columns["score"]
    shown = _fitting({name: x for name, x in columns.items() if x.ndim == 1 and not name.startswith("remedies")})
    lines = [f"{'step':>6}" + "".join(f"  {name:>{_width(name)}}" for name in shown)]
    for step in range(max(0, steps - parsed.rows), steps):
        lines.append(f"{step:6}" + "".join(f"  {float(x[step]):{_width(name)}.6g}" for name, x in shown.items()))
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
    """Draw the history of a run of tune, finished or not.

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
