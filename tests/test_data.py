"""Splits are disjoint, seeded and checked; the digits are scikit-learn's."""

import builtins

import numpy as np
import pytest

import jaxhpo
from jaxhpo.data import Examples, digits, split


def rows(part):
    return {tuple(row) for row in part.inputs.tolist()}


def test_digits_have_the_documented_shapes_and_ranges():
    parts = digits(0, train=200, validation=300)
    assert [part.inputs.shape for part in parts] == [(200, 64), (300, 64), (1297, 64)]  # 1797 images in all
    for part in parts:
        assert part.inputs.dtype == np.float32 and part.targets.dtype == np.int32
        assert part.inputs.min() >= 0 and part.inputs.max() <= 1
        assert set(part.targets.tolist()) == set(range(10))


def test_parts_are_disjoint():
    # No two of the 1797 images are equal, so that images can stand for indices.
    parts = digits(3, train=100, validation=100, test=500)
    assert [len(part.targets) for part in parts] == [100, 100, 500]
    assert len(set.union(*map(rows, parts))) == sum(len(rows(part)) for part in parts) == 700


def test_the_seed_decides_the_split():
    first, again, other = digits(1), digits(1), digits(2)
    np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
    assert rows(first.train) != rows(other.train)


def test_inputs_stay_with_their_targets():
    parts = split(Examples(np.arange(50) * 10, np.arange(50)), seed=5, train=20, validation=20)
    for inputs, targets in parts:
        np.testing.assert_array_equal(inputs, targets * 10)
    assert sorted(np.concatenate([part.targets for part in parts])) == list(range(50))


@pytest.mark.parametrize(
    "arguments, names",
    [
        ({"train": 0}, ["train", "at least 1"]),
        ({"train": 2.5}, ["train", "integer"]),
        ({"validation": "300"}, ["validation", "integer"]),
        ({"seed": -1}, ["seed", "at least 0"]),
        ({"test": 0}, ["test", "at least 1"]),
        ({"train": 1500, "validation": 297}, ["1797", "disjoint"]),
        ({"train": 200, "validation": 300, "test": 1298}, ["test=1298", "1797"]),
    ],
)
def test_mistakes_are_named(arguments, names):
    with pytest.raises(jaxhpo.JaxhpoError) as error:
        digits(**arguments)
    assert all(name in str(error.value) for name in names)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxhpo\[demo\]'"):
        digits()
