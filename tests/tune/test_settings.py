"""Settings found in the closures of optax's transformations."""

import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhpo._tune.settings import fingerprint


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (optax.sgd(0.5, momentum=0.9), {"scale.step_size": "-0.5", "trace.decay": "0.9", "trace.nesterov": "False"}),
        (
            optax.chain(optax.clip(0.3), optax.adam(optax.cosine_decay_schedule(0.1, 20, alpha=0.2))),
            {"clip.max_delta": "0.3", "cosine_decay_schedule.decay_steps": "20", "cosine_decay_schedule.alpha": "0.2"},
        ),
        (optax.sgd(optax.join_schedules([lambda t: 0.1, lambda t: 0.2], [7])), {"join_schedules.boundaries": "7"}),
    ],
    ids=["sgd", "a chain", "a list of schedules"],
)
def test_settings_are_found(optimizer, settings):
    found = fingerprint(optimizer)
    assert settings.items() <= found.items(), found


def test_another_setting_has_another_fingerprint():
    schedules = [optax.warmup_cosine_decay_schedule(0.0, peak, 5, 50) for peak in (0.1, 0.2)]
    first, second = (fingerprint(optax.adamw(schedule)) for schedule in schedules)
    assert first.keys() == second.keys() and first != second


@pytest.mark.parametrize(
    "schedule",
    [
        lambda rates: optax.piecewise_interpolate_schedule("linear", 1.0, dict(enumerate(rates, 1))),
        lambda rates: optax.piecewise_constant_schedule(1.0, dict(enumerate(rates, 1))),
        lambda rates: lambda count: jnp.asarray(rates)[count],
        lambda rates: (lambda table: lambda count: jnp.asarray(table)[count])(np.asarray(rates)),
    ],
    ids=["interpolated", "a dict", "a list", "an array"],
)
def test_a_long_schedule_takes_linear_time_and_little_room(schedule):
    """A quadratic search takes minutes for 60 000 values; one of them is another, and that is seen."""
    begun = time.perf_counter()
    rates = [1.0] * 60_000
    first, second = (fingerprint(optax.sgd(schedule(each))) for each in (rates, [*rates[:-2], 0.25, 1.0]))
    assert time.perf_counter() - begun < 20
    assert first != second and len(str(first)) < 2000
