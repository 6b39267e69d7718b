"""Small flax models for examples and benchmarks, and link prediction. No other subpackage imports flax."""

from jaxhpo.models import link_prediction as link_prediction
from jaxhpo.models._layers import MLP as MLP
from jaxhpo.models._layers import SelfTuningConv as SelfTuningConv
from jaxhpo.models._layers import SelfTuningDense as SelfTuningDense
from jaxhpo.models._layers import SelfTuningMLP as SelfTuningMLP
