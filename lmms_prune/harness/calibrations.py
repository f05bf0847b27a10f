"""Schedules found by ``lmms-prune calibrate``, stored for ``schedule=auto``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_prune.record.files import write


class StoredCalibrationError(ValueError):
    """A stored calibration that cannot be used; the message names its file."""


def calibration_file(pretrained: str, budget: str, home: Path | None = None, adapter: str | None = None) -> Path:
    """Return the file that stores the calibration of a checkpoint at a budget; a local checkpoint is identified by its path.

    Args:
        pretrained, budget: as in --model_args.
        adapter: as ``peft`` in --model_args.
        home: folder to use instead of ``~/.cache/lmms-prune``.
    """
    names = [str(Path(name).resolve()) if os.path.isdir(name) else name for name in (pretrained, adapter) if name]
    folder = Path.home() / ".cache" / "lmms-prune" if home is None else home
    return (
        folder / "calibrations" / (re.sub(r"[^A-Za-z0-9.]+", "-", f"{'+'.join(names)}@{budget}").strip("-") + ".json")
    )


def keep_calibration(path: Path, calibration: Mapping[str, Any]) -> None:
    """Write a calibration, a mapping with at least the key ``schedule``.

    Raises:
        WriteError: the file cannot be written.
    """
    write(path, json.dumps(calibration, indent=1))


def kept_schedule(path: Path) -> str | None:
    """Return the stored schedule; None if the file does not exist.

    Raises:
        StoredCalibrationError: the file exists but holds no schedule.
    """
    if not os.path.isfile(path):  # also False for a path that is too long to exist
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
