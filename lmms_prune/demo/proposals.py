"""What ``lmms-prune calibrate`` proposes for the demo's models, as stored with their weights by ``docs/proposals.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lmms_prune.demo.models import MODELS, DemoError
from lmms_prune.schedule import Schedule

PROPOSALS = Path(__file__).with_name("weights") / "proposals.json"
_FIX = "install lmms-prune again."


@dataclass(frozen=True)
class StoredProposal:
    """What ``calibrate`` found for one model.

    Args:
        schedule: the schedule that lost least.
        budget: its budget, as written in ``--budget``.
        horizon: the layer from which on removing all visual tokens costs next to nothing.
    """

    schedule: Schedule
    budget: str
    horizon: int

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> StoredProposal:
        """Read what was stored of one run of `lmms-prune calibrate --json`.

        Raises:
            KeyError, TypeError, ValueError: the record has another form.
        """
        return cls(Schedule.parse(record["schedule"]), str(record["budget"]), int(record["horizon"]))


@cache
def proposals(path: Path = PROPOSALS) -> dict[str, StoredProposal]:
    """Return the stored proposals, by the model's folder.

    Raises:
        DemoError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {model.folder: StoredProposal.read(content[model.folder]) for model in MODELS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"the demo lacks {path} ({type(error).__name__}: {error}): {_FIX}") from error
