"""What lmms-eval's command has saved, read back: it logs that it could not save results, and exits with 0."""

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
    """Results that were not saved whole; the message names the file and says why."""


def refuse_unwritable(tracker: Any) -> None:
    """Know before any weights are loaded that nothing can be saved.

    Args:
        tracker: what saves the evaluation's results, of lmms-eval.

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
    """Have an evaluation's tracker look at what it has saved; what is not there whole ends the command.

    Args:
        tracker: of the evaluation that is being set up; no other one is touched.
    """
    if saved_below(tracker) is None:
        return
    results, samples = tracker.save_results_aggregated, tracker.save_results_samples

    def save_results(*given: Any, **named: Any) -> None:
        with plain_errors(SavingError):
            _saved(lambda: results(*given, **named), lambda: saved_file(tracker, SUFFIX[1:]), read_results_file)

    def save_samples(task_name: str, samples_: Any = None, **named: Any) -> None:
        rows = named.pop("samples", samples_)

        def whole(path: Path) -> None:
            lines = read_text(path).splitlines()
            if len([json.loads(line) for line in lines]) != len(rows):
                raise ResultsError(
                    f"it holds {len(lines)} samples, not the {len(rows)} of this run; give each run an --output_path of its own."
                )

        with plain_errors(SavingError):
            _saved(
                lambda: samples(task_name=task_name, samples=rows, **named),
                lambda: saved_file(tracker, f"samples_{task_name}.jsonl"),
                whole,
            )

    tracker.save_results_aggregated, tracker.save_results_samples = save_results, save_samples


def _saved(save: Callable[[], None], name: Callable[[], Path], read: Callable[[Path], Any]) -> None:
    """Let lmms-eval save a file, and read it.

    Raises:
        SavingError: it is not whole.
    """
    errors: list[OSError] = []

    def heard(_: Any) -> None:
        if isinstance(error := sys.exc_info()[1], OSError):
            errors.append(error)

    # It says why in its log alone, from where it has caught the error.
    sink = logger.add(heard, level="INFO", format="{message}", filter="lmms_eval")
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
            # What lmms-eval's buffer holds is written when nobody hears of an error any more.
            why = "it is cut short, as on a full disk"
        # Half of a file helps nobody. Too many samples without an error are another run's of the same second, too.
        if path.is_file() and (errors or path.name.endswith(SUFFIX)):
            path.unlink()
        raise SavingError(
            f"{path} was not saved whole: {why.rstrip('.')}. When that is mended, run it again; a journal keeps the answers."
        ) from error
