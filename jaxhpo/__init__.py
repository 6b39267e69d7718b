"""Hypergradients in JAX: tune the hyperparameters of anything that JAX can train, by their gradient.

    solver = jaxhpo.from_optax(train_loss, optax.sgd(0.1))       # train_loss(params, hparams, batch)

    def outer_loss(hparams):                                     # the validation loss of the trained model
        start = solver.init(params, hparams)
        return val_loss(jaxhpo.solve(solver, start, hparams, num_steps=100, adjoint=jaxhpo.Unroll()).params)

    hypergradient = jax.grad(outer_loss)(hparams)                # or: jaxhpo.tune(outer_loss, hparams, ...)

`help(jaxhpo.solve)`, and so on, has the details. The names by what they are for:

Train, differentiably
    from_optax, momentum_sgd, fixed_point: make a solver of a train loss, or of your own update
    solve: trains; implicit: attaches a derivative to what another library found
    Solver, InnerState, Solution, Info: what they take and return

Choose how the derivative is taken (`adjoint=`)
    Auto: an exact rule, and under `tune` the cheapest that is measured to do
    Unroll, Reversible, Forward: exact, by the training itself
    Implicit: exact where training converges, by a linear solve
    DrMAD, FiniteDifference, SAMA, ForwardGradient, Smoothing: approximate, cheap, or random

Choose the linear solver of `Implicit`
    General: for any invertible matrix; Direct: exact, for small models
    CG, NormalCG, GMRES, BiCGStab, from_lineax: iterative
    Neumann, Richardson, Identity, Nystrom: approximate
    gauss_newton, outer_product: matrices in the Hessian's place
    LinearInfo, LinearStatus, debug_solves: how a solve ended

Tune
    tune, load, TuneResult, TuneStep, Member, history_table: the outer loop, and what it reports
    positive, unit_interval, box, simplex: keep hyperparameters in range
    Remedies: clips, averages or shrinks the hypergradient
    outer_step, OuterStep, OuterState, OuterReport: the step alone, for a loop of your own

Tune by methods that carry state
    hypergradient, Hypergradient, HypergradientInfo, from_pair: make them, and run them under `tune`
    HOAG, hoag_step, RealTime: hypergradients while training goes on
    EvolutionStrategies, PersistentES: without derivatives
    Hypernetwork, affine_response, AffineResponse, self_response, Perturbed: a learned best response

Find out whether to trust it, and what it costs
    check_hypergradient, HypergradientCheck: against exact tangents, and why it differs
    error_bar, ErrorBar: a hypergradient with an estimate of its own error
    compare, Comparison, MethodRow: error, time and memory of each method on your problem
    memory_plan, MemoryPlan, PlanRow: memory and time of each schedule, before the run
    attribution, Attribution: what each training example does to each test measurement
    lds, LDS, drop_curves, DropCurves: whether retraining without examples confirms it
    JaxhpoError, NonFiniteError, ZeroHypergradientError, ZeroHypergradientWarning: what is raised or warned of

Write your own
    Adjoint, LinearSolver, StatefulMethod, Transform: the protocols; Problem: what a rule is given

Modules, imported when they are first used
    jaxhpo.criteria, .data, .models, .plot, .search, .single_loop, .sklearn, .testing
"""

import importlib as _importlib
import pkgutil as _pkgutil
import typing as _typing

from jaxhpo._adjoint.drmad import DrMAD as DrMAD
from jaxhpo._adjoint.implicit import Implicit as Implicit
from jaxhpo._adjoint.implicit import implicit as implicit
from jaxhpo._adjoint.last_step import SAMA as SAMA
from jaxhpo._adjoint.last_step import FiniteDifference as FiniteDifference
from jaxhpo._adjoint.pushforward import Forward as Forward
from jaxhpo._adjoint.pushforward import ForwardGradient as ForwardGradient
from jaxhpo._adjoint.pushforward import Smoothing as Smoothing
from jaxhpo._adjoint.reversible import Reversible as Reversible
from jaxhpo._adjoint.unroll import Unroll as Unroll
from jaxhpo._core.errors import JaxhpoError as JaxhpoError
from jaxhpo._core.errors import NonFiniteError as NonFiniteError
from jaxhpo._core.errors import ZeroHypergradientError as ZeroHypergradientError
from jaxhpo._core.errors import ZeroHypergradientWarning as ZeroHypergradientWarning
from jaxhpo._core.record import debug_solves as debug_solves
from jaxhpo._core.transforms import box as box
from jaxhpo._core.transforms import positive as positive
from jaxhpo._core.transforms import simplex as simplex
from jaxhpo._core.transforms import unit_interval as unit_interval
from jaxhpo._core.types import Hypergradient as Hypergradient
from jaxhpo._core.types import HypergradientInfo as HypergradientInfo
from jaxhpo._core.types import Info as Info
from jaxhpo._core.types import InnerState as InnerState
from jaxhpo._core.types import LinearInfo as LinearInfo
from jaxhpo._core.types import LinearSolver as LinearSolver
from jaxhpo._core.types import LinearStatus as LinearStatus
from jaxhpo._core.types import Solution as Solution
from jaxhpo._core.types import Solver as Solver
from jaxhpo._core.types import StatefulMethod as StatefulMethod
from jaxhpo._core.types import Transform as Transform
from jaxhpo._diagnostics.attribution.attribution import Attribution as Attribution
from jaxhpo._diagnostics.attribution.attribution import attribution as attribution
from jaxhpo._diagnostics.attribution.retraining import LDS as LDS
from jaxhpo._diagnostics.attribution.retraining import DropCurves as DropCurves
from jaxhpo._diagnostics.attribution.retraining import drop_curves as drop_curves
from jaxhpo._diagnostics.attribution.retraining import lds as lds
from jaxhpo._diagnostics.auto import Auto as Auto
from jaxhpo._diagnostics.check.check import check_hypergradient as check_hypergradient
from jaxhpo._diagnostics.check.result import HypergradientCheck as HypergradientCheck
from jaxhpo._diagnostics.compare.compare import compare as compare
from jaxhpo._diagnostics.compare.result import Comparison as Comparison
from jaxhpo._diagnostics.compare.result import MethodRow as MethodRow
from jaxhpo._diagnostics.error_bar import ErrorBar as ErrorBar
from jaxhpo._diagnostics.error_bar import error_bar as error_bar
from jaxhpo._diagnostics.memory_plan import MemoryPlan as MemoryPlan
from jaxhpo._diagnostics.memory_plan import PlanRow as PlanRow
from jaxhpo._diagnostics.memory_plan import memory_plan as memory_plan
from jaxhpo._estimator.evolution_strategies import EvolutionStrategies as EvolutionStrategies
from jaxhpo._estimator.evolution_strategies import PersistentES as PersistentES
from jaxhpo._estimator.hoag import HOAG as HOAG
from jaxhpo._estimator.hoag import hoag_step as hoag_step
from jaxhpo._estimator.hypergradient import from_pair as from_pair
from jaxhpo._estimator.hypergradient import hypergradient as hypergradient
from jaxhpo._estimator.hypernetwork import AffineResponse as AffineResponse
from jaxhpo._estimator.hypernetwork import Hypernetwork as Hypernetwork
from jaxhpo._estimator.hypernetwork import Perturbed as Perturbed
from jaxhpo._estimator.hypernetwork import affine_response as affine_response
from jaxhpo._estimator.hypernetwork import self_response as self_response
from jaxhpo._estimator.real_time import RealTime as RealTime
from jaxhpo._inner.problem import Adjoint as Adjoint
from jaxhpo._inner.problem import Problem as Problem
from jaxhpo._inner.solver import fixed_point as fixed_point
from jaxhpo._inner.solver import from_optax as from_optax
from jaxhpo._inner.solver import momentum_sgd as momentum_sgd
from jaxhpo._linear.bicgstab import BiCGStab as BiCGStab
from jaxhpo._linear.cg import CG as CG
from jaxhpo._linear.curvature import gauss_newton as gauss_newton
from jaxhpo._linear.curvature import outer_product as outer_product
from jaxhpo._linear.direct import Direct as Direct
from jaxhpo._linear.general import General as General
from jaxhpo._linear.gmres import GMRES as GMRES
from jaxhpo._linear.identity import Identity as Identity
from jaxhpo._linear.lineax import from_lineax as from_lineax
from jaxhpo._linear.neumann import Neumann as Neumann
from jaxhpo._linear.normal_cg import NormalCG as NormalCG
from jaxhpo._linear.nystrom import Nystrom as Nystrom
from jaxhpo._linear.richardson import Richardson as Richardson
from jaxhpo._solve import solve as solve
from jaxhpo._tune.load import load as load
from jaxhpo._tune.record import TuneStep as TuneStep
from jaxhpo._tune.remedies import Remedies as Remedies
from jaxhpo._tune.step import OuterReport as OuterReport
from jaxhpo._tune.step import OuterState as OuterState
from jaxhpo._tune.step import OuterStep as OuterStep
from jaxhpo._tune.step import outer_step as outer_step
from jaxhpo._tune.table import history_table as history_table
from jaxhpo._tune.tune import Member as Member
from jaxhpo._tune.tune import TuneResult as TuneResult
from jaxhpo._tune.tune import tune as tune

__version__ = "0.2.0"

if not _typing.TYPE_CHECKING:  # a type checker reads the imports above, and would take any name for granted
    __all__ = [name for name in dir() if not name.startswith("_")]
    _MODULES = [module.name for module in _pkgutil.iter_modules(__path__) if not module.name.startswith("_")]

    def __getattr__(name):
        """Imports a module where it is first used: `jaxhpo.models` needs flax, for one."""
        if name in _MODULES:
            return _importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return [*globals(), *_MODULES]
