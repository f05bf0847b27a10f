"""Complete results: what lmms-eval wrote is read back before it takes its place, which it does at once or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmms_prune.harness.fingerprint import code, digest, versions
from lmms_prune.record.files import make_folder, read_text, regular, write
from lmms_prune.record.redaction import redacted, redacted_values
from lmms_prune.record.results import SUFFIX, ResultsError, read_results_file, results_files
from lmms_prune.sweep.units import Unit

STAMP = "sweep.json"  # beside lmms-eval's files: what they were made from, and how large they are


def seconds_if_complete(unit: Unit) -> float | None:
    """How long the unit's result took, if it is there for the same settings, versions and code; else None."""
    stamp = _stamp(unit)
    return None if stamp is None or _damaged(unit, stamp) else float(stamp["seconds"])


def damage(unit: Unit) -> str | None:
    """What happened to a result that is there for the same settings, versions and code; None if nothing, or if none is."""
    stamp = _stamp(unit)
    return None if stamp is None else _damaged(unit, stamp)


def _stamp(unit: Unit) -> dict[str, Any] | None:
    """What a result says that it was made from, if that is what the unit would be made from."""
    try:
        stamp = json.loads(read_text(unit.folder / STAMP))
        {name: int(size) for name, size in stamp["files"].items()}
        float(stamp["seconds"])
    except (OSError, AttributeError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stamp if all(stamp.get(name) == value for name, value in _made_from(unit).items()) else None


def _damaged(unit: Unit, stamp: dict[str, Any]) -> str | None:
    """The first of the files that is not as it was written, and why; results are read, too, which are small."""
    for name, size in stamp["files"].items():
        path = unit.folder / name
        try:
            now = regular(path).stat().st_size
            if now != size:
                return f"{path}: damaged: {now} bytes, of which {size} were written."
            if name.endswith(SUFFIX):
                read_results_file(path, named=True)
        except FileNotFoundError:
            return f"{path}: gone."
        except (OSError, ResultsError) as error:
            return f"{path}: {getattr(error, 'strerror', None) or error}"
    return None


def redact_files(folder: Path, secrets: Collection[str]) -> str | None:
    """Take the secrets out of the files that lmms-eval has written below `folder`; one that keeps them is removed.

    Returns:
        None, or why that was not possible.
    """
    problem = None
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                clean = _redacted_file(content, path.suffix, secrets)
                if clean != content:
                    write(path, clean)
        except OSError as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            removed = "" if path.exists() else "; it was removed"
            problem = f"{path} cannot be freed of secrets: {error.strerror}{removed}"
    return problem


def _redacted_file(content: bytes, suffix: str, secrets: Collection[str]) -> bytes:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content  # no text
    if (clean := redacted(text, secrets)) == text:
        return content
    # JSON stays JSON, whatever is before or after a secret in it.
    with suppress(ValueError):
        if suffix == ".json":
            clean = json.dumps(redacted_values(json.loads(text), secrets), indent=2, ensure_ascii=False)
        elif suffix == ".jsonl":
            rows = [redacted_values(json.loads(line), secrets) for line in text.splitlines()]
            clean = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return clean.encode()


def publish(unit: Unit, seconds: float, secrets: Collection[str]) -> str | None:
    """Move a finished unit's files to their place, instead of any older ones there.

    Args:
        unit: evaluated into ``unit.partial``.
        seconds: that it took.
        secrets: values that no file may hold.

    Returns:
        None, or why the files are no complete result; then nothing is moved.
    """
    try:
        found, problem = _read(unit.partial)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"what it left cannot be read back: {type(error).__name__}: {error}"
    if problem is not None:
        return problem
    (results, said), samples = found
    # It was told the place where it worked, and says the one where it will stand.
    resolved = said["config"]["resolved_cli_args"]
    for name in ("output_path", "hf_hub_log_args"):
        resolved[name] = resolved[name].replace(str(unit.partial), unit.settings["output_path"])
    # The journal was the sweep's own affair.
    resolved["model_args"] = said["config"]["model_args"] = unit.settings.get("model_args", "")
    try:
        clean = json.dumps(redacted_values(said, secrets), indent=2, ensure_ascii=False)
        write(results, clean)
        sizes = {str(path.relative_to(unit.partial)): path.stat().st_size for path in (results, *samples)}
        stamp = {**_made_from(unit), "seconds": seconds, "files": sizes}
        write(unit.partial / STAMP, json.dumps(stamp, indent=2))
    except OSError as error:
        return f"its files cannot be completed: {error}"
    older = unit.partial.with_name(f"{unit.partial.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    try:
        make_folder(unit.folder.parent)
        if unit.folder.exists():
            os.replace(unit.folder, older)
        os.replace(unit.partial, unit.folder)
    except OSError as error:
        return f"its files cannot be moved to {unit.folder}: {error.strerror}"
    shutil.rmtree(older, ignore_errors=True)
    return None


def _made_from(unit: Unit) -> dict[str, Any]:
    settings = json.loads(json.dumps(dict(unit.settings), default=str))
    # Where the file and the tasks lie is no part of what is measured: the tasks' content is in the code.
    for name in ("config", "output_path", "include_path"):
        settings.pop(name)
    # As a digest, since settings may hold a secret.
    return {"settings": digest(settings), "inputs": dict(unit.inputs), "versions": versions(), "code": code()}


def _read(folder: Path) -> tuple[Any, str | None]:
    """The results file with its content, and the samples files; or what is wrong with them."""
    unreadable: list[OSError] = []
    written = []
    for path in results_files(folder, unreadable.append):
        try:
            content = read_results_file(path)
        except (OSError, ResultsError) as error:
            return None, f"{path}: {getattr(error, 'strerror', None) or error}"
        if content is not None:
            written.append((path, content))
    if unreadable:
        return None, f"{unreadable[0].filename}: {unreadable[0].strerror}"
    if len(written) != 1:
        return None, f"it left {len(written) or 'no'} results files"
    ((results, said),) = written
    samples = []
    for task in said["configs"]:
        path = results.with_name(results.name.replace(SUFFIX, f"_samples_{task}.jsonl"))
        if problem := _problem(said, task, path):
            return None, f"{task}: {problem}"
        samples.append(path)
    return ((results, said), samples), None


def _problem(said: dict[str, Any], task: str, samples: Path) -> str | None:
    """Whether a task of a results file has a score, and a sample for each document."""
    # Keys are "metric,filter"; standard errors have other names.
    values = said["results"].get(task, {}).items()
    scores = [value for key, value in values if key.split(",")[0] in said["higher_is_better"][task]]
    if not any(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        return "it left no score"
    if not samples.exists():
        return f"it left no {samples.name}"
    lines = read_text(samples).splitlines()
    answered, expected = len({json.loads(line)["doc_id"] for line in lines}), said["n-samples"][task]["effective"]
    # A task with several filters logs a document once for each.
    if answered != expected or len(lines) % expected:
        return f"it left {len(lines)} samples of {answered} documents, where {expected} were evaluated"
    return None
