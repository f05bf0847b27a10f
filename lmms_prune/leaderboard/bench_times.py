"""Reads the times that ``lmms-prune bench --tasks … --json`` printed, for the paper's Table 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.published import published_costs
from lmms_prune.leaderboard.rows import BenchTimes
from lmms_prune.record.files import read_text


class BenchTimesError(ValueError):
    """A file holds no times of ``bench``; the message names it."""


def read_times(path: Path) -> BenchTimes:
    """Read the last line of a file as the output of ``bench --tasks … --json``.

    Raises:
        BenchTimesError: the file cannot be read, is no such output, or has no row of Table 3.
    """
    try:
        lines = read_text(path).strip().splitlines()
        content: dict[str, Any] = json.loads(lines[-1] if lines else "")
        times = {
            str(row["schedule"]): (_milliseconds(row["cuda_ms"]), _milliseconds(row["latency_ms"]))
            for row in content["paper"]
        }
        source = f"{path}, {content['model']}, {content['clock']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise BenchTimesError(
            f"--bench {path}: this is not the output of `lmms-prune bench … --tasks … --json` ({reason})."
        ) from error
    if not times:
        raise BenchTimesError(
            f"--bench {path}: none of its schedules is a row of the paper's Table 3, which has "
            f"{published_costs()[0].model} alone; time the presets that docs/commands.md names."
        )
    return BenchTimes(source, times)


def _milliseconds(value: Any) -> float | None:
    """Check a time: a number that is not negative, or None for what was not measured."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{value!r} is no time in milliseconds")
    return float(value)
