"""lmms-eval's response cache, held to the code, versions and files that its answers come from.

The harness keys an answer by the text of ``--model_args`` and by its own version. What else answers depend on would not
tell two runs apart, so a file in the cache's folder says what each of our runs was made from, and another one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from lmms_prune.harness.arguments import ArgumentError, split
from lmms_prune.harness.fingerprint import digest
from lmms_prune.record.files import read_text, write

_STAMPS = "lmms-prune.json"


def hold_to(cache: Path, model: str, given: Any, made_from: Mapping[str, str]) -> None:
    """Say in a cache's folder what a run is made from.

    Args:
        cache: what ``--use_cache`` names.
        model: lmms-eval's name of it.
        given: ``--model_args``.
        made_from: all that the run's answers depend on beside their documents.

    Raises:
        ArgumentError: what is in the cache for these arguments was made from something else.
    """
    folder = cache.parent if cache.suffix == ".db" else cache
    arguments = split(given) if isinstance(given, str) else {name: str(value) for name, value in (given or {}).items()}
    key = digest({"model": model, **{name: _as_the_harness_reads(value) for name, value in arguments.items()}})
    # The number of rows is no more of an answer's origin than the harness takes it for.
    said = {name: value for name, value in made_from.items() if name != "batch_size"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{_STAMPS}.lock"):
            stamps = _read(folder / _STAMPS)
            before = stamps.setdefault(key, said)
            write(folder / _STAMPS, json.dumps(stamps))
    except OSError as error:
        raise ArgumentError(f"--use_cache {cache} cannot be written to: {error.strerror}.") from error
    if changed := [name for name in said | before if before.get(name) != said.get(name)]:
        name = changed[0]
        raise ArgumentError(
            f"--use_cache {cache} holds answers to these arguments from another {', '.join(changed)} ({name}: "
            f"{before.get(name)}, now {said.get(name)}), and lmms-eval would give them out again; use a new folder."
        )


def _as_the_harness_reads(value: str) -> str:
    """lmms-eval takes 007 for 7, 1e3 for 1000.0 and TRUE for true, whatever they name, before it makes its key of them."""
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
