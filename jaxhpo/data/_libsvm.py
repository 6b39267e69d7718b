"""Tables in LIBSVM's text format: ijcnn1."""

from typing import NamedTuple

import numpy as np

from jaxhpo._core.errors import JaxhpoError
from jaxhpo._core.extra import needs_extra
from jaxhpo.data._download import fetch
from jaxhpo.data._split import Examples

ADDRESS = "https://raw.githubusercontent.com/X-DataInitiative/tick-datasets/master/binary/ijcnn1/"
FILES = {
    "ijcnn1.trn.bz2": ("b38a4198ce142d43e96fb86d17b87211feec1f909ac344fa057455c69de29de3", 49_990),
    "ijcnn1.tst.bz2": ("acd1db430684fdd3f0c768ecc49aa8e749d0004fc117611220c2aa576a7b6a24", 91_701),
}


class TrainTest(NamedTuple):
    """A data set with a test part of its own.

    Attributes:
      train: `Examples`.
      test: `Examples`.

    Example:
      >>> one = jaxhpo.data.Examples(np.zeros((1, 2)), np.zeros(1))
      >>> jaxhpo.data.TrainTest(one, one).test.inputs.shape
      (1, 2)
    """

    train: Examples
    test: Examples


def ijcnn1() -> TrainTest:
    """ijcnn1 of the 2001 neural network competition: 49 990 rows of 22 features for training, 91 701 for testing.

    Reads `<JAXHPO_DATA_DIR>/libsvm/<file>` if that environment variable is set and the file exists. Otherwise it
    downloads the two files (4 MB) once, into pooch's cache. Their sha256 is verified either way.

    Returns:
      `train` and `test`, each with inputs float32 (n, 22) and targets float32 (n,) of −1 and 1, in the files' order.

    Raises:
      ImportError: without scikit-learn, which reads the format; a file must be downloaded, and pooch is not installed.
      JaxhpoError: a failed download; a damaged file.

    Example:
      >>> rows = jaxhpo.data.ijcnn1()  # doctest: +SKIP
      >>> rows.train.inputs.shape, rows.test.targets.shape  # doctest: +SKIP
      ((49990, 22), (91701,))

    References:
      Prokhorov. IJCNN 2001 Neural Network Competition. 2001.
    """
    return TrainTest(*(_read(name, *kind) for name, kind in FILES.items()))


def _read(name, sha256, rows) -> Examples:
    path = fetch("libsvm", name, ADDRESS + name, sha256)
    with needs_extra("`jaxhpo.data.ijcnn1` reads its files with scikit-learn", "demo"):
        from sklearn.datasets import load_svmlight_file
    x, y = load_svmlight_file(str(path), n_features=22)
    if len(y) != rows:
        raise JaxhpoError(f"{path} has {len(y)} rows, not {rows}: remove it, so that it is downloaded anew.")
    return Examples(x.toarray().astype(np.float32), y.astype(np.float32))
