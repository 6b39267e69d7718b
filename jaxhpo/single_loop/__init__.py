"""Tune while training once: stochastic methods that move parameters and hyperparameters together, on minibatches.

Methods, for `jaxhpo.hypergradient`
    SOBA: one minibatch a step for all; MASOBA: with averaged hypergradients
    SABA, SPABA: with reduced variance, so that constant steps converge
    AmIGO, StocBiO: some inner steps, then the linear system by stochastic steps, or by a series
    F2SA: no second derivatives
    Online: within an ordinary training, with its own minibatches and optimiser; slow_where_noisy: for its steps

What they are made of
    FiniteSum: minibatches that are known by their number
    SingleLoop: any estimator on any sums; InTurn: one unknown after another
    SingleLoopState, OnlineState, SlowState: what they carry
    implicit_sums, series_sums, penalty_sums: what is summed; Point, Term, Problem, Draws: for sums of your own
    Plain, Momentum, STORM, SAGA, SARAH, PAGE, PerVariable: estimators of a mean; Estimator: for one of your own
"""

from jaxhpo.single_loop._amigo import AmIGO
from jaxhpo.single_loop._f2sa import F2SA
from jaxhpo.single_loop._in_turn import InTurn
from jaxhpo.single_loop._loop import SingleLoop, SingleLoopState
from jaxhpo.single_loop._masoba import MASOBA
from jaxhpo.single_loop._noise import SlowState, slow_where_noisy
from jaxhpo.single_loop._online import Online, OnlineState
from jaxhpo.single_loop._saba import SABA
from jaxhpo.single_loop._soba import SOBA
from jaxhpo.single_loop._spaba import SPABA
from jaxhpo.single_loop._stocbio import StocBiO
from jaxhpo.single_loop._sums import Draws, FiniteSum, Point, Problem, Term, implicit_sums, penalty_sums, series_sums
from jaxhpo.single_loop._variance import PAGE, SAGA, SARAH, STORM, Estimator, Momentum, PerVariable, Plain

__all__ = [
    "AmIGO",
    "Draws",
    "Estimator",
    "F2SA",
    "FiniteSum",
    "InTurn",
    "MASOBA",
    "Momentum",
    "Online",
    "OnlineState",
    "PAGE",
    "PerVariable",
    "Plain",
    "Point",
    "Problem",
    "SABA",
    "SAGA",
    "SARAH",
    "SOBA",
    "SPABA",
    "STORM",
    "SlowState",
    "SingleLoop",
    "SingleLoopState",
    "StocBiO",
    "Term",
    "implicit_sums",
    "penalty_sums",
    "series_sums",
    "slow_where_noisy",
]
