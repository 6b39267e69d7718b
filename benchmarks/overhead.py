"""What does `tune` cost beside a bare jitted loop, a checkpoint of a megabyte, and a thousand outer steps in memory?

The step is a chain of matrix products that takes about 20 ms; the bare loop is the same jitted value, gradient and
optax update, with the value brought to the host, as a user writes it. Turns of both alternate; a ratio is that of their
median steps within one turn, and so is the one with a `run_dir`, at its default settings. Memory is the process's
resident set after 100 and after 1000 outer steps of a small problem. A checkpoint holds a carry of 1 MB and is synced.

    python benchmarks/overhead.py [--turns 7] [--steps 50] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo._tune._run_dir import RunDir

SIZE, GOAL = 256, 0.02  # of the matrices; seconds that a step should take
OPTIMIZER = optax.adam(0.01)
MATRIX = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / SIZE**0.5


def outer_loss(h, products):
    """As many products as make a step long enough."""
    body = lambda x, _: (jnp.tanh(MATRIX @ x), None)  # noqa: E731
    return jnp.sum(jax.lax.scan(body, h * MATRIX, None, products)[0] ** 2)


def bare(products: int, steps: int) -> list[float]:
    """Seconds of each step of a loop by hand."""

    @jax.jit
    def step(h, state):
        value, grad = jax.value_and_grad(outer_loss)(h, products)
        updates, state = OPTIMIZER.update(grad, state, h)
        return value, optax.apply_updates(h, updates), state

    h = jnp.ones((SIZE, SIZE))
    state, clock = OPTIMIZER.init(h), []
    for _ in range(steps + 1):
        value, h, state = step(h, state)
        float(value)
        clock.append(time.perf_counter())
    return list(np.diff(clock))


def tuned(products: int, steps: int, **settings) -> list[float]:
    """The same of `tune`."""
    start = jnp.ones((SIZE, SIZE))
    result = jaxhpo.tune(
        lambda h: outer_loss(h, products), start, OPTIMIZER, num_steps=steps + 1, progress=False, **settings
    )
    return list(np.diff(result.history["seconds"]))


def checkpoints(times: int) -> list[float]:
    """Seconds of saving a state of a megabyte."""
    tree = {"carry": np.random.default_rng(0).normal(size=125_000)}
    found = []
    with tempfile.TemporaryDirectory() as folder, RunDir(folder) as run_dir:
        for i in range(times):
            run_dir.append({"value": np.asarray(float(i))})
            begun = time.perf_counter()
            run_dir.save(tree, {})
            found.append(time.perf_counter() - begun)
    return found


def resident_bytes() -> int:
    fields = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def memory() -> dict[str, int]:
    """Of the process, after 100 and 1000 outer steps."""
    solver = jaxhpo.from_optax(lambda p, h, b: jnp.sum((p - 1.0) ** 2) + h * jnp.sum(p**2), optax.sgd(0.1))

    def loss(h):
        return jnp.sum((jaxhpo.solve(solver, solver.init(jnp.zeros(1000), h), h, num_steps=20).params - 0.5) ** 2)

    seen = {}

    def note(step):
        if step.step + 1 in (100, 1000):
            seen[str(step.step + 1)] = resident_bytes()

    jaxhpo.tune(loss, jnp.asarray(0.1), optax.adam(0.01), num_steps=1000, callbacks=[note], progress=False)
    return seen


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="timed in each turn")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    products = 10
    while (seconds := statistics.median(bare(products, 10))) < 0.9 * GOAL:
        products = max(products + 1, round(products * min(4.0, GOAL / seconds)))
    turns = []
    for _ in range(parsed.turns):
        with tempfile.TemporaryDirectory() as folder:
            kinds = bare(products, parsed.steps), tuned(products, parsed.steps)
            turns.append([statistics.median(x) for x in (*kinds, tuned(products, parsed.steps, run_dir=folder))])
    ratios = {
        name: statistics.quantiles([turn[i] / turn[0] for turn in turns], n=4)
        for i, name in ((1, "tune"), (2, "tune with run_dir"))
    }
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bare_step_seconds": statistics.median(turn[0] for turn in turns),
        "ratio": ratios,
        "checkpoint_seconds": statistics.quantiles(checkpoints(50), n=4),
        "resident_bytes": memory(),
    }
    print(f"a bare step takes {1000 * report['bare_step_seconds']:.1f} ms")
    for name, (low, median, high) in ratios.items():
        print(f"{name}: {median:.3f} times that ({low:.3f}, {high:.3f})")
    low, median, high = (1000 * x for x in report["checkpoint_seconds"])
    print(f"a checkpoint of 1 MB: {median:.1f} ms ({low:.1f}, {high:.1f})")
    early, late = report["resident_bytes"].values()
    print(
        f"memory after 100 outer steps {early / 2**20:.1f} MiB, after 1000 {late / 2**20:.1f} MiB: {late / early:.4f}"
    )
    (parsed.out / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
