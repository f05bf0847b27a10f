"""The interval of a measured difference. Without numpy, so that what only prints a table need not wait for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile interval, and the p value of zero.

    Args:
        value: the value on the data itself.
        low, high: ends of the interval.
        p: two-sided p value of no difference, from the resamples on either side of zero; at least 1/(resamples + 1).
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
