"""`Forward`, `ForwardGradient` and `Smoothing`: derivatives of the inner run along directions of its inputs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxhpo._adjoint.model_state import warn_of_stopped
from jaxhpo._adjoint.pullback import refuse_tol
from jaxhpo._core.mesh import cast_varying, ravel, varying_axes
from jaxhpo._core.tree import has_derivative, is_inexact, map_in_chunks, partition
from jaxhpo._core.types import InnerState
from jaxhpo._core.validate import check_settings
from jaxhpo._inner.loop import run
from jaxhpo._inner.problem import Problem


@dataclasses.dataclass(frozen=True)
class Forward:
    r"""Exact forward mode, which carries the Jacobian of the inner state with respect to the hyperparameters.

    With :math:`\Phi_t` the inner step and :math:`Z_t = d\theta_t / dh`:

    .. math:: Z_{t+1} = \partial_\theta \Phi_t\, Z_t + \partial_h \Phi_t, \qquad \dot\theta_T = Z_T \dot h

    Reverse mode transposes this product, so `jax.grad`, `jax.jvp`, `jax.jacfwd` and Hessians all work. Only perturbed
    inputs (those that are being differentiated) get a column of Z.

    **Cost and bias**: 2 + 1.35 m trainings for m perturbed numbers (operations counted on an MLP 784-256-256-10,
    T = 20); memory of m copies of the inner state, for any T. Exact for the T-step map, as `Unroll()` is. Cheaper than
    `Unroll()` for a single hyperparameter; with more hyperparameters, useful where T is too large for any other rule to
    fit in memory.

    Args:
      chunk_size: number of columns carried at once; None carries all. A smaller number needs less memory and repeats
        the forward run once per chunk.

    Raises:
      JaxhpoError: if a setting is out of its range, or `tol` is given (the number of steps must be fixed).

    Example:
      >>> adjoint = jaxhpo.Forward(chunk_size=8)

    References:
      Franceschi, Donini, Frasconi, Pontil. Forward and Reverse Gradient-Based Hyperparameter Optimization. 2017.
      arXiv:1703.01785
    """

    chunk_size: int | None = None

    def __post_init__(self):
        check_settings(self, chunk_size="count or None")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop and carries the derivative of its state forward."""

        def tangent(fn, z, dz, _given):
            # θ̇_T = Σ_k ż_k Z_k, with the columns Z_k = Θ'(z) e_k of the Jacobian.
            return weighted_sum(dz, push(fn, z, jnp.eye(z.size, dtype=z.dtype), self.chunk_size))

        final, taken = run_with_tangent(problem, self, tangent)
        return warn_of_stopped(problem, final), taken


@dataclasses.dataclass(frozen=True)
class ForwardGradient:
    r"""Forward mode along random directions: an unbiased estimate whose cost does not grow with the dimension m of h.

    With v the cotangent at the solution:

    .. math:: \hat g = \frac1K\sum_{k=1}^K \big(\theta'(h)\, v_k\big)^\top v\; v_k, \qquad v_k \sim N(0, I_m)

    :math:`E[\hat g]` is the exact hypergradient through the solve.

    **Cost and bias**: 2 + 1.35 K trainings (as `Forward`); memory of K copies of the inner state. Unbiased, with a
    variance of :math:`(m + 1)/K` times the squared norm: K must grow with m for the same error. That is in the units of
    the hyperparameters that `solve` is given: pass logarithms of penalties, and take `jnp.exp` in the train loss. With
    `transforms=positive` alone the derivatives of tiny penalties are spread over large ones (30 penalties from
    :math:`e^{-7}` to :math:`e^2`: 590 times the norm in the logarithms, where it would be 5.9).

    Args:
      num_directions: K above.

    Raises:
      JaxhpoError: if K is not a positive integer, `solve` is given no `key`, or `tol` is given.

    Example:
      >>> adjoint = jaxhpo.ForwardGradient(num_directions=16)

    References:
      Baydin, Pearlmutter, Syme, Wood, Torr. Gradients without Backpropagation. 2022. arXiv:2202.08587
    """

    num_directions: int

    def __post_init__(self):
        check_settings(self, num_directions="count")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop and estimates its derivative from random directions."""
        return self.run_weighted(problem, jnp.full(self.num_directions, 1 / self.num_directions))

    def run_weighted(self, problem: Problem, weights: jax.Array) -> tuple[InnerState, jax.Array]:
        """`run` with the directions weighted by a (K,) array, in the place of their mean."""

        def tangent(fn, z, dz, given):
            key, weights = given
            # θ̇ = Θ'(z) ż = E[Θ'(z) v (v·ż)], since E[v vᵀ] = I; the estimate is the mean over K samples of v.
            v = jax.random.normal(key, (self.num_directions, z.size), z.dtype)
            return weighted_sum(jnp.matmul(v, dz, precision="highest") * weights.astype(dz.dtype), push(fn, z, v, None))

        final, taken = run_with_tangent(problem, self, tangent, (problem.require_key(self), weights))
        return warn_of_stopped(problem, final), taken


@dataclasses.dataclass(frozen=True)
class Smoothing:
    r"""Derivative of the solution map smoothed by a Gaussian, from pairs of trainings at perturbed inputs.

    .. math:: \theta_\sigma(h) = E\,\theta(h + \sigma\epsilon), \qquad \theta_\sigma'(h)\,\dot h = E\Big[
        \frac{\theta(h+\sigma\epsilon)-\theta(h-\sigma\epsilon)}{2\sigma}\, (\epsilon\cdot\dot h)\Big], \qquad
        \epsilon \sim N(0, I_m)

    The inner run is not differentiated, so it may be rough or chaotic, and may contain loops and integer decisions. The
    outer loss keeps its true derivative. (To smooth the outer loss too, as for an accuracy, see `EvolutionStrategies`.)

    **Cost and bias**: 1 + 2K trainings; memory of 2K copies of the inner state, for any T. Unbiased for the smoothed
    map; biased by O(σ²) for the map itself, with a variance of order m/K.

    Args:
      num_pairs: K above, the number of samples of ε.
      sigma: σ above, the standard deviation of the perturbation in units of the hyperparameters that `solve` is given.
        It is the same for all of them, so give them similar scales: for penalties their logarithms, with `jnp.exp` in
        the train loss (see `ForwardGradient`).

    Raises:
      JaxhpoError: if a setting is out of its range, `solve` is given no `key`, or `tol` is given.

    Example:
      >>> adjoint = jaxhpo.Smoothing(num_pairs=16, sigma=0.1)

    References:
      Nesterov, Spokoiny. Random Gradient-Free Minimization of Convex Functions. 2017.
      Salimans et al. Evolution Strategies as a Scalable Alternative to Reinforcement Learning. 2017. arXiv:1703.03864
    """

    num_pairs: int
    sigma: float

    def __post_init__(self):
        check_settings(self, num_pairs="count", sigma="positive")

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop and estimates its derivative from runs at perturbed inputs."""
        return self.run_weighted(problem, jnp.full(self.num_pairs, 1 / self.num_pairs))

    def run_weighted(self, problem: Problem, weights: jax.Array) -> tuple[InnerState, jax.Array]:
        """`run` with the pairs weighted by a (K,) array, in the place of their mean."""

        def tangent(fn, z, dz, given):
            key, weights = given
            # θ̇ = E[(Θ(z + σε) − Θ(z − σε)) / 2σ (ε·ż)]; the estimate is the mean over K samples of ε.
            noise = jax.random.normal(key, (self.num_pairs, z.size), z.dtype)

            def slope(e):
                pair = fn(z + self.sigma * e), fn(z - self.sigma * e)
                return jax.tree.map(lambda plus, minus: (plus - minus) / (2 * self.sigma), *pair)

            products = jnp.matmul(noise, dz, precision="highest")
            return weighted_sum(products * weights.astype(dz.dtype), jax.vmap(slope)(noise))

        return run_with_tangent(problem, self, tangent, (problem.require_key(self), weights))


def run_with_tangent(
    problem: Problem, adjoint: Any, tangent: Callable, given: Any = None
) -> tuple[InnerState, jax.Array]:
    """Runs the inner problem, with a tangent that is computed from runs of the whole inner problem.

    Args:
      problem: the inner problem, without `tol`.
      adjoint: the rule, for messages.
      tangent: `(fn, z, dz, given) -> tangent of fn(z) along dz`, linear in dz, so that reverse mode can transpose it. z
        is the vector of all perturbed inputs (initial state, hyperparameters, closed-over values, data); inputs that
        are not perturbed cost nothing. fn returns the floating-point leaves of the final state.
      given: arrays that `tangent` needs; closed over, they would be lost to a `jit` around the solve.

    Returns:
      The final state, and the number of steps taken.
    """
    refuse_tol(problem, adjoint)

    def final(inputs):
        state, own, xs = inputs
        return run(problem._replace(state=state, inputs=own, xs=xs))

    return _with_tangent(final, tangent, (problem.state, problem.inputs, problem.xs), given)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_tangent(final, tangent, inputs, _given):
    return final(inputs)


def _with_tangent_jvp(final, tangent, primals, tangents):
    # θ_T = Θ(z) with z the perturbed leaves as one vector; the tangent is θ̇_T = Θ'(z) ż, or an estimate of it.
    (inputs, given), (dots, _) = primals, tangents
    # θ_T itself is computed by this same rule, so that second derivatives use the rule too.
    out = _with_tangent(final, tangent, inputs, given)
    perturbed = jax.tree.map(lambda x, d: has_derivative(x) and not isinstance(d, SymbolicZero), inputs, dots)
    leaves, combine = partition(inputs, perturbed)
    z, unravel = ravel(leaves)
    dz, _ = ravel(partition(dots, perturbed)[0])
    floats = jax.tree.map(is_inexact, out)

    def fn(z):  # Θ
        return partition(final(combine(unravel(z))), floats)[0]

    # Integer leaves of the result have tangents of type float0.
    _, combine_dots = partition(jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), out), floats)
    return out, combine_dots(tangent(fn, z, dz, given))


_with_tangent.defjvp(_with_tangent_jvp, symbolic_zeros=True)


def push(fn: Callable, z: jax.Array, directions: jax.Array, chunk_size: int | None) -> list:
    """Directional derivatives Θ'(z) v_k of `fn` at `z`, one per row v_k of `directions`, `chunk_size` at a time."""
    return map_in_chunks(lambda v: jax.jvp(fn, (z,), (v,))[1], cast_varying(directions, varying_axes(z)), chunk_size)


def weighted_sum(weights: jax.Array, columns: list) -> list:
    """Σ_k weights[k] columns[k], which is linear in the weights."""
    return [jnp.tensordot(weights.astype(c.dtype), c, axes=1, precision="highest") for c in columns]
