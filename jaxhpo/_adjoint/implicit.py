"""Implicit differentiation: the rule `Implicit`, and `implicit` for a solution found by any solver."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo._adjoint.implicit_function import Root, attach
from jaxhpo._adjoint.pullback import closed_over_names, not_entering
from jaxhpo._core.errors import JaxhpoError, warn
from jaxhpo._core.record import report_root
from jaxhpo._core.stop_gradient import stop_gradient_with_warning
from jaxhpo._core.trace import closure_convert, untrusted_rule
from jaxhpo._core.tree import cast_like, mixed_types, names, upcast
from jaxhpo._core.types import InnerState, LinearSolver, PyTree, Solver, declared
from jaxhpo._core.validate import check_arrays, check_callable, check_finite, check_params, check_residual, describe
from jaxhpo._inner.gradient import train_loss_of
from jaxhpo._inner.loop import run
from jaxhpo._inner.problem import Adjoint, Problem
from jaxhpo._linear.cg import CG
from jaxhpo._linear.curvature import GaussNewton
from jaxhpo._linear.general import General
from jaxhpo._linear.report import relative_norm
from jaxhpo._linear.system import run_solver, solve_by


@dataclasses.dataclass(frozen=True)
class Implicit:
    r"""Implicit differentiation at the solution.

    With g the condition (:math:`\nabla_\theta L` for `from_optax`) and H its Jacobian in θ,
    :math:`(d\theta/dh)^\top v = -(\partial_h g)^\top H^{-1} v`, with :math:`H^{-1} v` from a linear solver.
    The initial state, the optimiser's state, the model state and every setting of the optimiser are constants of the
    differentiation; a `ZeroHypergradientWarning` names each of them that is being differentiated.

    Several outer losses share one training and one linearisation: `jax.jacrev` of a vector of them solves for all
    right-hand sides at once.

    **Cost and bias**: T gradients forward, then one linear solve (see the solver) and one mixed product; memory
    independent of T. Exact where the inner problem has converged (`info.optimality` → 0) and the linear solve is.

    Args:
      linear_solver: `CG()`, `Neumann(num_terms, step_size)`, `Identity(scale)`, `Direct()`, any other `LinearSolver`,
        or any function `(matvec, b, x0=None) -> (x, LinearInfo)`. By default `CG()`, and where that fails because the
        matrix is not positive definite, `General()` in the same program. `CG()` stops after 100 products, converged or
        not, also where there are more parameters: `CG(maxiter=1000)` for ill-conditioned problems; `debug_solves`, and
        `tune(record="linear_solves")`, tell whether it is needed.
      curvature: `"hessian"`, the Jacobian of the condition itself, or a positive semi-definite matrix in its place:
        `gauss_newton(...)`, `outer_product(...)`.
      on_failure: where the linear solve failed (`LinearInfo.failed`: an indefinite matrix under `CG`, one that is not
        finite, an answer that its own residual contradicts), "nan" makes the hypergradient NaN, and "keep" keeps what
        the solver returned. An answer that was stopped early, as by `maxiter`, has not failed.

    Raises:
      JaxhpoError: not a linear solver, or one that does not suit the condition.

    Example:
      >>> adjoint = jaxhpo.Implicit(jaxhpo.CG(maxiter=20))

    References:
      Larsen, Svarer, Andersen, Hansen. Adaptive Regularization in Neural Network Modeling. 1998.
      Bengio. Gradient-Based Optimization of Hyperparameters. 2000.
      Lorraine, Vicol, Duvenaud. Optimizing Millions of Hyperparameters by Implicit Differentiation. 2020.
      arXiv:1911.02590
    """

    linear_solver: LinearSolver | Callable = CG(fallback=General())
    curvature: str | GaussNewton = "hessian"
    on_failure: str = "nan"

    def __post_init__(self):
        check_linear_solver(self.linear_solver)
        check_on_failure("Implicit", self.on_failure)
        if self.curvature != "hessian" and not isinstance(self.curvature, GaussNewton):
            raise JaxhpoError(
                f"`Implicit(curvature=...)` got {describe(self.curvature)}, which is not a curvature: write 'hessian', "
                f"`gauss_newton(predict, output_loss)` or `outer_product(example_loss)`."
            )

    def run(self, problem: Problem) -> tuple[InnerState, jax.Array]:
        """Runs the inner loop, undifferentiated, and attaches the implicit derivative to the final parameters."""
        self.check(problem)
        state, steps = run(self._as_constants(problem))
        root, leaves = self.root(problem, state, self)
        key = problem.require_key(self) if declared(self.linear_solver).needs_key else None
        params = attach(root, jax.lax.stop_gradient(state.params), leaves, key)
        model_state = stop_gradient_with_warning(
            state.model_state, ["model_state"], trained_state_is_constant(self), inputs=problem.residual_inputs[0]
        )
        return jax.lax.stop_gradient(state)._replace(params=params, model_state=model_state), steps

    def check(self, problem: Problem) -> None:
        """Raises if the linear solver does not suit the problem's condition."""
        if declared(self.linear_solver).needs_symmetry and self.curvature == "hessian":
            check_symmetric(self, problem.solver)
            warn_of_untrusted_rule(self, problem)

    def root(self, problem: Problem, state: InnerState, method: Any) -> tuple[Root, list]:
        """The root of the problem's condition that `state` is, and the leaves that the condition depends on."""
        hparams, batch, closed_over = problem.residual_inputs
        leaves, structure = jax.tree.flatten((jax.lax.stop_gradient(state.model_state), problem.residual_inputs))
        leaf_names = [*names(state.model_state, "model_state"), *names(hparams, "hparams"), *names(batch, "batch")]
        size, product = structure.num_leaves, None

        def condition(params, leaves):
            return problem.residual(params, *jax.tree.unflatten(structure, leaves[:size]))

        if self.curvature != "hessian":
            matrix: Any = self.curvature
            pure, consts = problem.at_condition(lambda p, h, x, v: matrix.linearise(p, h, x)(v), upcast(state.params))

            def times(params, leaves, v):
                hparams, x, _ = upcast(jax.tree.unflatten(structure, leaves[:size])[1])
                return pure(leaves[size:], params, hparams, x, v)

            product = times
            # It only replaces the Jacobian: the values that it closes over are not differentiated a second time.
            leaves, closed_over = [*leaves, *jax.lax.stop_gradient(consts)], [*closed_over, *consts]
        remedy = not_entering(f"the condition of `{problem.solver.name}`", repr(method))
        every_name = (*leaf_names, *closed_over_names(closed_over))
        return Root(condition, self.linear_solver, product, every_name, remedy, self.on_failure), leaves

    def _as_constants(self, problem):
        """The problem with all inputs constant, and a warning for each input whose derivative is lost entirely."""
        why = f"{self!r} differentiates the equation that the solution satisfies, in which"
        state = stop_gradient_with_warning(
            problem.state,
            names(problem.state, "state"),
            f"is part of the initial state, and {why} no initial value appears, so its hypergradient through this "
            f"solve is exactly zero. `Unroll()` sees it.",
        )
        hparams, closed_over = problem.inputs
        unseen = (
            f"does not appear in the train loss, and {why} only the train loss appears, so its hypergradient through "
            "this solve is exactly zero. `Unroll()` sees it."
        )
        closed_over = [
            jax.lax.stop_gradient(c) if seen else stop_gradient_with_warning(c, closed_over_names([c]), unseen)
            for c, seen in zip(closed_over, problem.in_residual(), strict=True)
        ]
        xs = problem.xs
        if problem.num_steps > 1:
            xs = stop_gradient_with_warning(
                xs,
                names(xs, "batches"),
                f"is being differentiated, and {why} only the condition's batch appears (the last, unless "
                f"`condition_batch` is given): all others have a hypergradient of exactly zero. `Unroll()` sees them.",
                partial=True,
            )
        hparams, xs, residual_inputs = jax.lax.stop_gradient((hparams, xs, problem.residual_inputs))
        return problem._replace(state=state, inputs=(hparams, closed_over), xs=xs, residual_inputs=residual_inputs)


def trained_state_is_constant(method: Any) -> str:
    """The warning about a model state, or an optimiser's state, that the outer loss reads."""
    return (
        f"was trained with hyperparameters that are being differentiated, but {method!r} treats it as a constant: the "
        "hypergradient through what the outer loss reads of it (batch statistics) is exactly zero. `Unroll()` sees it."
    )


def check_symmetric(rule: Any, solver: Solver) -> None:
    """Raises if a rule needs a symmetric Jacobian, and that of the solver's condition is another."""
    if not solver.symmetric:
        raise JaxhpoError(
            f"{rule!r} needs a symmetric matrix, but the Jacobian of `{solver.name}`'s condition p - step(p) is not "
            "symmetric in general: use `Neumann(num_terms, 1.0)` or `Direct()` within `Implicit`, or give "
            "`fixed_point` a `condition` that is the gradient of an objective."
        )


def is_symmetric(problem: Problem, linear_solver: Any, curvature: Any) -> bool:
    """True if products with H serve as products with Hᵀ: for a Hessian, and for solvers that take H to be symmetric.

    A `fixed_point` with a condition, and a train loss with an untrusted derivative rule, may have another Jacobian.
    """
    if curvature != "hessian" or declared(linear_solver).needs_symmetry:
        return True
    return problem.solver.symmetric and problem.solver.loss is not None and untrusted_rule_of(problem) is None


def untrusted_rule_of(problem: Problem) -> str | None:
    """The name and place of a function in the train loss whose derivative rule may be no derivative, or None."""
    if problem.solver.loss is None:
        return None
    pure, consts = train_loss_of(problem)
    return untrusted_rule(pure, consts, problem.state, problem.inputs[0], jax.tree.map(lambda x: x[-1], problem.xs))


def warn_of_untrusted_rule(rule: Any, problem: Problem) -> None:
    """Warns that a rule takes a Hessian to be symmetric that may not be."""
    own = untrusted_rule_of(problem)
    if own is not None:
        warn(
            f"The train loss holds {own}, with a derivative rule of its own, and {rule!r} takes the Hessian to be "
            "symmetric. If that rule is not the true derivative (it reverses or clips a gradient, say), it is not and "
            "the hypergradient is wrong: use `Implicit(GMRES())`, `Implicit(Direct())` or `Unroll()`."
        )


def implicit(
    condition: Callable,
    params: PyTree,
    args: Any,
    linear_solver: LinearSolver | Callable | None = None,
    on_failure: str = "nan",
    like: PyTree = None,
) -> PyTree:
    r"""Attaches an implicit derivative to a solution found by any solver.

    Returns `params` unchanged, but with
    :math:`d\theta/da = -(\partial_\theta g)^{-1} \partial_a g` where g is the condition: closed forms, scikit-learn,
    SciPy or L-BFGS become differentiable with respect to `args` and to everything that `condition` closes over.
    First and higher derivatives, forward and reverse.

    **Cost and bias**: one linear solve a derivative, plus one mixed product; memory of one linearisation of the
    condition. Exact where the condition is zero and the linear solve converged. `check_hypergradient` says where it is
    not zero, in the solver's own units (scikit-learn's `C`, its halves, its means over examples): where Newton's step
    from `params` is longer than 1 % of their length. `debug_solves` prints that length. A function that finds `params`
    gets arrays of JAX's precision, and what it returns is rounded to that of `like`: enable x64 for a solver of double
    precision, with a small tolerance of its own.

    Args:
      condition: `(params, args) -> pytree like params`, zero at `params`; for a minimum, the gradient of the objective.
      params: the solution, a pytree of floating-point arrays; or a plain Python function `args -> solution`, which is
        called with NumPy arrays when the program runs, also under `jit`, and one member at a time under `vmap`. No
        derivative flows into how the solution is found.
      args: any pytree that the condition depends on; integer, boolean and key leaves are allowed.
      linear_solver: solves with the condition's Jacobian in `params`; `General()` when None, which is right for any
        invertible one: roots of either sign, saddle points, maxima. `CG()`, which ends after `maxiter=100` products, is
        cheaper for many parameters, where the Jacobian is symmetric positive definite, as a Hessian at a minimum is.
      on_failure: "nan" for a derivative of NaN where the linear solve failed, "keep" for what it returned; see
        `Implicit`.
      like: arrays of the solution's shapes and dtypes, where `params` is a function.

    Returns:
      `params`, differentiable.

    Raises:
      JaxhpoError: `params` has no floating-point leaf or an integer one, or the condition's result does not match it.

    Example:
      >>> X, y = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), jnp.array([1.0, 2.0, 3.0])
      >>> def condition(w, log_penalty):
      ...     return X.T @ (X @ w - y) + jnp.exp(log_penalty) * w
      >>> def ridge(log_penalty):
      ...     w = jnp.linalg.solve(X.T @ X + jnp.exp(log_penalty) * jnp.eye(2), X.T @ y)
      ...     return jaxhpo.implicit(condition, w, log_penalty)
      >>> print(jax.grad(lambda h: jnp.sum(ridge(h)))(0.0).round(3))
      -0.412
      >>> import scipy.optimize
      >>> def fit(log_penalty):  # by SciPy, which JAX cannot trace
      ...     return scipy.optimize.root(lambda w: np.asarray(condition(w, log_penalty)), np.zeros(2)).x
      >>> def by_scipy(log_penalty):
      ...     return jaxhpo.implicit(condition, fit, log_penalty, like=jnp.zeros(2))
      >>> print(jax.jit(jax.grad(lambda h: jnp.sum(by_scipy(h))))(0.0).round(3))
      -0.412

    References:
      Blondel et al. Efficient and Modular Implicit Differentiation. 2022. arXiv:2105.15183
    """
    solver = General() if linear_solver is None else check_linear_solver(linear_solver)
    check_on_failure("implicit", on_failure)
    if declared(solver).needs_key:
        instead = "`functools.partial(solver, key=key)`"
        raise JaxhpoError(f"{solver!r} draws random numbers, and `implicit` has no key to give it: pass {instead}.")
    check_callable("condition", condition, "condition(params, args)", 2)
    found_outside = callable(params) or like is not None
    if not found_outside:
        params = check_params(params, "params")
    check_finite(check_arrays(args, "args"), "args", allow_infinite=True)
    args = jax.tree.map(jnp.asarray, args)
    if found_outside:
        params = _found_outside(params, args, like)
    with mixed_types():
        pure, consts = closure_convert(lambda p, a: check_residual(condition(p, a), p), upcast(params), upcast(args))
    leaves, structure = jax.tree.flatten(args)

    def residual(params, leaves):
        args = upcast(jax.tree.unflatten(structure, leaves[len(consts) :]))
        return pure(leaves[: len(consts)], params, args)

    remedy = "does not enter the condition: its derivative is zero. Put it into the condition, or hold it constant."
    closed_over = [f"a {describe(c)} that the condition closes over" for c in consts]
    root = Root(residual, solver, None, (*closed_over, *names(args, "args")), remedy, on_failure)
    leaves, params = [*consts, *leaves], jax.lax.stop_gradient(params)
    report_root(lambda: _distance(root, params, leaves))
    return attach(root, params, leaves, None)


def _distance(root: Root, params: PyTree, leaves: list) -> tuple[jax.Array, jax.Array]:
    """Returns ‖H⁻¹ g‖ / ‖θ‖, the relative length of Newton's step from the parameters, and whether the solve failed."""
    point, leaves = jax.lax.stop_gradient((upcast(params), leaves))
    value, matvec = jax.linearize(lambda p: cast_like(root.condition(p, leaves), p), point)
    step, info = solve_by(root.linear_solver, functools.partial(run_solver, on_failure="keep"), matvec, value, None)
    return relative_norm(step, point), info.failed


def _found_outside(solver: Any, args: Any, like: PyTree) -> PyTree:
    """The solution that a plain Python function finds when the program runs."""
    check_callable("params", solver, "params(args)", 1)
    if like is None:
        raise JaxhpoError(
            f"`params` got the function {describe(solver)}, whose result has shapes that are not known before it runs: "
            "pass `like=`, arrays of these shapes and dtypes (`like=jnp.zeros(10)`), or pass the solution itself."
        )
    shapes = jax.eval_shape(lambda: check_params(like, "like"))

    def call(args):
        out = solver(jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, args))
        found = jax.tree.map(np.asarray, out)
        if jax.tree.map(np.shape, found) != jax.tree.map(lambda x: x.shape, shapes):
            raise JaxhpoError(
                f"`params`, a function, returned a tree of shapes {_shapes(found)}, but `like` has {_shapes(like)}: "
                "return arrays like those, or give `like` the shapes of the solution."
            )
        return jax.tree.map(lambda x, s: x.astype(s.dtype), found, shapes)

    return jax.pure_callback(call, shapes, jax.lax.stop_gradient(args), vmap_method="sequential")


def _shapes(tree):
    """The tree with a description in place of each array; of one array, that alone."""
    shapes = jax.tree.map(describe, tree)
    return shapes if isinstance(shapes, str) else str(shapes).replace("'", "")


def check_linear_solver(linear_solver: Any) -> Any:
    """Raises unless this is a linear solver, set up and ready to be called."""
    if isinstance(linear_solver, type):
        name = linear_solver.__name__
        raise JaxhpoError(f"`linear_solver` got the class {name}, not an instance: write `{name}(...)`.")
    if not callable(linear_solver):
        why = "it is called as `linear_solver(matvec, b)`"
        if isinstance(linear_solver, Adjoint):
            why = f"that is a derivative rule, to be passed to `solve` as `adjoint={linear_solver!r}`"
        raise JaxhpoError(
            f"`linear_solver` got {linear_solver!r}, but {why}: write `CG()`, `Neumann(num_terms, step_size)`, "
            "`Identity(scale)` or `Direct()`, which are linear solvers."
        )
    keywords = ("key",) if declared(linear_solver).needs_key else ()
    signature = f"linear_solver(matvec, b, x0=None{', *, key' * bool(keywords)})"
    check_callable("linear_solver", linear_solver, signature, 2, keywords=keywords)
    return linear_solver


def check_on_failure(who: str, on_failure: Any) -> None:
    """Raises unless this says what a derivative is where the linear solve failed."""
    if on_failure not in ("nan", "keep"):
        raise JaxhpoError(
            f"`{who}(on_failure=...)` got {describe(on_failure)}: write 'nan' for a derivative of NaN where the linear "
            "solve failed, or 'keep' for what the solver returned."
        )
