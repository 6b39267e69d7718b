"""Real-time forward differentiation: the Jacobian of an inner run that never ends."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, varying_axes
from jaxhpo._core.tree import is_inexact, upcast
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, Solution
from jaxhpo._estimator.pair import check_pair_state
from jaxhpo._inner.problem import info_of, make_problem
from jaxhpo._inner.watch import instrumented


class RealTimeState(NamedTuple):
    """What the pair of `RealTime` carries.

    Attributes:
      inner: where the next inner steps start.
      jacobian: Z, the derivative of `inner` with respect to the hyperparameters: one array for each floating-point leaf
        of `inner`, with a leading axis of length m in front of the leaf's own.
    """

    inner: InnerState
    jacobian: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class RealTime:
    r"""Real-time forward mode (RTHO): hyperparameters move while one long training goes on.

    An update takes `num_steps` inner steps at the current hyperparameters and carries on the Jacobian Z of the whole
    inner state s (parameters, optimiser's state, model state), then reads off the hypergradient:

    .. math:: Z \leftarrow \partial_s \Phi\, Z + \partial_h \Phi, \qquad
              dF/dh = Z^\top \partial_s F + \partial_h F.

    Z goes on from update to update, so that the whole past counts, at hyperparameters that were slightly different
    then. With constant hyperparameters it is the exact hypergradient of all steps taken, as of `Forward()`. Sees all
    that `Unroll()` sees: losses, learning rates, momenta.

    **Cost and bias**: each inner step costs 1.1 + 1.34 m plain ones for m hyperparameters (operations counted on an MLP
    784-256-256-10); memory of m copies of the inner state, whatever the number of steps. Biased as long as the
    hyperparameters move: move them slowly.

    Raises:
      JaxhpoError: `hypergradient(..., warm_start=False)`, which is `Forward()`.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.RealTime(), solver, lambda solution, h, batch: jnp.sum((solution.params - 3.0) ** 2), num_steps=1
      ... )
      >>> h = jnp.ones(2)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.sgd(0.05), num_steps=150, gradient=jaxhpo.from_pair(pair),
      ...     carry=pair.init(jnp.zeros(2), h), progress=False,
      ... )
      >>> print(result.hparams.round(2))
      [3. 3.]

    References:
      Franceschi, Donini, Frasconi, Pontil. Forward and Reverse Gradient-Based Hyperparameter Optimization. 2017.
      arXiv:1703.01785
    """

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """The pair of functions for `hypergradient`."""
        if not warm_start:
            raise JaxhpoError(
                f"{self!r} got `warm_start=False`, but its Jacobian goes on from update to update, and so must the "
                "parameters: drop `warm_start`, or write `hypergradient(Forward(), ..., warm_start=False)`."
            )

        def init(params, hparams, model_state=None):
            # The optimiser's state may depend on the hyperparameters from the start.
            inner, jacobian = _push(lambda _, h: solver.init(params, h, model_state), None, (), hparams)
            return RealTimeState(inner, jacobian)

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, RealTimeState, self)
            _check_jacobian(state, hparams)
            problem = instrumented(make_problem(solver, state.inner, hparams, batches, num_steps=num_steps, key=key))
            inner, jacobian = _run(problem, state.jacobian)
            info = info_of(problem, inner, jnp.asarray(problem.num_steps, jnp.int32))

            def outer(inner, hparams):
                return outer_loss(
                    Solution(inner.params, inner.opt_state, inner.model_state, info), hparams, outer_batch
                )

            value, metrics, grad = _read_off(outer, inner, jacobian, hparams)
            return grad, RealTimeState(inner, jacobian), HypergradientInfo(value, metrics, info)

        return Hypergradient(init, update)


def _run(problem, jacobian):
    """The inner steps, the Jacobian carried along."""
    hparams, closed_over = problem.inputs
    axes = varying_axes(problem.state) | varying_axes(hparams)

    def body(carry, x):
        state, jacobian = carry
        return _push(lambda s, h: problem.advance(s, (h, closed_over), x), state, jacobian, hparams), None

    start = (problem.state, cast_varying(jacobian, axes))
    (inner, jacobian), _ = jax.lax.scan(body, start, problem.xs, problem.num_steps)
    return inner, jacobian


def _push(fn, state, jacobian, hparams):
    """`fn(state, hparams)` and its Jacobian, given that of the state: one derivative for each hyperparameter."""

    def floats_of_result(floats, hparams):
        after = fn(_replaced(state, floats), hparams)
        return _floats(after), after

    z, unravel = ravel_pytree(hparams)
    directions = jax.vmap(unravel)(cast_varying(jnp.eye(z.size, dtype=z.dtype), varying_axes(z)))
    _, push, after = jax.linearize(floats_of_result, _floats(state), hparams, has_aux=True)
    return after, jax.vmap(push)(jacobian, directions)


def _read_off(outer, inner, jacobian, hparams):
    """The value and metrics of the outer loss, and Zᵀ ∂_s F + ∂_h F."""

    def loss(floats, hparams):
        return outer(_replaced(inner, floats), hparams)

    (value, metrics), (pull, direct) = jax.value_and_grad(loss, (0, 1), has_aux=True)(_floats(inner), hparams)
    grad, unravel = ravel_pytree(direct)
    for z, v in zip(*upcast((jacobian, pull)), strict=True):
        grad += jnp.tensordot(z, v, axes=v.ndim).astype(grad.dtype)
    return value, metrics, unravel(grad)


def _floats(state) -> tuple:
    """The leaves that can have a derivative: no counters, no keys."""
    return tuple(leaf for leaf in jax.tree.leaves(state) if is_inexact(leaf))


def _replaced(state, floats):
    """The state with other floating-point leaves."""
    floats = iter(floats)
    return jax.tree.map(lambda leaf: next(floats) if is_inexact(leaf) else leaf, state)


def _check_jacobian(state, hparams):
    size, shapes = ravel_pytree(hparams)[0].size, [leaf.shape for leaf in _floats(state.inner)]
    if [z.shape for z in state.jacobian] != [(size, *shape) for shape in shapes]:
        raise JaxhpoError(
            f"`state.jacobian` has the shapes {[z.shape for z in state.jacobian]}, but {size} hyperparameters and this "
            f"inner state need {[(size, *shape) for shape in shapes]}: make the state with "
            "`pair.init(params, hparams)` for these hyperparameters."
        )
