"""Logistic and softmax regression with a penalty per feature or group; Laplace's evidence with its exact Hessian."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
from scipy.special import log_softmax, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets

from jaxhpo._core.errors import JaxhpoError
from jaxhpo.sklearn._base import Data, Linear
from jaxhpo.sklearn._outer import Criterion, by_group, inverse

MOVED = 6.0  # log penalties move by at most so much from the evidence's level
FREE = 1e-6  # the penalty of intercepts
BLOCK = 2**25  # numbers in a temporary array, at most about so many


class BilevelLogisticRegression(ClassifierMixin, Linear):
    r"""Logistic or softmax regression with a penalty per feature, group or covariate, chosen by the evidence.

    It minimises :math:`-\sum_i m_i \log p(y_i | x_i) + \frac12 \sum_j \lambda_j |w_j|^2`, m the sample weights, with a
    free intercept; :math:`w_j` are the weights of feature j, of all classes. Log penalties are chosen as by
    `BilevelRidge`, by Laplace's approximation of the evidence, with its exact Hessian where τ is chosen. The evidence
    says how penalties differ, but of separable classes not how large they are: their common level is then moved to
    where the loss of leave-one-out is lowest.

    Do not use it where few features matter and the others not at all, which an l1 penalty finds better.

    **Cost and bias**: Newton's method at each h, and the inverse of its matrix, of P × P with P = (p + 1)(classes − 1).
    The Hessian over h takes a product of P × P matrices for each penalty. `LogisticRegressionCV` is faster where there
    are many classes. Laplace's approximation is exact for infinitely many rows only.

    Args:
      groups: as for `BilevelRidge`.
      covariates: as for `BilevelRidge`.
      criterion: "evidence", or "leave_one_out", by a step of Newton's method for each row.
      cv: as for `BilevelRidge`; the log loss of what folds hold out.
      shrinkage: as for `BilevelRidge`.
      min_gain: as for `BilevelRidge`.
      standardize: as for `BilevelRidge`.

    Attributes:
      classes_: the labels.
      coef_: w, in units of X, shape (1, n_features) of two classes, or (classes, n_features).
      intercept_: shape (1,) or (classes,).
      penalties_: λ of each (standardised) feature; scikit-learn's `C` is 1/λ.
      groups_: as of `BilevelRidge`.
      shrinkage_: as of `BilevelRidge`.
      one_penalty_: as of `BilevelRidge`.
      reason_: as of `BilevelRidge`.
      path_: as of `BilevelRidge`.
      n_features_in_: the number of features.
      feature_names_in_: their names, where X has names.

    Raises:
      JaxhpoError: as of `BilevelRidge`, and one class only.

    Example:
      >>> from jaxhpo.sklearn import BilevelLogisticRegression
      >>> rng = np.random.default_rng(0)
      >>> X = rng.normal(size=(200, 20))
      >>> y = np.where(2 * X[:, 0] + rng.logistic(size=200) > 0, "yes", "no")
      >>> model = BilevelLogisticRegression().fit(X, y)
      >>> print(model.penalties_.argmin(), model.predict(2 * np.eye(20)[:1]))
      0 ['yes']

    References:
      MacKay. The Evidence Framework Applied to Classification Networks. 1992.
    """

    _criteria = ("evidence", "leave_one_out")

    def decision_function(self, X):
        """The logits.

        Args:
          X: shape (rows, n_features).

        Returns:
          Shape (rows, classes); with two classes that of the second one against the first, shape (rows,).
        """
        return (self._rows(X) @ self.coef_.T + self.intercept_)[:, 0 if len(self.coef_) == 1 else slice(None)]

    def predict(self, X):
        """The likeliest class of each row.

        Args:
          X: shape (rows, n_features).

        Returns:
          Shape (rows,).
        """
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)]

    def predict_proba(self, X):
        """The probability of each class.

        Args:
          X: shape (rows, n_features).

        Returns:
          Shape (rows, classes).
        """
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X):
        """The logarithm of `predict_proba`.

        Args:
          X: shape (rows, n_features).

        Returns:
          Shape (rows, classes).
        """
        logits = self.decision_function(X)
        return log_softmax(np.column_stack([np.zeros(len(logits)), logits]) if logits.ndim == 1 else logits, 1)

    def _encode(self, y):
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise JaxhpoError(f"`y` has 1 class, {self.classes_[0]}, and two are needed to tell apart.")
        return np.eye(len(self.classes_))[index]

    def _make_criterion(self, data, name):
        return {"evidence": laplace, "leave_one_out": left_out, "folds": held_out}[name](data)

    def _level(self, data, h):
        """The common level by leave-one-out, where h is the evidence's.

        The evidence of classes that a plane separates does not fall where all penalties do, since nearly all of a wide
        prior's mass that separates them fits perfectly; so it says how penalties differ, and not how large they are.
        """
        if self.criterion != "evidence" or self.cv is not None:
            return h
        loss = left_out(data).value_and_grad
        search = {"method": "bounded", "bounds": (-MOVED, MOVED), "options": {"xatol": 0.05}}
        return h + scipy.optimize.minimize_scalar(lambda move: loss(h + move)[0], **search).x

    def _solve(self, data, h):
        theta = fit(data, np.exp(data.expand(h)), None) @ contrasts(data.y.shape[1]).T
        theta = theta[:, 1:] if theta.shape[1] == 2 else theta
        return theta[:-1], theta[-1]


def contrasts(classes: int) -> np.ndarray:
    """U, shape (classes, M): logits are f Uᵀ with M = classes − 1 numbers f a row.

    Of two classes the first has the logit zero. Of more, columns are orthonormal, and orthogonal to the constant: what
    moves all logits changes no probability, its posterior is its prior, and the evidence is the same without it.
    """
    if classes == 2:
        return np.array([[0.0], [1.0]])
    return scipy.linalg.helmert(classes).T


class Mode(NamedTuple):
    """The posterior mode, and what derivatives need there.

    Attributes:
      theta: shape (p + 1, M), the intercepts last.
      p: probabilities, shape (n, classes).
      value: the penalised loss.
      a: the inverse Hessian, shape (P, P), P = (p + 1) M; that of one feature's outputs beside each other.
      volume: the Hessian's log determinant.
      b: Xᵢ A, shape (n, M, P).
    """

    theta: np.ndarray
    p: np.ndarray
    value: float
    a: np.ndarray
    volume: float
    b: np.ndarray


def fit(data: Data, penalties: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """Newton's method with halved steps, for the sum of log losses + ½ Σ λⱼ|θⱼ|²."""
    x, u = _with_ones(data), contrasts(data.y.shape[1])
    lam = np.append(penalties, FREE)[:, None]
    theta = np.zeros((x.shape[1], u.shape[1])) if start is None else start

    def loss(theta):
        return -data.weights @ (data.y * log_softmax(x @ theta @ u.T, 1)).sum(1) + 0.5 * (lam * theta**2).sum()

    value = loss(theta)
    for _ in range(100):
        p = softmax(x @ theta @ u.T, 1)
        slope = x.T @ (data.weights[:, None] * (p - data.y) @ u) + lam * theta
        factor = scipy.linalg.cho_factor(curvature(x, data.weights, p, u, lam), overwrite_a=True, check_finite=False)
        step = scipy.linalg.cho_solve(factor, slope.ravel(), check_finite=False).reshape(theta.shape)
        fall, size = (slope * step).sum(), 1.0
        while (new := loss(theta - size * step)) > value - 1e-4 * size * fall + 1e-12 * abs(value) and size > 1e-6:
            size /= 2
        theta, value = theta - size * step, new
        if fall < 1e-13 * (1 + abs(value)):  # its square is lost to rounding
            break
    return theta


def curvature(x, weights, p, u, lam):
    """Σᵢ XᵢᵀWᵢXᵢ + Λ with Wᵢ = Uᵀ(diag(pᵢ) − pᵢpᵢᵀ)U."""
    hessian = _assembled(x, weights[:, None, None] * _second(p, u))
    hessian[np.diag_indices_from(hessian)] += np.repeat(lam, u.shape[1])
    return hessian


def _assembled(x, w):
    """Σᵢ XᵢᵀwᵢXᵢ with Xᵢ = xᵢᵀ ⊗ I, of symmetric matrices w, shape (n, M, M)."""
    (_, columns), outputs = x.shape, w.shape[1]
    found = np.empty((columns, outputs, columns, outputs))
    for a in range(outputs):
        for b in range(a + 1):
            found[:, a, :, b] = found[:, b, :, a] = _gram(x, w[:, a, b])
    return found.reshape(columns * outputs, -1)


def _gram(x, w):
    """Xᵀ diag(w) X; by half of the operations where no weight is negative."""
    if (w < 0).any():
        return (x * w[:, None]).T @ x
    root = x * np.sqrt(w)[:, None]
    return root.T @ root


# Derivatives of log Σ exp: with κ₂ = diag(p) − ppᵀ, and dp = κ₂ df,
#   κ₃[v] = diag(p∘ṽ) − (p∘ṽ)pᵀ − p(p∘ṽ)ᵀ, ṽ = v − pᵀv                              (a matrix, for a vector v)
#   κ₃(B) = ∇⟨B, κ₂⟩ = κ₂(diag(B) − 2Bp)                                            (a vector, for a symmetric matrix B)
#   κ₄(B) = ∇²⟨B, κ₂⟩ = κ₃[diag(B) − 2Bp] − 2κ₂Bκ₂                                   (a matrix)
# below for all rows at once, between outputs: Uᵀ from each side.


def _second(p, u):
    pu = p @ u
    return np.einsum("ik,ka,kb->iab", p, u, u, optimize=True) - pu[:, :, None] * pu[:, None, :]


def _third(p, u, v):
    """Uᵀκ₃[v]U of vectors v, shape (n, classes)."""
    pv = p * (v - (p * v).sum(1, keepdims=True))
    cross = (pv @ u)[:, :, None] * (p @ u)[:, None, :]
    return np.einsum("ik,ka,kb->iab", pv, u, u, optimize=True) - cross - cross.transpose(0, 2, 1)


def _slope(p, u, matrix):
    """diag(B) − 2Bp of B = U matrix Uᵀ, of matrices of shape (n, …, M, M)."""
    ub = np.einsum("i...ab,ka->i...kb", matrix, u)  # UB
    extra = (1,) * (matrix.ndim - 3)
    return np.einsum("i...kb,kb->i...k", ub, u) - 2 * (ub @ (p @ u).reshape(len(p), *extra, -1, 1))[..., 0]


def _apply_second(p, u, v):
    """Uᵀκ₂v of vectors v, shape (n, …, classes)."""
    p = p.reshape(len(p), *(1,) * (v.ndim - 2), -1)
    return (p * (v - (p * v).sum(-1, keepdims=True))) @ u


def mode(data: Data, h: np.ndarray, start) -> Mode:
    """The mode at log penalties h."""
    x, u = _with_ones(data), contrasts(data.y.shape[1])
    theta = fit(data, np.exp(h), start)
    lam = np.append(np.exp(h), FREE)
    f = x @ theta @ u.T
    p = softmax(f, 1)
    value = -data.weights @ (data.y * log_softmax(f, 1)).sum(1) + 0.5 * lam @ (theta**2).sum(1)
    a, volume = inverse(curvature(x, data.weights, p, u, lam))
    return Mode(theta, p, value, a, volume, _times(x, a, theta.shape))


def _times(x, a, shape):
    """Xᵢ A, shape (n, M, P)."""
    return np.stack([x @ block for block in a.reshape(*shape, -1).transpose(1, 0, 2)], 1)


def tangents(data: Data, at: Mode, h: np.ndarray) -> np.ndarray:
    """T: dθ/dhₘ = −A λₘθₘ (θ of group m, zero elsewhere), shape (P, groups)."""
    lam_theta = np.exp(h)[:, None] * at.theta[:-1]
    columns = at.a[:, : lam_theta.size].reshape(len(at.a), *lam_theta.shape)
    return -by_group((columns * lam_theta).sum(2), data.starts, 1)


def _with_ones(data):
    return np.column_stack([data.x, np.ones(len(data.x))])


def _diagonal(at: Mode, data: Data, h):
    """λ tr A of each group, shape (groups,)."""
    trace = np.diag(at.a).reshape(at.theta.shape).sum(1)[:-1]
    return by_group(np.exp(h) * trace, data.starts, 0)


def _warm(data: Data):
    """`mode` from the last one's parameters on."""
    memory: list = [None]

    def at(h) -> Mode:
        found = mode(data, h, memory[0])
        memory[0] = found.theta
        return found

    return at


def laplace(data: Data) -> Criterion:
    r"""Minus the log evidence by Laplace's approximation, and its exact Hessian.

    C(h) = ℓ(θ) + ½ Σ λⱼ|θⱼ|² + ½ log|H| − ½ M Σ hⱼ at the mode θ, with H = ∇²ℓ + Λ, A = H⁻¹. With tⱼ = dθ/dhⱼ =
    −A λⱼEⱼθ, Eⱼ the projection on the j-th penalty's parameters, and Nⱼ = dH/dhⱼ = λⱼEⱼ + ∇³ℓ[tⱼ]:

        2 Cⱼ = λⱼ|Eⱼθ|² + tr(A Nⱼ) − dim Eⱼ
        2 Cⱼₖ = δⱼₖ λⱼ|Eⱼθ|² + 2 λⱼ θᵀEⱼtₖ − tr(A Nⱼ A Nₖ) + tr(A dNⱼ/dhₖ)
        dNⱼ/dhₖ = δⱼₖ λⱼEⱼ + ∇⁴ℓ[tⱼ, tₖ] + ∇³ℓ[dtⱼ/dhₖ]
        dtⱼ/dhₖ = δⱼₖ tⱼ − A (∇³ℓ[tₖ] tⱼ + λₖEₖtⱼ + λⱼEⱼtₖ)

    With γ = ∇ℓ'''[A], so that tr(A ∇³ℓ[v]) = γᵀv, and ζ = Aγ, the last trace is a sum over rows i of quadratic forms
    in Dᵢ = Xᵢ T, and products with γ and ζ.
    """
    at_mode, u = _warm(data), contrasts(data.y.shape[1])
    x, outputs, columns = _with_ones(data), u.shape[1], data.x.shape[1]

    def gamma(at):
        """γ, and bᵢ = XᵢAXᵢᵀ with diag(bᵢ) − 2bᵢp."""
        b = _spread(at, x)
        slope = _slope(at.p, u, b)
        return (x.T @ (data.weights[:, None] * _apply_second(at.p, u, slope))).ravel(), slope, b

    def value_and_grad(h):
        h = data.expand(h)
        at = at_mode(h)
        square = by_group(np.exp(h) * (at.theta[:-1] ** 2).sum(1), data.starts, 0)
        grad = square + _diagonal(at, data, h) - outputs * data.sizes + gamma(at)[0] @ tangents(data, at, h)
        return at.value + 0.5 * (at.volume - outputs * h.sum()), 0.5 * grad

    def hessian(h):
        h = data.expand(h)
        at = at_mode(h)
        lam, t = np.exp(h), tangents(data, at, h)
        lam_theta, flat = lam[:, None] * at.theta[:-1], columns * outputs
        square = by_group(lam * (at.theta[:-1] ** 2).sum(1), data.starts, 0)
        starts = data.starts * outputs

        def within(vectors):  # (λEₖ·)ᵀ vⱼ: sums over the parameters of group k
            return by_group(vectors[:flat], starts, 0)

        g, slope, b = gamma(at)
        zeta = at.a @ g
        lam_p = np.repeat(lam, outputs)[:, None]
        found = np.diag(square + _diagonal(at, data, h) + g @ t)
        found += 2 * within(lam_theta.reshape(-1, 1) * t[:flat])
        cross = within(lam_p * zeta[:flat, None] * t[:flat])  # ζᵀ λₖEₖ tⱼ
        found -= cross + cross.T
        d = (x @ t.reshape(columns + 1, -1)).reshape(len(x), outputs, -1)  # Dᵢ
        w = _second(at.p, u)
        form = _third(at.p, u, slope) - 2 * w @ b @ w
        form = form - _third(at.p, u, x @ zeta.reshape(-1, outputs) @ u.T)
        weighted = (data.weights[:, None, None] * form) @ d
        found += np.tensordot(d, weighted, ((0, 1), (0, 1)))
        return 0.5 * (found - _squares(data, at, x, u, d, lam))

    return Criterion(value_and_grad, hessian)


def _spread(at, x):
    """Xᵢ A Xᵢᵀ, the posterior covariance of each row's outputs, shape (n, M, M)."""
    rows = at.b.reshape(len(x), at.theta.shape[1], -1, at.theta.shape[1])
    return np.einsum("iajb,ij->iab", rows, x, optimize=True)


def _squares(data, at, x, u, d, lam):
    """tr(A Nⱼ A Nₖ), Nⱼ = λⱼEⱼ + Ñⱼ with Ñⱼ = Σᵢ Xᵢᵀ Vᵢⱼ Xᵢ and Vᵢⱼ = κ₃[Dᵢⱼ]."""
    (n, outputs, groups), columns = d.shape, len(lam)
    flat, starts = columns * outputs, data.starts * outputs
    scaled = at.a[:flat, :flat] * np.repeat(lam, outputs)
    found = by_group(scaled * scaled.T, starts, 0, 1)  # both λE
    rows = at.b[:, :, :flat].reshape(n, outputs, columns, outputs)
    # λⱼEⱼ and Ñₖ: Σᵢ ⟨Vᵢₖ, Ψᵢⱼ⟩ = Σᵢ Dᵢₖᵀ κ₃(Ψᵢⱼ) with Ψᵢⱼ = λⱼ BᵢEⱼBᵢᵀ
    psi = by_group(lam[:, None, None] * np.einsum("iajm,ibjm->ijab", rows, rows, optimize=True), data.starts, 1)
    mixed = np.einsum("iak,ija->jk", d, data.weights[:, None, None] * _apply_second(at.p, u, _slope(at.p, u, psi)))
    found = found + mixed + mixed.T
    if outputs == 1 and n**2 * (columns + groups) < groups * columns**2 * (n + 2 * columns):
        # Σᵢₗ Vᵢⱼ Sᵢₗ² Vₗₖ, S = X A Xᵀ, some rows at a time
        v = data.weights[:, None] * _third(at.p, u, np.ones((n, 1)) @ u.T)[:, 0] * d[:, 0]
        for rows in _blocks(n, n):
            s = at.b[rows, 0] @ x.T
            found += v[rows].T @ (s * s @ v)
        return found
    lower = np.linalg.cholesky(at.a)  # ⟨LᵀÑⱼL, LᵀÑₖL⟩ with A = LLᵀ, some columns of these matrices at a time
    for block in _blocks(len(lower), groups * len(lower)):
        m = np.empty((groups, lower[:, block].size))
        for j in range(groups):
            v = data.weights[:, None, None] * _third(at.p, u, d[:, :, j] @ u.T)
            m[j] = (lower.T @ (_assembled(x, v) @ lower[:, block])).ravel()
        found += m @ m.T
    return found


def _blocks(length, size):
    """Slices of an axis such that arrays of `size` numbers an entry are not too large."""
    step = max(1, BLOCK // size)
    return [slice(start, start + step) for start in range(0, length, step)]


def held_out(data: Data) -> Criterion:
    """The log loss of the rows that folds hold out, each by the mode of the others; Hessian of Gauss and Newton.

    In nats of all rows, as the evidence is: a row that is held out in several splits counts once in all.
    """
    u, share = contrasts(data.y.shape[1]), data.weights.sum() / sum(data.weights[test].sum() for _, test in data.splits)
    parts = [(_warm(train := data.take(rows)), train, data.take(test)) for rows, test in data.splits]

    def folds(h):
        """Of each fold: the loss, its slopes in the outputs, probabilities, and derivatives of the outputs."""
        h = data.expand(h)
        for at_mode, train, test in parts:
            at, x = at_mode(h), _with_ones(test)
            f, d = x @ at.theta @ u.T, x @ tangents(train, at, h).reshape(x.shape[1], -1)
            p = softmax(f, 1)
            loss = -test.weights @ (test.y * log_softmax(f, 1)).sum(1)
            yield loss, test.weights[:, None] * (p - test.y) @ u, p, test.weights, d.reshape(len(x), u.shape[1], -1)

    def value_and_grad(h):
        value, grad = 0.0, np.zeros_like(h)
        for loss, slopes, _, _, d in folds(h):
            value, grad = value + loss, grad + np.tensordot(slopes, d, 2)
        return share * value, share * grad

    def hessian(h):
        found = np.zeros((len(h), len(h)))
        for _, _, p, weights, d in folds(h):
            found += np.tensordot(d, (weights[:, None, None] * _second(p, u)) @ d, ((0, 1), (0, 1)))
        return share * found

    return Criterion(value_and_grad, hessian)


def left_out(data: Data) -> Criterion:
    r"""The log loss of leave-one-out, each row left out by one step of Newton's method from the mode of all.

    Its outputs are Fᵢ = fᵢ + bᵢqᵢ, qᵢ = Gᵢ⁻¹rᵢ, Gᵢ = I − Wᵢbᵢ, with bᵢ = XᵢAXᵢᵀ, rᵢ = Uᵀ(pᵢ − yᵢ). With
    D = Xᵢ dθ/dhⱼ, dr = WD and dW = κ₃[D]:

        dF = D + (I + bG⁻¹W) db q + bG⁻¹ (W D + κ₃[D] b q),   dbᵢ = −Xᵢ A Nⱼ A Xᵢᵀ

    So with π the slopes of the loss in F, η = G⁻ᵀbπ and α = π + Wη: dC = Σᵢ Dᵢᵀ[α + κ₃(η(bq)ᵀ)] − tr(NⱼΩ), where
    Ω = Σᵢ AXᵢᵀ αᵢqᵢᵀ XᵢA, and tr(NⱼΩ) = λⱼ tr(EⱼΩ) + Σᵢ Dᵢᵀκ₃(XᵢΩXᵢᵀ). The Hessian is that of Gauss and Newton with the
    W of all rows held, as those of weighted ridge regression: dF = (I + bG⁻¹W)(D + db q), dbᵢ = −λⱼ XᵢAEⱼAXᵢᵀ.
    """
    at_mode, u = _warm(data), contrasts(data.y.shape[1])
    x, identity = _with_ones(data), np.eye(u.shape[1])
    copies, weights = np.minimum(1, data.weights), data.weights[:, None]  # of a row that counts thrice one is left out

    def product(matrix, vector, transposed=False):
        return np.einsum("iba,ib->ia" if transposed else "iab,ib->ia", matrix, vector)

    def outputs(h):
        """At expanded h: the mode, T, W, b, G⁻¹, q and F."""
        at = at_mode(h)
        w, b = _second(at.p, u), copies[:, None, None] * _spread(at, x)
        g = np.linalg.inv(identity - w @ b)
        q = product(g, (at.p - data.y) @ u)
        return at, tangents(data, at, h), w, b, g, q, (x @ at.theta + product(b, q)) @ u.T

    def value_and_grad(h):
        h = data.expand(h)
        at, t, w, b, g, q, f = outputs(h)
        slopes = weights * (softmax(f, 1) - data.y) @ u
        eta = product(g, product(b, slopes), transposed=True)
        alpha = slopes + product(w, eta)
        rows = (copies[:, None] * alpha)[:, :, None] * q[:, None, :]
        rows = 0.5 * (rows + rows.transpose(0, 2, 1)) @ at.b
        omega = np.tensordot(at.b, rows, ((0, 1), (0, 1)))
        there = _times(x, omega, at.theta.shape)
        pair = eta[:, :, None] * product(b, q)[:, None, :]
        pair = 0.5 * (pair + pair.transpose(0, 2, 1)) - weights[:, :, None] * _spread(at._replace(b=there), x)
        third = _apply_second(at.p, u, _slope(at.p, u, pair))
        own = np.exp(h) * np.diag(omega).reshape(at.theta.shape).sum(1)[:-1]
        grad = (x.T @ (alpha + third)).ravel() @ t - by_group(own, data.starts, 0)
        return -data.weights @ (data.y * log_softmax(f, 1)).sum(1), grad

    def hessian(h):
        h = data.expand(h)
        at, t, w, b, g, q, f = outputs(h)
        rows = at.b[:, :, : len(h) * len(identity)]
        moved = np.repeat(np.exp(h), len(identity)) * rows * np.einsum("iap,ia->ip", rows, q)[:, None]
        d = (x @ t.reshape(x.shape[1], -1)).reshape(len(x), len(identity), -1)
        d = d - copies[:, None, None] * by_group(moved, data.starts * len(identity), 2)
        d = (identity + b @ g @ w) @ d
        return np.tensordot(d, (weights[:, :, None] * _second(softmax(f, 1), u)) @ d, ((0, 1), (0, 1)))

    return Criterion(value_and_grad, hessian)
