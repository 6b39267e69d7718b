"""What pages say beside what their examples print: figures, files for schedulers, loggers, a kill."""

import json
import pathlib
import re
import signal
import subprocess
import sys

import jax.numpy as jnp
import optax
import pytest
import yaml
from helpers import cheap_environment

import jaxhpo

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page, kind="python"):
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", sorted((DOCS / "recipes").glob("*.md")), ids=lambda page: page.stem)
def test_a_recipe_has_thirty_lines(page):
    found = blocks(page)
    assert found or page.stem == "index"
    assert all(sum(bool(line.strip()) for line in block.splitlines()) <= 30 for block in found)  # the limit


def test_recipes_are_all_in_the_index():
    index = (DOCS / "recipes" / "index.md").read_text()
    for page in (DOCS / "recipes").glob("*.md"):
        assert page.stem == "index" or (f"]({page.name})" in index and f"\n{page.stem}\n" in index)


class Recorder:
    """Stands for a SummaryWriter, or for a run of Weights & Biases."""

    def __init__(self):
        self.scalars, self.histograms, self.logged = [], [], []

    def add_scalar(self, tag, scalar_value, global_step):
        self.scalars.append((tag, float(scalar_value), global_step))

    def add_histogram(self, tag, values, global_step):
        self.histograms.append((tag, values.shape, global_step))

    def log(self, data, step):
        self.logged.append((data, step))


def test_callbacks_of_the_logging_page():
    """They call what tensorboardX 2.6 and wandb 0.31 have, which were tried by hand."""
    names = {}
    exec(blocks("recipes/logging.md")[0], names)
    to, h = Recorder(), {"penalty": jnp.ones(3)}
    callbacks = [names["to_tensorboard"](to), names["to_wandb"](to)]
    result = jaxhpo.tune(
        lambda h: jnp.sum(h["penalty"] ** 2), h, optax.sgd(0.1), num_steps=2, callbacks=callbacks, progress=False
    )
    values, norms = (result.history[name].tolist() for name in ("value", "hypergradient_norm"))
    assert to.scalars[::2] == [("outer loss", value, step) for step, value in enumerate(values)]
    assert to.scalars[1::2] == [("hypergradient", norm, step) for step, norm in enumerate(norms)]
    assert to.histograms == [("hyperparameters['penalty']", (3,), step) for step in range(2)]
    assert to.logged == [
        ({"outer loss": value, "hypergradient": norm}, step)
        for step, (value, norm) in enumerate(zip(values, norms, strict=True))
    ]


@pytest.mark.slow
def test_minibatches_go_on_after_a_kill(tmp_path):
    """The page copies the folder of a run in the place of killing it: here it is killed."""
    recipe = blocks("recipes/minibatches.md")[0]
    kill = """
import os, signal
run("runs/2", callbacks=[lambda step: step.step == 17 and os.kill(os.getpid(), signal.SIGKILL)])
"""
    go_on = """
import jaxhpo
again = run("runs/2")
assert "after 15 outer steps" in again.message
for name in ("hparams", "best_hparams"):
    assert jax.tree.all(jax.tree.map(jnp.array_equal, getattr(again, name), getattr(result, name)))
assert (again.history["value"] == result.history["value"]).all()
"""
    for code, ended in ((recipe.partition("result =")[0] + kill, -signal.SIGKILL), (recipe + go_on, 0)):
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, cwd=tmp_path, env=cheap_environment(), capture_output=True, text=True)
        assert out.returncode == ended, out.stderr


def test_figures_of_other_libraries_are_those_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text())["rows"]
    shown = re.findall(r"^\| (\w+): (\w+) `(.*?)` \| (.*) \|$", (DOCS / "migrate.md").read_text(), re.MULTILINE)
    assert len(shown) == 11
    for kind, library, method, figures in shown:
        here = [
            row
            for problem in ("ridge", "mlp")
            for row in rows
            if (row["kind"], row["library"], row["method"]) == (kind, library, method)
            and (row["problem"], row["dtype"], row["threads"]) == (problem, "float32", 1)
        ]
        times, errors = [f"{row['time'][1]:.2f}" for row in here], [f"{row['error']:.1e}" for row in here]
        assert figures.split(" | ") == times + errors, method


def test_costs_in_the_questions_are_those_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())["rows"]
    page, costs = (
        (DOCS / "faq.md").read_text(),
        r"`Unroll\(\)` ([\d.]+) plain.*?`Implicit\(CG\(maxiter=10\)\)` ([\d.]+)",
    )
    unroll, implicit = re.search(costs, page, re.DOTALL).groups()
    assert unroll == f"{rows['Unroll()']['time']:.1f}"
    assert implicit == f"{rows['Implicit(CG(maxiter=10))']['time']:.1f}"


def test_files_for_schedulers():
    """The batch script is bash, and the manifest hangs together; neither is run."""
    (script,), (manifest,) = blocks("several_hosts.md", "bash"), blocks("several_hosts.md", "yaml")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    code = jaxhpo.TuneResult(*[None] * 6, status="preempted", message="").exit_code
    assert f'[ "$status" -eq {code} ]' in script
    service, job = yaml.safe_load_all(manifest)
    assert job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [code]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    host, count = re.search(r'initialize\("([\w.-]+):\d+", (\d+),', (DOCS / "several_hosts.md").read_text()).groups()
    first_pod = f"{job['metadata']['name']}-0"  # as Kubernetes names the pods of an indexed job
    assert host == f"{first_pod}.{service['metadata']['name']}"
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == int(count)
