"""Estimators in the style of scikit-learn that choose a penalty per feature, group or covariate by its gradient.

BilevelRidge, BilevelLogisticRegression: by evidence, leave-one-out or folds, in closed form
BilevelLasso, BilevelElasticNet: by folds
BilevelKernelRidge: a lengthscale per feature or group, by evidence

What they find is in `penalties_`, `groups_`, `reason_` and `plot()`. scikit-learn is needed:
pip install 'jaxhpo[sklearn]'.
"""

from jaxhpo._core.extra import needs_extra

with needs_extra("`jaxhpo.sklearn` builds on scikit-learn", "sklearn"):
    import sklearn.base as _  # noqa: F401

from jaxhpo.sklearn._kernel import BilevelKernelRidge
from jaxhpo.sklearn._lasso import BilevelElasticNet, BilevelLasso
from jaxhpo.sklearn._logistic import BilevelLogisticRegression
from jaxhpo.sklearn._ridge import BilevelRidge

__all__ = ["BilevelElasticNet", "BilevelKernelRidge", "BilevelLasso", "BilevelLogisticRegression", "BilevelRidge"]
