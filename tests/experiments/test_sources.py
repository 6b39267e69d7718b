"""Sources: what is spoilt and how, and how images weigh beside those of the validation part."""

import jax.numpy as jnp
import numpy as np
import pytest
import sources

import jaxhpo.data


@pytest.fixture(scope="module")
def part():
    return jaxhpo.data.digits(0, train=len(sources.SOURCE), validation=sources.VALIDATION).train


def test_three_sources_are_spoilt_each_in_its_way(part):
    x, y = map(np.asarray, sources.mixture(part, seed=0))
    of = {name: sources.SOURCE == place for place, name in enumerate(sources.SIZES)}
    pixels, labels = part.inputs, part.targets
    for name in sources.CLEAN:
        np.testing.assert_array_equal(x[of[name]], pixels[of[name]])
        np.testing.assert_array_equal(y[of[name]], labels[of[name]])
    drawn, renamed, noise = (of[name] for name in ("random labels", "permuted", "noise"))
    assert 0.8 < np.mean(y[drawn] != labels[drawn]) < 1  # nine tenths
    np.testing.assert_array_equal(x[drawn | renamed], pixels[drawn | renamed])
    pairs = {tuple(pair) for pair in zip(labels[renamed], y[renamed], strict=True)}
    assert len(pairs) == 10 == len({new for _, new in pairs}) and all(old != new for old, new in pairs)
    np.testing.assert_array_equal(y[noise], labels[noise])
    assert abs(np.corrcoef(x[noise].ravel(), pixels[noise].ravel())[0, 1]) < 0.05


def test_weights_of_images_sum_to_the_shares():
    shares = jnp.array([0.1, 0.2, 0.3, 0.15, 0.25])
    weights = np.asarray(sources.of_images(shares))
    np.testing.assert_allclose(np.bincount(sources.SOURCE, weights), shares, rtol=1e-5)


def test_equal_weights_stay_equal_beside_the_validation_images():
    number = len(sources.SOURCE)
    uniform = np.asarray(sources.with_validation(jnp.asarray(sources.COUNTS / number)))
    np.testing.assert_allclose(uniform, 1 / (number + sources.VALIDATION), rtol=1e-4)
    kept = np.array([sources.SIZES[name] * (name in sources.CLEAN) for name in sources.SIZES])
    oracle = np.asarray(sources.with_validation(jnp.asarray(kept / kept.sum())))
    np.testing.assert_allclose(oracle[oracle > 0], 1 / (kept.sum() + sources.VALIDATION), rtol=1e-4)
    assert (oracle > 0).sum() == kept.sum() + sources.VALIDATION
