"""Ridge regression with a penalty per feature or group, and its criteria in closed form."""

import numpy as np

from jaxhpo.sklearn._base import LEAST, NOISE, Data, LinearRegressor
from jaxhpo.sklearn._outer import Criterion, by_group, inverse


class BilevelRidge(LinearRegressor):
    r"""Ridge regression with a penalty per feature, group or covariate, chosen by the evidence.

    It minimises :math:`\sum_i m_i (y_i - x_i w - b)^2 + \sum_j \lambda_j w_j^2`, m the sample weights. The log
    penalties are h = Zb + d: b is free, Z is a column of ones and `covariates`, and d ~ N(0, τ²) is shrunk. The
    criterion chooses h at each τ of 0, .3, .6, 1.2, 2.5 and 5, and its own evidence, over h, chooses τ. One penalty
    (τ = 0) is kept unless that gains more than `min_gain` nats: criteria overfit where there are many penalties.

    Do not use it where few features matter and the others not at all, which `LassoCV` finds better, or where nothing
    is known of the features and they are alike, which leaves nothing to gain over `RidgeCV`.

    **Cost and bias**: of 100 rows and 50 features about 5 times `RidgeCV`. Some tens of inversions at each τ, of
    p × p or n × n, whichever is smaller; the choice of τ inverts p × p. Exact but for Laplace's approximation over h.

    Args:
      groups: a label for each feature; those of one label share a penalty. None is a penalty for each feature.
      covariates: what log penalties depend on linearly, shape (penalties,) or (penalties, k): a row for each feature,
        or with `groups` for each label, in sorted order.
      criterion: "evidence", the noise profiled out; "leave_one_out"; or "gcv".
      cv: folds whose errors take the place of `criterion`: a number, a splitter of scikit-learn's, or pairs of indices.
      shrinkage: "score", or τ itself: 0 keeps one penalty, or what the covariates say; `np.inf` shrinks nothing.
      min_gain: nats by which the score has to fall before one penalty is given up.
      standardize: whether features are divided by their standard deviations before penalties apply.

    Attributes:
      coef_: w, in units of X, shape (n_features,).
      intercept_: b.
      penalties_: λ of each (standardised) feature.
      groups_: the penalty of each label, or without `groups` of each feature, a dict.
      shrinkage_: the chosen τ.
      one_penalty_: whether one penalty was kept.
      reason_: why.
      path_: what was found at each τ: shrinkage, log_penalties, criterion, score.
      n_features_in_: the number of features.
      feature_names_in_: their names, where X has names.

    Raises:
      JaxhpoError: groups, covariates or weights of another length than X, or a criterion that there is not.
      ImportError: of `jaxhpo.sklearn`, without scikit-learn.

    Example:
      >>> from jaxhpo.sklearn import BilevelRidge
      >>> rng = np.random.default_rng(0)
      >>> X = rng.normal(size=(60, 40))
      >>> y = X[:, :4].sum(1) + rng.normal(size=60)
      >>> model = BilevelRidge(groups=["useful"] * 4 + ["noise"] * 36).fit(X, y)
      >>> print(model.groups_["noise"] > 100 * model.groups_["useful"])
      True
      >>> print(model.reason_)
      shrinkage 5 is 21.3 nats better than one penalty

    References:
      MacKay. Bayesian Interpolation. 1992.
    """

    _criteria = ("evidence", "leave_one_out", "gcv")

    def _make_criterion(self, data, name):
        if name == "evidence":
            return evidence(data)
        return squared(data, {"leave_one_out": left_out, "gcv": generalised, "folds": held_out}[name](data))

    def _solve(self, data, h):
        x, y = centred(data)
        v = posterior(x, y, data.expand(h))[0]
        w = np.exp(-data.expand(h) / 2) * v
        mass = data.weights / data.weights.sum()
        return w, mass @ data.y - mass @ data.x @ w


def centred(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Rows and values without their means, which is what a free intercept does to them; scaled by √weight."""
    mass, root = data.weights / data.weights.sum(), np.sqrt(data.weights)
    return root[:, None] * (data.x - mass @ data.x), root * (data.y - mass @ data.y)


def posterior(x, y, h, gram=None):
    """Ridge regression in the scale of its prior.

    With Z = X Λ^(−1/2), Λ = diag(e^h), and w = Λ^(−1/2) v: v = Q Zᵀy, Q = (I + ZᵀZ)⁻¹ = I − Zᵀ K⁻¹ Z, K = I + ZZᵀ,
    whichever matrix is smaller. Their determinants are equal.

    Returns:
      v, the log determinant, and a function for Q that may be told to return its diagonal only.
    """
    z, (n, p) = x * np.exp(-h / 2), x.shape
    if p <= n:
        if gram is None:
            gram = x.T @ x
        q, volume = inverse(np.eye(p) + np.exp(-0.5 * (h[:, None] + h)) * gram)
        return q @ (z.T @ y), volume, lambda diagonal: np.diag(q) if diagonal else q
    k, volume = inverse(np.eye(n) + z @ z.T)
    kz = k @ z
    return kz.T @ y, volume, lambda diagonal: 1 - (z * kz).sum(0) if diagonal else np.eye(p) - z.T @ kz


def evidence(data: Data) -> Criterion:
    """Minus the log probability of y, weights and intercept integrated out, and the variance of the noise profiled out.

    C = ½ [(n − 1) log s + log|I + ZᵀZ|] with s = |y − Xw|² + |v|² in the notation of `posterior`. As ds/dhⱼ = vⱼ²
    (the envelope: v minimises s) and d log|I + ZᵀZ|/dhⱼ = Qⱼⱼ − 1,

        2 dC/dhⱼ = (n − 1) vⱼ²/s + Qⱼⱼ − 1
        2 d²C/dhⱼdhₖ = (n − 1) [δⱼₖ vⱼ²/s − 2 vⱼ Qⱼₖ vₖ/s − vⱼ² vₖ²/s²] + δⱼₖ Qⱼⱼ − Qⱼₖ²

    from d(λⱼwⱼ²)/dhₖ = δⱼₖ vⱼ² − 2 vⱼ Qⱼₖ vₖ and dQⱼⱼ/dhₖ = δⱼₖ Qⱼⱼ − Qⱼₖ². Those of a group are sums over it.
    """
    x, y = centred(data)
    gram = x.T @ x if x.shape[1] <= x.shape[0] else None
    count = data.weights.sum() - 1
    floor = NOISE * (y @ y) + LEAST

    def parts(h):
        h = data.expand(h)
        v, volume, q = posterior(x, y, h, gram)
        residual = y - x @ (np.exp(-h / 2) * v)
        return v, residual @ residual + v @ v + floor, volume, q

    def value_and_grad(h):
        v, s, volume, q = parts(h)
        grad = count * v**2 / s + q(True) - 1
        return 0.5 * (count * np.log(s) + volume), 0.5 * by_group(grad, data.starts, 0)

    def hessian(h):
        v, s, _, q = parts(h)
        q = q(False)
        square = by_group(v**2, data.starts, 0)
        off = by_group(2 * count / s * v[:, None] * q * v + q**2, data.starts, 0, 1)
        on = count / s * square + by_group(np.diag(q), data.starts, 0)
        return 0.5 * (np.diag(on) - off - count * np.outer(square, square) / s**2)

    return Criterion(value_and_grad, hessian)


def squared(data: Data, errors) -> Criterion:
    """(n/2) log of the mean square of prediction errors: their negative log likelihood, its variance profiled out.

    Args:
      data: what is fitted.
      errors: of h, to errors e, shape (m,), scaled by √weight, and their derivatives E, shape (m, penalties).
    """
    count, floor = data.weights.sum(), NOISE * (data.weights @ data.y**2) + LEAST

    def value_and_grad(h):
        e, slopes = errors(h)
        return 0.5 * count * np.log(s := e @ e + floor), count / s * (e @ slopes)

    def hessian(h):  # of Gauss and Newton
        e, slopes = errors(h)
        return count / (e @ e + floor) * slopes.T @ slopes

    return Criterion(value_and_grad, hessian)


def left_out(data: Data, *, mean_leverage: bool = False):
    """Errors of leave-one-out, or with the mean leverage those of generalised cross-validation.

    eᵢ = rᵢ/cᵢ, cᵢ = 1 − Sᵢᵢ − 1/n, with S = ZQZᵀ (Sherman and Morrison). With B = ZQ: drᵢ/dhⱼ = Bᵢⱼvⱼ and
    dSᵢᵢ/dhⱼ = −Bᵢⱼ², so deᵢ/dhⱼ = (Bᵢⱼvⱼ − eᵢBᵢⱼ²)/cᵢ. Of a row with weight m > 1 one of m copies is left out, and
    where m < 1 the whole row.
    """
    x, y = centred(data)
    copies = np.minimum(1, 1 / data.weights)

    def errors(h):
        h = data.expand(h)
        v, _, q = posterior(x, y, h)
        z = x * np.exp(-h / 2)
        b = z @ q(False)
        residual, leverage = y - z @ v, (b * z).sum(1)
        slopes = by_group(b**2, data.starts, 1)
        if mean_leverage:
            total = data.weights.sum()
            c, slopes = 1 - (leverage.sum() + 1) / total, slopes.sum(0, keepdims=True) / total
        else:
            c = 1 - copies * leverage - copies * data.weights / data.weights.sum()
            slopes = copies[:, None] * slopes
        e = residual / (c := np.maximum(c, 1e-9))
        return e, (by_group(b * v, data.starts, 1) - e[:, None] * slopes) / np.reshape(c, (-1, 1))

    return errors


def generalised(data: Data):
    """Errors of generalised cross-validation."""
    return left_out(data, mean_leverage=True)


def held_out(data: Data):
    """Errors at the rows that a fold holds out: e = y − Xw − b, and de/dhⱼ = Bⱼvⱼ with B = ZQ of those rows."""
    parts = [(data.take(train), data.take(test)) for train, test in data.splits]

    def fold(h, train, test):
        mass, root = train.weights / train.weights.sum(), np.sqrt(test.weights)
        v, _, q = posterior(*centred(train), h)
        z = root[:, None] * (test.x - mass @ train.x) * np.exp(-h / 2)
        return root * (test.y - mass @ train.y) - z @ v, by_group(z @ q(False) * v, data.starts, 1)

    def errors(h):
        found = [fold(data.expand(h), *part) for part in parts]
        return np.concatenate([e for e, _ in found]), np.concatenate([slopes for _, slopes in found])

    return errors
