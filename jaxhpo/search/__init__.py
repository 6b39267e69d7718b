"""Searches that take no derivative of a training.

value_function: trainings on a design, a model of the inner optimal value, and an augmented Lagrangian over parameters
    and hyperparameters together; for inner problems with many minima
"""

from jaxhpo.search._value_function import ValueFunctionState, value_function

__all__ = ["ValueFunctionState", "value_function"]
