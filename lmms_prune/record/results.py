"""Finding and reading lmms-eval's results files, and recognising damaged or missing ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmms_prune.record.files import find, read_text

SUFFIX = "_results.json"
SUBMISSIONS = "submissions"
"""The folder into which lmms-eval's tasks write details of their own; some are called results, too."""
# What no one but lmms-eval calls its files: the second when a run began.
_STAMPED = re.compile(r"(\d{8}_\d{6})_(results\.json|samples_.+\.jsonl)")


class ResultsError(ValueError):
    """A results file without valid results; the message says what it contains instead, without the file's name."""


def results_files(folder: Path, unreadable: Callable[[OSError], None]) -> list[Path]:
    """All files below `folder` that are called results, but what tasks wrote for themselves.

    Args:
        folder: whose hidden folders, in which a sweep is at work, are left out.
        unreadable: is told of each folder that cannot be read.
    """
    return [path for path in find(folder, f"*{SUFFIX}", unreadable) if path.parent.name != SUBMISSIONS]


def orphans(folder: Path, unreadable: Callable[[OSError], None]) -> dict[Path, Path]:
    """Map each missing results file below `folder` to a samples file that was written with it."""
    missing: dict[Path, Path] = {}
    for path in find(folder, "*_samples_*.jsonl", unreadable):
        stamp = _STAMPED.fullmatch(path.name)
        if stamp is not None and not (results := path.with_name(stamp[1] + SUFFIX)).exists():
            missing.setdefault(results, path)
    return missing


def read_results_file(path: Path, *, named: bool = False) -> dict[str, Any] | None:
    """The content of one results file: a mapping with ``config`` and ``results``, which name the same tasks.

    Args:
        path: of the file.
        named: whether the user named the file as results; else only its name tells.

    Returns:
        None for a well-formed file of another program that only has a results file's name.

    Raises:
        ResultsError: it must be lmms-eval's, and is cut short or damaged.
        OSError: it is no regular file, or cannot be read.
    """
    try:
        content = _printable(json.loads(read_text(path)))
    except json.JSONDecodeError as error:
        raise ResultsError(f"no complete JSON ({error}); the run was cut short while it wrote. Run it again.") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"no text ({error}).") from None
    except (RecursionError, ValueError) as error:
        raise ResultsError(f"no JSON that can be read ({error}).") from None
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
        return "its 'results' name no task."
    configs = content.get("configs")
    missing = [task for task in configs if task not in results] if isinstance(configs, dict) else []
    return f"it was evaluated on '{missing[0]}', of which 'results' say nothing." if missing else ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def _printable(value: Any) -> Any:
    """A JSON value without halves of surrogate pairs, as JSON's \\ud83d makes them and no file or terminal takes them."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(part) for name, part in value.items()}
    return value
