"""The command line: `jaxhpo demo`, `jaxhpo compare`, `jaxhpo show`, `jaxhpo plot`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence

import numpy as np

import jaxhpo
from jaxhpo import plot
from jaxhpo._cli import demo, problems
from jaxhpo._tune import table

QUICK = {"seeds": 2, "outer_steps": 3, "num_steps": 30}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: such as `["demo", "--quick"]`; None takes the process's own.

    Returns:
      The exit code: 0 when the command did its work, 1 when it could not, 130 after Ctrl-C.

    Raises:
      SystemExit: with code 2 for arguments that cannot work, and 0 after `--help` or `--version`.

    Example:
      >>> from jaxhpo._cli.main import main
      >>> main(["demo", "--quick", "--out", "/tmp/jaxhpo-demo"])  # doctest: +SKIP
      0
    """
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except (ImportError, OSError, jaxhpo.JaxhpoError) as error:
        print(f"jaxhpo {parsed.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\njaxhpo {parsed.name}: interrupted.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxhpo", description="Gradient-based hyperparameter optimisation in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxhpo {jaxhpo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="name")
    _add_demo(commands)
    _add_compare(commands)
    _add_show(commands)
    _add_plot(commands)
    return parser


def _add_demo(commands) -> None:
    defaults = demo.Settings()
    parser = commands.add_parser(
        "demo",
        help="tune about 5000 hyperparameters of a digit classifier by their gradient, and compare (under two minutes)",
        description=(
            "Trains a small network on scikit-learn's handwritten digits (no download). One penalty for every weight "
            "and a learning-rate schedule are tuned by the gradient of the validation loss through training, and "
            "compared, at the same number of training steps, with untuned defaults, a grid and random search. Prints "
            "a table and writes report.json and demo.png."
        ),
    )
    unset = argparse.SUPPRESS
    parser.add_argument(
        "--seeds",
        type=_integer(2, "standard errors are taken across seeds"),
        default=unset,
        metavar="N",
        help=f"repetitions, each with its own split, initial weights and minibatches (default: {defaults.seeds})",
    )
    parser.add_argument(
        "--outer-steps",
        type=_integer(1, "it counts steps on the hyperparameters"),
        default=unset,
        metavar="N",
        help=f"hypergradient steps; the other methods get as many training steps (default: {defaults.outer_steps})",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, "seeds count from zero"),
        default=unset,
        metavar="N",
        help=f"seed of the first repetition; the others follow it (default: {defaults.seed})",
    )
    _add_out(parser, "jaxhpo-demo")
    short = "{seeds} seeds, {outer_steps} outer and {num_steps} inner steps".format(**QUICK)
    parser.add_argument("--quick", action="store_true", help=f"a few seconds, to see that it runs: {short}")
    parser.set_defaults(command=_run_demo)


def _add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="measure hypergradient methods on a ready-made problem, and say which one to take",
        description=(
            "Measures hypergradient methods on a small ready-made problem: error, time and memory of each, and which "
            "one to take. Prints a table and writes comparison.json and comparison.png. For a problem of your own, "
            "call jaxhpo.compare."
        ),
        epilog="methods: " + ", ".join(problems.METHODS),
    )
    parser.add_argument(
        "--problem", required=True, choices=list(problems.PROBLEMS), help="which problem; mlp needs scikit-learn"
    )
    parser.add_argument(
        "--methods",
        type=_methods,
        default=problems.USUAL,
        metavar="NAMES",
        help=f"names with commas between (default: {','.join(problems.USUAL)})",
    )
    parser.add_argument(
        "--num-steps",
        type=_integer(1, "it counts inner training steps"),
        metavar="N",
        help="inner steps (default: the problem's own)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, "seeds count from zero"),
        default=0,
        metavar="N",
        help="seed of the data and initial weights (default: %(default)s)",
    )
    _add_out(parser, "jaxhpo-compare")
    parser.set_defaults(command=_run_compare)


def _add_show(commands) -> None:
    parser = commands.add_parser(
        "show",
        help="print how a run of tune stands, also while it is going on",
        description="Prints the last outer steps of a run, its best one, and what remedies did.",
    )
    parser.add_argument("run_dir", type=pathlib.Path, metavar="RUN_DIR", help="the run_dir of jaxhpo.tune")
    rows = _integer(1, "it counts rows")
    parser.add_argument("--rows", type=rows, default=10, metavar="N", help="of the table (default: %(default)s)")
    parser.set_defaults(command=_run_show)


def _add_plot(commands) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw how a run of tune went, also while it is going on",
        description="Draws convergence, the norm of the hypergradient, and the paths of the hyperparameters.",
    )
    parser.add_argument("run_dir", type=pathlib.Path, metavar="RUN_DIR", help="the run_dir of jaxhpo.tune")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE", help="a .png, .pdf or .svg (default: RUN_DIR/run.png)"
    )
    parser.set_defaults(command=_run_plot)


def _add_out(parser, folder: str) -> None:
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(folder),
        metavar="DIR",
        help="folder to write into (default: %(default)s)",
    )


def _methods(text: str) -> tuple[str, ...]:
    """An argument type: names of methods."""
    names = tuple(name for name in text.replace(" ", "").split(",") if name)
    unknown = [name for name in names if name not in problems.METHODS]
    if unknown or not names:
        got = f"got {unknown[0]!r}, which is no method" if unknown else "got no name"
        raise argparse.ArgumentTypeError(f"{got}: write some of {', '.join(problems.METHODS)}, with commas between")
    return tuple(dict.fromkeys(names))


def _integer(minimum: int, why: str) -> Callable[[str], int]:
    """An argument type: an integer that is at least `minimum`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, but {why}: write an integer such as {minimum}") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"got {number}, but {why}: write {minimum} or more")
        return number

    return convert


def _run_demo(parsed: argparse.Namespace) -> int:
    """`jaxhpo demo`."""
    given = {field.name for field in dataclasses.fields(demo.Settings)} & set(vars(parsed))
    chosen = (QUICK if parsed.quick else {}) | {name: getattr(parsed, name) for name in given}
    _make_folder(parsed.out, "report.json and demo.png")
    demo.run(demo.Settings(**chosen), parsed.out)
    return 0


def _run_compare(parsed: argparse.Namespace) -> int:
    """`jaxhpo compare`."""
    _make_folder(parsed.out, "comparison.json and comparison.png")
    plot.figure()  # a missing matplotlib is to be known now, not after the work
    steps = () if parsed.num_steps is None else (parsed.num_steps,)
    problem = problems.PROBLEMS[parsed.problem](parsed.seed, *steps)
    rules = [problems.METHODS[name](problem) for name in parsed.methods]
    comparison = jaxhpo.compare(problem.make_outer_loss, problem.hparams, rules)
    print(f"{parsed.problem}: {problem.title}.\n{comparison}", flush=True)
    report = {"problem_name": parsed.problem, "title": problem.title, "seed": parsed.seed} | comparison.to_dict()
    text = json.dumps(report, indent=2, allow_nan=False)
    (parsed.out / "comparison.json").write_text(text + "\n", encoding="utf-8")
    plot.comparison(comparison, parsed.out / "comparison.png")
    print(f"\nWritten: {parsed.out / 'comparison.json'}, {parsed.out / 'comparison.png'}.")
    return 0


def _run_show(parsed: argparse.Namespace) -> int:
    """`jaxhpo show`."""
    columns, which = table.columns_of_best(parsed.run_dir)
    steps, best = len(columns["value"]), int(np.nanargmin(columns["score"]))
    shown = _that_fit({name: x for name, x in columns.items() if x.ndim == 1 and not name.startswith("remedies")})
    print(f"{'step':>6}" + "".join(f"  {name:>{_width(name)}}" for name in shown))
    for step in range(max(0, steps - parsed.rows), steps):
        print(f"{step:6}" + "".join(f"  {x[step]:{_width(name)}.6g}" for name, x in shown.items()))
    if which:
        print(f"\n{which}")
    print(f"\n{steps} outer steps in {columns['seconds'][-1]:.3g} s; best: {columns['score'][best]:.6g} at step {best}")
    print(table.standing(parsed.run_dir, steps))
    if len(shown) < len(columns):
        print(f"{len(columns) - len(shown)} further columns: jaxhpo.history_table({str(parsed.run_dir)!r})")
    counts = {name[len("remedies['") : -2]: int(x.sum()) for name, x in columns.items() if name.startswith("remedies")}
    if any(counts.values()):
        print("remedies: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n))
    return 0


def _that_fit(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As many columns as the terminal is wide, those first that tell most."""
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


def _run_plot(parsed: argparse.Namespace) -> int:
    """`jaxhpo plot`."""
    path = parsed.out or parsed.run_dir / "run.png"
    plot.run(parsed.run_dir, path)
    print(f"Written: {path}.")
    return 0


def _make_folder(path: pathlib.Path, files: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise jaxhpo.JaxhpoError(f"--out got {path}, a file, but {files} are written into it: name a folder.") from None


if __name__ == "__main__":
    raise SystemExit(main())
