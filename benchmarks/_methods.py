"""Registry of the methods, for the table of `docs/choose.md` and the benchmark of costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """One row of the table of methods.

    Attributes:
      call: as a user writes it; for a stateful method with its distinguishing arguments.
      names: the row's public names.
      tunes: the hyperparameters that it can tune.
      cost: growth of the time, in trainings.
      memory: growth of the memory beyond a plain training's.
      exact: conditions under which the hypergradient is exact.
      fails: conditions under which to avoid it.
      paper: Markdown links.
      door: the argument it is passed as: `adjoint=`, or `hypergradient(method, ...)`.
    """

    call: str
    names: tuple[str, ...]
    tunes: str
    cost: str
    memory: str
    exact: str
    fails: str
    paper: str
    door: str = "adjoint"


ALL = "loss, rates, start, data"
LOSS = "loss"

METHODS = (
    Method(
        "Unroll()",
        ("Unroll",),
        ALL,
        "a pass redone where that saves memory's time",
        "states, gradients, activations, up to 1 GiB",
        "always, for the T-step map",
        "the inner run is chaotic (rate too large)",
        "[Domke 2012](https://proceedings.mlr.press/v22/domke12.html), "
        "[Franceschi 2017](https://arxiv.org/abs/1703.01785)",
    ),
    Method(
        "Unroll(checkpoint='sqrt')",
        ("Unroll",),
        ALL,
        "forward, redo, backward",
        "2√T states",
        "as above",
        "time matters more",
        "[Griewank 2000](https://doi.org/10.1145/347837.347846)",
    ),
    Method(
        "Unroll(checkpoint=1)",
        ("Unroll",),
        ALL,
        "each step redone, without its gradient",
        "T states and gradients",
        "as above",
        "memory runs out",
        "[Griewank 2000](https://doi.org/10.1145/347837.347846)",
    ),
    Method(
        "Unroll(checkpoint=None)",
        ("Unroll",),
        ALL,
        "nothing redone",
        "T steps' activations",
        "as above",
        "memory runs out sooner",
        "[Franceschi 2017](https://arxiv.org/abs/1703.01785)",
    ),
    Method(
        "Unroll(checkpoint='binomial')",
        ("Unroll",),
        ALL,
        "each step up to three times",
        "1.8 T^⅓ states",
        "as above",
        "time matters more",
        "[Griewank 2000](https://doi.org/10.1145/347837.347846)",
    ),
    Method(
        "Unroll(hvp_fraction=0.25)",
        ("Unroll",),
        ALL,
        "forward, a part of backward",
        "T states and gradients, up to 1 GiB",
        "on average",
        "train losses that are no mean over the examples; noise",
        "[Kemaev 2025](https://arxiv.org/abs/2505.00793), here on part of a minibatch",
    ),
    Method(
        "Unroll(truncate=5)",
        ("Unroll",),
        "loss; rates and data of the last steps",
        "1 + 1.4 K/T",
        "K steps' activations",
        "K = T; error O((1 − αμ)^K)",
        "slow inner convergence",
        "[Shaban 2019](https://arxiv.org/abs/1810.10667)",
    ),
    Method(
        "Reversible()",
        ("Reversible", "momentum_sgd"),
        ALL,
        "forward, backwards, backward",
        "4 states and T log₂(1/momentum) bits a parameter",
        "always, for the T-step map in fixed point",
        "any optimiser but `momentum_sgd`; weights beyond the fixed point's range, steps below its spacing (2⁻²⁸)",
        "[Maclaurin 2015](https://arxiv.org/abs/1502.03492)",
    ),
    Method(
        "Forward()",
        ("Forward",),
        ALL,
        "2 + 1.35 m for m numbers",
        "m states",
        "always, for the T-step map",
        "m is large",
        "[Franceschi 2017](https://arxiv.org/abs/1703.01785)",
    ),
    Method(
        "ForwardGradient(num_directions=4)",
        ("ForwardGradient",),
        ALL,
        "2 + 1.35 K",
        "K states",
        "on average",
        "m is large: variance (m + 1)/K",
        "[Baydin 2022](https://arxiv.org/abs/2202.08587)",
    ),
    Method(
        "Smoothing(num_pairs=4, sigma=0.1)",
        ("Smoothing",),
        ALL + "; discrete decisions inside",
        "1 + 2K",
        "2K states",
        "on average, σ → 0",
        "m is large: variance of order m/K",
        "[Nesterov 2017](https://doi.org/10.1007/s10208-015-9296-2)",
    ),
    Method(
        "DrMAD()",
        ("DrMAD",),
        ALL,
        "1 + 1.95 N/T for N points",
        "4 states",
        "a straight trajectory, walked at constant speed",
        "the trajectory bends; long runs with momentum explode, unless `num_points` is small",
        "[Fu 2016](https://arxiv.org/abs/1601.00917)",
    ),
    Method(
        "FiniteDifference(step_size=0.1)",
        ("FiniteDifference",),
        LOSS,
        "two gradients",
        "2 P",
        "as one unrolled step: H = I/α",
        "curvatures differ; low precision; weights as small as its step ε",
        "[Liu 2019](https://arxiv.org/abs/1806.09055)",
    ),
    Method(
        "SAMA()",
        ("SAMA",),
        "loss; rates of the last step",
        "two gradients, one update",
        "2 P",
        "as one unrolled step of the optimiser",
        "curvatures differ; low precision; weights as small as its step ε",
        "[Choe 2023](https://arxiv.org/abs/2310.05674)",
    ),
    Method(
        "Implicit(CG(maxiter=10))",
        ("Implicit", "CG"),
        LOSS,
        "k Hessian products",
        "4 P",
        "converged, H ≻ 0, k large",
        "not converged; indefinite H (which is said)",
        "[Pedregosa 2016](https://arxiv.org/abs/1602.02355), [Rajeswaran 2019](https://arxiv.org/abs/1909.04630)",
    ),
    Method(
        "Implicit(Neumann(10, 0.1))",
        ("Neumann",),
        LOSS,
        "K − 1 Hessian products",
        "3 P",
        "converged, K → ∞",
        "α‖H‖ ≥ 2",
        "[Lorraine 2020](https://arxiv.org/abs/1911.02590)",
    ),
    Method(
        "Implicit(Richardson(0.1, 10))",
        ("Richardson",),
        LOSS,
        "K Hessian products",
        "3 P",
        "converged, K → ∞; or K = 1 in a pair, which goes on",
        "α‖H‖ ≥ 2",
        "[Arbel 2022](https://arxiv.org/abs/2111.14580)",
    ),
    Method(
        "Implicit(Identity(0.1))",
        ("Identity",),
        LOSS,
        "one mixed product",
        "P",
        "H = I/α",
        "curvatures differ",
        "[Luketina 2016](https://arxiv.org/abs/1511.06727)",
    ),
    Method(
        "Implicit(Direct())",
        ("Direct",),
        LOSS,
        "P Hessian products and P³",
        "P²",
        "converged, H invertible",
        "P beyond a few thousand",
        "[Bengio 2000](https://doi.org/10.1162/089976600300015187)",
    ),
    Method(
        "Implicit(Nystrom(10, 0.01))",
        ("Nystrom",),
        LOSS,
        "k Hessian products",
        "k P",
        "damped, rank of H ≤ k",
        "flat directions, small damping",
        "[Hataya 2023](https://arxiv.org/abs/2302.09726)",
    ),
    Method(
        "Implicit(GMRES())",
        ("GMRES",),
        LOSS + ", fixed points",
        "products",
        "one Krylov basis",
        "converged, H invertible",
        "ill-conditioned",
        "[Saad 1986](https://doi.org/10.1137/0907058)",
    ),
    Method(
        "Implicit(BiCGStab())",
        ("BiCGStab",),
        LOSS + ", fixed points",
        "2 products an iteration",
        "7 P",
        "converged, H invertible",
        "ill-conditioned; breakdown",
        "[van der Vorst 1992](https://doi.org/10.1137/0913035)",
    ),
    Method(
        "Implicit(General(maxiter=10))",
        ("General",),
        LOSS + ", fixed points, any root",
        "2 products an iteration",
        "8 P; P² for P ≤ 1000",
        "converged, H invertible",
        "ill-conditioned, P > 1000",
        "[van der Vorst 1992](https://doi.org/10.1137/0913035)",
    ),
    Method(
        "Implicit(NormalCG(maxiter=10))",
        ("NormalCG",),
        LOSS + ", fixed points",
        "2 products an iteration",
        "5 P",
        "converged, H invertible",
        "ill-conditioned: the condition is squared",
        "[Hestenes 1952](https://doi.org/10.6028/jres.049.044)",
    ),
    Method(
        "Implicit(from_lineax(lineax.CG(rtol=1e-3, atol=1e-6, max_steps=10)))",
        ("from_lineax",),
        LOSS,
        "that solver's",
        "that solver's",
        "as the solver",
        "as the solver",
        "[Rader 2023](https://arxiv.org/abs/2311.17283)",
    ),
    Method(
        "Implicit(CG(maxiter=10), curvature=gauss_newton(predict, output_loss, regulariser))",
        ("gauss_newton",),
        LOSS,
        "k Gauss-Newton products",
        "4 P",
        "converged, linear model or no residual",
        "large residuals",
        "[Larsen 1998](https://doi.org/10.1007/3-540-49430-8_6)",
    ),
    Method(
        "Implicit(CG(maxiter=10), curvature=outer_product(example_loss, regulariser))",
        ("outer_product",),
        LOSS,
        "k products",
        "4 P",
        "at a well-specified model, many examples",
        "few examples",
        "[Larsen 1998](https://doi.org/10.1007/3-540-49430-8_6)",
    ),
    Method(
        "hypergradient(Implicit(Identity(0.1)), ..., num_steps=1)",
        ("hypergradient", "from_pair"),
        LOSS,
        "an update for every inner step",
        "P",
        "H = I/α (T1–T2 alternation)",
        "curvatures differ; stalls far from the optimum",
        "[Luketina 2016](https://arxiv.org/abs/1511.06727)",
        "pair",
    ),
    Method(
        "hypergradient(HOAG(), ...)",
        ("HOAG",),
        LOSS,
        "inner steps and products to a falling tolerance",
        "5 P",
        "in the limit",
        "indefinite H; tolerance too slow",
        "[Pedregosa 2016](https://arxiv.org/abs/1602.02355)",
        "pair",
    ),
    Method(
        "hypergradient(RealTime(), ...)",
        ("RealTime",),
        "loss, rates",
        "1.1 + 1.34 m",
        "m states",
        "while h stands still",
        "h moves fast; m is large",
        "[Franceschi 2017](https://arxiv.org/abs/1703.01785)",
        "pair",
    ),
    Method(
        "hypergradient(EvolutionStrategies(num_pairs=4, sigma=0.1), ...)",
        ("EvolutionStrategies",),
        "loss, rates; metrics without derivative; discrete decisions inside",
        "1 + 2K",
        "one training at a time",
        "on average, σ → 0",
        "m is large: variance of order m/K",
        "[Salimans 2017](https://arxiv.org/abs/1703.03864)",
        "pair",
    ),
    Method(
        "hypergradient(PersistentES(num_pairs=4, sigma=0.1, horizon=200), ...)",
        ("PersistentES",),
        "loss, rates; metrics without derivative",
        "2K, a partial run an update",
        "2K states",
        "on average, σ → 0",
        "variance grows with the number of partial runs",
        "[Vicol 2021](https://arxiv.org/abs/2112.13835)",
        "pair",
    ),
    Method(
        "hypergradient(Hypernetwork(optax.adam(1e-3), 0.1), ...)",
        ("Hypernetwork", "Perturbed"),
        LOSS,
        "one gradient a step",
        "(m + 1) P; self-tuning layers 2 P",
        "the hypernetwork fits the best response",
        "it does not; σ too small or too large",
        "[Lorraine 2018](https://arxiv.org/abs/1802.09419), [MacKay 2019](https://arxiv.org/abs/1903.03088)",
        "pair",
    ),
)

HEADER = (
    "method",
    "what it can tune",
    "time",
    "by the clock",
    "grows as",
    "memory",
    "grows as",
    "exact when",
    "fails when",
    "paper",
)


def markdown(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of `docs/choose.md` as Markdown.

    Args:
      measured: for each method's `call`, `{"time", "seconds_ratio", "memory"}` as `benchmarks/methods.py` writes.
    """
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for method in METHODS:
        figures = measured[method.call]
        cells = (
            f"`{method.call}`",
            method.tunes,
            f"{figures['time']:.2f}",
            f"{figures['seconds_ratio']:.1f}",
            method.cost,
            f"{figures['memory']:.0f}",
            method.memory,
            method.exact,
            method.fails,
            method.paper,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
