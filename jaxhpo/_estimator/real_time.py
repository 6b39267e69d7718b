"""Real-time forward differentiation: the Jacobian of a training that continues from update to update."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import cast_varying, everywhere, ravel, varying_axes
from jaxhpo._core.tree import is_inexact, partition, upcast
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, Solution, StatefulMethod
from jaxhpo._estimator.pair import check_pair_state, check_warm_start
from jaxhpo._inner.loop import scan_slices
from jaxhpo._inner.problem import info_of, make_problem


class RealTimeState(NamedTuple):
    """The state of `RealTime`.

    Attributes:
      inner: where the next inner steps start.
      jacobian: Z, the derivative of `inner` with respect to the hyperparameters: one array for each floating-point leaf
        of `inner`, with a leading axis of length m in front of the leaf's own.
    """

    inner: InnerState
    jacobian: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class RealTime(StatefulMethod):
    r"""Real-time forward mode (RTHO): hyperparameters move during one long training.

    An update takes `num_steps` inner steps at the current hyperparameters, with the Jacobian Z of the whole inner state
    s (parameters, optimiser's state, model state), then computes the hypergradient from Z:

    .. math:: Z \leftarrow \partial_s \Phi\, Z + \partial_h \Phi, \qquad
              dF/dh = Z^\top \partial_s F + \partial_h F.

    Z is kept from update to update, so that the whole past counts, at the slightly different hyperparameters of that
    time. With constant hyperparameters the result is the exact hypergradient of all steps taken, that of `Forward()`.
    Sees all inputs that `Unroll()` sees: losses, learning rates, momenta.

    **Cost and bias**: each inner step costs 1.1 + 1.34 m plain ones for m hyperparameters (operations counted on an MLP
    784-256-256-10); memory of m copies of the inner state, whatever the number of steps. Biased while the
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
        """Return the pair of `init` and `update`."""
        check_warm_start(warm_start, self, "Forward()")

        def init(params, hparams, model_state=None):
            # The optimiser's first state may depend on the hyperparameters.
            inner, jacobian = _push(lambda _, h: solver.init(params, h, model_state), None, (), hparams)
            return RealTimeState(inner, jacobian)

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, RealTimeState, self)
            _check_jacobian(state, hparams)
            problem = make_problem(solver, state.inner, hparams, batches, num_steps=num_steps, key=key)
            inner, jacobian = _run(problem, state.jacobian)
            info = info_of(problem, inner, jnp.asarray(problem.num_steps, jnp.int32))
            floats, replace = _partition(inner)

            def outer(floats, hparams):
                return outer_loss(Solution(**replace(floats)._asdict(), info=info), hparams, outer_batch)

            (value, metrics), (pull, direct) = jax.value_and_grad(outer, (0, 1), has_aux=True)(floats, hparams)
            # dF/dh = ∂_h F + Zᵀ ∂_s F, summed over the leaves of s.
            grad, unravel = ravel(direct)
            for z, v in zip(*upcast((jacobian, pull)), strict=True):
                product = jnp.tensordot(z, v, axes=v.ndim, precision="highest", out_sharding=everywhere(v))
                grad += product.astype(grad.dtype)
            return unravel(grad), RealTimeState(inner, jacobian), HypergradientInfo(value, metrics, info)

        return Hypergradient(init, update)


def _run(problem, jacobian):
    """Run the inner steps on the state and its Jacobian."""
    hparams, closed_over = problem.inputs

    def body(carry, x):
        state, jacobian = carry
        return _push(lambda s, h: problem.advance(s, (h, closed_over), x), state, jacobian, hparams), None

    axes = varying_axes(problem.state) | varying_axes(hparams)
    start = (problem.state, cast_varying(jacobian, axes))
    return scan_slices(body, start, problem.xs, problem.counts, problem.num_steps)[0]


def _push(fn, state, jacobian, hparams):
    """Return Φ(s, h) for Φ = `fn`, and its Jacobian in h, given Z, that of s."""
    floats, replace = _partition(state)

    def floats_of_result(floats, hparams):
        after = fn(replace(floats), hparams)
        return _partition(after)[0], after

    # Z ← ∂_s Φ Z + ∂_h Φ, one column for each of the m hyperparameters: the push-forward of (Z eᵢ, eᵢ). Φ is
    # linearised once for all columns.
    z, unravel = ravel(hparams)
    directions = jax.vmap(unravel)(cast_varying(jnp.eye(z.size, dtype=z.dtype), varying_axes(z)))
    _, push, after = jax.linearize(floats_of_result, floats, hparams, has_aux=True)
    return after, jax.vmap(push, axis_size=z.size)(jacobian, directions)


def _partition(state):
    """Return the leaves that can have a derivative (no counters, no keys), and the function that replaces them."""
    floats, replace = partition(state, jax.tree.map(is_inexact, state))
    return tuple(floats), replace


def _check_jacobian(state, hparams):
    size, floats = ravel(hparams)[0].size, _partition(state.inner)[0]
    got, needed = [z.shape for z in state.jacobian], [(size, *leaf.shape) for leaf in floats]
    if got != needed:
        raise JaxhpoError(
            f"`state.jacobian` has the shapes {got}, but {size} hyperparameters and this inner state need {needed}: "
            "make the state with `pair.init(params, hparams)` for these hyperparameters."
        )
