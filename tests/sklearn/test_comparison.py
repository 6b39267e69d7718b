"""The statistics of `benchmarks/estimators.py`."""

import numpy as np
import pytest

pytest.importorskip("sklearn.base")
import estimators
import scipy.stats


def test_draws_are_compared_by_the_paired_t_test_and_folds_by_the_corrected_one(monkeypatch):
    rng = np.random.default_rng(0)
    mine, other = rng.normal(size=(2, 30))
    found = {"ours": [(e, 1.0) for e in mine], "theirs": [(e, 2.0) for e in other]}
    first, row = estimators.compare("dense 100x50", found)
    assert first["p"] is None and row["p"] == pytest.approx(scipy.stats.ttest_rel(mine, other).pvalue)
    assert row["seconds"] == 2.0 and row["difference"] == pytest.approx(mine.mean() - other.mean())
    _, corrected = estimators.compare("diabetes", found)
    # Nadeau and Bengio 2003: the variance has 1/J + n_test/n_train in the place of 1/J, ten folds have 1/9
    assert corrected["standard_error"] / row["standard_error"] == pytest.approx(np.sqrt((1 / 30 + 1 / 9) * 30))
    _, short = estimators.compare("dense 100x50", found | {"theirs": found["theirs"][:4]})
    assert short["seeds"] == 4 and short["difference"] == pytest.approx((mine - other)[:4].mean())


def test_holm_stops_at_the_first_that_is_not_significant():
    rows = [{"p": p} for p in (0.04, 0.001, 0.02, None, 0.03)]  # of four: .05/4, .05/3, .05/2, .05
    assert [row["significant"] for row in estimators.holm(rows)] == [False, True, False, False, False]
    rows = [{"p": p} for p in (0.012, 0.016, 0.03, 0.001)]
    assert [row["significant"] for row in estimators.holm(rows)] == [True, True, True, True]


def test_folds_are_those_of_one_shuffle_in_each_repetition():
    x, y = np.arange(40.0)[:, None], np.arange(40.0)
    draw = estimators.folds(lambda: (x, y))
    parts = [draw(estimators.FIRST + fold)[3] for fold in range(10)]
    assert sorted(np.concatenate(parts)) == list(range(40))
    assert set(draw(estimators.FIRST + 10)[3]) != set(parts[0])
