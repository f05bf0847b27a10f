"""What measured information says on the whole: layer by layer, and of what methods keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

CONFIDENCE = 0.95


def interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over samples; the mean itself where there is one sample, or all are equal."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) == 0:
        return float(data.mean()), float(data.mean())
    random = np.random.default_rng(seed)
    found = bootstrap(
        (data,), np.mean, n_resamples=resamples, method="percentile", rng=random, confidence_level=CONFIDENCE
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def by_sample(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a sample and layer: mean and variance of information over its visual tokens, p_text, p_full, divergence.

    A block's value counts once for each of its tokens.
    """
    weighted = rows.assign(sum=rows.information * rows.tokens, square=rows.information**2 * rows.tokens)
    keys = ["task", "sample", "layer"]
    said = weighted.groupby(keys, sort=False).agg(
        tokens=("tokens", "sum"),
        sum=("sum", "sum"),
        square=("square", "sum"),
        p_text=("p_text", "first"),
        p_full=("p_full", "first"),
        divergence=("divergence", "first"),
    )
    mean = said["sum"] / said.tokens
    said = said.assign(mean=mean, variance=(said.square / said.tokens - mean**2).clip(lower=0))
    return said.reset_index()[[*keys, "tokens", "mean", "variance", "p_text", "p_full", "divergence"]]


def by_layer(samples: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """A line a task and layer: what `by_sample` has, averaged over samples, with the interval of the mean information."""
    made: list[dict[str, Any]] = []
    for (task, layer), group in samples.groupby(["task", "layer"], sort=False):
        low, high = interval(group["mean"].tolist(), resamples, seed)
        averages = group[["mean", "variance", "p_text", "p_full", "divergence"]].mean().to_dict()
        made.append({"task": task, "layer": layer, "samples": len(group), **averages, "low": low, "high": high})
    order = ["task", "layer", "samples", "mean", "low", "high", "variance", "p_text", "p_full", "divergence"]
    return pd.DataFrame(made)[order].sort_values(["task", "layer"], ignore_index=True)
