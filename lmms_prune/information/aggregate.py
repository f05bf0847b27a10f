"""Aggregates measured information: per sample and layer, and per task and layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

CONFIDENCE = 0.95


def interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over samples; with one sample or equal values, the mean itself."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2 or np.ptp(data) == 0:
        return float(data.mean()), float(data.mean())
    random = np.random.default_rng(seed)
    result = bootstrap(
        (data,), np.mean, n_resamples=resamples, method="percentile", rng=random, confidence_level=CONFIDENCE
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def by_sample(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per sample and layer: mean and variance of information over visual tokens, p_text, p_full, divergence.

    The value of a block of tokens is counted once for each of its tokens.
    """
    weighted = rows.assign(sum=rows.information * rows.tokens, square=rows.information**2 * rows.tokens)
    keys = ["task", "sample", "layer"]
    table = weighted.groupby(keys, sort=False).agg(
        tokens=("tokens", "sum"),
        sum=("sum", "sum"),
        square=("square", "sum"),
        p_text=("p_text", "first"),
        p_full=("p_full", "first"),
        divergence=("divergence", "first"),
    )
    mean = table["sum"] / table.tokens
    # Rounding can make a variance of 0 slightly negative.
    table = table.assign(mean=mean, variance=(table.square / table.tokens - mean**2).clip(lower=0))
    return table.reset_index()[[*keys, "tokens", "mean", "variance", "p_text", "p_full", "divergence"]]


def by_layer(samples: pd.DataFrame, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One line per task and layer: the columns of `by_sample` averaged over samples, and the mean's 95 % interval."""
    lines: list[dict[str, Any]] = []
    for (task, layer), group in samples.groupby(["task", "layer"], sort=False):
        low, high = interval(group["mean"].tolist(), resamples, seed)
        averages = group[["mean", "variance", "p_text", "p_full", "divergence"]].mean().to_dict()
        lines.append({"task": task, "layer": layer, "samples": len(group), **averages, "low": low, "high": high})
    order = ["task", "layer", "samples", "mean", "low", "high", "variance", "p_text", "p_full", "divergence"]
    return pd.DataFrame(lines)[order].sort_values(["task", "layer"], ignore_index=True)
