"""Small flax models for examples and benchmarks, and link prediction. No other subpackage imports flax.

MLP, LeNet: classifiers
SelfTuningDense, SelfTuningConv, SelfTuningMLP: layers for `Hypernetwork`
link_prediction: models of knowledge graphs, losses and ranks
regression: features; Bayesian linear, kernel ridge, logistic and softmax regression, at the optimum
"""

from jaxhpo.models import link_prediction, regression
from jaxhpo.models._layers import MLP, LeNet, SelfTuningConv, SelfTuningDense, SelfTuningMLP

__all__ = ["MLP", "LeNet", "SelfTuningConv", "SelfTuningDense", "SelfTuningMLP", "link_prediction", "regression"]
