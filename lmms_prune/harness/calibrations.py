"""Schedules that ``lmms-prune calibrate`` has found, kept for ``schedule=auto``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def calibration_file(pretrained: str, budget: str, home: Path | None = None) -> Path:
    """Where the calibration of a checkpoint at a budget is kept; a local checkpoint goes by its whole path.

    Args:
        pretrained: as in --model_args.
        budget: as in --model_args.
        home: instead of ``~/.cache/lmms-prune``.
    """
    name = str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained
    folder = Path.home() / ".cache" / "lmms-prune" if home is None else home
    return folder / "calibrations" / (re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}@{budget}").strip("-") + ".json")


def keep_calibration(path: Path, found: Mapping[str, Any]) -> None:
    """Write a calibration in one move; `found` has at least the key ``schedule``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(partial, path)


def kept_schedule(path: Path) -> str | None:
    """The schedule that was found, or None where none was kept."""
    if not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["schedule"])
