"""The long form of the fault suite: `python -m tests.tune.faults --kills 200 --times 20`. Prints what was lost."""

import argparse
import pathlib
import random
import signal
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import faults  # noqa: E402


def disturbed(times: int, seed: int) -> int:
    """Injects every fault but kills, `times` times each; returns the number of runs that failed."""
    lost = 0
    with tempfile.TemporaryDirectory() as whole:
        faults.tune(whole)
        want = faults.end(whole)
    for fault in faults.FAULTS:
        failed = 0
        for i in range(times):
            try:
                faults.survives(fault, want, seed + i)
            except AssertionError as error:
                failed += 1
                print(f"{fault.__name__}, seed {seed + i}: {error}", flush=True)
        print(f"{fault.__name__}: {times} times, {failed} lost", flush=True)
        lost += failed
    return lost


def main() -> int:
    """Returns the exit code: 0 where no run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.tune.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kill -9 at random moments (default: %(default)s)")
    parser.add_argument("--times", type=int, default=20, help="of every other fault (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    lost = disturbed(parsed.times, parsed.seed) if parsed.times else 0
    if parsed.kills:
        with tempfile.TemporaryDirectory() as whole:
            seconds = faults.undisturbed(whole)
            want = faults.end(whole)
        lost += sum(faults.chains(parsed.kills, seconds, want, random.Random(parsed.seed)))
    print("nothing was lost" if not lost else f"{lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    raise SystemExit(main())
