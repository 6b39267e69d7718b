"""What a penalty for each weight gains on new images, what it fits on validation images, and when training diverges.

MNIST, softmax regression with a penalty ½ Σ h w² on all 7850 weights, biases among them. Pixels are less their mean.

1. 1000 training and 1000 validation images: one penalty, one for each class (10), for each pixel (785), for each weight
   (7850). Each from .01, by 30 outer steps of Adam on log h, between which training goes on for 20 steps of SGD with
   momentum; the hypergradient is implicit, with 10 iterations of conjugate gradients. Then trained anew, on the 1000
   images, and on all 2000 with the same penalties; beside both the start, untuned.

2. 50 training and 50 validation images, penalties e^l of each weight from l = −4; 20 steps of gradient descent at a
   rate of .1 to each of 100 outer steps of Adam(.05), by conjugate gradients, Neumann's series of 20 terms, and the
   identity (T1–T2) in place of the inverse Hessian, and of Adam(.1) by Neumann's series of 100 terms ("faster"); then
   150 outer steps more, to see which of them diverge. The control: all 100 images trained on with the penalties of the
   start. 1000 test images.

   A step of gradient descent of rate α multiplies an error along a curvature λ by 1 − αλ. The curvature along a weight
   is at least its e^l, so training diverges where α e^l > 2, and l ≤ log(1/α) prevents that. The hypergradient does
   not: neither the identity's, −e^l w α v, nor the exact one, −e^l w H⁻¹v, which holds for a trained model, knows of
   the rate that trains it. Monitored: α times the largest of the penalties and of what ten power iterations find; both
   are below the largest curvature, so above 2 divergence is certain, whatever the loss still says.

The outer steps of the first part, 30 in place of 60, were chosen on seed 100 by other images; all else was set
beforehand. Errors are standard errors over seeds; those of differences are paired. Settings: Maclaurin, Duvenaud,
Adams, Gradient-based Hyperparameter Optimization through Reversible Learning, 2015, arXiv:1502.03492, section 3.2 (per
weight); Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2020,
arXiv:1911.02590, section 5.2 (50 images).

    python benchmarks/experiments/penalty_per_weight.py [--out DIR] [--quick] [--seeds 5] [--run-dir DIR]
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import each_seed, mean, paired, parse, text, write

import jaxhpo
import jaxhpo.data
from jaxhpo import plot

PIXELS, CLASSES = 785, 10  # a pixel that is always 1 carries the biases
GROUPS = {"one": (1, 1), "per class": (1, CLASSES), "per pixel": (PIXELS, 1), "per weight": (PIXELS, CLASSES)}
IMAGES, START, OUTER, INNER, STEPS = 1000, 0.01, 30, 20, 300
FEW, LOG_START, RATE, LONG = 50, -4.0, 0.1, 250  # of the second part
RULES = {
    "CG": jaxhpo.Implicit(jaxhpo.CG(maxiter=50)),
    "Neumann": jaxhpo.Implicit(jaxhpo.Neumann(20, RATE)),
    "Neumann, faster": jaxhpo.Implicit(jaxhpo.Neumann(100, RATE)),
    "identity": jaxhpo.Implicit(jaxhpo.Identity(RATE)),
    "identity, bounded": jaxhpo.Implicit(jaxhpo.Identity(RATE)),
}
BOUND = math.log(1 / RATE)
COLORS = dict(zip(RULES, (plot.BLUE, plot.GREEN, plot.SKY, plot.VERMILION, plot.ORANGE), strict=True))


def load(seed, images, test=None):
    """Training, validation and test images with a pixel of ones."""
    parts = jaxhpo.data.mnist(seed, train=images, validation=images, test=test)
    centre = parts.train.inputs.mean(0)

    def prepared(part):
        x = np.concatenate([part.inputs - centre, np.ones((len(part.targets), 1), np.float32)], 1)
        return jnp.asarray(x), jnp.asarray(part.targets)

    return tuple(map(prepared, parts))


def cross_entropy(w, images):
    return optax.softmax_cross_entropy_with_integer_labels(images[0] @ w, images[1]).mean()


def accuracy(w, images):
    """In percent."""
    return 100 * jnp.mean(jnp.argmax(images[0] @ w, 1) == images[1])


def train_loss(w, penalty, images):
    return cross_entropy(w, images) + 0.5 * jnp.sum(penalty * w**2)


def validation_loss(solution, penalty, images):
    return cross_entropy(solution.params, images)


def initial():
    return jnp.zeros((PIXELS, CLASSES))


SOLVER = jaxhpo.from_optax(train_loss, optax.sgd(0.3, momentum=0.9))


@jax.jit
def train(penalty, images):
    return jaxhpo.solve(SOLVER, SOLVER.init(initial(), penalty), penalty, lambda t: images, num_steps=STEPS).params


@functools.cache
def make_tuner():
    pair = jaxhpo.hypergradient(jaxhpo.Implicit(jaxhpo.CG(maxiter=10)), SOLVER, validation_loss, num_steps=INNER)

    def gradient(penalty, carry, key):
        state, images, validation, new = carry
        slope, state, info = pair.update(penalty, state, lambda t: images, validation)
        return info.value, slope, (state, images, validation, new), cross_entropy(state.inner.params, new)

    step = jaxhpo.outer_step(None, optax.adam(0.1), transforms=jaxhpo.positive, gradient=gradient)
    return pair.init, step.init, jax.jit(step.update), step.hparams


def tuned(shape, images, validation, new, num_steps):
    """Penalties of this shape, and the losses on validation and new images at each outer step."""
    start, init, update, penalties = make_tuner()
    penalty = jnp.full(shape, START)
    state, path = init(penalty, (start(initial(), penalty), images, validation, new)), []
    for _ in range(num_steps):
        state, report = update(state)
        path.append([round(float(report.value), 4), round(float(report.info), 4)])
    return penalties(state), path


def measure_groups(seed, num_images, num_steps, test):
    """Validation and test loss, and accuracy, with each group of penalties, and after training on all images."""
    images, validation, new = load(seed, num_images, test)
    every = tuple(jnp.concatenate(pair) for pair in zip(images, validation, strict=True))
    rows = {}
    for name, shape in {"untuned": (1, 1), **GROUPS}.items():
        penalty, path = jnp.full(shape, START), []
        if name != "untuned":
            penalty, path = tuned(shape, images, validation, new, num_steps)
        w, of_all = train(penalty, images), train(penalty, every)
        rows[name] = {
            "validation": float(cross_entropy(w, validation)),
            "test": float(cross_entropy(w, new)),
            "accuracy": float(accuracy(w, new)),
            "test, all": float(cross_entropy(of_all, new)),
            "accuracy, all": float(accuracy(of_all, new)),
            "penalties": np.quantile(np.asarray(penalty), [0, 0.25, 0.5, 0.75, 1]).tolist(),
            "path": path,
        }
    return rows


def largest_curvature(w, log_penalty, images):
    """A number not above the largest eigenvalue of the train loss's Hessian, and near it.

    The Rayleigh quotient after ten power iterations, or the largest penalty, whose weight has at least that curvature.
    """
    slope = jax.grad(lambda w: train_loss(w, jnp.exp(log_penalty), images))

    def times(v):
        return jax.jvp(slope, (w,), (v,))[1]

    def step(_, v):
        v = times(v)
        return v / jnp.linalg.norm(v)

    # Not a constant: adding the same to all classes changes no prediction, so the data have no curvature along that.
    start = jax.random.normal(jax.random.key(0), w.shape, w.dtype)
    v = jax.lax.fori_loop(0, 10, step, start / jnp.linalg.norm(start))
    return jnp.maximum(jnp.vdot(v, times(v)), jnp.exp(log_penalty.max()))


def overfit(rule, bounded, outer_rate, num_steps, images, validation, new):
    """Values at each outer step of the second part, as arrays, and the last log penalties."""
    solver = jaxhpo.from_optax(lambda w, h, images: train_loss(w, jnp.exp(h), images), optax.sgd(RATE))
    pair = jaxhpo.hypergradient(rule, solver, validation_loss, num_steps=INNER)

    def gradient(log_penalty, state, key):
        slope, state, info = pair.update(log_penalty, state, lambda t: images, validation)
        w = state.inner.params
        told = {
            "validation": accuracy(w, validation),
            "test": accuracy(w, new),
            "loss": info.value,
            "monitor": RATE * largest_curvature(w, log_penalty, images),
        }
        return info.value, slope, state, told

    project = (lambda h: jnp.minimum(h, BOUND)) if bounded else None
    step = jaxhpo.outer_step(None, optax.adam(outer_rate), projections=project, gradient=gradient)
    start = jnp.full((PIXELS, CLASSES), LOG_START)
    state = step.init(start, pair.init(initial(), start))
    state, reports = jax.lax.scan(lambda state, _: step.update(state), state, length=num_steps)
    return reports.info, step.hparams(state)


@functools.cache
def make_overfit(name, num_steps):
    outer_rate = 0.1 if name.endswith("faster") else 0.05
    return jax.jit(functools.partial(overfit, RULES[name], name.endswith("bounded"), outer_rate, num_steps))


def first(flags):
    """The place of the first True, or None."""
    return int(np.argmax(flags)) if np.any(flags) else None


def measure_few(seed, num_steps, long, test):
    """Of each rule its path, when validation was driven to 100 %, when the monitor crossed 2, and when all was lost."""
    images, validation, new = load(seed, FEW, test)
    every = tuple(jnp.concatenate(pair) for pair in zip(images, validation, strict=True))
    default = jnp.full((1, 1), math.exp(LOG_START))
    rows = {
        "untuned, 50 images": {"test": float(accuracy(train(default, images), new))},
        "untuned, 100 images": {"test": float(accuracy(train(default, every), new))},
    }
    for name in RULES:
        path, last = make_overfit(name, long)(images, validation, new)
        path = {key: np.asarray(values, float) for key, values in path.items()}
        lost = first(~np.isfinite(path["loss"]))
        rows[name] = {
            "all right at": first(path["validation"] >= 100),
            "monitor above 2 at": first(path["monitor"] > 2),
            "not finite at": lost,
            "largest monitor": float(path["monitor"][:lost].max()),
            "validation": float(path["validation"][num_steps - 1]),
            "test": float(path["test"][num_steps - 1]),
            "largest log penalty": float(jnp.max(last)),
            "path": {key: [round(x, 3) if np.isfinite(x) else None for x in path[key]] for key in path},
        }
    return rows


def summary_of_groups(rows):
    found = {}
    for name in ("untuned", *GROUPS):
        values = {key: [row[name][key] for row in rows] for key in rows[0][name] if key not in ("penalties", "path")}
        found[name] = {key: mean(column) for key, column in values.items()}
        for key in ("validation", "test", "test, all"):
            found[name][f"{key}, less one"] = paired(values[key], [row["one"][key] for row in rows])
    return found


def summary_of_few(rows):
    found = {}
    for name in (name for name in rows[0] if name != "seed"):
        tests = [row[name]["test"] for row in rows]
        control = [row["untuned, 100 images"]["test"] for row in rows]
        found[name] = {"test": mean(tests), "test less untuned, 100 images": paired(tests, control)}
        if name in RULES:
            told = ("all right at", "monitor above 2 at", "not finite at", "largest monitor", "validation")
            found[name] |= {key: [row[name][key] for row in rows] for key in told}
    return found


def span(steps):
    """Of outer steps, one a seed: their range, or in how many seeds there is none."""
    known = [step for step in steps if step is not None]
    if not known:
        return "never"
    text_ = f"{min(known)} to {max(known)}" if min(known) < max(known) else str(known[0])
    return text_ + (f" (never in {len(steps) - len(known)})" if len(known) < len(steps) else "")


def table(found):
    print("| penalties | validation loss | test loss | test, % | test loss, all images | test, all images, % |")
    print("|---|---|---|---|---|---|")
    for name, each in found["groups"].items():
        losses = [text(each[key]) for key in ("validation", "test")]
        cells = [*losses, text(each["accuracy"], ".2f"), text(each["test, all"]), text(each["accuracy, all"], ".2f")]
        print("| " + " | ".join([name, *cells]) + " |")
    for name, each in found["groups"].items():
        if name != "one":
            told = {key: text(each[f"{key}, less one"], ".4f") for key in ("validation", "test", "test, all")}
            print(f"{name} less one: {told}")
    print("\n| 50 + 50 images | all right at step | monitor above 2 | not finite | test, % |\n|---|---|---|---|---|")
    for name, each in found["few"].items():
        steps = ("all right at", "monitor above 2 at", "not finite at")
        cells = [span(each[key]) if key in each else "" for key in steps]
        print("| " + " | ".join([name, *cells, text(each["test"], ".1f")]) + " |")


def picture(rows, found, path):
    figure, axes = plot.figure(1, 3, width=12.5, height=3.8)
    for name, color in zip(GROUPS, plot.PALETTE, strict=False):
        curves = np.array([row[name]["path"] for row in rows["groups"]]).mean(0)
        for of, style, label in ((0, "-", name), (1, "--", None)):
            axes[0, 0].plot(curves[:, of], style, color=color, lw=2, label=label)
    axes[0, 0].set(xlabel="outer step", ylabel="loss")
    axes[0, 0].set_title("1000 + 1000 images; dashed: test", fontsize=plot.TITLE)
    axes[0, 0].legend(**plot.LEGEND)
    for name, color in COLORS.items():
        curves = {
            key: np.array([row[name]["path"][key] for row in rows["few"]], float)
            for key in ("validation", "test", "monitor")
        }
        if name in ("CG", "identity"):
            for key, style in (("validation", "-"), ("test", "--")):
                axes[0, 1].plot(curves[key].mean(0), style, color=color, lw=2, label=f"{key}, {name}")
        axes[0, 2].plot(curves["monitor"].T, color=color, lw=1, label=[name] + [None] * (len(curves["monitor"]) - 1))
        lost = [row[name]["not finite at"] for row in rows["few"]]
        for curve, end in zip(curves["monitor"], lost, strict=True):
            if end is not None:
                axes[0, 2].plot(end - 1, min(curve[end - 1], 30), "x", color=color, ms=7, mew=2)
    control = found["few"]["untuned, 100 images"]["test"]["mean"]
    axes[0, 1].axhline(control, color="0.5", lw=1.5, ls=":", label="test, all 100, untuned")
    axes[0, 1].set(xlabel="outer step", ylabel="accuracy, %")
    axes[0, 1].set_title("50 + 50 images", fontsize=plot.TITLE)
    axes[0, 1].legend(**plot.LEGEND)
    axes[0, 2].axhline(2, color="0.5", lw=1)
    axes[0, 2].set(xlabel="outer step", ylabel="rate · largest curvature", yscale="log", ylim=(0.01, 20))
    axes[0, 2].set_title("above 2 training diverges; ×: not finite", fontsize=plot.TITLE)
    axes[0, 2].legend(**plot.LEGEND)
    gain = found["groups"]["per weight"]
    less = [f"{gain[f'{key}, less one']['mean']:+.3f}" for key in ("validation", "test", "test, all")]
    title = "A penalty per weight less one penalty: validation loss {}, test loss {}, trained on all images {}; {}"
    title = title.format(*less, warning(found["few"]["identity"]))
    figure.suptitle(title, fontsize=11)
    plot.save(figure, path)


def warning(identity):
    """How long before the loss is lost the monitor tells it."""
    pairs = zip(identity["monitor above 2 at"], identity["not finite at"], strict=True)
    lead = [lost - above for above, lost in pairs if lost is not None and above is not None]
    return f"divergence is foretold {min(lead)} to {max(lead)} steps ahead" if lead else "nothing diverged"


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=5, quick=1)
    images, outer, test = (100, 3, 1000) if given.quick else (IMAGES, OUTER, None)
    steps, long = (5, 8) if given.quick else (100, LONG)
    rows = {
        "groups": each_seed(given, lambda seed, _: measure_groups(seed, images, outer, test), "groups"),
        "few": each_seed(given, lambda seed, _: measure_few(seed, steps, long, 1000), "few"),
    }
    found = {"groups": summary_of_groups(rows["groups"]), "few": summary_of_few(rows["few"])}
    table(found)
    write(given, {"summary": found, "rows": rows})
    picture(rows, found, given.out / "penalty_per_weight.png")


if __name__ == "__main__":
    main()
