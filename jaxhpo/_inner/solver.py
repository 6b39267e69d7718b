"""Inner problems: the training of parameters as pure functions of the hyperparameters."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import add_scaled, mixed_types, named_leaves, zeros_like
from jaxhpo._core.types import InnerState, PyTree, Solver
from jaxhpo._core.validate import (
    check_arrays,
    check_callable,
    check_hparams,
    check_params,
    check_residual,
    check_scalar,
    check_traceable_number,
    describe,
    is_array,
)
from jaxhpo._inner.gradient import value_and_grad


def from_optax(loss: Callable, tx: Any, *, has_state: bool = False) -> Solver:
    r"""An inner problem trained by an optax optimiser.

    One step is :math:`u, s \leftarrow \mathrm{tx.update}(\nabla_\theta L(\theta, h, b), s, \theta)`,
    :math:`\theta \leftarrow \theta + u`; the condition of implicit rules is :math:`\nabla_\theta L = 0`.

    An optimiser with another fixed point (decoupled weight decay as in `optax.adamw`, clipping, projection) does not
    end where that condition holds: `info.optimality` stays large. Under `Implicit`, put the decay into the loss, or use
    `fixed_point(step)`.

    **Cost and bias**: one gradient of the loss per step. Any optax transformation without a data-dependent loop can be
    differentiated through; Adam and similar optimisers need `eps_root > 0` (`optax.adam(lr, eps_root=1e-6)`), since
    the derivative of a square root at zero is infinite. Where the train loss is not finite, the parameters after the
    step are not finite either, even if the gradient is: the logarithm of a negative number is never ignored.

    Args:
      loss: `(params, hparams, batch) -> scalar`; with `has_state`,
        `(params, hparams, batch, model_state) -> (scalar, model_state)`.
      tx: an `optax.GradientTransformation`, or a function `hparams -> GradientTransformation`; with the function,
        learning rates, momenta, schedules and decays can be hyperparameters. Its `update` receives `value`, `grad` and
        `value_fn` if it accepts them.
      has_state: whether the model carries state such as batch-norm statistics: start with
        `solver.init(params, hparams, model_state)`, and read `solution.model_state`. The outer loss of `tune` may have
        the arguments `(h, carry, key)` and start anew at every step: then its `carry` is None.

    Returns:
      A `Solver`.

    Raises:
      JaxhpoError: `tx` is neither, or the loss has the wrong signature or result.

    Example:
      >>> def train_loss(params, hparams, batch):
      ...     return jnp.sum((params - batch) ** 2) + jnp.exp(hparams["log_decay"]) * jnp.sum(params**2)
      >>> solver = jaxhpo.from_optax(train_loss, lambda h: optax.sgd(jnp.exp(h["log_lr"]), momentum=0.9))

    References:
      DeepMind et al. The DeepMind JAX Ecosystem. 2020.
    """
    evaluate = _checked_loss(loss, has_state)
    make_tx = _checked_tx(tx)

    def apply(state, hparams, batch, out, grad):
        value, model_state = out
        update = optax.with_extra_args_support(make_tx(hparams)).update
        extras = _accepted(
            update, value=value, grad=grad, value_fn=lambda p: evaluate(p, hparams, batch, state.model_state)[0]
        )
        # u, s ← tx.update(∇L(θ), s, θ), then θ ← θ + u
        with mixed_types():  # optax mixes types of numbers
            updates, opt_state = update(grad, state.opt_state, state.params, **extras)
            return InnerState(optax.apply_updates(state.params, updates), opt_state, model_state)

    init = _initialiser(lambda params, hparams: make_tx(hparams).init(params), has_state)
    return _descent(init, evaluate, apply, "from_optax")


class MomentumState(NamedTuple):
    """The state of `momentum_sgd`.

    Attributes:
      velocity: v, like the parameters.
      count: steps taken, int32.
    """

    velocity: PyTree
    count: jax.Array


def momentum_sgd(loss: Callable, learning_rate: Any, momentum: Any, *, has_state: bool = False) -> Solver:
    r"""An inner problem trained by gradient descent with momentum, in the form that `Reversible` can run backwards.

    .. math:: v \leftarrow m_t v - (1 - m_t) g, \qquad \theta \leftarrow \theta + \alpha_t v

    The form matters: with the rate inside the velocity, :math:`v \leftarrow m v - (1 - m) \alpha_t g,\ \theta
    \leftarrow \theta + v`, a constant rate has the same trajectory, but the rate of a single step has another
    derivative. (`optax.sgd` has the rate outside, :math:`v \leftarrow m v + g,\ \theta
    \leftarrow \theta - \alpha_t v`: with a constant momentum it is this form at :math:`\alpha_t / (1 - m)`.)

    **Cost and bias**: one gradient of the loss per step; the velocity is one copy of the parameters. Where the train
    loss is not finite, the parameters after the step are not finite either, as in `from_optax`.

    Args:
      loss: as in `from_optax`.
      learning_rate: α, a float, or a function `(hparams, step) -> float or a prefix tree of params` (a rate per layer).
      momentum: m in [0, 1), in the same forms.
      has_state: as in `from_optax`.

    Returns:
      A `Solver`.

    Raises:
      JaxhpoError: a rate or momentum that is neither a number nor a function, or out of its range.

    Example:
      >>> solver = jaxhpo.momentum_sgd(
      ...     lambda p, h, batch: jnp.sum((p - h["target"]) ** 2),
      ...     learning_rate=lambda h, step: jnp.exp(h["log_lr"])[step],
      ...     momentum=0.9,
      ... )

    References:
      Maclaurin, Duvenaud, Adams. Gradient-based Hyperparameter Optimization through Reversible Learning. 2015.
      arXiv:1502.03492
    """
    evaluate = _checked_loss(loss, has_state)
    rate = _checked_schedule("learning_rate", learning_rate, upper=None)
    decay = _checked_schedule("momentum", momentum, upper=1.0)

    init = _initialiser(lambda params, hparams: MomentumState(zeros_like(params), jnp.zeros((), jnp.int32)), has_state)

    def rates(params, hparams, count):
        alpha = _broadcast_prefix(rate(hparams, count), params, "learning_rate")
        return alpha, _broadcast_prefix(decay(hparams, count), params, "momentum")

    def apply(state, hparams, batch, out, grad):
        alpha, m = rates(state.params, hparams, state.opt_state.count)
        with mixed_types():  # rates may be wider than the parameters
            # v ← m_t v − (1 − m_t) g
            velocity = jax.tree.map(lambda m, v, g: m * v - (1 - m) * g, m, state.opt_state.velocity, grad)
            # θ ← θ + α_t v, with the new v
            params = jax.tree.map(lambda p, a, v: p + a * v, state.params, alpha, velocity)
        return InnerState(params, MomentumState(velocity, state.opt_state.count + 1), out[1])

    return _descent(init, evaluate, apply, "momentum_sgd", rates)


def fixed_point(step: Callable, condition: Callable | None = None) -> Solver:
    r"""An inner problem given by your own update :math:`\theta \leftarrow \Phi(\theta, h, b)`.

    For any map that converges: proximal and projected steps, decoupled decay, EM, power iterations. Implicit rules
    differentiate :math:`\theta = \Phi(\theta, h, b)`.

    **Cost and bias**: one call of `step` per step. The Jacobian of :math:`\theta - \Phi` is not symmetric in general,
    so `CG` refuses it: take `Neumann(num_terms, 1.0)`, whose sum is :math:`\sum_k J^k`, or `Direct()`.

    Args:
      step: `(params, hparams, batch) -> params`.
      condition: `(params, hparams, batch) -> pytree like params`, zero at the solution, in place of θ − Φ(θ); when it
        is the gradient of an objective, its Jacobian is symmetric and `CG` may be used.

    Returns:
      A `Solver`.

    Raises:
      JaxhpoError: a function with another signature, or a result that does not match the parameters.

    Example:
      >>> soft = lambda x, t: jnp.sign(x) * jnp.maximum(jnp.abs(x) - t, 0)
      >>> def ista(w, h, batch):
      ...     X, y = batch
      ...     return soft(w - 0.1 * X.T @ (X @ w - y), 0.1 * jnp.exp(h))
      >>> solver = jaxhpo.fixed_point(ista)

    References:
      Bertrand et al. Implicit differentiation of Lasso-type models for hyperparameter optimization. 2020.
      arXiv:2002.08943
    """
    check_callable("step", step, "step(params, hparams, batch)", 3)
    if condition is not None:
        check_callable("condition", condition, "condition(params, hparams, batch)", 3)

    def mapped(params, hparams, batch):
        return check_residual(step(params, hparams, batch), params, "step")

    def advance(state, hparams, batch):
        return InnerState(mapped(state.params, hparams, batch), None, None)

    def residual(params, hparams, batch, model_state):
        if condition is not None:
            return condition(params, hparams, batch)
        return add_scaled(params, -1.0, mapped(params, hparams, batch))  # θ − Φ(θ, h, b)

    init = _initialiser(lambda params, hparams: None)
    return Solver(init, advance, residual, "fixed_point", symmetric=condition is not None)


def _accepted(update, **offered) -> dict:
    """The extra arguments that an optax update accepts: some name theirs instead of taking `**extra_args`."""
    parameters = inspect.signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _descent(init, loss, apply, name, rates=None) -> Solver:
    """A solver whose steps are functions of the gradient of the loss."""

    def step(state, hparams, batch):
        out, grad = value_and_grad(loss, state.params, hparams, batch, state.model_state)
        return apply(state, hparams, batch, out, grad)

    def condition(params, hparams, batch, model_state):
        return value_and_grad(loss, params, hparams, batch, model_state)[1]

    return Solver(init, step, condition, name, loss=loss, apply=apply, rates=rates)


def _checked_loss(loss, has_state):
    """Returns `(params, hparams, batch, model_state) -> (scalar, model_state)`, which checks the loss as it traces."""
    if has_state:
        check_callable("loss", loss, "loss(params, hparams, batch, model_state)", 4)
    else:
        with_state = ", or pass `has_state=True` if its fourth argument is a model state"
        check_callable("loss", loss, "loss(params, hparams, batch)", 3, with_state)

    def evaluate(params, hparams, batch, model_state):
        args = (params, hparams, batch, model_state) if has_state else (params, hparams, batch)
        # New containers: a loss may change its model state in place, as flax nnx does, which also requires that the
        # containers are made within the trace that changes them.
        args = jax.tree.map(lambda x: x, args)
        try:
            out = loss(*args)
        except (TypeError, AttributeError) as error:
            if batch is not None or "None" not in str(error):
                raise
            raise JaxhpoError(
                f"`loss` raised `{error}`. It got `batch=None`, since `solve` got `batches=None`: if it uses its third "
                "argument, pass `batches=`."
            ) from error
        return _checked_output(out, has_state)

    return evaluate


def _checked_output(out, has_state):
    if isinstance(out, tuple) and not has_state:
        raise JaxhpoError(
            "`loss` returned a tuple, but it must return a scalar: drop the rest, or, if it is model state, write "
            "`from_optax(loss, tx, has_state=True)` and `loss(params, hparams, batch, model_state)`."
        )
    if has_state and not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], jax.Array)):
        raise JaxhpoError(
            f"`loss` returned {describe(out)}, but with `has_state=True` it must return the new state too: return "
            "`(scalar, model_state)`."
        )
    value, model_state = out if has_state else (out, None)
    return check_scalar(value, "loss"), check_arrays(model_state, "model_state")


def _checked_tx(tx: Any) -> Callable[[PyTree], Any]:
    """Returns `hparams -> GradientTransformation`, for either form of `tx`."""
    one = "an `optax.GradientTransformation` such as `optax.sgd(0.1)`"
    if _is_transformation(tx):
        return lambda hparams: tx
    if isinstance(tx, type) or not callable(tx):
        what = f"the class {tx.__name__}" if isinstance(tx, type) else describe(tx)
        raise JaxhpoError(f"`tx` got {what}: write {one}, or a function `hparams -> GradientTransformation`.")
    try:
        parameters = list(inspect.signature(tx).parameters)
    except ValueError:
        parameters = []
    if parameters[:1] == ["learning_rate"]:
        name = getattr(tx, "__name__", "optimiser")
        raise JaxhpoError(
            f"`tx` got the function `{name}` itself, which takes a learning rate, not the hyperparameters: write "
            f"`optax.{name}(0.1)`, or `lambda hparams: optax.{name}(hparams['learning_rate'])` to tune the rate."
        )
    if parameters in (["count"], ["step"]):
        raise JaxhpoError("`tx` got a schedule, but it must make an optimiser: write `optax.sgd(schedule)`.")
    check_callable("tx", tx, "tx(hparams)", 1)

    def make(hparams):
        made = tx(hparams)
        if not _is_transformation(made):
            raise JaxhpoError(f"`tx(hparams)` returned {describe(made)}, not an optimiser: return {one}.")
        return made

    return make


def _is_transformation(tx) -> bool:
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None)) and not isinstance(tx, type)


def _checked_schedule(what, value, upper):
    """Returns `(hparams, step) -> value`, for a number or such a function."""
    if callable(value):
        check_callable(what, value, f"{what}(hparams, step)", 2)
        return value
    check_traceable_number(what, value)
    if upper is not None and not isinstance(value, Tracer) and value >= upper:
        raise JaxhpoError(f"`{what}` got {value}, but the velocity would never decay: write a number in [0, {upper}).")
    return lambda hparams, step: value


def _initialiser(make_opt_state, has_state=False) -> Callable[..., InnerState]:
    """Returns the `init` of a solver, which checks every part of the state that it makes."""

    def init(params, hparams, model_state=None):
        params, hparams = check_params(params, "params"), check_hparams(hparams)
        if has_state and model_state is None:
            raise JaxhpoError(
                "`init` got no model state, but the solver was made with `has_state=True`: write "
                "`solver.init(params, hparams, model_state)`, or omit `has_state`."
            )
        if not has_state and model_state is not None:
            raise JaxhpoError(
                "`init` got a model state, but without `has_state=True` the loss would ignore it: write "
                "`from_optax(loss, tx, has_state=True)`."
            )
        return InnerState(params, make_opt_state(params, hparams), check_arrays(model_state, "model_state"))

    return init


def _broadcasts(shape, to) -> bool:
    """Returns whether an array of this shape broadcasts to the other without enlarging it."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _broadcast_prefix(prefix, params, what):
    """Broadcasts a prefix tree of rates to the parameters, with a check of every shape."""
    instead = "return one number, or one per subtree of the parameters"
    try:
        values = jax.tree.broadcast(prefix, params)
    except ValueError as error:
        raise JaxhpoError(f"`{what}` returned a tree that is not a prefix of the parameters: {instead}.") from error
    for (name, p), value in zip(named_leaves(params, "params"), jax.tree.leaves(values), strict=True):
        if not is_array(value) or not _broadcasts(jnp.shape(value), p.shape):
            raise JaxhpoError(
                f"`{what}` returned {describe(value)} for `{name}`, which is {describe(p)}: {instead} (for a schedule, "
                "index it: `rates[step]`)."
            )
    return values
