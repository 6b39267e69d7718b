"""Hypernetworks: the best response θ*(h) is learned around h, and differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.stop_gradient import warn_zero
from jaxhpo._core.trace import differentiable_inputs
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import names
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree, Solution
from jaxhpo._core.validate import (
    check_callable,
    check_nonnegative,
    check_params,
    check_positive,
    check_residual,
    describe,
    require_key,
)
from jaxhpo._estimator.pair import check_pair_state
from jaxhpo._estimator.perturbation import normal
from jaxhpo._inner.inputs import check_steps, checked_batches_function
from jaxhpo._inner.solver import from_optax
from jaxhpo._solve import solve


class Perturbed(NamedTuple):
    """Hyperparameters with the scale of their perturbation, both tuned.

    Attributes:
      value: the hyperparameters, which the losses get.
      scale: the standard deviations of their perturbation in unconstrained units, a tree like `value` of positive
        numbers, each of its leaf's shape or a scalar.
    """

    value: PyTree
    scale: PyTree


class AffineResponse(NamedTuple):
    """The parameters of `affine_response`.

    Attributes:
      offset: b, like the model's parameters.
      slope: U, like the model's parameters, with one more axis at the end, over all m entries of the hyperparameters.
    """

    offset: PyTree
    slope: PyTree


class _Affine:
    r"""The best response :math:`\theta(u) = b + U (u - u_0)`, with b the parameters given to `init` and U = 0 at first.

    m + 1 copies of the parameters. :math:`u_0` is where the search starts: without it, hyperparameters far from zero,
    such as logarithms of penalties, would make b and U hard to tell apart.

    Example:
      >>> phi = jaxhpo.affine_response.init(jnp.array([1.0, 2.0]), jnp.zeros(3))
      >>> print(jaxhpo.affine_response.apply(phi, jnp.ones(3)), phi.slope.shape)
      [1. 2.] (2, 3)
    """

    def init(self, params: PyTree, hparams: PyTree) -> AffineResponse:
        """The response that is `params` everywhere."""
        size = ravel_pytree(hparams)[0].size
        return AffineResponse(params, jax.tree.map(lambda x: jnp.zeros((*x.shape, size), x.dtype), params))

    def apply(self, phi: AffineResponse, hparams: PyTree) -> PyTree:
        """The model's parameters."""
        vector, _ = ravel_pytree(hparams)
        return jax.tree.map(lambda b, U: b + U @ vector.astype(U.dtype), phi.offset, phi.slope)

    def __repr__(self):
        return "affine_response"


class _Self:
    """No network at all: the model reads the hyperparameters itself, as with `jaxhpo.models.SelfTuningDense`.

    Example:
      >>> print(jaxhpo.self_response.apply(jnp.ones(2), jnp.zeros(3)))
      [1. 1.]
    """

    def init(self, params: PyTree, hparams: PyTree) -> PyTree:
        """The model's own parameters."""
        del hparams
        return params

    def apply(self, phi: PyTree, hparams: PyTree) -> PyTree:
        """The model's own parameters."""
        del hparams
        return phi

    def __repr__(self):
        return "self_response"


affine_response, self_response = _Affine(), _Self()


class HypernetworkState(NamedTuple):
    """What a hypernetwork carries.

    Attributes:
      inner: the hypernetwork's parameters and the state of their optimiser.
      origin: the unconstrained hyperparameters at `init`.
    """

    inner: InnerState
    origin: PyTree


@dataclasses.dataclass(frozen=True)
class Hypernetwork:
    r"""The derivative of a learned best response :math:`\theta_\phi(h)`, trained along with the search.

    Each update takes `num_steps` steps on the train loss at perturbed hyperparameters, then differentiates the outer
    loss through the response, at no perturbation:

    .. math:: \phi \leftarrow \phi - \mathrm{tx}\,\nabla_\phi L(\theta_\phi(\hat h), \hat h), \quad
       \hat h = \mathrm{forward}(u + s\epsilon); \qquad g = \nabla_h V(\theta_\phi(h), h)

    or, globally, with :math:`\hat h` drawn from a prior. Where the hyperparameters are a `Perturbed(value, scale)`, the
    scale s is tuned too: the outer loss is then taken at :math:`\hat h`, its derivative goes to both, and
    :math:`-\tau \sum \log s` joins it (the entropy of the perturbation), which keeps s from shrinking to nothing.

    The train loss need not be differentiable in h: dropout rates, noise levels, cut-out sizes can be tuned. Learning
    rates cannot.

    **Cost and bias**: `num_steps` + 1 gradients an update, and one for `info.solution.optimality` where that is kept;
    memory of φ and its optimiser: (m + 1) copies of θ for `affine_response`, about two for a self-tuning model. Exact
    when φ fits the best response around h: an affine response to a smooth problem is O(s²) off, φ lags while h moves,
    and too small an s leaves the slope unlearned.

    Args:
      tx: the optax transformation that trains φ. (That of the solver is not used: only its train loss is.)
      scale: standard deviation s of the perturbation in unconstrained units, the same for all; None with a `prior`, or
        where it is tuned.
      prior: `key -> hparams`, in natural units, for a response learned everywhere; in place of `scale`.
      network: an object with `init(params, u) -> φ` and `apply(φ, u) -> params`, where u are the unconstrained
        hyperparameters less those at `init`. `affine_response`, or `self_response` for a model that reads the
        hyperparameters that the losses get.
      per_example: one perturbation for each example: wherever they are perturbed, the losses get hyperparameters whose
        leaves have a leading axis as long as that of the batch's leaves. For `self_response` and the like.
      entropy: τ above, for `Perturbed` hyperparameters.
      transforms: what `tune` is given too (for the `value` of `Perturbed` ones): the perturbation then stays inside the
        domain. With None, h itself is perturbed. The hypergradient is with respect to h in both cases.

    Raises:
      JaxhpoError: a setting out of its range; no `key` was given to `update`; a solver without a train loss; a model
        state; a batch from which the number of examples cannot be told.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> method = jaxhpo.Hypernetwork(optax.sgd(0.1), scale=1.0)
      >>> pair = jaxhpo.hypergradient(
      ...     method, solver, lambda solution, h, batch: jnp.sum((solution.params - 3.0) ** 2), num_steps=400
      ... )
      >>> h = jnp.ones(2)
      >>> hypergrad, state, info = pair.update(h, pair.init(jnp.zeros(2), h), key=jax.random.key(0))
      >>> print(hypergrad.round(3))
      [-4. -4.]

    References:
      Lorraine, Duvenaud. Stochastic Hyperparameter Optimization through Hypernetworks. 2018. arXiv:1802.09419
      MacKay, Vicol, Lorraine, Duvenaud, Grosse. Self-Tuning Networks. 2019. arXiv:1903.03088
    """

    tx: optax.GradientTransformation
    scale: float | None = None
    prior: Callable[[jax.Array], PyTree] | None = None
    network: Any = affine_response
    per_example: bool = False
    entropy: float = 0.0
    transforms: PyTree = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if not (hasattr(self.tx, "init") and hasattr(self.tx, "update")) or isinstance(self.tx, type):
            raise JaxhpoError(
                f"`Hypernetwork(tx=...)` got {describe(self.tx)}, but it trains the hypernetwork: write an optax "
                "transformation such as `optax.adam(1e-3)`."
            )
        if self.scale is not None:
            check_positive("Hypernetwork(scale=...)", self.scale)
        check_nonnegative("Hypernetwork(entropy=...)", self.entropy)
        if self.prior is not None:
            check_callable("Hypernetwork(prior=...)", self.prior, "prior(key)", 1)
            if self.scale is not None:
                raise JaxhpoError(
                    f"`Hypernetwork` got `scale={self.scale}` and a `prior`, but perturbations are drawn from one of "
                    "them: drop the other."
                )
        if isinstance(self.network, type) or not (hasattr(self.network, "init") and hasattr(self.network, "apply")):
            raise JaxhpoError(
                f"`Hypernetwork(network=...)` got {describe(self.network)}, but it needs `init(params, u)` and "
                "`apply(phi, u)`: write `affine_response`, `self_response`, or an object with these two."
            )
        if self.per_example and self.network is affine_response:
            raise JaxhpoError(
                "`Hypernetwork(per_example=True)` with `affine_response` would need other parameters for every "
                "example: drop it, or use a model that reads the hyperparameters, with `network=self_response`."
            )

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """The two functions of the method."""
        if solver.loss is None:
            raise JaxhpoError(
                f"`{solver.name}` has no train loss, which the hypernetwork descends: make the solver with "
                "`from_optax(train_loss, tx)`."
            )

        def train_loss(phi, carried, x):
            (hparams, origin), (batch, key) = carried, x
            point, drawn = self._draw(key, hparams, batch)
            return solver.loss(self._respond(phi, point, origin), drawn, batch, None)[0]

        inner = from_optax(train_loss, self.tx)

        def init(params, hparams, model_state=None):
            if model_state is not None:
                raise JaxhpoError(
                    "`init` got a model state, but a hypernetwork keeps none: use a model without one (layer in place "
                    "of batch normalisation, say)."
                )
            params, hparams = check_params(params, "params"), check_params(hparams, "hparams")
            self._check_perturbation(hparams)
            jax.eval_shape(solver.init, params, _value_of(hparams))  # for its checks
            origin = to_unconstrained(self.transforms, _value_of(hparams))
            phi = self.network.init(params, origin)
            check_residual(self.network.apply(phi, jax.tree.map(jnp.zeros_like, origin)), params, "network.apply")
            return HypernetworkState(inner.init(phi, None), origin)

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, HypernetworkState, self)
            train_key, outer_key = jax.random.split(require_key(key, self))
            self._check_perturbation(hparams)
            start = state.inner if warm_start else inner.init(state.inner.params, None)
            steps = check_steps(batches, num_steps)
            data = _with_keys(batches, train_key, steps)
            trained = solve(inner, start, (hparams, state.origin), data, num_steps=steps)
            seen = self._seen(solver, trained.params, (hparams, state.origin), data)

            def loss(hparams):
                point, drawn = self._outer_point(outer_key, hparams, outer_batch)
                point = jax.tree.map(lambda x, s: x if s else jax.lax.stop_gradient(x), point, seen)
                params = self._respond(trained.params, point, state.origin)
                value, metrics = outer_loss(Solution(params, None, None, trained.info), drawn, outer_batch)
                return value - self._bonus(hparams, value), (value, metrics)

            grad, (value, metrics) = jax.grad(loss, has_aux=True)(hparams)
            after = HypernetworkState(trained.state, state.origin) if warm_start else state
            return grad, after, HypergradientInfo(value, metrics, trained.info)

        return Hypergradient(init, update)

    def _seen(self, solver, phi, carried, data):
        """For each hyperparameter, whether the train loss reads it; a `ZeroHypergradientWarning` where it does not."""
        hparams, origin = carried
        first: Any = data(0) if callable(data) else jax.tree.map(lambda x: x[0], data)
        batch, key = first
        point, drawn = self._draw(key, hparams, batch)
        params, (leaves, structure) = self._respond(phi, point, origin), jax.tree.flatten(drawn)

        def value(leaves):
            return solver.loss(params, jax.tree.unflatten(structure, leaves), batch, None)[0]

        seen = differentiable_inputs(value, leaves)
        for name, reads in zip(names(_value_of(hparams), "hparams"), seen, strict=True):
            if not reads:
                warn_zero(
                    name,
                    "does not enter the train loss, which is all that a hypernetwork learns to respond to, so its "
                    "hypergradient through the trained parameters is exactly zero. If it is a setting of the optimiser "
                    "(a learning rate, a momentum), `Unroll()` or `RealTime()` sees it; if nothing uses it, remove it; "
                    "if it enters the outer loss directly, that part is still right.",
                )
        return jax.tree.unflatten(structure, seen)

    def _respond(self, phi, point, origin):
        """θ_φ at unconstrained hyperparameters, which may have a leading axis of examples."""
        shift = jax.tree.map(lambda u, o: u - jnp.broadcast_to(o, u.shape), point, origin)
        return self.network.apply(phi, shift)

    def _draw(self, key, hparams, batch):
        """Perturbed hyperparameters, unconstrained and natural; with `per_example`, one of each for every example."""

        def draw(key):
            if self.prior is not None:
                drawn = check_residual(self.prior(key), hparams, "prior", "hparams")
                return to_unconstrained(self.transforms, drawn), drawn
            centre = to_unconstrained(self.transforms, _value_of(hparams))
            scale = hparams.scale if isinstance(hparams, Perturbed) else jax.tree.map(lambda _: self.scale, centre)
            point = jax.tree.map(lambda u, s, e: u + s * e, centre, scale, normal(key, centre))
            return point, to_natural(self.transforms, point)

        if not self.per_example:
            return draw(key)
        return jax.vmap(draw)(jax.random.split(key, _num_examples(batch)))

    def _outer_point(self, key, hparams, outer_batch):
        if isinstance(hparams, Perturbed):
            return self._draw(key, hparams, outer_batch)
        return to_unconstrained(self.transforms, hparams), hparams

    def _bonus(self, hparams, value):
        """τ times the entropy of N(u, diag s²) less a constant, Σ log s (a scalar s counts for all its entries)."""
        if not isinstance(hparams, Perturbed):
            return jnp.zeros_like(value)
        logs = jax.tree.map(lambda v, s: jnp.log(jnp.broadcast_to(s, v.shape)), *hparams)
        return (self.entropy * jnp.sum(ravel_pytree(logs)[0])).astype(value.dtype)

    def _check_perturbation(self, hparams):
        """Raises unless exactly one thing says how the hyperparameters are perturbed."""
        given = [self.scale is not None, self.prior is not None, isinstance(hparams, Perturbed)]
        if sum(given) != 1:
            raise JaxhpoError(
                f"`{self!r}` was given {sum(given)} of `scale`, a `prior` and `Perturbed` hyperparameters, but exactly "
                "one says how they are perturbed: write `Hypernetwork(tx, scale=0.5)`, or `Hypernetwork(tx)` with "
                "`hparams=Perturbed(value, scale)` to tune the scale too."
            )
        if isinstance(hparams, Perturbed):
            _check_scales(hparams)
        elif self.entropy:
            raise JaxhpoError(
                f"`entropy={self.entropy}` rewards a large scale, but the scale is not tuned: drop it, or write "
                "`hparams=Perturbed(value, scale)`."
            )


def _value_of(hparams):
    return hparams.value if isinstance(hparams, Perturbed) else hparams


def _check_scales(hparams):
    value, scale = hparams
    leaves = zip(names(value, "hparams.value"), jax.tree.leaves(value), jax.tree.leaves(scale), strict=False)
    same = jax.tree.structure(value) == jax.tree.structure(scale)
    if not same or any(s.shape not in ((), v.shape) for _, v, s in leaves):
        raise JaxhpoError(
            f"`Perturbed(value, scale)` got {jax.tree.map(describe, value)} and {jax.tree.map(describe, scale)}, but "
            "there must be one scale for each leaf of the value, of its shape or a scalar: write "
            "`jax.tree.map(lambda x: jnp.full_like(x, 0.5), value)`, say."
        )
    if any(not isinstance(s, Tracer) and bool(jnp.any(s <= 0)) for s in jax.tree.leaves(scale)):
        raise JaxhpoError(
            "`Perturbed(value, scale)` got a scale that is not positive, but it is a standard deviation: write 0.5, "
            "say, and tune it under `transforms=Perturbed(..., positive)`."
        )


def _num_examples(batch) -> int:
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if len(sizes) != 1:
        raise JaxhpoError(
            f"`per_example=True` draws one perturbation for each example, but the batch has the leading axes "
            f"{sorted(sizes)}: pass the examples as the batch (and, for a tuned scale, as `outer_batch`), all leaves "
            "with the same leading axis; what else the loss needs may be a scalar, or closed over."
        )
    return sizes.pop()


def _with_keys(batches, key, num_steps):
    """The batches, each with a key of its own."""
    if batches is None:
        return lambda step: (None, jax.random.fold_in(key, step))
    if callable(batches):
        take = checked_batches_function(batches)
        return lambda step: (take(step), jax.random.fold_in(key, step))
    return batches, jax.random.split(key, num_steps)
