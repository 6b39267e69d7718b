"""LeNet has the published number of parameters, and takes small images."""

import jax
import jax.numpy as jnp
import pytest

from jaxhpo.models import LeNet


@pytest.mark.parametrize(
    ("model", "shape", "number"),
    [
        # 6·(25 + 1) + 16·(6·25 + 1) + 400·120 + 120 + 120·84 + 84 + 84·10 + 10: LeNet-5, all channels connected
        (LeNet(), (32, 32, 1), 61_706),
        # ... with three colours, 2·6·25 more
        (LeNet(), (32, 32, 3), 62_006),
        (LeNet((10,), (4, 5), (3, 3), padding="SAME"), (8, 8, 1), 4 * 10 + 5 * 37 + 2 * 2 * 5 * 10 + 10),
    ],
)
def test_lenet_has_the_right_number_of_parameters(model, shape, number):
    images = jnp.zeros((2, *shape))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(x.size for x in jax.tree.leaves(params)) == number
    assert jax.eval_shape(model.apply, params, images).shape == (2, 10)
