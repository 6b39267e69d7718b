"""A Gaussian process of the values of trainings, by tinygp."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import where

EMPTY = 1e6  # noise of a place that holds no training
LEAST_NOISE = {"float32": 3e-5, "float64": 1e-10}  # variance, where that of the values is 1
SCALES = (0.2, 1.0)  # length scales from which the likelihood is raised, where the extent of the points is 1
FIT_STEPS = 25  # of L-BFGS, from each of them


def gaussian_process(points: jax.Array, values: jax.Array, count: jax.Array, kernel: str) -> Callable:
    """A Gaussian process of the first `count` of N values: x -> its mean and standard deviation there.

    Its length scales, amplitude and noise are those of the largest marginal likelihood times a wide prior, which L-BFGS
    finds from several starts. Places without a value have so large a noise that they say nothing.

    Args:
      points: (N, m).
      values: (N,).
      count: of the places that hold a value.
      kernel: "matern52" or "rbf".
    """
    try:
        import tinygp
        from tinygp.kernels.distance import L2Distance
    except ImportError as error:
        raise JaxhpoError("a Gaussian process needs tinygp: `pip install 'jaxhpo[search]'`.") from error
    given, dtype = values.dtype, jnp.result_type(float)  # optax's line search takes no float32 where x64 is enabled
    points, values = points.astype(dtype), values.astype(dtype)
    there = jnp.arange(len(values)) < count
    centre = jnp.sum(jnp.where(there, values, 0.0)) / count
    spread = jnp.sqrt(jnp.sum(jnp.where(there, values - centre, 0.0) ** 2) / count)
    spread = jnp.where(spread > 0, spread, 1.0)
    targets = jnp.where(there, (values - centre) / spread, 0.0)
    # tinygp's default distance is |x|₁, with which Matérn's function is not positive definite in two dimensions.
    form = {"matern52": tinygp.kernels.Matern52, "rbf": tinygp.kernels.ExpSquared}[kernel](distance=L2Distance())
    least = LEAST_NOISE[str(dtype)]

    def process(setting):
        noise = jnp.where(there, least + jnp.exp(setting["log_noise"]), EMPTY)
        amplitude, scales = jnp.exp(setting["log_amplitude"]), jnp.exp(setting["log_scales"])
        covariance = amplitude * tinygp.transforms.Linear(1 / scales, form)
        return tinygp.GaussianProcess(covariance, points, diag=noise)

    def loss(setting):
        # Normal priors on the logarithms: they matter where the values say nothing.
        prior = jnp.sum(setting["log_scales"] ** 2) / 8 + (setting["log_amplitude"] - 1.0) ** 2 / 18
        return prior + (setting["log_noise"] + 14.0) ** 2 / 50 - process(setting).log_probability(targets)

    optimizer = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=8))
    value_and_grad = optax.value_and_grad_from_state(loss)

    def fitted(scale):
        log_scales = jnp.full(points.shape[1], jnp.log(scale), points.dtype)
        setting = {
            "log_scales": log_scales,
            "log_amplitude": jnp.ones_like(scale),
            "log_noise": jnp.full_like(scale, -14.0),
        }

        def body(loop, _):
            setting, state, kept = loop
            value, grad = value_and_grad(setting, state=state)
            kept = where(value < kept[0], (value, setting), kept)  # False of NaN, as of a matrix that is singular
            updates, state = optimizer.update(grad, state, setting, value=value, grad=grad, value_fn=loss)
            return (optax.apply_updates(setting, updates), state, kept), None

        loop = setting, optimizer.init(setting), (jnp.full_like(scale, jnp.inf), setting)
        (_, _, kept), _ = jax.lax.scan(body, loop, length=FIT_STEPS)
        return kept

    losses, settings = jax.vmap(fitted)(jnp.asarray(SCALES, points.dtype))
    best = jnp.argmin(losses)
    gp = process(jax.tree.map(lambda x: x[best], settings))
    weights = gp.solver.solve_triangular(gp.solver.solve_triangular(targets), transpose=True)

    def predict(x):
        x = x.astype(dtype)
        covariances = gp.kernel(points, x[None])[:, 0]
        explained = jnp.sum(gp.solver.solve_triangular(covariances) ** 2)
        variance = gp.kernel(x[None], x[None])[0, 0] - explained
        mean, deviation = centre + spread * covariances @ weights, spread * jnp.sqrt(jnp.maximum(variance, 0.0) + least)
        return mean.astype(given), deviation.astype(given)

    return predict
