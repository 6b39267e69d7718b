"""The command line: `jaxhpo demo`."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence

import jaxhpo
from jaxhpo import _demo

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
      >>> from jaxhpo.cli import main
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
    return parser


def _add_demo(commands) -> None:
    defaults = _demo.Settings()
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
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("jaxhpo-demo"),
        metavar="DIR",
        help="folder to write into (default: %(default)s)",
    )
    short = "{seeds} seeds, {outer_steps} outer and {num_steps} inner steps".format(**QUICK)
    parser.add_argument("--quick", action="store_true", help=f"a few seconds, to see that it runs: {short}")
    parser.set_defaults(command=_run_demo)


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
    given = {field.name for field in dataclasses.fields(_demo.Settings)} & set(vars(parsed))
    chosen = (QUICK if parsed.quick else {}) | {name: getattr(parsed, name) for name in given}
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        message = f"--out got {parsed.out}, a file, but report.json and demo.png are written into it: name a folder."
        raise jaxhpo.JaxhpoError(message) from None
    _demo.run(_demo.Settings(**chosen), parsed.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
