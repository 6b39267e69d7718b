"""What experiments share: a loop over seeds that can be resumed, means with their errors, the report."""

import json
import pathlib
import sys
import time

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # where benchmarks' own modules are

import _arguments  # noqa: E402


def parse(script: str, description: str, arguments, *, seeds: int, quick: int, more=None):
    """The command line of an experiment: `--out`, `--quick`, `--seeds`, `--run-dir`, and what `more(parser)` adds.

    `script` is its `__file__`.
    """
    name = pathlib.Path(script).stem
    return _arguments.parse(description, arguments, seeds=seeds, quick=quick, experiment=name, more=more)


def each_seed(given, measure, name: str = "") -> list[dict]:
    """The rows `measure(seed, run_dir)`, one a seed, with progress.

    With `--run-dir` a finished row is kept there and read again, and `run_dir` is a folder for the searches in it
    (`tune(..., run_dir=run_dir / "penalties")`); without, it is None. `name` tells several loops of a script apart.
    """
    rows = []
    for seed in range(given.seeds):
        started, run_dir = time.perf_counter(), None
        if given.run_dir is not None:
            run_dir = given.run_dir / ("quick" if given.quick else "full") / name / f"seed-{seed}"
            run_dir.mkdir(parents=True, exist_ok=True)
            if (run_dir / "row.json").exists():
                rows.append(json.loads((run_dir / "row.json").read_text()))
                continue
        rows.append({"seed": seed, **measure(seed, run_dir)})
        if run_dir is not None:
            (run_dir / "row.tmp").write_text(json.dumps(rows[-1]))
            (run_dir / "row.tmp").replace(run_dir / "row.json")
        said = f"{name} seed {seed}".strip()
        print(f"{said}: {time.perf_counter() - started:.0f} s, {len(rows)} of {given.seeds}", file=sys.stderr)
    return rows


def once(given, name: str, make):
    """What `make()` returns, which JSON can hold; with `--run-dir` it is kept there and read again."""
    if given.run_dir is None:
        return make()
    path = given.run_dir / ("quick" if given.quick else "full") / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(make()))
        path.with_suffix(".tmp").replace(path)
    return json.loads(path.read_text())


def mean(values) -> dict:
    """Mean of numbers, one a seed, and its standard error; None of a single one."""
    values = np.asarray(values, float)
    error = float(standard_errors(values)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "error": error, "n": len(values)}


def standard_errors(values) -> np.ndarray:
    """Those of means over the leading axis, of seeds; zero of a single one."""
    values = np.asarray(values, float)
    return values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1:])


def paired(first, second) -> dict:
    """Mean of `first - second` over the same seeds with its standard error, and in how many `first` is lower."""
    difference = np.asarray(first, float) - np.asarray(second, float)
    return {**mean(difference), "lower in": int((difference < 0).sum())}


def text(summary: dict, form: str = ".3f") -> str:
    """A mean with its error, as the tables print it: `.914 ± .002` or `.914`."""
    error = "" if summary["error"] is None else f" ± {summary['error']:{form.lstrip('+')}}"
    return f"{summary['mean']:{form}}{error}"


def write(given, report: dict) -> None:
    """Write `report.json` into `--out`."""
    (given.out / "report.json").write_text(json.dumps({"seeds": given.seeds, **report}, indent=1) + "\n")
