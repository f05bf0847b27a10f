"""A guard of lmms-eval's response cache: its answers must come from the same code, versions and files.

lmms-eval keys an answer by the text of ``--model_args`` and by its own version, but answers depend on more. A file in the
cache's folder therefore records what each of our runs was made from, and a run made from something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from lmms_prune.harness.argument_text import ArgumentError, split
from lmms_prune.harness.fingerprint import digest
from lmms_prune.record.files import read_text, write

_STAMPS = "lmms-prune.json"


def hold_to(cache: Path, model: str, model_args: Any, made_from: Mapping[str, str]) -> None:
    """Record in a cache's folder what a run is made from, or refuse a run that contradicts the record.

    Args:
        cache: the path after ``--use_cache``.
        model: lmms-eval's name of the model.
        model_args: the text or mapping after ``--model_args``.
        made_from: all that the run's answers depend on besides their documents.

    Raises:
        ArgumentError: the cache's answers to these arguments were made from something else, or it cannot be written to.
    """
    folder = cache.parent if cache.suffix == ".db" else cache
    arguments = (
        split(model_args)
        if isinstance(model_args, str)
        else {name: str(value) for name, value in (model_args or {}).items()}
    )
    key = digest({"model": model, **{name: _as_the_harness_reads(value) for name, value in arguments.items()}})
    # Batch size is excluded: it does not change answers, and the harness ignores it too.
    stamp = {name: value for name, value in made_from.items() if name != "batch_size"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{_STAMPS}.lock"):
            stamps = _read(folder / _STAMPS)
            recorded = stamps.setdefault(key, stamp)
            write(folder / _STAMPS, json.dumps(stamps))
    except OSError as error:
        raise ArgumentError(f"--use_cache {cache} cannot be written to: {error.strerror}.") from error
    if changed := [name for name in stamp | recorded if recorded.get(name) != stamp.get(name)]:
        name = changed[0]
        raise ArgumentError(
            f"--use_cache {cache} holds answers to these arguments from another {', '.join(changed)} ({name}: "
            f"{recorded.get(name)}, now {stamp.get(name)}), and lmms-eval would give them out again; use a new folder."
        )


def _as_the_harness_reads(value: str) -> str:
    """Convert a value as lmms-eval does before it makes its key: 007 to 7, 1e3 to 1000.0 and TRUE to true."""
    try:
        return str(float(value))
    except ValueError:
        return value.lower() if value.lower() in ("true", "false") else value


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        stamps = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        stamps = error
    if not isinstance(stamps, dict) or not all(isinstance(stamp, dict) for stamp in stamps.values()):
        raise ArgumentError(
            f"{path} is broken, so that nothing says what the answers in this cache were made from; use a new folder."
        )
    return stamps
