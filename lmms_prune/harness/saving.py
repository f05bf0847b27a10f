"""Checks the files that lmms-eval saves by reading them back.

If saving fails, lmms-eval only logs a warning and exits with code 0.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loguru import logger

from lmms_prune.compat.lmms_eval import saved_below, saved_file
from lmms_prune.harness.arguments import ArgumentError, plain_errors
from lmms_prune.record.files import read_text
from lmms_prune.record.results import SUFFIX, ResultsError, read_results_file


class SavingError(RuntimeError):
    """Results were not saved completely; the message names the file and the reason."""


def refuse_unwritable(tracker: Any) -> None:
    """Refuse an unwritable results folder before any weights are loaded.

    Args:
        tracker: lmms-eval's `EvaluationTracker`, which saves the results.

    Raises:
        ArgumentError: the folder cannot be written to.
    """
    folder = saved_below(tracker)
    if folder is None:
        return
    # lmms-eval makes missing folders when it saves, so the closest existing one must be writable.
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        where = "" if existing == folder.absolute() else f" in {existing}"
        raise ArgumentError(
            f"--output_path {folder} cannot be written to{where}: {error.strerror}; name another folder."
        ) from error


def read_back(tracker: Any) -> None:
    """Make a tracker check each file after saving it; an incomplete file ends the command.

    Args:
        tracker: the tracker of the evaluation that is being set up. Other trackers are not changed.
    """
    if saved_below(tracker) is None:
        return
    original_save_results, original_save_samples = tracker.save_results_aggregated, tracker.save_results_samples

    def save_results(*args: Any, **kwargs: Any) -> None:
        with plain_errors(SavingError):
            _save_and_check(
                lambda: original_save_results(*args, **kwargs),
                lambda: saved_file(tracker, SUFFIX[1:]),
                read_results_file,
            )

    def save_samples(task_name: str, samples_: Any = None, **kwargs: Any) -> None:
        rows = kwargs.pop("samples", samples_)

        def check_samples(path: Path) -> None:
            lines = read_text(path).splitlines()
            if len([json.loads(line) for line in lines]) != len(rows):
                raise ResultsError(
                    f"it holds {len(lines)} samples, not the {len(rows)} of this run; give each run an --output_path of its own."
                )

        with plain_errors(SavingError):
            _save_and_check(
                lambda: original_save_samples(task_name=task_name, samples=rows, **kwargs),
                lambda: saved_file(tracker, f"samples_{task_name}.jsonl"),
                check_samples,
            )

    tracker.save_results_aggregated, tracker.save_results_samples = save_results, save_samples


def _save_and_check(save: Callable[[], None], name: Callable[[], Path], read: Callable[[Path], Any]) -> None:
    """Let lmms-eval save a file, then check the file by reading it.

    Args:
        save: saves the file.
        name: returns the file's path; called after `save`, which sets the date in the name.
        read: raises OSError or ValueError if the file is not complete.

    Raises:
        SavingError: the file is not complete.
    """
    errors: list[OSError] = []

    def record_error(_: Any) -> None:
        if isinstance(error := sys.exc_info()[1], OSError):
            errors.append(error)

    # lmms-eval catches the error and only logs it. While it logs, the exception is still the current one of the thread.
    sink = logger.add(record_error, level="INFO", format="{message}", filter="lmms_eval")
    try:
        save()
    finally:
        logger.remove(sink)
    path = name()
    try:
        read(path)
    except (OSError, ValueError) as error:
        reason = errors[0].strerror or str(errors[0]) if errors else getattr(error, "strerror", None) or str(error)
        if not errors and not isinstance(error, OSError) and path.name.endswith(SUFFIX):
            # lmms-eval never closes the results file itself. Python does on deletion, and ignores its errors.
            reason = "it is cut short, as on a full disk"
        # An incomplete file is removed. A samples file with too many lines but no error stays: lmms-eval appends to samples
        # files, so the other lines belong to a run that started in the same second.
        if path.is_file() and (errors or path.name.endswith(SUFFIX)):
            path.unlink()
        raise SavingError(
            f"{path} was not saved completely: {reason.rstrip('.')}. Fix the cause, then run the same command again; with a "
            "journal, finished answers are kept."
        ) from error
