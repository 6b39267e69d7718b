"""The outer loop, for those who do not want to write it."""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo._diagnose import diagnose
from jaxhpo._errors import JaxhpoError, NonFiniteError, ZeroHypergradientWarning
from jaxhpo._health import forget_if_jitted, raise_if_zero, what_is_not_finite
from jaxhpo._progress import Progress
from jaxhpo._run_dir import exists, load, make_folder, save
from jaxhpo._transforms import to_natural, to_unconstrained
from jaxhpo._tree import all_finite, differentiable_inputs, names, norm, upcast
from jaxhpo._tune_inputs import check_callbacks, check_settings, make_evaluator
from jaxhpo._types import PyTree
from jaxhpo._validate import (
    check_arrays,
    check_key,
    check_params,
)


class TuneResult(NamedTuple):
    """What `tune` found. Everything is in natural units.

    Attributes:
      hparams: the last hyperparameters, after the last update.
      carry: the last carry.
      best_hparams: the hyperparameters of lowest outer loss. (Where the outer loss is random, the luckiest step.)
      best_value: that loss, a float.
      history: a dict of NumPy arrays with one row per outer step: `value`, `hypergradient_norm` (in unconstrained
        units, those of the search), `seconds`, `hparams` (a tree; leaves of more than 1024 entries are kept as their
        minimum, quartiles and maximum), `info`.
      status: "finished", "patience", "callback", "interrupted" or "not_finite".
      message: why it stopped, in words.
    """

    hparams: PyTree
    carry: PyTree
    best_hparams: PyTree
    best_value: float
    history: dict[str, Any]
    status: str
    message: str

    def __repr__(self) -> str:
        steps = len(self.history["value"])
        return f"TuneResult(best_value={self.best_value:.6g}, steps={steps}, status={self.status!r}: {self.message})"


class TuneStep(NamedTuple):
    """What a callback is given after each outer step.

    Attributes:
      step: 0, 1, …
      value: the outer loss at `hparams`.
      hparams: the hyperparameters at which it was evaluated.
      hypergradient_norm: Euclidean norm in unconstrained units.
      info: what the outer loss reported, or None.
      best_value: the lowest outer loss so far.
      seconds: since the start.
    """

    step: int
    value: float
    hparams: PyTree
    hypergradient_norm: float
    info: PyTree
    best_value: float
    seconds: float


def tune(
    outer_loss: Callable | None,
    hparams: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    transforms: PyTree = None,
    gradient: Callable | None = None,
    key: jax.Array | None = None,
    carry: PyTree = None,
    run_dir: str | os.PathLike | None = None,
    callbacks: Iterable[Callable[[TuneStep], Any]] = (),
    patience: int | None = None,
    min_delta: float = 0.0,
    progress: bool = True,
) -> TuneResult:
    r"""Moves hyperparameters down their hypergradient with an optax optimiser.

    With h = forward(u), each outer step is
    :math:`u \leftarrow u + \mathrm{optimizer}(\nabla_u F(\mathrm{forward}(u)))`.
    The step is compiled once. Ctrl-C returns what there is.

    **Cost and bias**: one hypergradient a step, and whatever bias its rule has; memory of the hyperparameters, the
    optimiser's state and one row of history a step.

    Args:
      outer_loss: `hparams -> scalar`, or `(hparams, carry, key) -> (scalar, carry, info)`: `carry` is handed from step
        to step (a solution's `.state`, for a warm start), `key` is new at every step, and `info` (any pytree, such as a
        solution's `.info`) is recorded. None where `gradient` is given.
      hparams: the start, in natural units.
      optimizer: any optax transformation, `optax.lbfgs()` too.
      num_steps: outer steps, in all (with those of earlier calls on the same `run_dir`).
      transforms: a prefix tree of transforms such as `{"penalty": positive, "momentum": unit_interval}`; None where a
        hyperparameter is unconstrained.
      gradient: `(hparams, carry, key) -> (value, hypergradient, carry, info)`, in natural units, in place of
        differentiating `outer_loss`.
      key: `jax.random.key(0)` when None.
      carry: the first carry.
      run_dir: a folder that keeps the whole state of the run (written every 10 s and at the end, atomically); the same
        call with the same folder goes on where it stood, or returns at once if it had finished. Another start, key or
        transform is refused; more steps, another optimiser setting or loss are taken as given. None keeps nothing.
      callbacks: each is called with a `TuneStep` after every step; a true result stops the run.
      patience: stop after this many steps without an improvement of more than `min_delta`; None never stops early.
      min_delta: the least improvement that counts for `patience`.
      progress: a tqdm bar where tqdm is installed and the output is a terminal or a notebook, else a line every 5 s.

    Returns:
      A `TuneResult`.

    Raises:
      ZeroHypergradientError: at the first step a leaf's hypergradient is exactly zero, or the rule cuts entries off.
      NonFiniteError: the first step is not finite; says where that began. (Later on, the run ends with a warning that
        says so, status "not_finite", and the last finite state.)
      JaxhpoError: an input that cannot work.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - 2.0) ** 2) + h * jnp.sum(p**2), optax.sgd(0.05))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=100)
      ...     return jnp.sum((sol.params - 1.0) ** 2)
      >>> result = jaxhpo.tune(
      ...     outer_loss, jnp.array(0.1), optax.adam(0.2), num_steps=100, transforms=jaxhpo.positive, progress=False
      ... )
      >>> print(round(float(result.best_hparams), 2))  # the minimiser of the penalised loss is 2 / (1 + h)
      1.0

    References:
      Pedregosa. Hyperparameter optimization with approximate gradient. 2016. arXiv:1602.02355
    """
    hparams = check_params(hparams, "hparams")
    callbacks = check_callbacks(callbacks)
    check_settings(optimizer, num_steps, transforms, patience, min_delta)
    if run_dir is not None:
        make_folder(run_dir)
    first_key = jax.random.key(0) if key is None else check_key(key)
    carry = jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
    forget_if_jitted(outer_loss)
    search = _Search(make_evaluator(outer_loss, gradient), optimizer, transforms)
    point = to_unconstrained(transforms, hparams)
    state = _State(point, optimizer.init(point), carry, first_key, jnp.zeros((), jnp.int32))
    run = _Run(search, state, run_dir)
    run.resume()
    if progress and run.rows:
        print(f"{run.origin}; another folder, or none, starts anew", file=sys.stderr)
    with Progress(num_steps, "step", progress, done=len(run.rows)) as bar:
        try:
            status, message = _advance(run, num_steps, callbacks, patience, min_delta, bar)
        except KeyboardInterrupt:
            if not run.rows:
                raise
            status, message = "interrupted", f"interrupted after {len(run.rows)} outer steps"
        finally:
            run.save()
    return run.result(status, message)


class _State(NamedTuple):
    """All that an outer step depends on."""

    point: PyTree  # unconstrained hyperparameters
    opt_state: PyTree
    carry: PyTree
    key: jax.Array
    step: Any


class _Report(NamedTuple):
    """What an outer step tells the host."""

    value: jax.Array
    hparams: PyTree
    hypergradient: PyTree
    hypergradient_norm: jax.Array
    finite: jax.Array
    info: PyTree


class _Search:
    """The compiled outer step."""

    def __init__(self, evaluate, optimizer, transforms):
        self.evaluate, self.transforms = evaluate, transforms
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.step = jax.jit(self._step)

    def objective(self, point, carry, key):
        """`(point, carry, key) -> (value, (carry, info))` where it can be differentiated."""
        value, carry, info = self.evaluate.loss(to_natural(self.transforms, point), carry, key)
        return value, (carry, info)

    def _value_and_grad(self, point, carry, key):
        if self.evaluate.gradient is None:
            (value, (carry, info)), grad = jax.value_and_grad(self.objective, has_aux=True)(point, carry, key)
            return value, grad, carry, info
        hparams, pullback = jax.vjp(lambda u: to_natural(self.transforms, u), point)
        value, grad, carry, info = self.evaluate.gradient(hparams, carry, key)
        return value, pullback(grad)[0], carry, info

    def _step(self, state):
        key = jax.random.fold_in(state.key, state.step)
        value, grad, carry, info = self._value_and_grad(state.point, state.carry, key)
        updates, opt_state = self.optimizer.update(
            grad,
            state.opt_state,
            state.point,
            value=value,
            grad=grad,
            value_fn=lambda u: self.objective(u, state.carry, key)[0],
        )
        point = optax.apply_updates(state.point, updates)
        after = _State(point, opt_state, carry, state.key, state.step + 1)
        finite = jnp.isfinite(value) & all_finite(grad) & all_finite(point)
        grad_norm = norm(upcast(grad))  # squares of float16 overflow
        return after, _Report(value, to_natural(self.transforms, state.point), grad, grad_norm, finite, info)

    def structure(self, state):
        """A function that tells for each leaf whether its derivative can be non-zero; None where that is unknown."""
        if self.evaluate.gradient is not None:
            return None
        leaves, tree = jax.tree.flatten(state.point)

        def value(leaves):
            return self.objective(jax.tree.unflatten(tree, leaves), state.carry, state.key)[0]

        return lambda: differentiable_inputs(value, leaves)

    def diagnosis(self, state) -> str:
        """Where the step from `state` ceases to be finite."""
        if self.evaluate.gradient is not None:
            return "It comes from the `gradient` function that was given."
        key = jax.random.fold_in(state.key, state.step)
        return diagnose(lambda u: self.objective(u, state.carry, key)[0], state.point)


class _Run:
    """Where a run stands: what an interruption must not lose."""

    def __init__(self, search, state, run_dir):
        self.search, self.state, self.run_dir, self.origin = search, state, run_dir, "started"
        # What must be the same when the run goes on: the numbers on disk mean nothing else.
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(search.transforms))  # an address differs from process to process
        transforms = np.frombuffer(text.encode(), np.uint8)
        self.settings = {"hparams": state.point, "key": state.key, "transforms": transforms}
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_hparams, self.waited = np.inf, None, 0
        self.started, self.saved = time.perf_counter(), time.perf_counter()

    def accept(self, after, report, min_delta) -> TuneStep:
        """Takes a step into the record."""
        value, grad_norm = float(report.value), float(report.hypergradient_norm)
        seconds = time.perf_counter() - self.started
        row = _row(report, seconds)
        if self.rows and jax.tree.structure(row) != jax.tree.structure(self.rows[0]):
            raise JaxhpoError(
                f"`outer_loss` returned an info of tree {jax.tree.structure(row['info'])} at outer step "
                f"{len(self.rows)}, but {jax.tree.structure(self.rows[0]['info'])} before: return the same tree at "
                "every step."
            )
        # From here on nothing takes long: an interruption finds the record whole.
        self.waited = 0 if value < self.best - min_delta else self.waited + 1
        if value < self.best:
            self.best, self.best_hparams = value, report.hparams
        self.state = after
        self.rows.append(row)
        return TuneStep(len(self.rows) - 1, value, report.hparams, grad_norm, report.info, self.best, seconds)

    def history(self):
        return jax.tree.map(lambda *x: np.stack(x), *self.rows)

    def save(self, every=0.0):
        """Writes the record, unless that happened less than `every` seconds ago."""
        if self.run_dir is None or not self.rows or time.perf_counter() - self.saved < every:
            return
        save(self.run_dir, self._tree(self.state, self.best_hparams, self.history()))
        self.saved = time.perf_counter()

    def resume(self):
        """Goes on from the record in `run_dir`, if there is one."""
        if self.run_dir is None or not exists(self.run_dir):
            return
        after, report = jax.eval_shape(self.search.step, self.state)
        row = _row(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), report), 0.0)
        after = after._replace(key=self.state.key)  # a shape does not tell which kind of key
        like = self._tree(after, report.hparams, jax.tree.map(lambda x: x[None], row))
        found = load(self.run_dir, like, "run['history']", "run['settings']")
        self.state, self.waited = jax.tree.map(jnp.asarray, found["state"]), int(found["waited"])
        self.best, self.best_hparams = float(found["best"]), jax.tree.map(jnp.asarray, found["best_hparams"])
        self.rows = [jax.tree.map(lambda x, i=i: x[i], found["history"]) for i in range(len(found["history"]["value"]))]
        self.started -= float(self.rows[-1]["seconds"])
        self.origin = f"resumed from {os.fspath(self.run_dir)!r} after {len(self.rows)} outer steps"

    def _tree(self, state, best_hparams, history):
        return {
            "state": state,
            "best": np.asarray(self.best),
            "best_hparams": best_hparams,
            "waited": np.asarray(self.waited),
            "history": history,
            "settings": self.settings,
        }

    def result(self, status, message) -> TuneResult:
        hparams = jax.jit(lambda u: to_natural(self.search.transforms, u))(self.state.point)
        message = message if self.origin == "started" else f"{self.origin}; {message}"
        return TuneResult(hparams, self.state.carry, self.best_hparams, self.best, self.history(), status, message)


def _advance(run, num_steps, callbacks, patience, min_delta, bar) -> tuple[str, str]:
    """Takes the outer steps; returns why it stopped."""
    while (step := len(run.rows)) < num_steps:
        if patience is not None and run.waited >= patience:
            return "patience", f"no improvement of more than {min_delta} in {patience} outer steps"
        after, report = _first_step(run.search, run.state) if step == 0 else run.search.step(run.state)
        if not bool(report.finite):
            return "not_finite", _not_finite(run.search, run.state, report, step)
        told = run.accept(after, report, min_delta)
        bar.update(f"loss {told.value:.4g}, best {run.best:.4g}, |hypergradient| {told.hypergradient_norm:.2g}")
        run.save(every=10.0)
        if any([callback(told) for callback in callbacks]):
            return "callback", f"a callback stopped the run after outer step {step}"
    return "finished", f"{len(run.rows)} outer steps were taken, of {num_steps} asked for"


def _first_step(search, state):
    """The step that traces: what the rules warned of while tracing is held against the hypergradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after, report = search.step(state)
    leaf_names = names(report.hparams, "hparams")
    for w in caught:
        # Of a leaf that is judged below by its value, nothing need be said twice.
        if not (isinstance(w.message, ZeroHypergradientWarning) and w.message.leaf in leaf_names):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    if bool(report.finite):
        messages = [w.message for w in caught]
        raise_if_zero(report.hypergradient, messages, leaf_names, search.structure(state))
    return after, report


def _not_finite(search, state, report, step) -> str:
    what = what_is_not_finite(report.value, report.hypergradient)
    message = f"Outer step {step}: {what} {search.diagnosis(state)}"
    if step == 0:
        raise NonFiniteError(message)
    warnings.warn(f"{message} The run ends; the last finite state is returned.", RuntimeWarning, stacklevel=4)
    return message


def _row(report, seconds) -> dict[str, Any]:
    def small(leaf):
        leaf = np.asarray(leaf)
        return leaf if leaf.size <= 1024 else np.quantile(leaf, [0, 0.25, 0.5, 0.75, 1])

    return {
        "value": np.asarray(report.value),
        "hypergradient_norm": np.asarray(report.hypergradient_norm),
        "seconds": np.asarray(seconds),
        "hparams": jax.tree.map(small, report.hparams),
        "info": jax.tree.map(_to_numpy, report.info),
    }


def _to_numpy(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
