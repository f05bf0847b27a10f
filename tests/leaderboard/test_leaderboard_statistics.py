"""The statistics against published and hand-computed values, and against what they promise in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.samples import Samples, Stamp
from lmms_prune.leaderboard.statistics import (
    DETECTABLE,
    detectable,
    flips,
    holm,
    interval,
    mcnemar,
    mean_ratio,
    over_seeds,
    resampled,
    verdict,
)


def samples(num: np.ndarray, den: np.ndarray | None = None, stratum: np.ndarray | None = None) -> Samples:
    many = len(num)
    return Samples(
        signature="s",
        num=num.astype(float),
        den=np.ones(many) if den is None else den.astype(float),
        stratum=np.zeros(many, int) if stratum is None else stratum,
        right=num > 0,
        documents=np.arange(many),
        unit=np.arange(many),
        answers=np.arange(many),
        offsets=np.arange(many),
        score=0.0,
        logged=many,
        empty=0,
        accounting=None,
        extras={},
        stamp=Stamp(0, 0, 0, 0),
    )


def test_what_replaces_scipy_stats_is_equal_to_it() -> None:
    """Its import takes longer than a table; it is imported in this test only."""
    from scipy.stats import binomtest, norm

    assert norm.ppf(0.975) + norm.ppf(0.80) == DETECTABLE
    chance = np.random.default_rng(0)
    cases = [(worse, total - worse) for total in range(1, 60) for worse in range(total + 1)]
    cases += [tuple(map(int, chance.integers(0, 20_000, 2))) for _ in range(100)]
    cases += [(50_000 + more, 50_000 - more) for more in (0, 1, 2, 200, 500, 2_000)]
    for worse, better in cases:
        assert mcnemar(worse, better) == pytest.approx(binomtest(worse, worse + better).pvalue, rel=1e-11, abs=0)


def test_mcnemar_by_hand() -> None:
    """5 and 1 flips: 2 (C(6,0) + C(6,1)) / 2^6; with many flips the exact p is near that of chi-squared."""
    assert mcnemar(5, 1) == pytest.approx(2 * 7 / 64)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(121, 59) == pytest.approx(chi2.sf((121 - 59) ** 2 / 180, 1), rel=0.3)
    assert flips(np.array([True, True, False]), np.array([False, True, True])) == (1, 1)


def test_holm_by_the_published_example() -> None:
    """The values that statsmodels' and R's documentation give for these p values."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_standard_error_and_what_could_be_detected() -> None:
    """12 worse and 8 better of 400: the textbook's error of a paired difference of shares, in points."""
    before, after = np.zeros(400), np.zeros(400)
    before[:12], after[12:20] = 100, 100
    draws = resampled([samples(after), samples(before)], 4000, np.random.default_rng(0))
    found = interval(-1.0, draws[:, 0] - draws[:, 1])
    expected = 100 * np.sqrt(20 / 400 - (4 / 400) ** 2) / np.sqrt(400)
    assert found.error == pytest.approx(expected, rel=0.05)
    assert detectable(found.error) == pytest.approx((1.959964 + 0.841621) * expected, rel=0.05)
    assert detectable(0.0) is None


def test_equal_runs_do_not_differ() -> None:
    values = np.random.default_rng(1).random(300)
    draws = resampled([samples(values), samples(values)], 500, np.random.default_rng(2))
    found = interval(0.0, draws[:, 0] - draws[:, 1])
    assert (found.low, found.high, found.p, found.excludes_zero) == (0, 0, 1, False)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 paired data sets with a true difference of 10 points: 95 % of the intervals hold it."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(400):
        before = rng.random(150) < 0.7
        after = np.where(rng.random(150) < 0.8, before, rng.random(150) < 0.2)  # 0.8 * 0.7 + 0.2 * 0.2 = 0.6
        draws = resampled([samples(100 * after), samples(100 * before)], 400, rng)
        found = interval(100 * (after.mean() - before.mean()), draws[:, 0] - draws[:, 1])
        held += found.low <= -10 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_strata_keep_their_sizes_and_ratios_are_of_sums() -> None:
    """Two MME categories that are each constant: nothing can vary. F1: the ratio of the resampled sums."""
    stratum = np.array([0] * 3 + [1] * 7)
    constant = samples(np.where(stratum == 0, 200.0, 50.0), stratum=stratum)
    assert (resampled([constant], 100, np.random.default_rng(4)) == 250).all()
    f1 = samples(np.array([200.0, 0, 0, 0]), den=np.array([2.0, 1, 1, 0]))
    assert set(np.round(resampled([f1], 400, np.random.default_rng(5))[:, 0], 6)) > {0.0, 50.0, 100.0}


def test_columns_share_their_draws() -> None:
    """A run and the same run plus 5 differ by exactly 5 in every resample."""
    values = np.random.default_rng(6).random(5000)
    draws = resampled([samples(values), samples(values + 5)], 2000, np.random.default_rng(7))
    np.testing.assert_allclose(draws[:, 1] - draws[:, 0], 5)
    assert draws[:, 0].std() == pytest.approx(values.std() / np.sqrt(5000), rel=0.05)


def test_rel_is_a_mean_of_ratios_on_every_resample() -> None:
    scores = {"a": np.array([50.0, 40.0, 10.0]), "b": np.array([10.0, 30.0, 0.0])}
    whole = {"a": np.array([100.0, 80.0, 0.0]), "b": np.array([20.0, 0.0, 0.0])}
    found = mean_ratio(scores, whole)
    assert found[:2].tolist() == [50.0, 50.0]  # in the second, b does not count
    assert np.isnan(found[2])


def test_seeds_are_drawn_too() -> None:
    """Two seeds ten points apart, without any variation of samples: the mean varies by that of the seeds."""
    draws = np.tile([40.0, 50.0], (4000, 1))
    found = over_seeds(draws, np.random.default_rng(8).integers(0, 2, draws.shape))
    assert set(found) == {40.0, 45.0, 50.0}
    assert found.std() == pytest.approx(5 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 2, "beats random"), (-2, -0.1, "below random"), (-1, 1, "not distinguishable")]
)
def test_a_verdict_needs_an_interval_without_zero(low: float, high: float, said: str) -> None:
    found = Interval((low + high) / 2, float(low), float(high), 0.5, 1.0)
    assert verdict(found, "beats random", "below random") == said
