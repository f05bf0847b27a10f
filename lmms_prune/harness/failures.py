"""The reason why a run of lmms-eval failed, read from its output, and which other runs will fail for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmms_prune.compat.lmms_eval import RUN_FAILED, through_a_task
from lmms_prune.record.files import regular

OURS = "lmms-prune: error:"
Scope = Literal["run", "checkpoint", "environment"]
"""Runs that share a failure: this run only, all of the checkpoint, or all in this Python environment."""
NOTES: dict[Scope, str] = {
    "checkpoint": "lmms-prune: every run of this checkpoint fails like this:",
    "environment": "lmms-prune: every run in this environment fails like this:",
}
"""Lines before our own error in a log, for readers and for `read_failure`."""
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b")
_IMPORT = re.compile(r"(ImportError|ModuleNotFoundError)\b")
_TRACEBACK = "Traceback (most recent call last):"


@dataclass(frozen=True)
class Failure:
    """Why a run failed.

    Args:
        reason: this package's own message (possibly several lines), else the last error, else the last line; "" if nothing
            was printed.
        ours: whether this package ended the run, rather than lmms-eval or a library.
        scope: which other runs will fail for the same reason.
    """

    reason: str
    ours: bool
    scope: Scope


def read_failure(text: str, *, before_any_run: bool = False) -> Failure:
    """Return the failure that ended the process with the output `text`.

    Args:
        text: the whole output, errors included.
        before_any_run: whether the process ended before any run began, so that no run is the cause.
    """
    text = text.strip()
    if OURS in text:
        scope: Scope = next((scope for scope, note in NOTES.items() if note in text), "run")
        return Failure(text[text.rindex(OURS) + len(OURS) :].strip(), True, scope)
    lines = [line.strip() for line in text.splitlines()]
    reason = next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "")
    # An import inside a task's own code fails only for that task.
    everywhere = _IMPORT.match(reason) and not through_a_task(text.rpartition(_TRACEBACK)[2])
    return Failure(reason, False, "environment" if before_any_run or everywhere else "run")


def first_run(text: str) -> tuple[str, bool]:
    """The output up to where lmms-eval reports its first failed run, and whether it reports one."""
    before, failed, _ = text.partition(RUN_FAILED)
    return before, bool(failed)


def read_log(log: Path, *, before_any_run: bool = False) -> Failure:
    """Return the failure that a log file shows; see `read_failure`."""
    return read_failure(regular(log).read_text(encoding="utf-8", errors="replace"), before_any_run=before_any_run)
