"""Hypernetworks: hypergradients through a learned best response θ*(h)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxhpo._adjoint.pullback import not_entering
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.mesh import ravel
from jaxhpo._core.stop_gradient import warn_zero
from jaxhpo._core.trace import differentiable_inputs
from jaxhpo._core.transforms import to_natural, to_unconstrained
from jaxhpo._core.tree import names, normal
from jaxhpo._core.types import Hypergradient, HypergradientInfo, InnerState, PyTree, Solution, StatefulMethod
from jaxhpo._core.validate import (
    check_callable,
    check_hparams,
    check_params,
    check_residual,
    check_settings,
    count_examples,
    describe,
    require_key,
)
from jaxhpo._estimator.pair import check_pair_state, inner_start
from jaxhpo._inner.inputs import check_steps, checked_batches_function
from jaxhpo._inner.solver import from_optax
from jaxhpo._solve import solve


class Perturbed(NamedTuple):
    """Hyperparameters with the scale of their perturbation, both tuned.

    Attributes:
      value: the hyperparameters, which are passed to the losses.
      scale: the standard deviations of their perturbation in unconstrained units, a tree like `value` of positive
        arrays, each of the shape of its leaf or a scalar.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(solution, h, batch):
      ...     return jnp.sum(solution.params)
      >>> method = jaxhpo.Hypernetwork(optax.sgd(0.1), entropy=0.1)
      >>> pair = jaxhpo.hypergradient(method, solver, outer_loss, num_steps=100)
      >>> h = jaxhpo.Perturbed(jnp.ones(2), scale=jnp.array(0.5))
      >>> hypergrad, state, info = pair.update(h, pair.init(jnp.zeros(2), h), key=jax.random.key(0))
      >>> jax.tree.map(jnp.shape, hypergrad)  # with respect to both
      Perturbed(value=(2,), scale=())
    """

    value: PyTree
    scale: PyTree


class AffineResponse(NamedTuple):
    """The parameters of `affine_response`.

    Attributes:
      offset: b, like the model's parameters.
      slope: U, like the model's parameters, with one more axis at the end, over all m entries of the hyperparameters.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(solution, h, batch):
      ...     return jnp.sum(solution.params)
      >>> pair = jaxhpo.hypergradient(jaxhpo.Hypernetwork(optax.sgd(0.1), scale=1.0), solver, outer_loss, num_steps=400)
      >>> h = jnp.ones(2)
      >>> _, state, _ = pair.update(h, pair.init(jnp.zeros(2), h), key=jax.random.key(0))
      >>> response = state.inner.params
      >>> print(response.offset.round(1), abs(response.slope.round(1)).tolist())  # the best response is h itself
      [1. 1.] [[1.0, 0.0], [0.0, 1.0]]
    """

    offset: PyTree
    slope: PyTree


class _Affine:
    r"""The best response :math:`\theta(u) = b + U (u - u_0)`, with b the parameters given to `init` and U = 0 at first.

    Memory of m + 1 copies of the parameters. :math:`u_0` is where the search starts: without it, b and U could hardly
    be separated for hyperparameters far from zero, such as logarithms of penalties.

    Example:
      >>> phi = jaxhpo.affine_response.init(jnp.array([1.0, 2.0]), jnp.zeros(3))
      >>> print(jaxhpo.affine_response.apply(phi, jnp.ones(3)), phi.slope.shape)
      [1. 2.] (2, 3)
    """

    def init(self, params: PyTree, hparams: PyTree) -> AffineResponse:
        """Return the response that is `params` everywhere."""
        size = ravel(hparams)[0].size
        return AffineResponse(params, jax.tree.map(lambda x: jnp.zeros((*x.shape, size), x.dtype), params))

    def apply(self, phi: AffineResponse, hparams: PyTree) -> PyTree:
        """Return the model's parameters."""
        vector, _ = ravel(hparams)  # u − u₀
        # A train loss quadratic in θ and bilinear in (θ, u) has an affine best response, which b + U (u − u₀) fits
        # exactly. Elsewhere it is fitted at u + s ε: b to θ* and U to dθ*/du, each up to O(s²).
        product = functools.partial(jnp.matmul, precision="highest")
        return jax.tree.map(lambda b, U: b + product(U, vector.astype(U.dtype)), phi.offset, phi.slope)

    def __repr__(self):
        return "affine_response"


class _Self:
    """The response of a model that reads the hyperparameters itself, such as `jaxhpo.models.SelfTuningDense`.

    Example:
      >>> print(jaxhpo.self_response.apply(jnp.ones(2), jnp.zeros(3)))
      [1. 1.]
    """

    def init(self, params: PyTree, hparams: PyTree) -> PyTree:
        """Return the model's own parameters."""
        return params

    def apply(self, phi: PyTree, hparams: PyTree) -> PyTree:
        """Return the model's own parameters."""
        return phi

    def __repr__(self):
        return "self_response"


affine_response, self_response = _Affine(), _Self()


class HypernetworkState(NamedTuple):
    """The state of `Hypernetwork`.

    Attributes:
      inner: the hypernetwork's parameters and the state of their optimiser.
      origin: the unconstrained hyperparameters at `init`.
    """

    inner: InnerState
    origin: PyTree


@dataclasses.dataclass(frozen=True)
class Hypernetwork(StatefulMethod):
    r"""Hypergradients through a learned best response :math:`\theta_\phi(h)`, trained during the search.

    Each update takes `num_steps` steps on the train loss at perturbed hyperparameters, then differentiates the outer
    loss through the response at the unperturbed ones:

    .. math:: \phi \leftarrow \phi - \mathrm{tx}\,\nabla_\phi L(\theta_\phi(\hat h), \hat h), \quad
       \hat h = \mathrm{forward}(u + s\epsilon); \qquad g = \nabla_h V(\theta_\phi(h), h)

    or, globally, with :math:`\hat h` drawn from a prior. Where the hyperparameters are a `Perturbed(value, scale)`, the
    scale s is tuned too: the outer loss is then taken at :math:`\hat h` and differentiated with respect to both, with
    :math:`-\tau \sum \log s` (the entropy of the perturbation) added, which keeps s from shrinking to zero.

    The train loss need not be differentiable in h: dropout rates, noise levels and cut-out sizes can be tuned. Learning
    rates cannot.

    **Cost and bias**: `num_steps` + 1 gradients per update, and one for `info.solution.optimality` where that is used;
    memory of φ and its optimiser: (m + 1) copies of θ for `affine_response`, about two for a self-tuning model. Exact
    when φ fits the best response around h. An affine response to a smooth problem has an error of O(s²), φ lags behind
    while h moves, and with too small an s the slope is not learned.

    Args:
      tx: the optax transformation that trains φ. (Of the solver, only the train loss is used, not its transformation.)
      scale: standard deviation s of the perturbation in unconstrained units, the same for all; None with a `prior`, or
        where it is tuned.
      prior: `key -> hparams`, in natural units, for a response learned everywhere; replaces `scale`.
      network: an object with `init(params, u) -> φ` and `apply(φ, u) -> params`, where u are the unconstrained
        hyperparameters less those at `init`. `affine_response`, or `self_response` for a model that reads the
        hyperparameters of its losses.
      per_example: one perturbation for each example: perturbed hyperparameters then have a leading axis as long as that
        of the batch's leaves. For `self_response` and similar networks.
      entropy: τ above, for `Perturbed` hyperparameters.
      transforms: the same as in `tune` (for the `value` of `Perturbed` ones): the perturbation then stays inside the
        domain. With None, h itself is perturbed. The hypergradient is with respect to h in both cases.

    Raises:
      JaxhpoError: a setting out of its range; no `key` was given to `update`; a solver without a train loss; a model
        state; a batch without one number of examples, under `per_example`.

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
        _check_methods("tx", self.tx, ("init", "update"), "an optax transformation such as `optax.adam(1e-3)`")
        instead = "`affine_response`, `self_response`, or an object with `init(params, u)` and `apply(phi, u)`"
        _check_methods("network", self.network, ("init", "apply"), instead)
        check_settings(self, scale="positive or None", entropy="nonnegative")
        if self.prior is not None:
            check_callable("Hypernetwork(prior=...)", self.prior, "prior(key)", 1)
        self._check_given(tuned=False, minimum=0)
        if self.per_example and self.network is affine_response:
            raise JaxhpoError(
                "`per_example=True` with `affine_response` would need other parameters for every example: omit it, or "
                "use a model that reads the hyperparameters, with `network=self_response`."
            )

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        loss = solver.loss
        if loss is None:
            raise JaxhpoError(f"`{solver.name}` has no train loss for a hypernetwork: write `from_optax(loss, tx)`.")

        def train_loss(phi, carried, x):
            # L(θ_φ(ĥ), ĥ), whose minimum over φ is the best response at every ĥ that the network can fit.
            (hparams, origin), (batch, key) = carried, x
            point, drawn = self._draw(key, hparams, batch)
            return loss(self._respond(phi, point, origin), drawn, batch, None)[0]

        inner = from_optax(train_loss, self.tx)

        def init(params, hparams, model_state=None):
            if model_state is not None:
                raise JaxhpoError(
                    "`init` got a model state, which a hypernetwork cannot keep: use a model without one (with layer "
                    "in place of batch normalisation, say)."
                )
            params, hparams = check_params(params, "params"), check_hparams(hparams)
            self._check_perturbation(hparams)
            value = _value_of(hparams)
            jax.eval_shape(solver.init, params, value)  # for its checks
            origin = to_unconstrained(self.transforms, value)
            phi = self.network.init(params, origin)
            check_residual(self.network.apply(phi, jax.tree.map(jnp.zeros_like, origin)), params, "network.apply")
            return HypernetworkState(inner.init(phi, None), origin)

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, HypernetworkState, self)
            train_key, outer_key = jax.random.split(require_key(key, self))
            self._check_perturbation(hparams)
            start = inner_start(inner, state.inner, None, warm_start)
            steps = check_steps(batches, num_steps)
            data = _with_keys(batches, train_key, steps)
            trained = solve(inner, start, (hparams, state.origin), data, num_steps=steps)
            seen = self._seen(solver, trained.params, (hparams, state.origin), data)

            def outer(hparams):
                # V(θ_φ(h), h) at ĥ = h; with a tuned scale, V(θ_φ(ĥ), ĥ) − τ Σ log s at ĥ = forward(u + s ε). h enters
                # through the response only where the train loss, from which that was learned, depends on it.
                tuned = isinstance(hparams, Perturbed)
                if tuned:
                    point, drawn = self._draw(outer_key, hparams, outer_batch)
                else:
                    point, drawn = to_unconstrained(self.transforms, hparams), hparams
                point = jax.tree.map(lambda x, s: x if s else jax.lax.stop_gradient(x), point, seen)
                params = self._respond(trained.params, point, state.origin)
                value, metrics = outer_loss(Solution(params, None, None, trained.info), drawn, outer_batch)
                bonus = (self.entropy * _sum_log(hparams)).astype(value.dtype) if tuned else 0.0
                return value - bonus, (value, metrics)

            grad, (value, metrics) = jax.grad(outer, has_aux=True)(hparams)
            after = HypernetworkState(trained.state, state.origin) if warm_start else state
            return grad, after, HypergradientInfo(value, metrics, trained.info)

        return Hypergradient(init, update)

    def _seen(self, solver, phi, carried, data):
        """Return for each hyperparameter whether the train loss depends on it; warn where it does not."""
        hparams, origin = carried
        first: Any = data(0) if callable(data) else jax.tree.map(lambda x: x[0], data)
        batch, key = first
        point, drawn = self._draw(key, hparams, batch)
        params = self._respond(phi, point, origin)
        seen = differentiable_inputs(lambda drawn: solver.loss(params, drawn, batch, None)[0], drawn)
        learnt_from = "the train loss, from which a hypernetwork learns its response"
        message = not_entering(learnt_from, "`Hypernetwork`", "`Unroll()` or `RealTime()`")
        for name, reads in zip(names(_value_of(hparams), "hparams"), seen, strict=True):
            if not reads:
                warn_zero(name, message)
        return jax.tree.unflatten(jax.tree.structure(drawn), seen)

    def _respond(self, phi, point, origin):
        """Return θ_φ at unconstrained hyperparameters, which may have a leading axis of examples."""
        shift = jax.tree.map(lambda u, o: u - jnp.broadcast_to(o, u.shape), point, origin)
        return self.network.apply(phi, shift)

    def _draw(self, key, hparams, batch):
        """Return ĥ, unconstrained and natural; with `per_example`, one for every example."""

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
        num_examples = count_examples(batch, "`per_example=True` draws one perturbation for each example")
        return jax.vmap(draw)(jax.random.split(key, num_examples))

    def _check_given(self, tuned, minimum=1):
        given = (self.scale is not None) + (self.prior is not None) + tuned
        if not minimum <= given <= 1:
            raise JaxhpoError(
                f"`{self!r}` was given {given} of `scale`, a `prior` and `Perturbed` hyperparameters, but one of them "
                "says how hyperparameters are perturbed: write `Hypernetwork(tx, scale=0.5)`, or `Hypernetwork(tx)` "
                "with `hparams=Perturbed(value, scale)` to tune the scale too."
            )

    def _check_perturbation(self, hparams):
        tuned = isinstance(hparams, Perturbed)
        self._check_given(tuned)
        if self.entropy and not tuned:
            raise JaxhpoError(
                f"`entropy={self.entropy}` rewards a large scale, but the scale is not tuned: omit it, or write "
                "`hparams=Perturbed(value, scale)`."
            )
        if tuned:
            _check_scales(*hparams)


def _value_of(hparams):
    return hparams.value if isinstance(hparams, Perturbed) else hparams


def _sum_log(perturbed):
    """Return Σ log s, the entropy of N(u, diag s²) up to a constant; a scalar s counts once for each of its entries."""
    logs = jax.tree.map(lambda v, s: jnp.log(jnp.broadcast_to(s, v.shape)), *perturbed)
    return jnp.sum(ravel(logs)[0])


def _check_methods(name, value, methods, instead):
    """Raise unless a setting is an object with these methods."""
    if isinstance(value, type) or not all(hasattr(value, method) for method in methods):
        raise JaxhpoError(
            f"`Hypernetwork({name}=...)` got {describe(value)}, which has no methods `{'` and `'.join(methods)}`: "
            f"write {instead}."
        )


def _check_scales(value, scale):
    leaves = zip(jax.tree.leaves(value), jax.tree.leaves(scale), strict=False)
    same = jax.tree.structure(value) == jax.tree.structure(scale)
    if not same or any(s.shape not in ((), v.shape) for v, s in leaves):
        raise JaxhpoError(
            f"`Perturbed(value, scale)` got {jax.tree.map(describe, value)} and {jax.tree.map(describe, scale)}, but "
            "needs one scale for each leaf of the value, of its shape or a scalar: write "
            "`jax.tree.map(lambda x: jnp.full_like(x, 0.5), value)`, say."
        )
    if any(not isinstance(s, Tracer) and bool(jnp.any(s <= 0)) for s in jax.tree.leaves(scale)):
        raise JaxhpoError(
            "`Perturbed(value, scale)` got a scale that is not positive, but it is a standard deviation: write 0.5, "
            "say, and tune it under `transforms=Perturbed(..., positive)`."
        )


def _with_keys(batches, key, num_steps):
    """Return the batches, each with its own key."""
    if batches is not None and not callable(batches):
        return batches, jax.random.split(key, num_steps)
    take = checked_batches_function(batches)
    return lambda step: (take(step), jax.random.fold_in(key, step))
