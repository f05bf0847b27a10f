"""Paired statistics over samples: resampling, exact tests, and what a sample of this size could have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, norm

from lmms_prune.leaderboard.samples import Samples, ratios

CONFIDENCE = 0.95
# Two-sided alpha of 5 % and power of 80 %: a true difference of this many standard errors is found four times of five.
DETECTABLE = float(norm.ppf(0.975) + norm.ppf(0.80))
_CHUNK = 4_000_000  # drawn units at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """A difference or a level with its 95 % percentile interval, and how often resamples fell on either side of zero.

    Args:
        value: of the data.
        low, high: of the interval.
        p: two-sided, of no difference; 1/(resamples + 1) at least.
        error: the standard error.
    """

    value: float
    low: float
    high: float
    p: float
    error: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def resampled(runs: Sequence[Samples], many: int, rng: np.random.Generator) -> Float[np.ndarray, "many runs"]:
    """Scores of runs of the same documents on `many` samples of their units, drawn with replacement within strata.

    Every run is scored on the same draws, so differences of columns are paired.

    Args:
        runs: with equal signatures.
        many: resamples.
        rng: decides the draws.
    """
    num, den = (np.stack([getattr(run, name) for run in runs], axis=1) for name in ("num", "den"))
    total = np.zeros((many, len(runs)))
    for stratum in range(int(runs[0].stratum.max()) + 1):
        chosen = runs[0].stratum == stratum
        total += _resampled_ratio(num[chosen], den[chosen], many, rng)
    return total


def _resampled_ratio(
    num: Float[np.ndarray, "units runs"], den: Float[np.ndarray, "units runs"], many: int, rng: np.random.Generator
) -> Float[np.ndarray, "many runs"]:
    units = len(num)
    parts = []
    for start in range(0, many, max(1, _CHUNK // units)):
        rows = min(max(1, _CHUNK // units), many - start)
        draws = rng.integers(0, units, size=(rows, units)) + units * np.arange(rows)[:, None]
        weights = np.bincount(draws.ravel(), minlength=rows * units).reshape(rows, units).astype(float)
        parts.append(ratios(weights @ num, weights @ den))
    return np.concatenate(parts)


def interval(value: float, draws: Float[np.ndarray, " many"]) -> Interval:
    """The percentile interval of resampled differences around the difference `value` of the data."""
    # Sums of the same numbers in another order differ in the last digits; that is no difference.
    draws = np.round(draws[np.isfinite(draws)], 9)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (side + 1) / (len(draws) + 1))
    return Interval(float(value), float(low), float(high), p, float(draws.std()))


def over_seeds(
    draws: Float[np.ndarray, "many runs"], picks: Int[np.ndarray, "many runs"]
) -> Float[np.ndarray, " many"]:
    """The mean over runs that differ in their seed, with the seeds drawn with replacement too: `picks` says which."""
    return np.take_along_axis(draws, picks, axis=1).mean(axis=1)


def mean_ratio(
    scores: Mapping[str, Float[np.ndarray, " many"]], unpruned: Mapping[str, Float[np.ndarray, " many"]]
) -> Float[np.ndarray, " many"]:
    """Rel on each resample, in percent: a benchmark does not count where the unpruned run scores nothing."""
    shares = [
        np.where(whole > 0, scores[task] / np.where(whole > 0, whole, 1), np.nan) for task, whole in unpruned.items()
    ]
    counted = np.isfinite(shares).sum(axis=0)
    return 100 * np.divide(np.nansum(shares, axis=0), counted, out=np.full(counted.shape, np.nan), where=counted > 0)


def flips(before: Bool[np.ndarray, " units"], after: Bool[np.ndarray, " units"]) -> tuple[int, int]:
    """How many units turned from right to wrong, and from wrong to right."""
    return int((before & ~after).sum()), int((~before & after).sum())


def mcnemar(worse: int, better: int) -> float:
    """The exact two-sided p of as many flips in the two directions, if both were equally likely."""
    return float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """The p values corrected for their number by Holm's method; at most 1, in the order given."""
    order = np.argsort(pvalues)
    stepped = np.maximum.accumulate([(len(order) - rank) * pvalues[i] for rank, i in enumerate(order)])
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in corrected]


def detectable(error: float) -> float | None:
    """The smallest true difference that a paired comparison of this standard error finds with 80 % power at 5 %.

    For a score that is the share of right units the standard error is sqrt(d - D²) / sqrt(n), with d the share of units
    that flipped and D the difference. None if nothing differed: then the samples do not tell.
    """
    return DETECTABLE * error if error > 0 else None


def verdict(compared: Interval, above: str, below: str) -> str:
    """In words: `above` or `below` only if the interval excludes zero."""
    return above if compared.low > 0 else below if compared.high < 0 else "not distinguishable"
