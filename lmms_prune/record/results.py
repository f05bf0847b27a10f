"""Finds and reads lmms-eval's results files, and recognises damaged or missing ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_prune.record.files import find
from lmms_prune.record.stored import stored_text

CIRCLE = 1_000_000  # MMBench repeats a question with rotated options, under its index plus a multiple of this
SUFFIX = "_results.json"
SUBMISSIONS = "submissions"
"""Folder into which lmms-eval's tasks write their submission files; some of these are named like results files."""
# Only lmms-eval names files like this; the digits are the date and time at which the run began.
_STAMPED = re.compile(r"(\d{8}_\d{6})_(results\.json|samples_.+\.jsonl)")


class ResultsError(ValueError):
    """A results file without valid results; the message says what is wrong, but does not name the file."""


def results_files(folder: Path, unreadable: Callable[[OSError], None]) -> list[Path]:
    """Find all files below `folder` that are named like results files, except the submission files of tasks.

    Args:
        folder: where to search. Hidden folders are skipped, because a running sweep writes into them.
        unreadable: called for each folder that cannot be read.
    """
    return [path for path in find(folder, f"*{SUFFIX}", unreadable) if path.parent.name != SUBMISSIONS]


def orphans(folder: Path, unreadable: Callable[[OSError], None]) -> dict[Path, Path]:
    """Map each missing results file below `folder` to a samples file of the same run."""
    missing: dict[Path, Path] = {}
    for path in find(folder, "*_samples_*.jsonl", unreadable):
        stamp = _STAMPED.fullmatch(path.name)
        if stamp is not None and not (results := path.with_name(stamp[1] + SUFFIX)).exists():
            missing.setdefault(results, path)
    return missing


def read_results_file(path: Path, *, named: bool = False) -> dict[str, Any] | None:
    """Read a results file: a mapping with ``config`` and ``results``, which name the same tasks.

    Args:
        path: path of the file.
        named: whether the user named the file as a results file. Otherwise only the file's name shows whose it is.

    Returns:
        None for valid JSON of another program that only has the name of a results file.

    Raises:
        ResultsError: the file must be from lmms-eval, but is truncated or damaged.
        OSError: it is not a regular file, or cannot be read.
    """
    try:
        content = _printable(json.loads(stored_text(path)))
    except json.JSONDecodeError as error:
        raise ResultsError(
            f"incomplete JSON ({error}); the run was cut short while it wrote the file. Run it again."
        ) from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"not a text file ({error}).") from None
    except (RecursionError, ValueError) as error:
        raise ResultsError(f"JSON that cannot be read ({error}).") from None
    if not isinstance(content, dict) or "config" not in content:
        if not named and _STAMPED.fullmatch(path.name) is None:
            return None
        kind = f"a mapping of {', '.join(content) or 'nothing'}" if isinstance(content, dict) else repr(content)
        raise ResultsError(f"damaged: lmms-eval writes a mapping with 'config' and 'results', not {_short(kind)}.")
    if problem := _problem(content):
        raise ResultsError(f"damaged: {problem}")
    return content


def _problem(content: dict[str, Any]) -> str:
    results = content.get("results")
    if not isinstance(content["config"], dict) or not isinstance(results, dict):
        return "its 'config' and 'results' must be mappings."
    if not results:
        return "its 'results' contain no task."
    configs = content.get("configs")
    missing = [task for task in configs if task not in results] if isinstance(configs, dict) else []
    return f"it was evaluated on '{missing[0]}', which 'results' do not contain." if missing else ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _printable(value: Any) -> Any:
    """Replace lone surrogates in a JSON value; JSON's \\ud83d creates them, and no file or terminal can encode them."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(part) for name, part in value.items()}
    return value
