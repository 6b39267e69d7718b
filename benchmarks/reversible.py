"""Exactness and storage of reversed momentum.

MNIST, a tanh network 784-50-50-50-10, batches of 200, a learning rate and a momentum for each of the 8 arrays of
weights and each step (Maclaurin, Duvenaud and Adams, 2015). Measured: the bits stored for a weight and step and the
memory allocated for them; bit-for-bit recovery of the start; the error of the hypergradient against plain
reverse mode with the same n/d in float64; the compiled program's memory; its time; and, as a control, the reversal in
plain floats.

    JAXHPO_DATA_DIR=... python benchmarks/reversible.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo
from jaxhpo import plot
from jaxhpo._adjoint import exact_arithmetic as arithmetic
from jaxhpo._adjoint import reversible
from jaxhpo._core.cost import count_arithmetic
from jaxhpo._inner.problem import make_problem
from jaxhpo.data import mnist

SIZES, BATCH, STEPS = (784, 50, 50, 50, 10), 200, 100
MOMENTA = (0.9, 0.98)
LOG_RATE, LOG_SCALE, LOG_L2 = -1.0, -3.0, -8.0
CONTROL_STEPS = (25, 50, 100, 150, 200, 250, 300)


class Data(NamedTuple):
    inputs: Any
    targets: Any
    val_inputs: Any
    val_targets: Any


def load() -> Data:
    parts = mnist(0, train=10_000, validation=2000)
    return Data(*parts.train, *parts.validation)


def hparams(momentum: float, num_steps: int, dtype) -> dict[str, jax.Array]:
    h = {
        "log_rate": np.full((num_steps, 8), LOG_RATE),
        "logit_momentum": np.full((num_steps, 8), np.log(momentum / (1 - momentum))),
        "log_l2": np.full(4, LOG_L2),
        "log_scale": np.full(8, LOG_SCALE),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), h)


def cross_entropy(layers, inputs, targets):
    hidden = inputs
    for w, b in layers[:-1]:
        hidden = jnp.tanh(hidden @ w + b)
    logits = hidden @ layers[-1][0] + layers[-1][1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train_loss(layers, h, batch):
    penalty = sum(jnp.exp(a) * jnp.sum(w**2) for a, (w, _) in zip(h["log_l2"], layers, strict=True))
    return cross_entropy(layers, *batch) + penalty


def start_of(h):
    """Return initial weights: e^scale times fixed normal numbers."""
    rng, dtype = np.random.default_rng(1), h["log_scale"].dtype
    layers = [(rng.normal(size=(a, b)), rng.normal(size=b)) for a, b in zip(SIZES[:-1], SIZES[1:], strict=True)]
    scales = jax.tree.structure(layers).unflatten(list(jnp.exp(h["log_scale"])))
    return jax.tree.map(lambda s, w: s * jnp.asarray(w, dtype), scales, layers)


def schedules(h, step, layers):
    fill = jax.tree.structure(layers).unflatten
    return fill(list(jnp.exp(h["log_rate"][step]))), fill(list(jax.nn.sigmoid(h["logit_momentum"][step])))


def batches_of(data, num_steps, dtype):
    pick = jnp.asarray(np.random.default_rng(2).integers(0, len(data.targets), (num_steps, BATCH)))
    return lambda t: (data.inputs[pick[t]].astype(dtype), data.targets[pick[t]])


def val_loss(layers, data):
    return cross_entropy(layers, data.val_inputs.astype(layers[0][0].dtype), data.val_targets)


def trained(h, data, adjoint):
    """The validation loss after training, as a function of the hyperparameters."""
    num_steps, start = len(h["log_rate"]), start_of(h)
    solver = jaxhpo.momentum_sgd(
        train_loss, lambda h, t: schedules(h, t, start)[0], lambda h, t: schedules(h, t, start)[1]
    )
    batches = batches_of(data, num_steps, start[0][0].dtype)
    solution = jaxhpo.solve(solver, solver.init(start, h), h, batches, num_steps=num_steps, adjoint=adjoint)
    return val_loss(solution.params, data)


def trained_plain(h, data):
    """The same by a scan of floats, with the rational momentum that `Reversible` uses."""
    start = start_of(h)
    batches = batches_of(data, len(h["log_rate"]), start[0][0].dtype)

    def step(carry, t):
        weights, velocity, left = carry  # what has been rounded away, and a half: n = ⌊left + m d⌋
        rate, m = schedules(h, t, weights)
        d = 2**16
        sums = jax.tree.map(lambda r, m: r + jax.lax.stop_gradient(m) * d, left, m)
        used = jax.tree.map(lambda m, s: m + jax.lax.stop_gradient(jnp.floor(s) / d - m), m, sums)
        left = jax.tree.map(lambda s: s - jnp.floor(s), sums)
        grad = jax.grad(train_loss)(weights, h, batches(t))
        velocity = jax.tree.map(lambda r, m, v, g: r * v - (1 - m) * g, used, m, velocity, grad)
        return (jax.tree.map(lambda w, a, v: w + a * v, weights, rate, velocity), velocity, left), None

    halves = jax.tree.map(lambda m: jnp.full_like(m, 0.5), schedules(h, 0, start)[1])
    carry = start, jax.tree.map(jnp.zeros_like, start), halves
    return val_loss(jax.lax.scan(jax.checkpoint(step), carry, jnp.arange(len(h["log_rate"])))[0][0], data)


def rule(momentum):
    """Return the rule with the buffer that the momenta, which are hyperparameters, need, and 1/1000 more."""
    return jaxhpo.Reversible(buffer_bits=round(-1.001 * float(np.log2(momentum)), 6))


def relative_error(got, want) -> float:
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(float) for t in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- what is measured ------------------------------------------------------------------------------------------------


def recovery(data, momentum) -> dict[str, Any]:
    """Run forward and backward; return the bits, and whether every integer is recovered."""

    @jax.jit
    def run(h, data):
        start = start_of(h)
        solver, batches = (
            jaxhpo.momentum_sgd(train_loss, float(np.exp(LOG_RATE)), momentum),
            batches_of(data, STEPS, float),
        )
        state = solver.init(start, h)
        problem = make_problem(solver, state, h, batches, num_steps=STEPS)
        plan, problem, consts = reversible.make_plan(problem, None)
        inputs = reversible.Inputs(problem.state, problem.inputs, problem.xs, consts)
        end = reversible.run_exact(plan, inputs)
        undo = lambda now, tx: (reversible.undo_step(plan, now, inputs, *tx)[0], None)  # noqa: E731
        return end, jax.lax.scan(undo, end, plan.steps(inputs), reverse=True)[0], reversible.exact_start(plan, state)

    h = hparams(momentum, STEPS, float)
    end, back, start = run(h, data)
    same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (back[:2], start[:2])), strict=True)]
    numbers = sum(w.size for w in jax.tree.leaves(start_of(h)))
    held = float(arithmetic.information(end.buffer)) * len(end.buffer.words)
    return {
        "recovered": all(same) and bool(arithmetic.is_empty(back.buffer)),
        "bits": held / numbers / STEPS,
        "expected_bits": float(-np.log2(momentum)),
        "times_less_than_32_bits": 32 * STEPS * numbers / held,
        "allocated": 8 * sum(x.nbytes for x in end.buffer) / held,
    }


def errors(data, momentum) -> dict[str, float]:
    """Return the errors of the hypergradient (1612 numbers), against plain reverse mode in float64 with equal n/d."""
    plain = jax.jit(jax.grad(trained_plain))
    exact = jax.jit(jax.grad(lambda h, d: trained(h, d, rule(momentum))))
    h = hparams(momentum, STEPS, jnp.float64)
    want = plain(h, data)
    found = {"int64": relative_error(exact(h, data), want)}
    with jax.enable_x64(False):
        h = hparams(momentum, STEPS, jnp.float32)
        return found | {
            "int32": relative_error(exact(h, data), want),
            "plain_float32": relative_error(plain(h, data), want),
        }


def cost(data, momentum, num_steps, timed) -> dict[str, dict[str, float]]:
    """Return temporary memory in copies of the weights, operations and seconds in plain trainings. float32, no x64."""
    with jax.enable_x64(False):
        h = hparams(momentum, num_steps, jnp.float32)
        size = sum(w.nbytes for w in jax.tree.leaves(start_of(h)))
        programs: dict[str, Any] = {"training": lambda h, d: trained(h, d, jaxhpo.Unroll())}
        for adjoint in (jaxhpo.Unroll(checkpoint=1), jaxhpo.Unroll(checkpoint="sqrt"), rule(momentum)):
            name = type(adjoint).__name__ + ("" if adjoint == rule(momentum) else f"({adjoint.checkpoint!r})")
            programs[name] = jax.value_and_grad(lambda h, d, a=adjoint: trained(h, d, a))
        compiled = {name: jax.jit(f).lower(h, data).compile() for name, f in programs.items()}
        rows = {name: {"memory": c.memory_analysis().temp_size_in_bytes / size} for name, c in compiled.items()}
        for name, f in programs.items():
            rows[name]["operations"] = count_arithmetic(f, h, data, unknown_length=1)
        if timed:
            # In turns, so that what else the machine does falls on all; the fastest of each is the least disturbed.
            seconds = {name: [] for name in compiled}
            for _ in range(timed):
                for name, c in compiled.items():
                    began = time.perf_counter()
                    jax.block_until_ready(c(h, data))
                    seconds[name].append(time.perf_counter() - began)
            for name, times in seconds.items():
                rows[name]["seconds"] = min(times)
    unit = dict(rows["training"])
    for row in rows.values():
        row["trainings"] = row.pop("operations") / unit["operations"]
        if timed:
            row["trainings_by_the_clock"] = row["seconds"] / unit["seconds"]
    return rows


def float_reversal(data, momentum, dtype) -> list[float | None]:
    """The control: max |recovered − true| / max |true| of the initial weights, for each of `CONTROL_STEPS`.

    None where the numbers overflowed.
    """
    h = hparams(momentum, 1, dtype)
    rate, start = np.exp(LOG_RATE), start_of(h)
    one_minus = 1 - momentum

    @jax.jit
    def error(data, start, num_steps):
        batches = batches_of(data, max(CONTROL_STEPS), dtype)

        def forward(t, carry):
            x, v = carry
            g = jax.grad(train_loss)(x, h, batches(t))
            v = jax.tree.map(lambda v, g: momentum * v - one_minus * g, v, g)
            return jax.tree.map(lambda x, v: x + rate * v, x, v), v

        def backward(i, carry):
            x, v = carry
            x = jax.tree.map(lambda x, v: x - rate * v, x, v)
            g = jax.grad(train_loss)(x, h, batches(num_steps - 1 - i))
            return x, jax.tree.map(lambda v, g: (v + one_minus * g) / momentum, v, g)

        end = jax.lax.fori_loop(0, num_steps, forward, (start, jax.tree.map(jnp.zeros_like, start)))
        back = jax.lax.fori_loop(0, num_steps, backward, end)[0]
        worst = [jnp.max(jnp.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (back, start)), strict=True)]
        return jnp.max(jnp.stack(worst)) / jnp.max(jnp.stack([jnp.max(jnp.abs(a)) for a in jax.tree.leaves(start)]))

    found = [float(error(data, start, steps)) for steps in CONTROL_STEPS]
    return [x if np.isfinite(x) else None for x in found]


# --- the report ------------------------------------------------------------------------------------------------------


def table(report) -> str:
    lines = []
    for momentum, row in report["momenta"].items():
        lines.append(
            f"momentum {momentum}: recovered bit for bit: {row['recovered']}; {row['bits']:.5f} bits a weight and step "
            f"(log2(1/m) = {row['expected_bits']:.5f}), {row['times_less_than_32_bits']:.0f} times less than 32; "
            f"allocated {row['allocated']:.2f} times that\n  hypergradient, relative error: int64 "
            f"{row['errors']['int64']:.1e}, int32 {row['errors']['int32']:.1e} (plain reverse mode in float32 "
            f"{row['errors']['plain_float32']:.1e})"
        )
    lines.append(f"\n{'T':>5} {'momentum':>9} {'rule':18} {'copies of θ':>12} {'trainings':>10} {'by the clock':>13}")
    for row in report["costs"]:
        for name, cells in row["rules"].items():
            where = f"{row['num_steps']:5} {row['momentum']:9} {name:18}"
            clock = f"{cells['trainings_by_the_clock']:13.2f}" if "seconds" in cells else ""
            lines.append(f"{where} {cells['memory']:12.1f} {cells['trainings']:10.2f} {clock}".rstrip())
    lines.append("\nreversed in plain floats, relative error of the initial weights after T steps:")
    lines.append(f"{'':24}" + "".join(f"{t:>9}" for t in CONTROL_STEPS))
    for name, found in report["control"].items():
        lines.append(f"{name:24}" + "".join(f"{'overflow' if x is None else f'{x:.1e}':>9}" for x in found))
    return "\n".join(lines)


def draw(report, path) -> None:
    figure, ((left, middle),) = plot.figure(1, 2, width=12, height=4.8)
    for name, found in report["control"].items():
        found = np.asarray(found, float)  # NaN, and so not drawn, where it overflowed
        style = {"color": "C3" if "float32" in name else "C0", "ls": "-" if "0.98" in name else "--"}
        left.plot(CONTROL_STEPS, found, marker=".", label=name, **style)
    left.axhline(1, color="0.5", lw=0.8, ls=":")
    left.set(yscale="log", xlabel="inner steps T", ylabel="relative error of the recovered initial weights")
    left.set_title("Run backwards in plain floats\n(Reversible: 0, every integer as it was)")
    left.legend(frameon=False)
    names = [name for name in report["costs"][0]["rules"] if name != "training"]
    colors = dict(zip(names, ("0.6", "0.2", "C2"), strict=True))
    for name in names:
        for momentum, style in zip(MOMENTA, ("--", "-"), strict=True):
            rows = [row for row in report["costs"] if row["momentum"] == momentum]
            points = [(row["num_steps"], row["rules"][name]["memory"]) for row in rows]
            reversed_ = name == "Reversible"
            if reversed_ or momentum == MOMENTA[-1]:
                label = f"{name}, momentum {momentum}" if reversed_ else f"Unroll{name[6:]}"
                middle.plot(*zip(*points, strict=True), marker=".", color=colors[name], ls=style, label=label)
    middle.set(
        xscale="log", yscale="log", xlabel="inner steps T", ylabel="memory beyond arguments, in copies of the weights"
    )
    middle.set_title("Memory of the compiled hypergradient, float32\n(activations of one batch included)")
    middle.legend(frameon=False)
    figure.suptitle("MNIST, 784-50-50-50-10, batches of 200: momentum run backwards")
    plot.save(figure, path)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, default=5, help="of each timed program")
    parsed = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    data = load()
    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    report["momenta"] = {m: recovery(data, m) | {"errors": errors(data, m)} for m in MOMENTA}
    report["costs"] = [
        {"num_steps": t, "momentum": m, "rules": cost(data, m, t, parsed.repeats if t == STEPS else 0)}
        for m in MOMENTA
        for t in (STEPS, 10 * STEPS)
    ]
    report["control"] = {f"float64, momentum {m}": float_reversal(data, m, jnp.float64) for m in MOMENTA}
    with jax.enable_x64(False):
        report["control"] |= {f"float32, momentum {m}": float_reversal(data, m, jnp.float32) for m in MOMENTA}
    print(table(report))
    parsed.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, default=float, allow_nan=False)
    (parsed.out / "reversible.json").write_text(text + "\n")
    draw(report, parsed.out / "reversible.png")


if __name__ == "__main__":
    main()
