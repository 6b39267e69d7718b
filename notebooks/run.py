"""Executes notebooks and keeps their outputs in them: `python notebooks/run.py [--quick] [NAME...]`.

Each runs in a fresh kernel, in an empty folder, and is written with its outputs and a digest of code and outputs, by
which the tests know that the one made the other. One that fails, warns or shows a path of this machine is not written.
With `--quick` the short form runs, which the environment variable `QUICK` chooses in a notebook; XLA optimises less, as
most of its time is compilation, and nothing is written.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import pathlib
import re
import resource
import sys
import tempfile
import time

import nbclient
import nbformat
import PIL.Image

NOTEBOOKS = sorted(pathlib.Path(__file__).parent.glob("*.ipynb"))
# Absolute paths of two names or more, and no address of the web.
PATH = re.compile(r"(?<![\w.:/~-])(?:/[\w.+-]+){2,}|\b[A-Z]:\\")


def read(path: pathlib.Path) -> nbformat.NotebookNode:
    """Reads a notebook, which must be valid."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(path: pathlib.Path, *, quick: bool, env: dict[str, str]) -> nbformat.NotebookNode:
    """Runs a notebook.

    Args:
      path: of the notebook, which stays as it is.
      quick: the short form.
      env: the environment of the kernel.

    Returns:
      The notebook with its outputs.

    Raises:
      CellExecutionError: where a cell raises.
    """
    notebook = read(path)
    kept = notebook.metadata.copy()
    # A kept output has no progress bars, nor the hint that these would be finer with another package.
    env = env | {"QUICK": "", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
    if quick:
        env |= {"QUICK": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],  # no word of how the kernel is reached
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=env)
    notebook.metadata = kept  # without the versions of this kernel
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = with_few_colors(output.data["image/png"])
    return notebook


def with_few_colors(picture: str) -> str:
    """Returns a PNG picture, in base64 as it came, with a palette: a third of the size, and looks the same."""
    image = PIL.Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image = image.quantize(128, dither=PIL.Image.Dither.NONE)
    image.save(out := io.BytesIO(), "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Returns what is wrong with the outputs: errors, warnings, paths, cells that were not run."""
    found = []
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count != number:
            found.append(f"code cell {number} was run as number {cell.execution_count}")
        for output in cell.outputs:
            text = output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if "image" not in k)
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"code cell {number} has an error or a warning: {text or output.evalue}")
            if path := PATH.search(text):
                found.append(f"code cell {number} shows a path: {path.group()}")
    return found


def digest(notebook: nbformat.NotebookNode) -> str:
    """Returns a digest of the code cells and their outputs; text may change without another run."""
    cells = [(cell.source, cell.outputs) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of a file's name; all without")
    parser.add_argument("--quick", action="store_true", help="run the short form, and write nothing")
    given = parser.parse_args()
    failed = False
    for path in NOTEBOOKS:
        if given.names and not any(name in path.stem for name in given.names):
            continue
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        notebook = execute(path, quick=given.quick, env=dict(os.environ))
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        wrong = faults(notebook)
        failed |= bool(wrong)
        if not (wrong or given.quick):
            notebook.metadata["jaxhpo"] = {"full_run": digest(notebook)}
            nbformat.write(notebook, path)
        size = len(nbformat.writes(notebook)) / 1e3
        print(
            f"{path.stem:24} {seconds:5.0f} s, {processor:5.0f} s of processors, {size:5.0f} kB",
            *wrong,
            sep="\n  ",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
