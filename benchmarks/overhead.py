"""Cost of `tune`: time against a bare jitted loop, a checkpoint of a megabyte, memory of a thousand outer steps.

The step is a chain of matrix products that takes about 20 ms; the bare loop is the same jitted value, gradient and
optax update, with the value brought to the host, as a user writes it. Its steps are taken one by one in a callback of
`tune`, so both see the same load of the machine; the time of `tune` from callback to callback is compared with the bare
step in between. A ratio is that of the medians of a turn, with quartiles over turns; the same with a `run_dir`, at its
default settings. Memory is the process's resident set after 100 and after 1000 outer steps of a small problem. A
checkpoint holds a carry of 1 MB and is synced.

"calls" is for steps of microseconds, those of `SOBA` on logistic regression of 22 weights, 64 rows a minibatch: a call
of `tune(..., steps_per_call=K)` against one `jax.lax.scan` over K updates of the same pair and optimiser, in turns.

    python benchmarks/overhead.py [--turns 7] [--steps 100] [--out DIR]
"""

from __future__ import annotations

import argparse
import itertools
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
from jaxhpo._tune.run_dir import RunDir
from jaxhpo.single_loop import SOBA, FiniteSum

SIZE, GOAL = 256, 0.02  # of the matrices; seconds that a step should take
OPTIMIZER = optax.adam(0.01)
MATRIX = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / SIZE**0.5


def outer_loss(h, products):
    """A chain of matrix products, long enough for a realistic step."""
    body = lambda x, _: (jnp.tanh(MATRIX @ x), None)  # noqa: E731
    return jnp.sum(jax.lax.scan(body, h * MATRIX, None, products)[0] ** 2)


def bare_step(products: int):
    """Return a function that takes a step of a hand-written loop, and returns its seconds."""

    @jax.jit
    def step(h, state):
        value, grad = jax.value_and_grad(outer_loss)(h, products)
        updates, state = OPTIMIZER.update(grad, state, h)
        return value, optax.apply_updates(h, updates), state

    start = jnp.ones((SIZE, SIZE))
    now = [start, OPTIMIZER.init(start)]

    def take(_=None) -> float:
        begun = time.perf_counter()
        value, *now[:] = step(*now)
        float(value)
        return time.perf_counter() - begun

    take()  # compiles
    return take


def turn(products: int, steps: int, **settings) -> tuple[float, float]:
    """Return median seconds of bare steps, and of the steps of `tune` interleaved with them."""
    bare, by_hand, spans = bare_step(products), [], []

    def callback(_):
        begun = time.perf_counter()
        by_hand.append(bare())
        spans.append((begun, time.perf_counter()))

    start = jnp.ones((SIZE, SIZE))
    loss = lambda h: outer_loss(h, products)  # noqa: E731
    jaxhpo.tune(loss, start, OPTIMIZER, num_steps=steps + 1, callbacks=[callback], progress=False, **settings)
    tuned = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    return statistics.median(by_hand[1:]), statistics.median(tuned)


def calls(steps_per_call: int, number: int) -> tuple[float, float]:
    """Return median seconds of a bare scan of steps of microseconds, and of the calls of `tune` interleaved with it."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.normal(keys[0], (1280, 22)), jnp.sign(jax.random.normal(keys[1], (1280,)))
    slow = optax.adam(1e-5)  # after 100 000 steps, too, the penalties are near their start
    rows = FiniteSum.of((x, y), 64)
    logistic = lambda w, batch: jnp.mean(jnp.logaddexp(0.0, -batch[1] * (batch[0] @ w)))  # noqa: E731
    train_loss = lambda w, h, batch: logistic(w, batch) + 0.5 * jnp.sum(jnp.exp(h) * w**2)  # noqa: E731
    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))
    pair = jaxhpo.hypergradient(SOBA(rows, rows), solver, lambda solution, h, batch: logistic(solution.params, batch))
    h = jnp.zeros(22)
    start = pair.init(jnp.zeros(22), h)

    @jax.jit
    def scan(h, state, opt_state, key):
        def update(carry, key):
            h, state, opt_state = carry
            grad, state, info = pair.update(h, state, key=key)
            updates, opt_state = slow.update(grad, opt_state, h)
            return (optax.apply_updates(h, updates), state, opt_state), None

        carry, _ = jax.lax.scan(update, (h, state, opt_state), jax.random.split(key, steps_per_call))
        return carry

    by_hand, spans, now = [], [], [h, start, slow.init(h)]
    jax.block_until_ready(scan(*now, keys[0]))  # compiles

    def callback(_):
        begun = time.perf_counter()
        now[:] = jax.block_until_ready(scan(*now, keys[1]))
        by_hand.append(time.perf_counter() - begun)
        spans.append((begun, time.perf_counter()))

    jaxhpo.tune(
        None,
        h,
        slow,
        num_steps=steps_per_call * (number + 1),
        steps_per_call=steps_per_call,
        gradient=jaxhpo.from_pair(pair),
        carry=start,
        callbacks=[callback],
        progress=False,
    )
    tuned = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    return statistics.median(by_hand[1:]), statistics.median(tuned)


def checkpoints(times: int) -> list[float]:
    """Return seconds to save a state of a megabyte."""
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
    """Return the process's memory after 100 and 1000 outer steps."""
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
    parser.add_argument("--steps", type=int, default=100, help="timed in each turn")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    products = 10
    while (seconds := statistics.median(map(bare_step(products), range(10)))) < 0.9 * GOAL:
        products = max(products + 1, round(products * min(4.0, GOAL / seconds)))
    turns = {"tune": [], "tune with run_dir": []}
    for _ in range(parsed.turns):
        with tempfile.TemporaryDirectory() as folder:
            turns["tune"].append(turn(products, parsed.steps))
            turns["tune with run_dir"].append(turn(products, parsed.steps, run_dir=folder))
    ratios = {name: statistics.quantiles([t / b for b, t in pairs], n=4) for name, pairs in turns.items()}
    times = {k: [calls(k, 20) for _ in range(parsed.turns)] for k in (1, 100, 1000, 10_000)}
    report = {
        "calls": {
            k: {"ratio": statistics.quantiles([t / b for b, t in pairs], n=4), "step_seconds": min(pairs)[0] / k}
            for k, pairs in times.items()
        },
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bare_step_seconds": statistics.median(bare for bare, _ in itertools.chain(*turns.values())),
        "ratio": ratios,
        "checkpoint_seconds": statistics.quantiles(checkpoints(50), n=4),
        "resident_bytes": memory(),
    }
    print(f"a bare step takes {1000 * report['bare_step_seconds']:.1f} ms")
    for name, (low, median, high) in ratios.items():
        print(f"{name}: {median:.3f} times that ({low:.3f}, {high:.3f})")
    for k, found in report["calls"].items():
        low, median, high = found["ratio"]
        print(
            f"calls of {k} steps of {1e6 * found['step_seconds']:.0f} µs: {median:.2f} times a bare scan "
            f"({low:.2f}, {high:.2f})"
        )
    low, median, high = (1000 * x for x in report["checkpoint_seconds"])
    print(f"a checkpoint of 1 MB: {median:.1f} ms ({low:.1f}, {high:.1f})")
    early, late = report["resident_bytes"].values()
    print(
        f"memory after 100 outer steps {early / 2**20:.1f} MiB, after 1000 {late / 2**20:.1f} MiB: {late / early:.4f}"
    )
    (parsed.out / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
