"""Bilevel problems with closed-form solutions and hypergradients, to test methods against.

Every formula here is written in NumPy and independent of the library's own derivatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class BilevelProblem(NamedTuple):
    """An inner and an outer problem with closed forms; arrays are float64, which JAX casts where x64 is off.

    Attributes:
      train_loss: `(params, hparams, batch) -> scalar`, the inner objective; `batch` is ignored.
      val_loss: `params -> scalar`, the outer objective.
      predict: `(params, inputs) -> outputs` of the model, or None.
      params: inner starting point, shape (P,).
      hparams: a point at which to test, shape (m,).
      step_size: a stable step for gradient descent on the train loss at `hparams`.
      solution: `hparams -> θ*`, the exact inner minimiser.
      hypergradient: `hparams -> dF/dh` at the exact inner minimiser.
      partial: `(hparams, inverse) -> dF/dh` with the inverse Hessian replaced by the matrix `inverse(H)`.
      unrolled: `(hparams, step_size, num_steps, truncate) -> dF/dh` through gradient descent from `params`, by a
        forward recursion for the Jacobian; None if the problem is not quadratic.

    Example:
      >>> problem = jaxhpo.testing.ridge()
      >>> solver = jaxhpo.from_optax(problem.train_loss, optax.sgd(problem.step_size))
      >>> def outer_loss(h):
      ...     return problem.val_loss(jaxhpo.solve(solver, solver.init(problem.params, h), h, num_steps=20).params)
      >>> exact = problem.unrolled(problem.hparams, problem.step_size, 20, None)
      >>> bool(jnp.allclose(jax.grad(outer_loss)(problem.hparams), exact, rtol=1e-3))
      True
    """

    train_loss: Callable
    val_loss: Callable
    predict: Callable | None
    params: np.ndarray
    hparams: np.ndarray
    step_size: float
    solution: Callable
    hypergradient: Callable
    partial: Callable
    unrolled: Callable | None


def _regression(loss, gradient, train, validation, params, h, step_size, solution, hessian, unrolled) -> BilevelProblem:
    """A linear model: its train loss is `loss(w, *train)` and the penalty ½ Σ_j e^h_j w_j².

    The condition g(w, h) = 0 holds at w*(h), so dw*/dh = −H⁻¹ ∂g/∂h, and ∂g/∂h = diag(e^h w*): with ∇V at w*,
    dF/dh = (dw*/dh)ᵀ ∇V = −e^h ∘ w* ∘ (H⁻¹ ∇V), as H is symmetric.
    """

    def partial(h, inverse=np.linalg.inv):
        w = solution(h)
        return -np.exp(h) * w * (inverse(hessian(w, h)) @ gradient(w, *validation))

    return BilevelProblem(
        train_loss=lambda w, h, batch: loss(w, *train) + 0.5 * jnp.sum(jnp.exp(h) * w**2),
        val_loss=lambda w: loss(w, *validation),
        predict=lambda w, inputs: inputs @ w,
        params=params,
        hparams=h,
        step_size=step_size,
        solution=solution,
        hypergradient=partial,
        partial=partial,
        unrolled=unrolled,
    )


def ridge(seed: int = 0, num_train: int = 40, num_val: int = 30, dim: int = 6) -> BilevelProblem:
    r"""Ridge regression with one log penalty per weight.

    .. math:: L = \tfrac12\|Xw-y\|^2 + \tfrac12\sum_j e^{h_j} w_j^2, \qquad V = \tfrac12\|X_v w - y_v\|^2

    With :math:`A = X^\top X + \mathrm{diag}(e^h)`: :math:`w^* = A^{-1}X^\top y` and
    :math:`dF/dh_j = -e^{h_j} w^*_j (A^{-1} X_v^\top (X_v w^* - y_v))_j`. The rows of X are scaled by
    :math:`1/\sqrt{n}`, so that curvatures are of order one.

    Args:
      seed: of the random data.
      num_train: rows of X.
      num_val: rows of X_v.
      dim: weights, and hyperparameters.

    Returns:
      A `BilevelProblem` with all closed forms.

    Example:
      >>> problem = jaxhpo.testing.ridge()
      >>> problem.hypergradient(problem.hparams).shape
      (6,)
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=dim)
    X, Xv = rng.normal(size=(num_train, dim)) / num_train**0.5, rng.normal(size=(num_val, dim)) / num_val**0.5
    y = X @ truth + 0.3 * rng.normal(size=num_train) / num_train**0.5
    yv = Xv @ truth + 0.3 * rng.normal(size=num_val) / num_val**0.5
    h, start = np.linspace(-1.5, 0.0, dim), rng.normal(size=dim)

    def loss(w, X, y):
        return 0.5 * jnp.sum((X @ w - y) ** 2)

    def gradient(w, X, y):
        return X.T @ (X @ w - y)

    def hessian(w, h):  # the same at every w
        return X.T @ X + np.diag(np.exp(h))

    def solution(h):
        return np.linalg.solve(hessian(None, h), X.T @ y)

    def unrolled(h, step_size, num_steps, truncate=None):
        # w ← w − α(Aw − Xᵀy) has the Jacobian Z ← (I − αA) Z − α diag(eʰ w), from Z = 0 where the derivative begins.
        A, w, Z = hessian(None, h), start, np.zeros((dim, dim))
        for t in range(num_steps):
            if truncate is None or t >= num_steps - truncate:
                Z = (np.eye(dim) - step_size * A) @ Z - step_size * np.diag(np.exp(h) * w)
            w = w - step_size * (A @ w - X.T @ y)
        return Z.T @ gradient(w, Xv, yv)

    step_size = 1.0 / float(np.linalg.eigvalsh(hessian(None, h))[-1])
    return _regression(loss, gradient, (X, y), (Xv, yv), start, h, step_size, solution, hessian, unrolled)


def quadratic(dim: int = 3, seed: int = 0) -> BilevelProblem:
    r"""The toy problem of two squared distances.

    .. math:: L = \|a-h\|^2, \qquad V = \|a-c\|^2

    so :math:`a^* = h` and :math:`dF/dh = 2(h-c)`. After T steps of gradient descent with rate η from :math:`a_0`,
    with :math:`\rho = (1-2\eta)^T`: :math:`a_T = (1-\rho)h + \rho a_0` and :math:`dF/dh = 2(1-\rho)(a_T-c)`.

    Args:
      dim: entries of a, h and c.
      seed: of the random a₀, h and c, uniform on [0, 1).

    Returns:
      A `BilevelProblem` with all closed forms.

    Example:
      >>> problem = jaxhpo.testing.quadratic()
      >>> problem.solution(problem.hparams).shape
      (3,)
    """
    rng = np.random.default_rng(seed)
    start, h, target = rng.uniform(size=(3, dim))

    def unrolled(h, step_size, num_steps, truncate=None):
        rho = (1 - 2 * step_size) ** num_steps
        cut = (1 - 2 * step_size) ** (num_steps if truncate is None else min(truncate, num_steps))
        return 2 * (1 - cut) * ((1 - rho) * h + rho * start - target)

    return BilevelProblem(
        train_loss=lambda a, h, batch: jnp.sum((a - h) ** 2),
        val_loss=lambda a: jnp.sum((a - target) ** 2),
        predict=None,
        params=start,
        hparams=h,
        step_size=0.1,
        solution=lambda h: np.asarray(h),
        hypergradient=lambda h: 2 * (h - target),
        partial=lambda h, inverse: 2 * inverse(2 * np.eye(dim)) @ (2 * (h - target)),
        unrolled=unrolled,
    )


def logistic(seed: int = 0, num_train: int = 60, num_val: int = 40, dim: int = 5) -> BilevelProblem:
    r"""Logistic regression with one log penalty per weight; exact through Newton's method and a dense solve.

    .. math:: L = \tfrac1n\sum_i \log(1+e^{-y_i x_i^\top w}) + \tfrac12\sum_j e^{h_j} w_j^2

    and V the same without penalty on the validation part. With H the Hessian of L at :math:`w^*`,
    :math:`dF/dh_j = -e^{h_j} w^*_j (H^{-1}\nabla V)_j`.

    Args:
      seed: of the random data.
      num_train: training examples.
      num_val: validation examples.
      dim: weights, and hyperparameters.

    Returns:
      A `BilevelProblem`; `unrolled` is None.

    Example:
      >>> problem = jaxhpo.testing.logistic()
      >>> problem.hypergradient(problem.hparams).shape
      (5,)
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=dim)
    X, Xv = rng.normal(size=(num_train, dim)), rng.normal(size=(num_val, dim))
    y = np.where(X @ truth + rng.logistic(size=num_train) > 0, 1.0, -1.0)
    yv = np.where(Xv @ truth + rng.logistic(size=num_val) > 0, 1.0, -1.0)
    h = np.linspace(-3.0, -1.5, dim)

    def loss(w, X, y):
        return jnp.mean(jax.nn.softplus(-y * (X @ w)))

    def gradient(w, X, y):  # of the mean of log(1 + e^−z) at z = y x·w, whose derivative is −1 / (1 + e^z)
        return X.T @ (-y / (1 + np.exp(y * (X @ w)))) / len(y)

    def hessian(w, h):
        p = 1 / (1 + np.exp(-X @ w))
        return X.T @ (X * (p * (1 - p))[:, None]) / len(y) + np.diag(np.exp(h))

    def solution(h):
        w = np.zeros(dim)
        for _ in range(50):  # Newton's method
            w = w - np.linalg.solve(hessian(w, h), gradient(w, X, y) + np.exp(h) * w)
        return w

    step_size = 1.0 / float(np.linalg.eigvalsh(X.T @ X / (4 * num_train) + np.diag(np.exp(h)))[-1])
    return _regression(loss, gradient, (X, y), (Xv, yv), np.zeros(dim), h, step_size, solution, hessian, None)
