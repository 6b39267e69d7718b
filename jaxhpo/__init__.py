"""Hypergradients in JAX: tune the hyperparameters of anything that JAX can train, by their gradient."""

from jaxhpo._adjoint._forward import Forward as Forward
from jaxhpo._adjoint._forward_gradient import ForwardGradient as ForwardGradient
from jaxhpo._adjoint._implicit import Implicit as Implicit
from jaxhpo._adjoint._smoothing import Smoothing as Smoothing
from jaxhpo._adjoint._unroll import Unroll as Unroll
from jaxhpo._check import HypergradientCheck as HypergradientCheck
from jaxhpo._check import check_hypergradient as check_hypergradient
from jaxhpo._curvature import gauss_newton as gauss_newton
from jaxhpo._curvature import outer_product as outer_product
from jaxhpo._errors import JaxhpoError as JaxhpoError
from jaxhpo._errors import NonFiniteError as NonFiniteError
from jaxhpo._errors import ZeroHypergradientError as ZeroHypergradientError
from jaxhpo._errors import ZeroHypergradientWarning as ZeroHypergradientWarning
from jaxhpo._estimator._hypergradient import from_pair as from_pair
from jaxhpo._estimator._hypergradient import hypergradient as hypergradient
from jaxhpo._implicit import implicit as implicit
from jaxhpo._linear._bicgstab import BiCGStab as BiCGStab
from jaxhpo._linear._cg import CG as CG
from jaxhpo._linear._direct import Direct as Direct
from jaxhpo._linear._gmres import GMRES as GMRES
from jaxhpo._linear._identity import Identity as Identity
from jaxhpo._linear._lineax import from_lineax as from_lineax
from jaxhpo._linear._neumann import Neumann as Neumann
from jaxhpo._linear._normal_cg import NormalCG as NormalCG
from jaxhpo._linear._nystrom import Nystrom as Nystrom
from jaxhpo._solve import solve as solve
from jaxhpo._solver import fixed_point as fixed_point
from jaxhpo._solver import from_optax as from_optax
from jaxhpo._solver import momentum_sgd as momentum_sgd
from jaxhpo._transforms import box as box
from jaxhpo._transforms import positive as positive
from jaxhpo._transforms import simplex as simplex
from jaxhpo._transforms import unit_interval as unit_interval
from jaxhpo._tune import TuneResult as TuneResult
from jaxhpo._tune import TuneStep as TuneStep
from jaxhpo._tune import tune as tune
from jaxhpo._types import Hypergradient as Hypergradient
from jaxhpo._types import HypergradientInfo as HypergradientInfo
from jaxhpo._types import Info as Info
from jaxhpo._types import InnerState as InnerState
from jaxhpo._types import LinearInfo as LinearInfo
from jaxhpo._types import LinearStatus as LinearStatus
from jaxhpo._types import Solution as Solution
from jaxhpo._types import Solver as Solver

__version__ = "0.1.0"
