"""Searches for hyperparameters that take no derivative of a training, with Optuna; and gradients within its trials.

random, grid, bayes, cmaes: one training a trial, with the signature and the result of `tune`
hyperband, asha: trials that are stopped early
tune_trial: gradients for the continuous hyperparameters within an Optuna trial, which chooses the others
open_storage: a storage of Optuna in which no trial is lost where a process is killed
value_function: trainings on a design, a model of the inner optimal value, and an augmented Lagrangian over parameters
    and hyperparameters together; for inner problems with many minima

Optuna is needed: pip install 'jaxhpo[search]'.
"""

from jaxhpo._core.extra import needs_extra

with needs_extra("`jaxhpo.search` runs trials with Optuna", "search"):
    import optuna as _  # noqa: F401

from jaxhpo.search._searches import asha, bayes, cmaes, grid, hyperband, random
from jaxhpo.search._storage import open_storage
from jaxhpo.search._tune_trial import tune_trial
from jaxhpo.search._value_function import ValueFunctionState, value_function

__all__ = [
    "ValueFunctionState",
    "asha",
    "bayes",
    "cmaes",
    "grid",
    "hyperband",
    "open_storage",
    "random",
    "tune_trial",
    "value_function",
]
