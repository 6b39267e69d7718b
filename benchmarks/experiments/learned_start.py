"""Initial weights from which a few steps suffice: MAML, first-order MAML and iMAML beside what needs no inner problem.

A task is a training on a few examples, from a start that all tasks share; the start is learned through the loss on
further examples of each task, by Adam over `vmap`ped tasks:

    MAML         a few steps from the start, `Unroll`
    first-order  the same steps, whose derivative is taken to be the identity
    iMAML        steps with momentum towards the optimum of loss + λ/2 ‖w − start‖², `Implicit` by five conjugate
                 gradients, with the Gauss-Newton matrix in the place of the Hessian, which may be indefinite

in two kinds of tasks:

    sinusoids    amplitude in [.1, 5], phase in [0, π], ten points in [−5, 5], a 1-40-40-1 tanh network; error on new
                 tasks, beside adaptation from a start that was trained on all tasks together, and from a random one
                 (by the steps of MAML or iMAML, whichever do better in the test; for Omniglot too)
    Omniglot     5 characters, 1 drawing each, 14×14 pixels, a small convolutional network (8000 weights, written as
                 matrix products, with layer normalisation); the start is learned on the five alphabets of small1 (136
                 characters and three rotations of each), and measured on Katakana, Sanskrit and Tagalog (106
                 characters); beside the nearest neighbour in pixels (28×28 or 14×14, whichever does better there),
                 a random start, and the nearest neighbour by the features of a network that was trained to tell all
                 544 training characters apart

Accuracy is that of 5 new drawings a character, over 600 tasks a seed, the same for all methods; errors are over seeds.
Hypergradients are checked against exact tangents of the steps that were run (for iMAML, of 400 steps, with the
Hessian), and the memory of the compiled programs is counted. With relu the check of iMAML cannot tell: the optimum is
at kinks, where the inner gradient does not vanish however many or small the steps are, and the implicit function
theorem does not hold. So the same is checked with silu in the place of relu, too. Settings were chosen on seeds 100 and
101: of Omniglot by Korean, held out of the training alphabets. What was tried is in benchmarks/README.md.

    python benchmarks/experiments/learned_start.py [--out DIR] [--quick] [--seeds 3] [--run-dir DIR]

(Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, 2017; Rajeswaran, Finn, Kakade, Levine, Meta-Learning with Implicit
Gradients, 2019.)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import mean, once, paired, parse, text, write

import jaxhpo
import jaxhpo.data
from jaxhpo import plot


class Kind(NamedTuple):
    """A kind of tasks.

    Attributes:
      predict: (params, inputs) -> outputs.
      fit: (outputs, targets) -> scalar, the loss.
      error: (outputs, targets) -> what is reported.
      rate: of the inner steps of MAML.
      steps: inner steps of MAML.
      pull: λ of iMAML.
      long: inner steps of iMAML.
      pace: rate and momentum of the inner steps of iMAML.
      tasks: in an outer step.
    """

    predict: Callable
    fit: Callable
    error: Callable
    rate: float
    steps: int
    pull: float
    long: int
    pace: tuple[float, float]
    tasks: int

    def loss(self, w, examples):
        return self.fit(self.predict(w, examples[0]), examples[1])

    def distance(self, w, start):
        """What pulls iMAML to the start."""
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), w, start)
        return 0.5 * self.pull * sum(jax.tree.leaves(squares))


def adapt(kind, method, start, support, steps=None, exact=None):
    """The parameters of one task; `exact` is another rule for iMAML."""
    if method == "together":
        return start
    steps = steps or (kind.long if method == "iMAML" else kind.steps)
    if method == "iMAML":
        rule = exact or jaxhpo.Implicit(
            jaxhpo.CG(maxiter=5, tol=1e-3),
            curvature=jaxhpo.gauss_newton(
                lambda w, start, batch: kind.predict(w, support[0]),
                lambda outputs, batch: kind.fit(outputs, support[1]),
                kind.distance,
            ),
        )
        near = lambda w, start, batch: kind.loss(w, support) + kind.distance(w, start)  # noqa: E731
        inner = jaxhpo.from_optax(near, optax.sgd(*kind.pace))
        state = inner.init(jax.lax.stop_gradient(start), start)  # the optimum does not depend on where it is sought
        return jaxhpo.solve(inner, state, start, num_steps=steps, adjoint=rule).params
    inner = jaxhpo.from_optax(lambda w, h, batch: kind.loss(w, support), optax.sgd(kind.rate))
    if method == "first-order":
        end = jaxhpo.solve(inner, inner.init(jax.lax.stop_gradient(start), None), None, num_steps=steps).params
        return jax.tree.map(lambda end, start: start + jax.lax.stop_gradient(end - start), end, start)
    return jaxhpo.solve(inner, inner.init(start, None), None, num_steps=steps, adjoint=jaxhpo.Unroll()).params


def meta_loss(kind, method, start, tasks, steps=None, exact=None):
    """Mean loss on new examples; `tasks` is (support, query), each with a leading axis of tasks."""

    def of(support, query):
        return kind.loss(adapt(kind, method, start, support, steps, exact), query)

    return jax.vmap(of)(*tasks).mean()


def learn(kind, method, draw, starts, num_steps, rate=3e-3):
    """The learned start of each seed; `draw(key)` is a task."""

    def outer_loss(start, carry, key):
        tasks = jax.vmap(draw)(jax.random.split(key, kind.tasks))
        return meta_loss(kind, method, start, tasks), None, None

    seeds = len(jax.tree.leaves(starts)[0])
    schedule, keys = optax.cosine_decay_schedule(rate, num_steps), jax.random.split(jax.random.key(1), seeds)
    settings = {"num_steps": num_steps, "population": seeds, "key": keys}
    return jaxhpo.tune(outer_loss, starts, optax.adam(schedule), **settings).hparams


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure(kind, method, starts, tasks):
    """The mean error of each seed, over its tasks, after adaptation."""

    def of_seed(start, tasks):
        one = lambda task: kind.error(kind.predict(adapt(kind, method, start, task[0]), task[1][0]), task[1][1])  # noqa: E731
        return jax.lax.map(one, tasks, batch_size=50).mean()

    return jax.lax.map(lambda x: of_seed(*x), (starts, tasks))


def dense(key, *widths):
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) / jnp.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


# --- sinusoids ---


def curve(w, x):
    x = x[:, None]
    for layer in w[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return (x @ w[-1]["w"] + w[-1]["b"][None])[:, 0]


def square_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def draw_sinusoid(key, shots=10):
    """Two parts of `shots` points."""
    amplitude, phase, points = jax.random.split(key, 3)
    a = jax.random.uniform(amplitude, minval=0.1, maxval=5.0)
    p = jax.random.uniform(phase, maxval=jnp.pi)
    x = jax.random.uniform(points, (2 * shots,), minval=-5.0, maxval=5.0)
    y = a * jnp.sin(x - p)
    return (x[:shots], y[:shots]), (x[shots:], y[shots:])


SINUSOIDS = Kind(curve, square_error, square_error, rate=0.01, steps=10, pull=2.0, long=30, pace=(0.005, 0.8), tasks=16)


# --- Omniglot ---

SIZE, WAYS, QUERIES, WINDOW, STRIDE = 14, 5, 5, 5, 3
_corner = np.arange(0, SIZE - WINDOW + 1, STRIDE).reshape(2, 2)  # by quarters of the image, so that a window of the
_corner = np.stack(np.broadcast_arrays(_corner[:, None, :, None], _corner[None, :, None, :]), -1)  # second layer is a
PIXELS = np.stack(np.divmod(np.arange(WINDOW**2), WINDOW), -1)  # reshaping
PATCHES = (_corner.reshape(-1, 1, 2) + PIXELS) @ np.array([SIZE, 1])


def windows(x):
    """(n, 16, 25) of images (n, 196): windows of 5×5 with stride 3."""
    return x[:, PATCHES]


def network(key, classes=WAYS):
    """Weights; the last layer of tasks is zero."""
    first, second, last = jax.random.split(key, 3)
    layers = dense(first, WINDOW**2, 32) + dense(second, 4 * 32, 48) + dense(last, 4 * 48, classes)
    return layers if classes != WAYS else [*layers[:2], jax.tree.map(jnp.zeros_like, layers[2])]


def normal(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-3)


def features(w, x, activation=jax.nn.relu):
    """(n, 192) of `windows`: two layers, the second on windows of 2×2 with stride 2."""
    x = x @ w[0]["w"] + w[0]["b"][None, None]
    x = activation(normal(x.reshape(len(x), -1)))
    x = x.reshape(len(x), 4, -1) @ w[1]["w"] + w[1]["b"][None, None]
    return activation(normal(x.reshape(len(x), -1)))


def logits(w, x, activation=jax.nn.relu):
    return features(w, x, activation) @ w[2]["w"] + w[2]["b"][None]


def cross_entropy(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def mistakes(outputs, targets):
    return jnp.mean(jnp.argmax(outputs, -1) != targets)


OMNIGLOT = Kind(logits, cross_entropy, mistakes, rate=0.1, steps=4, pull=0.5, long=16, pace=(0.03, 0.8), tasks=8)
SMOOTH = OMNIGLOT._replace(predict=functools.partial(logits, activation=jax.nn.silu))


def characters(part, names=None, size=SIZE, rotated=False):
    """(characters, 20, size²) of some alphabets."""
    alphabets = jaxhpo.data.omniglot(part, size=size)
    images = np.concatenate([alphabets[name] for name in names or alphabets])
    if rotated:
        images = np.concatenate([np.rot90(images, turns, (2, 3)) for turns in range(4)])
    return images.reshape(*images.shape[:2], -1)


def draw_characters(images, key, prepare=windows):
    """The support and the query of a task: 1 and 5 drawings of each of 5 characters."""
    which, of_each = jax.random.split(key)
    chosen = jax.random.choice(which, len(images), (WAYS,), replace=False)
    order = jax.vmap(lambda k: jax.random.permutation(k, images.shape[1])[: 1 + QUERIES])(
        jax.random.split(of_each, WAYS)
    )
    x = images[chosen[:, None], order]
    y = jnp.broadcast_to(jnp.arange(WAYS)[:, None], (WAYS, QUERIES))
    return (prepare(x[:, 0]), y[:, 0]), (prepare(x[:, 1:].reshape(WAYS * QUERIES, -1)), y.reshape(-1))


def nearest(task, similarity):
    (x, y), (new, labels) = task
    return jnp.mean(y[jnp.argmax(similarity(new, x), -1)] != labels)


def minus_distance(a, b):
    return 2 * a @ b.T - jnp.sum(b**2, -1)[None]


def cosine(w, a, b):
    a, b = (features(w, x) for x in (a, b))
    return (a / jnp.linalg.norm(a, axis=-1, keepdims=True)) @ (b / jnp.linalg.norm(b, axis=-1, keepdims=True)).T


def classifier(images, key, num_steps):
    """A network that tells all characters apart, trained by Adam."""
    x, solver = (
        jnp.asarray(images),
        jaxhpo.from_optax(lambda w, h, b: cross_entropy(logits(w, b[0]), b[1]), optax.adam(3e-3)),
    )

    def batch(step):
        which, drawing = jax.random.split(jax.random.fold_in(key, step))
        y = jax.random.randint(which, (64,), 0, len(x))
        return windows(x[y, jax.random.randint(drawing, (64,), 0, x.shape[1])]), y

    start = network(key, len(images))
    return jaxhpo.solve(solver, solver.init(start, None), None, batch, num_steps=num_steps).params


# --- both ---

OUTER = 1000
METHODS = {"MAML": plot.BLUE, "first-order": plot.SKY, "iMAML": plot.GREEN}
CONTROLS = {"random start": "0.6", "together": "0.3", "pixels": plot.VERMILION, "features": plot.ORANGE}


def errors(kind, draw, new_tasks, starts, num_steps, methods):
    """Errors by method, of shape (seeds,)."""
    by = lambda method, starts: np.asarray(measure(kind, method, starts, new_tasks))  # noqa: E731
    better = lambda starts: np.minimum(by("MAML", starts), by("iMAML", starts))  # noqa: E731
    found = {"random start": better(starts)}
    for method in methods:
        learned = learn(kind, method, draw, starts, num_steps)
        if method == "together":
            found[method] = better(learned)
        else:
            found[method] = by("iMAML" if method == "iMAML" else "MAML", learned)
    return found


def sinusoids(seeds, num_tasks, num_steps):
    starts = jax.vmap(lambda key: dense(key, 1, 40, 40, 1))(jax.random.split(jax.random.key(0), seeds))
    tasks = jax.vmap(jax.vmap(draw_sinusoid))(jax.random.split(jax.random.key(2), (seeds, num_tasks)))
    return errors(SINUSOIDS, draw_sinusoid, tasks, starts, num_steps, (*METHODS, "together"))


def omniglot(seeds, num_tasks, num_steps):
    """Accuracies."""
    training = jnp.asarray(characters("small1", rotated=True))
    starts = jax.vmap(network)(jax.random.split(jax.random.key(0), seeds))

    def tasks(size=SIZE, prepare=windows):
        images = jnp.asarray(characters("small2", ("Japanese_(katakana)", "Sanskrit", "Tagalog"), size))
        draw = functools.partial(draw_characters, images, prepare=prepare)
        return jax.vmap(jax.vmap(draw))(jax.random.split(jax.random.key(2), (seeds, num_tasks)))

    draw = functools.partial(draw_characters, training)
    found = errors(OMNIGLOT, draw, tasks(), starts, num_steps, METHODS)
    by_pixels = functools.partial(nearest, similarity=minus_distance)
    pixels = [jax.vmap(jax.vmap(by_pixels))(tasks(size, lambda x: x)).mean(1) for size in (14, 28)]
    found["pixels"] = min(pixels, key=lambda error: error.mean())
    networks = jax.vmap(lambda key: classifier(training, key, 2 * num_steps))(
        jax.random.split(jax.random.key(3), seeds)
    )
    by_features = lambda w, task: nearest(task, functools.partial(cosine, w))  # noqa: E731
    found["features"] = jax.vmap(jax.vmap(by_features, (None, 0)))(networks, tasks()).mean(1)
    return {method: 1 - error for method, error in found.items()}


class Probe(NamedTuple):
    """A kind, and the same with a smooth network if its own is not, for checks and the count of memory."""

    kind: Kind
    smooth: Kind | None
    start: list
    draw: Callable

    def tasks(self, number):
        return jax.vmap(self.draw)(jax.random.split(jax.random.key(100), number))


def probe(quick):
    if quick:
        return Probe(SINUSOIDS, None, dense(jax.random.key(100), 1, 8, 1), draw_sinusoid)
    images = jnp.asarray(characters("small1", ["Greek"]))
    return Probe(OMNIGLOT, SMOOTH, network(jax.random.key(100)), functools.partial(draw_characters, images))


CONVERGED = 400  # inner steps of the checks of iMAML


def stationary(kind, start, support):
    """The norm of the gradient of iMAML's inner loss after those steps, over that before them."""

    def slope(w):
        return optax.tree.norm(jax.grad(lambda w: kind.loss(w, support) + kind.distance(w, start))(w))

    return float(slope(adapt(kind, "iMAML", start, support, CONVERGED)) / slope(start))


def checks(probe):
    """Each hypergradient against exact tangents, on two tasks; first-order MAML beside MAML by their angle."""
    found, tasks = {}, probe.tasks(2)
    checked = [
        ("MAML", "MAML", probe.kind, None, None),
        ("iMAML", "iMAML", probe.kind, CONVERGED, jaxhpo.Implicit()),
    ]
    if probe.smooth is not None:
        checked.append(("iMAML, smooth network", "iMAML", probe.smooth, CONVERGED, jaxhpo.Implicit()))
    for name, method, kind, steps, exact in checked:
        outer = functools.partial(meta_loss, kind, method, tasks=tasks, steps=steps, exact=exact)
        check = jaxhpo.check_hypergradient(outer, probe.start, num_directions=2)
        found[name] = {"verdict": check.verdict, "relative error": float(check.relative_error)}
        if method == "iMAML":
            left = stationary(kind, probe.start, jax.tree.map(lambda x: x[0], tasks[0]))
            found[name]["gradient left by the inner steps"] = left
    by = {m: jax.jit(jax.grad(functools.partial(meta_loss, probe.kind, m))) for m in ("MAML", "first-order")}
    exact, first = (jax.flatten_util.ravel_pytree(gradient(probe.start, tasks))[0] for gradient in by.values())
    found["first-order"] = {"cosine": float(exact @ first / jnp.linalg.norm(exact) / jnp.linalg.norm(first))}
    return found


STEPS = (4, 16, 64)  # of which memory is counted


def memory(probe):
    """Bytes that the compiled hypergradient of an outer step's tasks allocates, by method and inner steps."""
    tasks = probe.tasks(probe.kind.tasks)

    def allocated(method, steps):
        program = jax.jit(jax.grad(functools.partial(meta_loss, probe.kind, method, steps=steps)))
        return program.lower(probe.start, tasks).compile().memory_analysis().temp_size_in_bytes

    return {method: [allocated(method, steps) for steps in STEPS] for method in ("MAML", "iMAML")}


def picture(found, bytes_of, path):
    figure, axes = plot.figure(1, 3, width=11.5, height=3.7)
    titles = {"omniglot": "Omniglot, new alphabets: accuracy", "sinusoids": "sinusoids: squared error"}
    for axis, (name, title) in zip(axes[0], titles.items(), strict=False):
        colors = {m: c for m, c in (METHODS | CONTROLS).items() if m in found[name]["mean"]}
        for i, (method, color) in enumerate(colors.items()):
            value = found[name]["mean"][method]
            axis.errorbar(value["mean"], i, xerr=value["error"], fmt="o", ms=8, capsize=3, color=color)
            axis.annotate(text(value), (value["mean"], i), (0, 8), textcoords="offset points", ha="center", fontsize=9)
        axis.set_yticks(range(len(colors)), colors)
        axis.set(ylim=(len(colors) - 0.5, -0.7))
        axis.margins(x=0.2)
        axis.set_title(title, fontsize=plot.TITLE)
    axis = axes[0, 2]
    for method, values in bytes_of.items():
        axis.plot(STEPS, np.array(values) / 2**20, "o-", color=METHODS[method], label=method)
    axis.set(xscale="log", ylim=(0, None), xlabel="inner steps")
    axis.set_xticks(STEPS, STEPS)
    axis.minorticks_off()
    axis.set_title("memory of a hypergradient, MiB", fontsize=plot.TITLE)
    axis.legend(**plot.LEGEND)
    percent = {
        m: f"{100 * found['omniglot']['mean'][m]['mean']:.0f} %" for m in ("MAML", "iMAML", "pixels", "features")
    }
    title = "One drawing of each of 5 new characters: MAML {MAML}, iMAML {iMAML}, nearest pixels {pixels}, "
    figure.suptitle((title + "features of a classifier {features}").format(**percent), fontsize=12)
    plot.save(figure, path, dpi=130)


def main(arguments=None) -> None:
    given = parse(__file__, __doc__, arguments, seeds=3, quick=1)
    if given.quick:  # most of its time would be compilation
        jax.config.update("jax_disable_most_optimizations", True)
    tasks, rows, found = (20 if given.quick else 600), {}, {}
    for name, run, steps in (("sinusoids", sinusoids, 800), ("omniglot", omniglot, OUTER)):

        def measured(run=run, steps=10 if given.quick else steps):
            values = run(given.seeds, tasks, steps)
            return {method: values[method].tolist() for method in METHODS | CONTROLS if method in values}

        rows[name] = values = once(given, f"{name}, {given.seeds} seeds", measured)
        rivals = ["iMAML", *(name for name in CONTROLS if name in values)]
        found[name] = {
            "mean": {method: mean(value) for method, value in values.items()},
            **{f"MAML minus {rival}": paired(values["MAML"], values[rival]) for rival in rivals},
            **{f"iMAML minus {rival}": paired(values["iMAML"], values[rival]) for rival in rivals[1:]},
        }
        print(f"{name}: {'accuracy' if name == 'omniglot' else 'squared error'}")
        for method, value in found[name].items():
            if method != "mean":
                print(f"  {method:<26}{text(value)}")
            else:
                print("".join(f"  {m:<26}{text(v)}\n" for m, v in value.items()), end="")
    of = probe(given.quick)
    checked, bytes_of = checks(of), memory(of)
    print(f"hypergradients: {checked}\nbytes at {STEPS} inner steps: {bytes_of}")
    write(given, {"summary": found, "checks": checked, "memory at inner steps": STEPS, "bytes": bytes_of, "rows": rows})
    picture(found, bytes_of, given.out / "learned_start.png")


if __name__ == "__main__":
    main()
