"""Why a run of lmms-eval failed, read from what it printed; and which other runs will fail for the same reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmms_prune.compat.lmms_eval import through_a_task
from lmms_prune.record.files import regular

OURS = "lmms-prune: error:"
Scope = Literal["run", "checkpoint", "environment"]
"""Which runs share a failure: that run alone, all of its checkpoint, or all with this Python and its packages."""
NOTES: dict[Scope, str] = {
    "checkpoint": "lmms-prune: every run of this checkpoint fails like this:",
    "environment": "lmms-prune: every run in this environment fails like this:",
}
"""What stands before our own error in a log, for people and for `read_failure`."""
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b")
_IMPORT = re.compile(r"(ImportError|ModuleNotFoundError)\b")
_TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class Failure:
    """Why a run failed.

    Args:
        reason: this package's own message, which may take several lines; else the last error, else the last line, "" where
            nothing was printed.
        ours: whether this package ended the run; else lmms-eval or a library of it did.
        scope: which other runs will fail for this reason.
    """

    reason: str
    ours: bool
    scope: Scope


def read_failure(text: str, *, before_any_run: bool = False) -> Failure:
    """The failure that ended what printed `text`.

    Args:
        text: all that was printed, errors included.
        before_any_run: whether the process ended before it came to a run, so that no run can be to blame.
    """
    text = text.strip()
    if OURS in text:
        scope: Scope = next((scope for scope, note in NOTES.items() if note in text), "run")
        return Failure(text[text.rindex(OURS) + len(OURS) :].strip(), True, scope)
    lines = [line.strip() for line in text.splitlines()]
    reason = next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "")
    # What a task imports for itself, other tasks can do without.
    elsewhere = _IMPORT.match(reason) and not through_a_task(text.rpartition(_TRACEBACK)[2])
    return Failure(reason, False, "environment" if before_any_run or elsewhere else "run")


def read_log(log: Path, *, before_any_run: bool = False) -> Failure:
    """As `read_failure`, of a file."""
    return read_failure(regular(log).read_text(encoding="utf-8", errors="replace"), before_any_run=before_any_run)
