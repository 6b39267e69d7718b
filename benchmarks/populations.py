"""Does `jax.vmap` over N hyperparameter vectors and seeds cost less than N runs?

A member of the population is a log decay, a log learning rate and the initial weights that a seed gave. All train on
the same batches, by SGD with momentum, and are differentiated by the default rule, with `jax.vmap` around the outer
loss and its gradient. Four inner problems: ridge regression with 50 weights and logistic regression with 500 (all
examples a step, 100 steps), an MLP 64-32-10 on scikit-learn's digits (minibatches of 128, 100 steps), and an MLP
784-256-256-10 (minibatches of 128 of random numbers, 10 steps).

Time: interleaved calls of the program for N members and of that for one; median and quartiles of the ratios, by the
processor's clock, which other work on the machine disturbs less, and by the wall clock. Memory: the compiled program's
allocation, and the prediction of `memory_plan`. Counted arithmetic grows by N exactly, so a ratio below N is a gain of
the machine from fewer, larger operations. Results of other tasks in DIR are kept.

    python benchmarks/populations.py [--tasks NAME ...] [--members 1 2 4 8 16] [--repeats 5] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxhpo
from jaxhpo import plot
from jaxhpo._core.cost import count_and_peak
from jaxhpo.data import digits

LEAST = 0.02  # seconds that a timed spell takes at least, in as many calls as that needs
LOG_DECAY, MOMENTUM, BATCH = -7.0, 0.9, 128


class Task(NamedTuple):
    """An inner problem.

    Attributes:
      sizes: of the layers; one layer is a linear model.
      loss: `(outputs, targets) -> a loss per example`.
      rate: learning rate.
      num_steps: inner steps.
      train: inputs and targets, whose first axis is that of the batches.
      val: inputs and targets.
    """

    sizes: tuple[int, ...]
    loss: Callable
    rate: float
    num_steps: int
    train: tuple[jax.Array, jax.Array]
    val: tuple[jax.Array, jax.Array]


def ridge() -> Task:
    inputs, noise, weights = normal((1, 500, 50), (1, 500), (50,))
    targets = inputs @ weights / 50**0.5 + noise
    return Task((50, 1), squared, 0.05, 100, (inputs[:, :250], targets[:, :250]), (inputs[0, 250:], targets[0, 250:]))


def logistic() -> Task:
    inputs, weights = normal((1, 2000, 500), (500,))
    targets = jnp.sign(inputs @ weights)
    parts = (inputs[:, :1000], targets[:, :1000]), (inputs[0, 1000:], targets[0, 1000:])
    return Task((500, 1), lambda outputs, y: jax.nn.softplus(-y * outputs[..., 0]), 0.1, 100, *parts)


def small_mlp() -> Task:
    parts = digits(train=8 * BATCH, validation=500)
    batches = (parts.train.inputs.reshape(8, BATCH, 64), parts.train.targets.reshape(8, BATCH))
    return Task((64, 32, 10), cross_entropy, 0.1, 100, batches, (parts.validation.inputs, parts.validation.targets))


def large_mlp() -> Task:
    (inputs,), targets = normal((11, BATCH, 784)), jax.random.randint(jax.random.key(2), (11, BATCH), 0, 10)
    return Task((784, 256, 256, 10), cross_entropy, 0.01, 10, (inputs[1:], targets[1:]), (inputs[0], targets[0]))


TASKS = {
    "ridge, 50 weights": ridge,
    "logistic, 500 weights": logistic,
    "MLP 64-32-10": small_mlp,
    "MLP 784-256-256-10": large_mlp,
}


def normal(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def squared(outputs, targets):
    return (outputs[..., 0] - targets) ** 2


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def make_outer_loss(task: Task) -> Callable:
    """Return `(member, data) -> validation loss`."""

    def losses(params, inputs, targets):
        *hidden, (last, bias) = params
        for w, b in hidden:
            inputs = jax.nn.gelu(inputs @ w + b)
        return task.loss(inputs @ last + bias, targets)

    def train_loss(params, h, batch):
        norm = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return losses(params, *batch).mean() + jnp.exp(h["decay"]) * norm

    solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(jnp.exp(h["rate"]), MOMENTUM))

    def outer_loss(member, data):
        h, train = {name: member[name] for name in ("decay", "rate")}, data[0]

        def batch_at(t):
            return jax.tree.map(lambda x: x[t % len(x)] if len(x) > 1 else x[0], train)

        solution = jaxhpo.solve(solver, solver.init(member["start"], h), h, batch_at, num_steps=task.num_steps)
        return losses(solution.params, *data[1]).mean()

    return outer_loss


def make_members(task: Task, num: int) -> dict[str, Any]:
    """Return hyperparameters around a centre, and newly drawn initial weights, stacked."""

    def member(key):
        first, second, *others = jax.random.split(key, 1 + len(task.sizes))
        shapes = zip(others, task.sizes[:-1], task.sizes[1:], strict=True)
        start = [(jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros(b)) for k, a, b in shapes]
        decay, rate = LOG_DECAY + jax.random.normal(first), jnp.log(task.rate) - jax.random.uniform(second)
        return {"decay": decay, "rate": rate, "start": start}

    return jax.vmap(member)(jax.random.split(jax.random.key(1), num))


def compiled(function: Callable, *args: Any) -> Callable[[], Any]:
    """Return the program with its arguments, and its temporary memory as the attribute `bytes`."""
    program = jax.jit(function).lower(*args).compile()

    def call():
        return jax.block_until_ready(program(*args))

    call.bytes = program.memory_analysis().temp_size_in_bytes
    return call


def spell(program: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Return seconds of a call by the processor's clock and by the wall clock."""
    processor, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        program()
    return (time.process_time() - processor) / calls, (time.perf_counter() - wall) / calls


def calls_of(program: Callable[[], Any]) -> int:
    program()  # the first one warms up
    return 1 + int(LEAST / max(spell(program, 3)))


def measure(task: Task, members: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return a row per size of the population."""
    hypergradient, data = jax.value_and_grad(make_outer_loss(task)), (task.train, task.val)
    populations = {num: make_members(task, num) for num in members}
    one = compiled(hypergradient, jax.tree.map(lambda x: x[0], populations[members[0]]), data)
    rows = []
    for num, stacked in populations.items():
        many = jax.vmap(hypergradient, (0, None))
        predicted, program = count_and_peak(many, stacked, data)[1], compiled(many, stacked, data)
        row = {"members": num, "bytes": program.bytes, "predicted_bytes": predicted, "single_bytes": one.bytes}
        rows.append(row | compare(program, one, repeats))
    return rows


def compare(program: Callable[[], Any], one: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Return quartiles of the interleaved time ratios of two programs, by either clock."""
    calls = calls_of(program), calls_of(one)
    turns = [(spell(program, calls[0]), spell(one, calls[1])) for _ in range(repeats)]
    clocks = {name: [many[i] / few[i] for many, few in turns] for i, name in enumerate(("processor", "wall"))}
    found: dict[str, Any] = {name: statistics.quantiles(ratios, n=4) for name, ratios in clocks.items()}
    return found | {"single_seconds": min(few[0] for _, few in turns)}


def draw(results: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    figure, ((left, right),) = plot.figure(1, 2, width=12, height=4.8)
    for i, (name, rows) in enumerate(results.items()):
        members = [row["members"] for row in rows]
        low, middle, high = ([row["processor"][k] / row["members"] for row in rows] for k in range(3))
        left.plot(members, middle, marker="o", color=f"C{i}", label=name)
        left.fill_between(members, low, high, color=f"C{i}", alpha=0.15, lw=0)
        right.plot(members, [row["bytes"] / 2**20 for row in rows], marker="o", color=f"C{i}", label=name)
        predicted = [row["predicted_bytes"] / 2**20 for row in rows]
        right.plot(members, predicted, marker="x", ls="--", lw=1, color=f"C{i}")
    left.axhline(1, color="0.5", lw=0.8, ls=":")
    left.annotate("N separate runs", (members[-1], 1), xytext=(0, 4), textcoords="offset points", ha="right",
                  fontsize=8, color="0.4")  # fmt: skip
    left.set(ylabel="time / time of N single runs", ylim=(0, None), title="Processor time, median and quartiles")
    right.set(yscale="log", ylabel="temporary memory, MiB", title="Memory (dashed: predicted)")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="members N")
        axis.set_xticks(members, [str(num) for num in members])
        axis.minorticks_off()
    right.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("A population's hypergradients by one vmap")
    plot.save(figure, path)


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}: one run {1e3 * min(row['single_seconds'] for row in rows):.3g} ms")
    head = f"{'N':>3} {'processor / one run':>22} {'/ N':>6} {'wall / one run':>22}"
    print(f"{head} {'compiled MiB':>13} {'predicted':>10}")
    for row in rows:
        num = row["members"]
        processor, wall = ("{1:.2f} ({0:.2f}, {2:.2f})".format(*row[clock]) for clock in ("processor", "wall"))
        sizes = f"{row['bytes'] / 2**20:13.3g} {row['predicted_bytes'] / row['bytes']:9.2f}×"
        print(f"{num:3} {processor:>22} {row['processor'][1] / num:6.2f} {wall:>22} {sizes}", flush=True)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME")
    parser.add_argument("--members", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parsed = parser.parse_args(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    file = parsed.out / "populations.json"
    results = json.loads(file.read_text())["tasks"] if file.exists() else {}
    for name in parsed.tasks:
        results[name] = measure(TASKS[name](), parsed.members, parsed.repeats)
        show(name, results[name])
        results = {known: results[known] for known in TASKS if known in results}
        report = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tasks": results}
        file.write_text(json.dumps(report, indent=1) + "\n")
    draw(results, parsed.out / "populations.png")


if __name__ == "__main__":
    main()
