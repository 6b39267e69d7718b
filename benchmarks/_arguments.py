"""The command line that benchmarks of several seeds share."""

import argparse
import pathlib


def parse(description: str, arguments, *, seeds: int, quick: int) -> argparse.Namespace:
    """Reads `--out`, `--quick` and `--seeds`, whose defaults are given, and makes the folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a small run, whose figures mean nothing")
    parser.add_argument("--seeds", type=int, help=f"{seeds} unless given, {quick} with --quick")
    given = parser.parse_args(arguments)
    if given.seeds is None:
        given.seeds = quick if given.quick else seeds
    if given.seeds < 1:
        parser.error(f"--seeds got {given.seeds}: write a whole number from 1 on")
    given.out.mkdir(parents=True, exist_ok=True)
    return given
