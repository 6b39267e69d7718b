"""The command line that benchmarks of several seeds share."""

import argparse
import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"


def parse(
    description: str, arguments, *, seeds: int, quick: int, experiment: str = "", more=None
) -> argparse.Namespace:
    """Reads `--out`, `--quick` and `--seeds`, whose defaults are given, and makes the folder.

    An experiment has a folder of results of its own, and `--run-dir`. `more(parser)` adds arguments.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = RESULTS / "experiments" / experiment if experiment else RESULTS
    parser.add_argument("--out", type=pathlib.Path, default=folder)
    parser.add_argument("--quick", action="store_true", help="a small run, whose figures mean nothing")
    parser.add_argument("--seeds", type=int, help=f"{seeds} unless given, {quick} with --quick")
    if experiment:
        told = "a folder for what is done, from which a run that was ended goes on"
        parser.add_argument("--run-dir", type=pathlib.Path, help=told)
    if more is not None:
        more(parser)
    given = parser.parse_args(arguments)
    if given.seeds is None:
        given.seeds = quick if given.quick else seeds
    if given.seeds < 1:
        parser.error(f"--seeds got {given.seeds}: write a whole number from 1 on")
    given.out.mkdir(parents=True, exist_ok=True)
    return given
