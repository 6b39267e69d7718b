r"""The value-function method: a bilevel problem as one problem with a constraint.

The inner optimal value :math:`\varphi(h) = \min_\theta f(\theta, h)` turns "θ is an inner minimum at h" into the
constraint :math:`f(\theta, h) - \varphi(h) \le 0`. A Gaussian process that is fitted to the values of finished
trainings stands for φ, and the problem

.. math:: \min_{\theta, h} F(\theta) \quad \text{subject to} \quad g = f(\theta, h) - \hat\varphi(h) \le 0

is solved by the augmented Lagrangian :math:`F + (\max(0, \mu + R g)^2 - \mu^2) / 2R`, whose multiplier becomes
:math:`\max(0, \mu + R g)` after each training, with g of the value that it found. Of a connected set of inner minima
this takes the one with the lowest outer loss; it does not cross barriers between separate ones, as parameters move by a
local optimiser.

A step of the method is a step of `tune`: one training at the present h, and then a move. In the first n steps the move
leads to the next point of the design.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import jaxhpo
from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.tree import upcast, where
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import check_callable, check_count, check_params, check_positive, check_scalar
from jaxhpo.search._gaussian_process import gaussian_process

MOST_MOVES = 16  # trainings beyond the design that the state has room for
SETTLED = 3  # moves that change little, after which the search ends


class ValueFunctionState(NamedTuple):
    """State of the method, the carry of its run: `result.carry` of `value_function`.

    Attributes:
      params: θ, of the augmented Lagrangian at the present h.
      best_params: θ of the best step so far.
      best_hparams: its h, flat.
      best_loss: its outer loss.
      multiplier: μ.
      penalty: R.
      points: (N, m) hyperparameters of the trainings so far, flat.
      values: (N,) φ, the inner losses that they found; zero where there is none yet.
      count: trainings so far.
      predicted: mean and standard deviation of φ at the present h.
      last_loss: the outer loss of the step before.
      settled: moves in a row that changed it little.

    Example:
      >>> result = jaxhpo.search.value_function(
      ...     lambda w, h: (w - h) ** 2, lambda w: (w - 1) ** 2, lambda h: h, jnp.linspace(0.0, 3.0, 4),
      ...     optax.adam(0.1), num_steps=6, progress=False
      ... )
      >>> print(result.carry.points[:4, 0], result.carry.values[:4], result.carry.count)
      [0. 1. 2. 3.] [0. 0. 0. 0.] 6
    """

    params: PyTree
    best_params: PyTree
    best_hparams: jax.Array
    best_loss: jax.Array
    multiplier: jax.Array
    penalty: jax.Array
    points: jax.Array
    values: jax.Array
    count: jax.Array
    predicted: tuple[jax.Array, jax.Array]
    last_loss: jax.Array
    settled: jax.Array


def value_function(
    train_loss: Callable[[PyTree, PyTree], jax.Array],
    val_loss: Callable[[PyTree], jax.Array],
    fit: Callable[[PyTree], PyTree],
    design: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    inner_steps: int = 300,
    kernel: str = "matern52",
    multiplier: float = 2.0,
    penalty: float = 2.0,
    growth: float = 1.5,
    tol: float = 1e-3,
    callbacks: Iterable[Callable] = (),
    **run: Any,
) -> jaxhpo.TuneResult:
    r"""Minimises an outer loss over parameters and hyperparameters, with a model of the inner optimal value.

    For few hyperparameters, as the design must surround the optimum (h stays within its smallest and largest values),
    and where the inner minimum is not unique, so that implicit differentiation is not defined. The parameters are
    trained on the validation data too, as far as the constraint lets them: compare methods after a training on both
    parts with `best_hparams`, and on data that neither has seen.

    **Cost and bias**: one training a step, and `inner_steps` gradients of both losses in each step after the design;
    memory of four copies of the parameters and of the optimiser's state. No derivative of the training is taken. The
    model is exact at the trainings, up to their own distance from a minimum.

    Args:
      train_loss: f(params, hparams), on all of the training data.
      val_loss: F(params).
      fit: h -> trained params; pure functions of JAX, as `jaxhpo.solve(...).params`.
      design: hyperparameters of the first n trainings, each leaf with a leading axis of n; in units in which φ is
        smooth (logarithms of penalties).
      optimizer: any optax transformation, for (params, hparams) together.
      num_steps: trainings in all, n of the design among them, and at most 16 more: R grows by `growth` in each.
      inner_steps: of the optimiser in each step.
      kernel: of the Gaussian process, "matern52" or "rbf", with a length scale for each hyperparameter.
      multiplier: the first μ.
      penalty: the first R.
      growth: of R in each step.
      tol: a step is feasible, and may be the best, where g is at most this part of φ (or of one, if that is more); the
        search ends where three in a row are, with outer losses that differ by less.
      callbacks: as for `tune`.
      **run: other arguments of `tune`: `run_dir`, `save_every`, `progress`, `max_seconds`, ...

    Returns:
      The result of `tune`: `best_hparams`; `history["value"]`, the outer loss of θ; `history["info"]` with the
      constraint `gap` g, `multiplier`, `inner_loss` φ, `predicted`, the model's φ̂ before the training, `surprise`, by
      how many of its standard deviations it was wrong (NaN within the design), and `trained`, the outer loss of the
      training. `carry.best_params` are the best parameters; the status is "converged" where `tol` ended the search.

    Raises:
      JaxhpoError: an invalid input, or tinygp is not installed.

    Example:
      >>> def train_loss(w, h): return (w[0] - h) ** 2          # of w₁ nothing is known: no unique minimum
      >>> def val_loss(w): return (w[0] - 1.0) ** 2 + (w[1] - 3.0) ** 2
      >>> def fit(h): return jnp.array([h, 0.0])
      >>> result = jaxhpo.search.value_function(
      ...     train_loss, val_loss, fit, jnp.linspace(-2.0, 2.0, 8), optax.adam(0.05), num_steps=14, progress=False
      ... )
      >>> print(result.status, result.best_hparams.round(2), result.carry.best_params.round(2))
      converged 1.0 [1. 3.]

    References:
      Sinha, Gunwal, Kumar. A Globally Convergent Gradient-based Bilevel Hyperparameter Optimization Method. 2022.
      arXiv:2208.12118
    """
    for name, function, signature, number in (
        ("train_loss", train_loss, "train_loss(params, hparams)", 2),
        ("val_loss", val_loss, "val_loss(params)", 1),
        ("fit", fit, "fit(hparams)", 1),
    ):
        check_callable(name, function, signature, number)
    if kernel not in ("matern52", "rbf"):
        raise JaxhpoError(f"`kernel` got {kernel!r}: write 'matern52' or 'rbf'.")
    check_count("inner_steps", inner_steps)
    for name, number in (("multiplier", multiplier), ("penalty", penalty), ("growth", growth), ("tol", tol)):
        check_positive(name, number)
    taken = {"carry", "gradient", "monitor", "population", "projections", "score_window", "transforms"} & run.keys()
    if taken:
        raise JaxhpoError(f"`value_function` got {sorted(taken)}, which it sets itself or cannot use: omit them.")
    method = _Method(train_loss, val_loss, fit, design, optimizer, inner_steps, kernel, growth, tol)
    most = method.number + MOST_MOVES
    check_count("num_steps", num_steps)
    if not method.number < num_steps <= most:
        raise JaxhpoError(
            f"`num_steps` got {num_steps}, of which {method.number} are the trainings of the design: write a number "
            f"from {method.number + 1} to {most}."
        )
    with warnings.catch_warnings():
        # Along the design only some of the hyperparameters may move.
        warnings.simplefilter("ignore", jaxhpo.ZeroHypergradientWarning)
        result = jaxhpo.tune(
            None,
            method.at(0),
            optax.sgd(1.0),
            num_steps=num_steps,
            gradient=method.step,
            carry=method.init(multiplier, penalty),
            monitor=lambda info: info["score"],
            score_window=1,
            callbacks=[*callbacks, lambda step: step.info["settled"] >= SETTLED],
            **run,
        )
    settled = result.history["info"]["settled"]
    if result.status == "callback" and settled[-1] >= SETTLED:
        message = f"after {len(settled)} trainings: {SETTLED} moves changed the outer loss by less than {tol:g}"
        result = result._replace(status="converged", message=message)
    moved = result.history["info"]["score"][method.number :]
    if len(moved) and not np.isfinite(moved).any():
        none = f"no move was feasible (`tol={tol:g}`), so that the best is a training of the design: more `inner_steps`"
        result = result._replace(message=f"{result.message}; {none}, or a larger `growth`, may do")
    best = ravel_pytree(result.best_hparams)[0]
    if ((best == method.low) | (best == method.high)).any():
        edge = "the best hyperparameters lie at the edge of the design: one that reaches further may hold better ones"
        result = result._replace(message=f"{result.message}; {edge}")
    return result


class _Method:
    """The steps of the method, as a `gradient` of `tune`: h minus the next h."""

    def __init__(self, train_loss, val_loss, fit, design, optimizer, inner_steps, kernel, growth, tol):
        self.fit = fit
        self.optimizer, self.inner_steps, self.kernel = optimizer, inner_steps, kernel
        self.growth, self.tol = growth, tol
        design = upcast(check_params(design, "design"))  # there is no Cholesky factorisation in bfloat16
        shapes = [x.shape for x in jax.tree.leaves(design)]
        sizes = {shape[0] if shape else 0 for shape in shapes}
        if len(sizes) != 1 or min(sizes) < 2:
            raise JaxhpoError(
                f"`design` has leaves of shapes {shapes}: give each a leading axis of the same number of trainings, "
                "two or more, as `{'log_penalty': jnp.linspace(-10.0, -1.0, 10)}`."
            )
        self.number = sizes.pop()
        first = jax.tree.map(lambda x: x[0], design)
        _, self.unravel = ravel_pytree(first)
        self.design = jax.vmap(lambda row: ravel_pytree(row)[0])(design)
        self.low, self.high = self.design.min(0), self.design.max(0)

        def scalar(loss, name):  # of the model's type, whatever that of the parameters is
            return lambda *args: check_scalar(loss(*args), name).astype(self.design.dtype)

        self.train_loss, self.val_loss = scalar(train_loss, "train_loss"), scalar(val_loss, "val_loss")
        flat = self.low == self.high
        if flat.any():
            raise JaxhpoError(
                f"`design` has one value only of {int(flat.sum())} of {flat.size} hyperparameters, so that nothing is "
                "learned of them, and they could not move: vary each, or close over it in the losses."
            )
        if len(np.unique(self.design, axis=0)) < self.number:
            raise JaxhpoError("`design` has the same hyperparameters twice, of which one training says all: omit one.")

    def at(self, i: int) -> PyTree:
        """Hyperparameters of the design's training i."""
        return self.unravel(self.design[i])

    def init(self, multiplier: float, penalty: float) -> ValueFunctionState:
        """The state before the first training."""
        shapes, dtype = (
            jax.eval_shape(lambda h: check_params(self.fit(h), "fit(hparams)"), self.at(0)),
            self.design.dtype,
        )
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        places, zero = self.number + MOST_MOVES, jnp.zeros((), dtype)
        most = jnp.asarray(jnp.finfo(dtype).max, dtype)
        return ValueFunctionState(
            params=params,
            best_params=params,
            best_hparams=self.design[0],
            best_loss=most,
            multiplier=jnp.asarray(multiplier, dtype),
            penalty=jnp.asarray(penalty, dtype),
            points=jnp.zeros((places, self.design.shape[1]), dtype),
            values=jnp.zeros(places, dtype),
            count=jnp.zeros((), jnp.int32),
            predicted=(zero, zero),
            last_loss=most,
            settled=jnp.zeros((), jnp.int32),
        )

    def step(self, hparams: PyTree, state: ValueFunctionState, key: jax.Array) -> tuple:
        """A training at h, then the move to the next h: (outer loss, h minus the next h, state, info)."""
        h, design = ravel_pytree(hparams)[0], state.count < self.number
        trained = self.fit(hparams)
        params = where(design, trained, state.params)
        # φ is a minimum: the lower of two losses is nearer to it.
        loss = self.train_loss(params, hparams)
        value = jnp.minimum(loss, self.train_loss(trained, hparams))
        gap, outer = loss - value, self.val_loss(params)
        feasible = gap <= self.tol * jnp.maximum(1.0, jnp.abs(value))
        better = feasible & (outer < state.best_loss)
        stays = feasible & (jnp.abs(outer - state.last_loss) <= self.tol * jnp.maximum(1.0, jnp.abs(outer)))
        mean, deviation = state.predicted
        state = state._replace(
            params=params,
            best_params=where(better, params, state.best_params),
            best_hparams=jnp.where(better, h, state.best_hparams),
            best_loss=jnp.where(better, outer, state.best_loss),
            multiplier=jnp.where(design, state.multiplier, jnp.maximum(0.0, state.multiplier + state.penalty * gap)),
            penalty=jnp.where(design, state.penalty, self.growth * state.penalty),
            points=state.points.at[state.count].set(h),
            values=state.values.at[state.count].set(value),
            count=state.count + 1,
            last_loss=outer,
            settled=jnp.where(stays & ~design, state.settled + 1, 0),
        )
        info = {
            "gap": gap,
            "multiplier": state.multiplier,
            "inner_loss": value,
            "predicted": jnp.where(design, jnp.nan, mean),
            "surprise": jnp.where(design, jnp.nan, (value - mean) / deviation),
            "trained": self.val_loss(trained),
            "score": jnp.where(feasible, outer, jnp.nan),
            "settled": state.settled,
        }
        after, state = jax.lax.cond(state.count < self.number, self.along_the_design, self.move, h, state)
        return outer, self.unravel(h - after), state, info

    def along_the_design(self, h: jax.Array, state: ValueFunctionState) -> tuple[jax.Array, ValueFunctionState]:
        """The design's next point."""
        return self.design[state.count], state

    def move(self, h: jax.Array, state: ValueFunctionState) -> tuple[jax.Array, ValueFunctionState]:
        """The lowest point of the augmented Lagrangian that the optimiser meets."""
        model = gaussian_process(jax.vmap(self.unit)(state.points), state.values, state.count, self.kernel)

        def lagrangian(variables):
            params, h = variables
            above = self.train_loss(params, self.unravel(h)) - model(self.unit(h))[0]
            slack = jnp.maximum(0.0, state.multiplier + state.penalty * above)
            return self.val_loss(params) + (slack**2 - state.multiplier**2) / (2 * state.penalty)

        def body(loop, _):
            variables, opt_state, lowest, kept = loop
            value, grad = jax.value_and_grad(lagrangian)(variables)
            kept, lowest = where(value < lowest, variables, kept), jnp.minimum(value, lowest)
            updates, opt_state = self.optimizer.update(grad, opt_state, variables)
            moved: Any = optax.apply_updates(variables, updates)
            params, h = moved
            return ((params, jnp.clip(h, self.low, self.high)), opt_state, lowest, kept), None

        # From the best training of the design at first, then on from where the last move ended.
        best = (state.best_params, state.best_hparams)
        start = where(state.count == self.number, best, (state.params, h))
        loop = (start, self.optimizer.init(start), jnp.full((), jnp.inf, h.dtype), start)
        (_, _, _, (params, h)), _ = jax.lax.scan(body, loop, length=self.inner_steps)
        return h, state._replace(params=params, predicted=model(self.unit(h)))

    def unit(self, points: jax.Array) -> jax.Array:
        """In units of the design's extent."""
        return (points - self.low) / (self.high - self.low)
