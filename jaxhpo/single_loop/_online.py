"""Hyperparameters tuned within one ordinary training, at half of its cost on top."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.trace import differentiable_inputs, untrusted_rule
from jaxhpo._core.tree import add_scaled, all_finite, cast_like, is_inexact, norm, partition, upcast, zeros_like
from jaxhpo._core.types import Hypergradient, HypergradientInfo, Info, InnerState, PyTree, Solution, StatefulMethod
from jaxhpo._core.validate import check_choice, check_settings, count_examples
from jaxhpo._estimator.pair import check_pair_state, check_warm_start
from jaxhpo._inner.gradient import value_and_grad
from jaxhpo._inner.inputs import check_same_state, check_start, check_steps, slices_of


class OnlineState(NamedTuple):
    """State of `Online`.

    Attributes:
      inner: the training: parameters, and states of optimiser and model.
      direction: the running solution of the linear system, like the parameters; None for the last step's derivative.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.mean((p - h) ** 2), optax.sgd(0.1))
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.single_loop.Online(), solver, lambda solution, h, b: jnp.mean(solution.params**2), num_steps=2
      ... )
      >>> print(pair.init(jnp.zeros(2), jnp.array(1.0)).inner.params)
      [0. 0.]
    """

    inner: InnerState
    direction: PyTree

    single_loop = True  # for `check_one_training`


@dataclasses.dataclass(frozen=True)
class Online(StatefulMethod):
    r"""One training, whose hyperparameters move every few steps: 10 000 of them for about half a training more.

    An update is `num_steps` ordinary steps of the solver's optimiser, and the derivative of the last one: with
    :math:`\theta' = \theta + u(g, h)`, g the gradient of the train loss L,

    .. math:: q = \Big(\frac{\partial u}{\partial g}\Big)^\top \partial_\theta F(\theta'), \qquad
              D_h = \partial_h F + \Big(\frac{\partial u}{\partial h}\Big)^\top \partial_\theta F(\theta')
                    + \partial_\theta \langle \partial_h L, \cdot \rangle\, q,

    which is that of `Unroll(truncate=1)`. ∂u/∂g is the optimiser's own preconditioner, as Adam's :math:`-\alpha (1 -
    \beta_1) / \sqrt{\hat v}`: where no gradient has come yet, and it is infinite, q is zero. Settings of the optimiser
    are seen through ∂u/∂h, and so is what the outer loss reads of the optimiser's and the model's state, as an average
    of the parameters. It weighs a hyperparameter by what it does in the next step, so it is blind to what only
    many steps show, and shortens the horizon where it sees (Wu and others, 2018): rates come out too small.
    `direction="window"` adds the mixed products of all K minibatches since the last update, at the last parameters and
    with the same q: where each minibatch meets other hyperparameters, as weights of examples, more of them move.
    `direction="implicit"` looks beyond: w goes on from update to update as

    .. math:: w \leftarrow w + \Big(\frac{\partial u}{\partial g}\Big)^\top (\partial_\theta F + H w),

    in q's place, whose fixed point is :math:`-H^{-1} \partial_\theta F`: SOBA, with the optimiser's preconditioner.

    **Cost and bias**, in gradients of the train loss, for K = `num_steps`: K, and one of the outer loss, and the mixed
    product, which is forward mode over the derivative in h alone. So for a penalty it takes no pass of the network, for
    weights of examples one forward derivative (two thirds of a gradient), for what acts on inputs four thirds more
    than a gradient; "implicit" adds a Hessian product of two to three. A training costs 1.5 times its price with K = 2
    for penalties, 1.4 times with K = 4 for weights, and 1.7 times with K = 8 by "window", whose mixed products are K;
    less, where the last phase has none. Memory of two more copies of the parameters. Biased, as above.

    To train on the validation labels, too, at the end: stop early, and go on from `result.carry.inner` by `solve`, with
    `result.hparams` and minibatches of both.

    Args:
      direction: "last_step", "window" or "implicit". The last diverges where the curvature times the optimiser's step
        is above 2, and follows a linear system that changes with every minibatch.
      parts: 2 or more take the mean over as many minibatches of the outer loss, which then has that leading axis in
        `outer_batch`, and report its standard error, on which `slow_where_noisy` acts. Each takes mixed products of its
        own, and memory of the hyperparameters.

    Raises:
      JaxhpoError: a setting out of its range; a solver without a train loss; `warm_start=False`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (60, 3))
      >>> y = x @ jnp.array([1.0, -1.0, 0.5])
      >>> solver = jaxhpo.from_optax(
      ...     lambda w, h, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(h) * jnp.sum(w**2), optax.adam(0.05)
      ... )
      >>> def data(key):  # two minibatches to train on, one to validate
      ...     i, j = jax.random.randint(key, (2, 10), 0, 40), jax.random.randint(key, (10,), 40, 60)
      ...     return (x[i], y[i]), (x[j], y[j])
      >>> pair = jaxhpo.hypergradient(
      ...     jaxhpo.single_loop.Online(), solver,
      ...     lambda solution, h, b: jnp.mean((b[0] @ solution.params - b[1]) ** 2), num_steps=2,
      ... )
      >>> h = jnp.array(0.0)
      >>> result = jaxhpo.tune(
      ...     None, h, optax.adam(0.03), num_steps=200, steps_per_call=50, gradient=jaxhpo.from_pair(pair, data),
      ...     carry=pair.init(jnp.zeros(3), h), progress=False,
      ... )
      >>> bool(result.hparams < -1.0)  # the data have no noise: the best penalty is none, h = -∞
      True

    References:
      Luketina, Berglund, Greff, Raiko. Scalable Gradient-Based Tuning of Continuous Regularization Hyperparameters.
      2016. arXiv:1511.06727
      Choe et al. Making Scalable Meta Learning Practical. 2023. arXiv:2310.05674
      Wu, Ren, Liao, Grosse. Understanding Short-Horizon Bias in Stochastic Meta-Optimization. 2018. arXiv:1803.02021
    """

    direction: str = "last_step"
    parts: int = 1

    def __post_init__(self):
        check_choice("Online(direction=...)", self.direction, "last_step", "window", "implicit")
        check_settings(self, parts="count")

    def pair(self, solver, outer_loss, num_steps, warm_start) -> Hypergradient:
        """Return the pair of `init` and `update`."""
        check_warm_start(warm_start, self, "Implicit()")
        if solver.loss is None or solver.apply is None:
            raise JaxhpoError(
                f"{self!r} differentiates a step of an optimiser on a train loss, which `{solver.name}` has none of: "
                "make the solver with `from_optax` or `momentum_sgd`."
            )
        loss, apply = solver.loss, solver.apply

        def init(params, hparams, model_state=None):
            inner = solver.init(params, hparams, model_state)
            return OnlineState(inner, zeros_like(inner.params) if self.direction == "implicit" else None)

        def update(hparams, state, batches, outer_batch, key):
            check_pair_state(state, OnlineState, self)
            self._check_direction(state)
            hparams, start = check_start(solver, state.inner, hparams)
            count = check_steps(batches, num_steps)
            slices, _, take = slices_of(batches, count)
            step = lambda inner, x: (_like(inner, solver.step(inner, hparams, take(x))), None)  # noqa: E731
            before, _ = jax.lax.scan(step, start, jax.tree.map(lambda x: x[:-1], slices))
            batch = take(jax.tree.map(lambda x: x[-1], slices))

            at = before.params, hparams, batch, before.model_state
            out, grad = value_and_grad(loss, *at)

            def report(params):
                return Info(
                    norm(upcast(grad)), jnp.asarray(count, jnp.int32), jnp.isfinite(out[0]) & all_finite(params)
                )

            def outer(params, states, hparams, outer_batch):
                return outer_loss(Solution(params, states[0], states[1], report(params)), hparams, outer_batch)

            # Beside θ′: what the outer loss reads of the states, as an average of θ in the optimiser's, and what that
            # and θ′ depend on beside the gradient: the train loss in a step size, a model state.
            parts = outer_batch if self.parts == 1 else self._checked(outer_batch)
            one = parts if self.parts == 1 else jax.tree.map(lambda x: x[0], parts)
            is_read = _differentiated(lambda states: outer(before.params, states, hparams, one)[0], before[1:])

            def advance(hparams, out, grad):
                return _like(before, apply(before, hparams, batch, out, grad))

            def seen(after):
                return after.params, partition(after[1:], is_read)[0]

            is_passed = _differentiated(lambda out: seen(advance(hparams, out, grad)), out)
            passed, with_passed = partition(out, is_passed)

            def applied(hparams, passed, grad):
                after = advance(hparams, with_passed(passed), grad)
                return seen(after), after

            _, pullback, after = jax.vjp(applied, hparams, passed, grad, has_aux=True)
            info = report(after.params)
            read, with_read = partition(after[1:], is_read)
            # Products with the present w are of no part of the outer loss: once for all.
            turned = None if state.direction is None else _hessian_product(loss, *at, state.direction)

            def product(q):
                if self.direction != "window":
                    return _mixed_product(loss, *at, q)
                of = lambda x: _mixed_product(loss, before.params, hparams, take(x), before.model_state, q)  # noqa: E731
                return jax.tree.map(lambda terms: jnp.sum(terms, 0), jax.lax.map(of, slices))

            def hypergradient(outer_batch):
                at_read = lambda params, read, h: outer(params, with_read(read), h, outer_batch)  # noqa: E731
                of_all = jax.value_and_grad(at_read, (0, 1, 2), has_aux=True)
                (value, metrics), (by_params, by_read, direct) = of_all(after.params, read, hparams)
                rest = by_params if turned is None else add_scaled(by_params, 1.0, turned)
                by_optimizer, by_passed, q = pullback((rest, by_read))
                # Of a square root at zero: a weight that no gradient has reached yet.
                q = jax.tree.map(lambda q, g: jnp.where((g == 0) & ~jnp.isfinite(q), 0, q), q, grad)
                w = None if turned is None else add_scaled(state.direction, 1.0, q)
                terms = [direct, by_optimizer, product(q if w is None else w)]
                if passed:
                    of_loss = lambda h: partition(loss(at[0], h, *at[2:]), is_passed)[0]  # noqa: E731
                    terms.append(jax.vjp(of_loss, hparams)[1](by_passed)[0])
                return jax.tree.map(lambda *terms: sum(terms), *terms), w, value, metrics

            if self.parts == 1:
                total, w, value, metrics = hypergradient(outer_batch)
                return total, OnlineState(after, w), HypergradientInfo(value, metrics, info)
            each, w, value, metrics = jax.lax.map(hypergradient, parts)  # one after another: less memory
            total, w, value = jax.tree.map(lambda x: jnp.mean(x, 0), (each, w, value))
            spread = jax.tree.map(lambda each, mean: each - mean[None], each, total)
            error = norm(upcast(spread)) / (self.parts * (self.parts - 1)) ** 0.5
            return total, OnlineState(after, w), HypergradientInfo(value, metrics, info, standard_error=error)

        return Hypergradient(init, update)

    def _check_direction(self, state):
        if (state.direction is None) != (self.direction != "implicit"):
            raise JaxhpoError(
                f"`state` is of a pair with another direction than {self!r}: go on with the pair that made it, or take "
                "`pair.init(state.inner.params, hparams)`, which starts the optimiser anew."
            )

    def _checked(self, outer_batch):
        if outer_batch is not None and count_examples(outer_batch, f"{self!r} takes minibatches") == self.parts:
            return outer_batch
        shapes = jax.tree.map(lambda x: list(jnp.shape(x)), outer_batch)
        raise JaxhpoError(
            f"`outer_batch` has the shapes {shapes}, but {self!r} takes {self.parts} minibatches of the outer loss, "
            f"for the variance of their mean: give every leaf a leading axis of {self.parts}."
        )


def _like(before, after) -> InnerState:
    """The state after a step in the dtypes of that before it; raises where the step changed its tree or a shape."""
    check_same_state(before, after)
    return cast_like(after, before)


def _differentiated(fn, tree) -> PyTree:
    """For each leaf of `tree`, whether the derivative of `fn(tree)` with respect to it can be non-zero."""
    inexact = jax.tree.map(is_inexact, tree)
    values, combine = partition(tree, inexact)
    seen = iter(differentiable_inputs(lambda values: fn(combine(values)), values) if values else [])
    return jax.tree.map(lambda x: x and next(seen), inexact)


def _mixed_product(loss, params, hparams, batch, model_state, q) -> PyTree:
    r""":math:`(\partial_h \nabla_\theta L)^\top q`, as the derivative along q of :math:`\partial_h L`.

    By reverse mode in h alone, a part of the loss without h falls away: a penalty's product has no pass of the network.
    Second derivatives are symmetric, but where the loss has a derivative rule of the user's, it may not be.
    """
    if untrusted_rule(loss, params, hparams, batch, model_state) is not None:
        gradient = lambda h: value_and_grad(loss, params, h, batch, model_state)[1]  # noqa: E731
        return jax.vjp(gradient, hparams)[1](q)[0]

    def by_hparams(params):
        return jax.grad(lambda h: loss(params, h, batch, model_state)[0])(hparams)

    return jax.jvp(by_hparams, (params,), (q,))[1]


def _hessian_product(loss, params, hparams, batch, model_state, w) -> PyTree:
    """H w, or Hᵀ w where the loss has a derivative rule of the user's."""
    gradient = lambda params: value_and_grad(loss, params, hparams, batch, model_state)[1]  # noqa: E731
    if untrusted_rule(loss, params, hparams, batch, model_state) is not None:
        return jax.vjp(gradient, params)[1](w)[0]
    return jax.jvp(gradient, (params,), (w,))[1]
