"""Schedules that ``lmms-prune calibrate`` has found, kept for ``schedule=auto``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_prune.record.files import write


class StoredCalibrationError(ValueError):
    """A calibration's file that cannot be used; the message names it."""


def calibration_file(pretrained: str, budget: str, home: Path | None = None) -> Path:
    """Where the calibration of a checkpoint at a budget is kept; a local checkpoint goes by its whole path.

    Args:
        pretrained: as in --model_args.
        budget: as in --model_args.
        home: instead of ``~/.cache/lmms-prune``.
    """
    name = str(Path(pretrained).resolve()) if os.path.isdir(pretrained) else pretrained
    folder = Path.home() / ".cache" / "lmms-prune" if home is None else home
    return folder / "calibrations" / (re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}@{budget}").strip("-") + ".json")


def keep_calibration(path: Path, found: Mapping[str, Any]) -> None:
    """Write a calibration; `found` has at least the key ``schedule``.

    Raises:
        WriteError: that is not possible.
    """
    write(path, json.dumps(found, indent=1))


def kept_schedule(path: Path) -> str | None:
    """The schedule that was found, or None where none was kept.

    Raises:
        StoredCalibrationError: the file exists but holds no schedule.
    """
    if not os.path.isfile(path):  # also False for what is too long to be a name
        return None
    try:
        schedule = json.loads(path.read_text(encoding="utf-8"))["schedule"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoredCalibrationError(f"{path} cannot be read ({error!r}); remove it and calibrate again.") from None
    if not isinstance(schedule, str):
        raise StoredCalibrationError(
            f"{path}: its schedule is {schedule!r}, which is no text; remove it and calibrate again."
        )
    return schedule
