"""Paired statistics over samples: resampling, exact tests, and the smallest detectable difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.samples import Samples, ratios

CONFIDENCE = 0.95
# With a two-sided alpha of 5 %, a true difference of this many standard errors is found with 80 % power.
DETECTABLE = 2.8015852181129683  # norm.ppf(0.975) + norm.ppf(0.80); scipy.stats takes half a second to import
_CHUNK = 4_000_000  # drawn units at a time: 32 MB


def resampled(runs: Sequence[Samples], resamples: int, rng: np.random.Generator) -> Float[np.ndarray, "resamples runs"]:
    """Score runs of the same documents on `resamples` samples of their units, drawn with replacement within strata.

    Every run is scored on the same draws, so that differences of columns are paired.

    Args:
        runs: samples with equal signatures.
        resamples: number of resamples.
        rng: the generator of the draws.
    """
    num, den = (np.stack([getattr(run, name) for run in runs], axis=1) for name in ("num", "den"))
    total = np.zeros((resamples, len(runs)))
    for stratum in range(int(runs[0].stratum.max()) + 1):
        chosen = runs[0].stratum == stratum
        total += _resampled_ratio(num[chosen], den[chosen], resamples, rng)
    return total


def _resampled_ratio(
    num: Float[np.ndarray, "units runs"], den: Float[np.ndarray, "units runs"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples runs"]:
    units = len(num)
    parts = []
    for start in range(0, resamples, max(1, _CHUNK // units)):
        rows = min(max(1, _CHUNK // units), resamples - start)
        draws = rng.integers(0, units, size=(rows, units)) + units * np.arange(rows)[:, None]
        weights = np.bincount(draws.ravel(), minlength=rows * units).reshape(rows, units).astype(float)
        parts.append(ratios(weights @ num, weights @ den))
    return np.concatenate(parts)


def interval(value: float, draws: Float[np.ndarray, " resamples"]) -> Interval:
    """Return the percentile interval of resampled differences; `value` is the difference on the data."""
    # Sums of the same numbers in another order differ in the last digits; rounding makes them equal again.
    draws = np.round(draws[np.isfinite(draws)], 9)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = min(1.0, 2 * (side + 1) / (len(draws) + 1))
    return Interval(float(value), float(low), float(high), p, float(draws.std()))


def over_seeds(
    draws: Float[np.ndarray, "resamples runs"], picks: Int[np.ndarray, "resamples runs"]
) -> Float[np.ndarray, " resamples"]:
    """Average over runs that differ in seed; the seeds are resampled too, as `picks` says."""
    return np.take_along_axis(draws, picks, axis=1).mean(axis=1)


def mean_ratio(
    scores: Mapping[str, Float[np.ndarray, " resamples"]], unpruned: Mapping[str, Float[np.ndarray, " resamples"]]
) -> Float[np.ndarray, " resamples"]:
    """Return Rel on each resample, in percent; a benchmark counts only where the unpruned run scores above 0."""
    shares = [
        np.where(unpruned_scores > 0, scores[task] / np.where(unpruned_scores > 0, unpruned_scores, 1), np.nan)
        for task, unpruned_scores in unpruned.items()
    ]
    counted = np.isfinite(shares).sum(axis=0)
    return 100 * np.divide(np.nansum(shares, axis=0), counted, out=np.full(counted.shape, np.nan), where=counted > 0)


def flips(before: Bool[np.ndarray, " units"], after: Bool[np.ndarray, " units"]) -> tuple[int, int]:
    """Count the units that flipped from right to wrong, and from wrong to right."""
    return int((before & ~after).sum()), int((~before & after).sum())


def mcnemar(worse: int, better: int) -> float:
    """Return the exact two-sided p value of these flips if both directions were equally likely."""
    # Imported here, because the commands that compute no p value need not wait for it; it is the test of
    # scipy.stats.binomtest without the rest of scipy.stats, whose import takes half a second.
    from scipy.special import betaincc

    fewer, total = min(worse, better), worse + better
    return 1.0 if worse == better else min(1.0, 2 * float(betaincc(fewer + 1, total - fewer, 0.5)))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Correct p values for their number by Holm's method; at most 1, in the given order."""
    order = np.argsort(pvalues)
    stepped = np.maximum.accumulate([(len(order) - rank) * pvalues[i] for rank, i in enumerate(order)])
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in corrected]


def detectable(error: float) -> float | None:
    """Return the smallest true difference that a comparison of this standard error finds with 80 % power at 5 %.

    For a score that is the share of right units the standard error is sqrt(d - D²) / sqrt(n), with d the share of units
    that flipped and D the difference. None if nothing differed, since the standard error is then unknown.
    """
    return DETECTABLE * error if error > 0 else None


def verdict(compared: Interval, above: str, below: str) -> str:
    """Return `above` or `below` if the interval excludes zero, else "not distinguishable"."""
    return above if compared.low > 0 else below if compared.high < 0 else "not distinguishable"
