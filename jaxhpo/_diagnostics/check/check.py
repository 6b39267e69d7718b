"""`check_hypergradient`: compares a hypergradient with the exact derivative, and says why it differs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhpo._core.outer import in_one_form, in_search_units, is_deterministic
from jaxhpo._core.processes import together
from jaxhpo._core.progress import EVERY, Progress
from jaxhpo._core.transforms import to_unconstrained
from jaxhpo._core.types import PyTree
from jaxhpo._core.validate import (
    check_arrays,
    check_count,
    check_key,
    check_one_training,
    check_params,
    check_positive,
    check_switch,
)
from jaxhpo._diagnostics.check.evidence import Evidence
from jaxhpo._diagnostics.check.result import HypergradientCheck
from jaxhpo._diagnostics.check.verdict import examine


@together()
def check_hypergradient(
    outer_loss: Callable | None,
    hparams: PyTree,
    *,
    num_directions: int | None = None,
    by_leaf: bool = False,
    repeats: int = 8,
    step_size: float | None = None,
    step: float | None = None,
    transforms: PyTree = None,
    gradient: Callable | None = None,
    carry: PyTree = None,
    key: jax.Array | None = None,
) -> HypergradientCheck:
    r"""Compares a hypergradient with the exact derivative of the outer loss, and says why they differ.

    The reference is the derivative :math:`g = dF/dh` of the steps that were run: directional derivatives by forward
    mode through the plain loop of every `solve`, whatever rule it asks for, past `stop_gradient` and derivative rules
    of your own. They have no step size, so float32 is no trouble. Up to 64 hyperparameters every coordinate is taken.
    Else the component of g along the hypergradient of each leaf, :math:`\hat g_l`, is exact, and the rest of g is
    measured along random directions, with a 95 % interval by :math:`\chi^2`.

    Where nothing can be differentiated forward (callbacks), where `implicit` stands around a solver of your own, or
    where differences contradict the tangents (integer arithmetic), the reference are central differences of fourth
    order; their own error is estimated from two step sizes.

    A hypergradient that differs is taken apart: rounding (a second evaluation with other roundings), `Unroll()` in the
    place of the rule, a better linear solver, as many inner steps again, `stop_gradient` kept. What takes the
    difference away is the cause.

    **Cost and bias**: one hypergradient, 1 + 1.3 k to 1 + 2 k trainings for k directions (8 together share the run),
    where k is the number of hyperparameters up to 64, else 8 and one a leaf; where it differs, about 4 hypergradients
    and twice the directions more. Differences cost 4 trainings a direction, `step` 17 trainings, and where it tries
    remedies 2 hypergradients and 18 trainings more. What takes longer than 5 s shows its progress on stderr.

    Args:
      outer_loss: `hparams -> scalar`, or `(hparams, carry, key) -> (scalar, carry, info)`, as for `tune`. None where
        `gradient` is given, whose own value is then differentiated.
      hparams: where to check, a pytree of floating-point arrays, in natural units.
      num_directions: random directions, or coordinates where there are no more; None takes all coordinates up to 64
        hyperparameters, else 8.
      by_leaf: takes as many random directions in each leaf too. (Up to 8 leaves are, where the whole differs.)
      repeats: draws, each with a key of its own, of a hypergradient that has a key and differs: their mean is compared
        with the mean of the references, and their spread is told from a bias.
      step_size: of central differences, relative to each hyperparameter's scale: its size, at most 1 (where it is zero,
        its leaf's root mean square, or 1). None takes :math:`\epsilon^{1/5}`, 7e-4 in float64 and 0.04 in float32, of
        that scale or of the size itself, whichever has the smaller error.
      step: also measures predictivity: the correlation of predicted and real change of the outer loss over 8 random
        steps, by which each hyperparameter moves with this standard deviation (about the rate of the outer optimiser),
        and over 8 of a third of it. Where the first is below 0.9 it is taken again, along the same steps, with half as
        many inner steps, and with half the inner rate, for the hypergradient and the trainings alike; what raises it
        by more than chance is printed beside it. None does not.
      transforms: as for `tune`: hypergradient, errors and `step` are then those of the unconstrained hyperparameters,
        which the outer optimiser moves. Without, a `step` of 0.1 takes a penalty of 0.05 below zero.
      gradient: `(hparams, carry, key) -> (value, hypergradient, carry, info)`, as for `tune`: `from_pair(pair)`, or a
        hypergradient of your own.
      carry: what the outer loss, or `gradient`, is given.
      key: for the directions and the outer loss; `jax.random.key(0)` when None.

    Returns:
      A `HypergradientCheck`; `print` it.

    Raises:
      ZeroHypergradientError: the rule cannot see a leaf, or some of its entries, and gives exactly zero for them.
      NonFiniteError: the outer loss or the hypergradient is not finite; names the inner step at which that began.
      JaxhpoError: an invalid input.

    Example:
      >>> solver = jaxhpo.from_optax(lambda p, h, batch: jnp.sum((p - h) ** 2), optax.sgd(0.1))
      >>> def outer_loss(h):
      ...     sol = jaxhpo.solve(solver, solver.init(jnp.zeros(2), h), h, num_steps=50)
      ...     return jnp.sum((sol.params - 3.0) ** 2)
      >>> jaxhpo.check_hypergradient(outer_loss, jnp.ones(2)).verdict
      'agrees'

    References:
      Griewank, Walther. Evaluating Derivatives. 2008.
      Fornberg. Generation of Finite Difference Formulas on Arbitrarily Spaced Grids. 1988.
    """
    loss, own = in_one_form(outer_loss, gradient)
    loss, own = in_search_units(transforms, loss, own)
    hparams = to_unconstrained(transforms, check_params(hparams, "hparams"))
    check_one_training(carry)
    carry = jax.tree.map(jnp.asarray, check_arrays(carry, "carry"))
    if num_directions is not None:
        check_count("num_directions", num_directions)
    check_switch("by_leaf", by_leaf)
    check_count("repeats", repeats)
    for what, value in (("step_size", step_size), ("step", step)):
        if value is not None:
            check_positive(what, value)
    direction_key, loss_key = jax.random.split(jax.random.key(0) if key is None else check_key(key))
    with Progress(2, "check_hypergradient", delay=EVERY) as bar:
        evidence = Evidence(loss, own, hparams, carry, loss_key, direction_key, bar)
        evidence.draw()
        evidence.refer(num_directions, by_leaf, step_size)
        if step is not None:
            evidence.foretell(step)
        if evidence.agrees():
            return evidence.report("agrees", *evidence.notes)
        if not is_deterministic(outer_loss, gradient):
            evidence.repeat(repeats)
        return evidence.report(*examine(evidence, num_directions or 8))
