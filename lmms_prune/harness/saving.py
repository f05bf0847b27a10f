"""Reading back the files that lmms-eval saves: if saving fails, lmms-eval only logs it and exits with 0."""

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
    """Results that were not saved completely; the message names the file and says why."""


def refuse_unwritable(tracker: Any) -> None:
    """Refuse an unwritable results folder before any weights are loaded.

    Args:
        tracker: lmms-eval's object that saves the evaluation's results.

    Raises:
        ArgumentError: the folder cannot be written to.
    """
    folder = saved_below(tracker)
    if folder is None:
        return
    above = folder.absolute()
    while not os.path.lexists(above):
        above = above.parent
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        where = "" if above == folder.absolute() else f" in {above}"
        raise ArgumentError(
            f"--output_path {folder} cannot be written to{where}: {error.strerror}; name another folder."
        ) from error


def read_back(tracker: Any) -> None:
    """Make an evaluation's tracker check the files that it saves; an incomplete file ends the command.

    Args:
        tracker: the tracker of the evaluation being set up; no other one is changed.
    """
    if saved_below(tracker) is None:
        return
    results, samples = tracker.save_results_aggregated, tracker.save_results_samples

    def save_results(*args: Any, **kwargs: Any) -> None:
        with plain_errors(SavingError):
            _saved(lambda: results(*args, **kwargs), lambda: saved_file(tracker, SUFFIX[1:]), read_results_file)

    def save_samples(task_name: str, samples_: Any = None, **kwargs: Any) -> None:
        rows = kwargs.pop("samples", samples_)

        def check_samples(path: Path) -> None:
            lines = read_text(path).splitlines()
            if len([json.loads(line) for line in lines]) != len(rows):
                raise ResultsError(
                    f"it holds {len(lines)} samples, not the {len(rows)} of this run; give each run an --output_path of its own."
                )

        with plain_errors(SavingError):
            _saved(
                lambda: samples(task_name=task_name, samples=rows, **kwargs),
                lambda: saved_file(tracker, f"samples_{task_name}.jsonl"),
                check_samples,
            )

    tracker.save_results_aggregated, tracker.save_results_samples = save_results, save_samples


def _saved(save: Callable[[], None], name: Callable[[], Path], read: Callable[[Path], Any]) -> None:
    """Let lmms-eval save a file, and check it by reading.

    Raises:
        SavingError: the file is not complete.
    """
    errors: list[OSError] = []

    def record_error(_: Any) -> None:
        if isinstance(error := sys.exc_info()[1], OSError):
            errors.append(error)

    # lmms-eval names the error only in its log; inside its handler the exception is still available.
    sink = logger.add(record_error, level="INFO", format="{message}", filter="lmms_eval")
    try:
        save()
    finally:
        logger.remove(sink)
    path = name()
    try:
        read(path)
    except (OSError, ValueError) as error:
        why = errors[0].strerror or str(errors[0]) if errors else getattr(error, "strerror", None) or str(error)
        if not errors and not isinstance(error, OSError) and path.name.endswith(SUFFIX):
            # lmms-eval's buffer is flushed when the file is closed, where errors are no longer logged.
            why = "it is cut short, as on a full disk"
        # An incomplete file is removed. Too many samples without an error belong to another run of the same second; they stay.
        if path.is_file() and (errors or path.name.endswith(SUFFIX)):
            path.unlink()
        raise SavingError(
            f"{path} was not saved whole: {why.rstrip('.')}. When that is fixed, run it again; a journal keeps the answers."
        ) from error
