"""Small networks in flax: multilayer perceptrons and a convolutional network like LeNet."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import jaxhpo
import jaxhpo.data
from jaxhpo.models import MLP, LeNet
from suite.problem import Problem, arrays, bilevel, by, corrupted, cross_entropies, full, minibatches, tabular

LENET = LeNet((32, 10), (6, 12), (3, 3), padding="SAME", activation=jax.nn.tanh)  # of 8×8 pixels


@functools.partial(jax.jit, static_argnums=0)
def initial(model: nn.Module, key: jax.Array, inputs) -> dict:
    return model.init(key, inputs)["params"]


def network(model: nn.Module, seed: int, inputs) -> tuple[dict, Callable]:
    """The initial parameters, and `(params, inputs) -> outputs`."""
    params = initial(model, jax.random.key(seed), inputs[:1])
    return arrays(params), lambda params, inputs: model.apply({"params": params}, inputs)


def digits(seed: int, train: int = 200, wrong: float = 0.0) -> jaxhpo.data.Split:
    """A share of the training labels may be wrong."""
    parts = jaxhpo.data.digits(seed, train=train, validation=300)
    labels = corrupted(parts.train.targets, seed, wrong, lambda rng, y: rng.integers(0, 10, y.shape, np.int32))
    return arrays(parts._replace(train=parts.train._replace(targets=labels)))


def classifier(title, model, tx, parts, hparams, seed, *, penalty=None, scale=None, solver=None, **settings) -> Problem:
    """Cross-entropy of a network on images, plus `penalty(params, h)`."""
    params, apply = network(model, seed, parts.train.inputs)

    def loss(params, h, data):
        return cross_entropies(apply(params, data.inputs), data.targets).mean()

    def train_loss(params, h, data):
        return loss(params, h, data) + (penalty(params, h) if penalty else 0.0)

    start = params if scale is None else functools.partial(scale, params)
    common = {"train_loss": train_loss, "loss": loss, "convex": False, "converged": False}
    return bilevel(title, solver or by(tx), parts, start, hparams, **common | settings)


def decay(params, log_penalty):
    """½ Σ e^h θ² for a tree of logarithms like the parameters', of the parameters' shapes or scalars."""
    return 0.5 * sum(jax.tree.leaves(jax.tree.map(lambda p, h: jnp.sum(jnp.exp(h) * p**2), params, log_penalty)))


def kernels(params):
    return {layer: params[layer]["kernel"] for layer in params}


def mlp_layers(seed: int) -> Problem:
    """A rate and a penalty for each layer, in `momentum_sgd`."""
    parts, steps = digits(seed), 100

    def penalty(params, h):
        return 0.5 * sum(
            jnp.exp(log) * jnp.sum(params[layer]["kernel"] ** 2) for layer, log in h["log_penalty"].items()
        )

    def rate(h, step):
        return jax.tree.map(jnp.exp, h["log_rate"])

    layers = ("Dense_0", "Dense_1")
    return classifier(
        "a network 64-16-10 of digits by momentum, a penalty and a rate for every layer",
        MLP((16, 10)),
        None,
        parts,
        {name: {layer: full(np.log(x)) for layer in layers} for name, x in (("log_penalty", 1e-3), ("log_rate", 0.1))},
        seed,
        penalty=penalty,
        solver=lambda train_loss: jaxhpo.momentum_sgd(train_loss, rate, 0.9),
        num_steps=steps,
        step_size=0.1,
        outer_rate=0.1,
        batches=minibatches(parts.train, seed, steps, 50),
    )


def mlp_penalties(tx, title, seed) -> Problem:
    parts, model = digits(seed), MLP((16, 10))
    shapes = network(model, seed, parts.train.inputs)[0]
    return classifier(
        f"a network 64-16-10 of digits by {title}, a penalty for every weight",
        model,
        tx,
        parts,
        jax.tree.map(lambda x: full(-6.0, *x.shape), shapes),
        seed,
        penalty=decay,
        num_steps=100,
        step_size=0.3,
        outer_rate=0.1,
    )


def mlp_examples(seed: int) -> Problem:
    """The weight of an example is 2 sigmoid(h); three labels of ten are wrong."""
    parts = digits(seed, 200, wrong=0.3)
    params, apply = network(MLP((32, 10)), seed, parts.train.inputs)

    def losses(params, data):
        return cross_entropies(apply(params, data.inputs), data.targets)

    return bilevel(
        "a network 64-32-10 of digits with wrong labels by Adam, a weight for every example",
        by(optax.adam(5e-3, eps_root=1e-5)),
        parts,
        params,
        full(0.0, 200),
        train_loss=lambda params, h, data: jnp.mean(2 * jax.nn.sigmoid(h) * losses(params, data)),
        loss=lambda params, h, data: losses(params, data).mean(),
        num_steps=150,
        step_size=0.1,
        outer_rate=0.2,
        convex=False,
        converged=False,
    )


def mlp_schedule(seed: int) -> Problem:
    parts, steps = digits(seed), 60

    def tx(h):
        return optax.sgd(lambda step: jnp.exp(h)[step], 0.9)

    return classifier(
        "a network 64-16-10 of digits by momentum, a rate for every step",
        MLP((16, 10)),
        tx,
        parts,
        full(np.log(0.03), steps),
        seed,
        num_steps=steps,
        step_size=0.1,
        outer_rate=0.1,
        batches=minibatches(parts.train, seed, steps, 50),
    )


def mlp_scale(seed: int) -> Problem:
    """The initial weights of each of three layers are multiplied by e^h; the rate is tuned with them."""
    parts = digits(seed)

    def scale(params, h):
        scales = jax.tree.broadcast(jax.tree.map(jnp.exp, h["log_scale"]), params)
        return jax.tree.map(jnp.multiply, scales, params)

    return classifier(
        "a network 64-16-16-10 of digits, the scale of every layer's initial weights and the rate",
        MLP((16, 16, 10)),
        lambda h: optax.sgd(jnp.exp(h["log_rate"]), 0.9),
        parts,
        {"log_scale": {f"Dense_{i}": full(-1.0) for i in range(3)}, "log_rate": full(np.log(0.05))},
        seed,
        scale=scale,
        num_steps=50,
        step_size=0.1,
        outer_rate=0.05,
    )


def mlp_features(seed: int) -> Problem:
    """A penalty for the weights of each of thirty inputs; the training converges."""
    parts = tabular(load_breast_cancer, seed, 100, 150)
    params, apply = network(MLP((4, 2)), seed, parts.train.inputs)

    def loss(params, h, data):
        return cross_entropies(apply(params, data.inputs), data.targets).mean()

    def train_loss(params, h, data):
        first, others = params["Dense_0"], (params["Dense_0"]["bias"], params["Dense_1"])
        penalties = jnp.sum(jnp.exp(h)[:, None] * first["kernel"] ** 2) + 0.02 * optax.tree.norm(others, squared=True)
        return loss(params, h, data) + 0.5 * penalties

    return bilevel(
        "a network 30-4-2 of breast cancer trained to convergence, a penalty for every input",
        by(optax.sgd(0.2, 0.95)),
        parts,
        params,
        full(np.log(0.02), 30),
        train_loss=train_loss,
        loss=loss,
        num_steps=800,
        step_size=0.2,
        outer_rate=0.1,
        convex=False,
        converged=True,
    )


def images(rows) -> Any:
    return rows.reshape(*rows.shape[:-1], 8, 8, 1)


def lenet_penalties(seed: int) -> Problem:
    """Half the squared norm of each layer's kernel, times e^h."""
    parts, steps = digits(seed, 150), 50
    parts = type(parts)(*(part._replace(inputs=images(part.inputs)) for part in parts))

    def penalty(params, h):
        return decay(kernels(params), h["log_penalty"])

    layers = ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
    return classifier(
        "LeNet on digits by Adam, a penalty for every layer and the rate",
        LENET,
        lambda h: optax.adam(jnp.exp(h["log_rate"]), eps_root=1e-6),
        parts,
        {"log_penalty": {layer: full(np.log(1e-3)) for layer in layers}, "log_rate": full(np.log(5e-3))},
        seed,
        penalty=penalty,
        num_steps=steps,
        step_size=0.1,
        outer_rate=0.1,
        batches=minibatches(parts.train, seed, steps, 32),
    )


class Augmented(NamedTuple):
    """Images with the normal numbers that distort them.

    Attributes:
      inputs: (n, 64).
      targets: (n,).
      noise: (n, 64), added to the pixels.
      shift: (n, 2), a translation.
      contrast: (n,), the logarithm of a factor.
    """

    inputs: jax.Array
    targets: jax.Array
    noise: jax.Array
    shift: jax.Array
    contrast: jax.Array


def augment(data: Augmented, strength: dict) -> jax.Array:
    """The images under distortions of the given strength, in which they are differentiable."""
    pixels = jnp.arange(8)

    def interpolation(shift):  # (n, 8, 8): linear, and zero outside the image
        distance = pixels[None, :, None] - pixels[None, None, :] - shift[:, None, None]
        return jax.nn.relu(1 - jnp.abs(distance))

    rows, columns = (interpolation(strength["shift"] * data.shift[:, axis]) for axis in range(2))
    moved = rows @ data.inputs.reshape(-1, 8, 8) @ jnp.swapaxes(columns, 1, 2)
    scaled = moved.reshape(len(moved), 64) * jnp.exp(strength["contrast"] * data.contrast)[:, None]
    return scaled + strength["noise"] * data.noise


def lenet_augmentation(seed: int) -> Problem:
    """Each minibatch is distorted anew; the logarithms of the strengths are tuned on plain images."""
    parts, steps, size = digits(seed, 100), 50, 32
    rng, count = np.random.default_rng(seed), steps * size
    rows = rng.integers(0, 100, count)
    noise, shift, contrast = (arrays(rng.normal(size=shape)) for shape in ((count, 64), (count, 2), (count,)))
    inputs, targets = (jnp.asarray(np.asarray(x)[rows]) for x in parts.train)
    train = Augmented(inputs, targets, noise, shift, contrast)
    params, apply = network(LENET, seed, images(parts.train.inputs))

    def train_loss(params, h, data):
        return cross_entropies(apply(params, images(augment(data, jax.tree.map(jnp.exp, h)))), data.targets).mean()

    return bilevel(
        "LeNet on digits by momentum, the strength of noise, shifts and contrast",
        by(optax.sgd(0.1, 0.9)),
        (train, *parts[1:]),
        params,
        {"noise": full(-3.0), "shift": full(-2.0), "contrast": full(-2.0)},
        train_loss=train_loss,
        loss=lambda params, h, data: cross_entropies(apply(params, images(data.inputs)), data.targets).mean(),
        num_steps=steps,
        step_size=0.1,
        outer_rate=0.2,
        convex=False,
        converged=False,
        batches=jax.tree.map(lambda x: x.reshape(steps, size, *x.shape[1:]), train),
    )


PROBLEMS = {
    "mlp-layers": mlp_layers,
    "mlp-penalties-sgd": functools.partial(mlp_penalties, optax.sgd(0.3, 0.9), "momentum"),
    "mlp-penalties-adam": functools.partial(mlp_penalties, optax.adam(1e-2, eps_root=1e-6), "Adam"),
    "mlp-examples": mlp_examples,
    "mlp-schedule": mlp_schedule,
    "mlp-scale": mlp_scale,
    "mlp-features": mlp_features,
    "lenet-penalties": lenet_penalties,
    "lenet-augmentation": lenet_augmentation,
}
