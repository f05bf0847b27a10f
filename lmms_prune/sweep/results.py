"""Publishes complete results: lmms-eval's files are read back first, then moved to their folder in one step."""

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
from lmms_prune.sweep.jobs import Job

STAMP = "sweep.json"  # among lmms-eval's files: what they were made from, and their sizes


def seconds_if_complete(job: Job) -> float | None:
    """The duration of the job's evaluation if its result is complete for these settings, versions and code; else None."""
    stamp = _stamp(job)
    return None if stamp is None or _damaged(job, stamp) else float(stamp["seconds"])


def damage(job: Job) -> str | None:
    """How a result for the same settings, versions and code is damaged; None if it is intact or does not exist."""
    stamp = _stamp(job)
    return None if stamp is None else _damaged(job, stamp)


def _stamp(job: Job) -> dict[str, Any] | None:
    """The stamp of an existing result, if it was made from the same settings, inputs, versions and code as `job`."""
    try:
        stamp = json.loads(read_text(job.folder / STAMP))
        {name: int(size) for name, size in stamp["files"].items()}
        float(stamp["seconds"])
    except (OSError, AttributeError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return stamp if all(stamp.get(name) == value for name, value in _made_from(job).items()) else None


def _damaged(job: Job, stamp: dict[str, Any]) -> str | None:
    """The first file that is not as it was written, and why. Results files are small, so they are also parsed."""
    for name, size in stamp["files"].items():
        path = job.folder / name
        try:
            found_size = regular(path).stat().st_size
            if found_size != size:
                return f"{path}: damaged: {found_size} bytes, of which {size} were written."
            if name.endswith(SUFFIX):
                read_results_file(path, named=True)
        except FileNotFoundError:
            return f"{path}: gone."
        except (OSError, ResultsError) as error:
            return f"{path}: {getattr(error, 'strerror', None) or error}"
    return None


def redact_files(folder: Path, secrets: Collection[str]) -> str | None:
    """Redact the secrets in lmms-eval's files below `folder`; a file that cannot be redacted is deleted.

    Returns:
        None, or why a file could not be redacted.
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
        return content  # not a text file
    if (clean := redacted(text, secrets)) == text:
        return content
    # Redacting the parsed values keeps the file valid JSON.
    with suppress(ValueError):
        if suffix == ".json":
            clean = json.dumps(redacted_values(json.loads(text), secrets), indent=2, ensure_ascii=False)
        elif suffix == ".jsonl":
            rows = [redacted_values(json.loads(line), secrets) for line in text.splitlines()]
            clean = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return clean.encode()


def publish(job: Job, seconds: float, secrets: Collection[str]) -> str | None:
    """Move a finished job's files to its result folder, replacing older ones.

    Args:
        job: evaluated into ``job.partial``.
        seconds: duration of the evaluation.
        secrets: values that no file may contain.

    Returns:
        None, or why the files are not a complete result; then nothing is moved.
    """
    try:
        files, problem = _read(job.partial)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"what it left cannot be read back: {type(error).__name__}: {error}"
    if problem is not None:
        return problem
    (results, content), samples = files
    # lmms-eval recorded the partial folder; the published file names the final one.
    resolved = content["config"]["resolved_cli_args"]
    for name in ("output_path", "hf_hub_log_args"):
        resolved[name] = resolved[name].replace(str(job.partial), job.settings["output_path"])
    # The sweep added the journal's path; it is not part of the configuration.
    resolved["model_args"] = content["config"]["model_args"] = job.settings.get("model_args", "")
    try:
        clean = json.dumps(redacted_values(content, secrets), indent=2, ensure_ascii=False)
        write(results, clean)
        sizes = {str(path.relative_to(job.partial)): path.stat().st_size for path in (results, *samples)}
        stamp = {**_made_from(job), "seconds": seconds, "files": sizes}
        write(job.partial / STAMP, json.dumps(stamp, indent=2))
    except OSError as error:
        return f"its files cannot be completed: {error}"
    older = job.partial.with_name(f"{job.partial.name}.older")
    shutil.rmtree(older, ignore_errors=True)
    try:
        make_folder(job.folder.parent)
        if job.folder.exists():
            os.replace(job.folder, older)
        os.replace(job.partial, job.folder)
    except OSError as error:
        return f"its files cannot be moved to {job.folder}: {error.strerror}"
    shutil.rmtree(older, ignore_errors=True)
    return None


def _made_from(job: Job) -> dict[str, Any]:
    """All that a result depends on, as the stamp records it."""
    settings = json.loads(json.dumps(dict(job.settings), default=str))
    # The paths of the file and the tasks do not change results; the tasks' content is part of the code's digest.
    for name in ("config", "output_path", "include_path"):
        settings.pop(name)
    # As a digest, because settings may contain a secret.
    return {"settings": digest(settings), "inputs": dict(job.inputs), "versions": versions(), "code": code()}


def _read(folder: Path) -> tuple[Any, str | None]:
    """The results file with its content, and the samples files; or what is wrong with them, as the second value."""
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
    ((results, content),) = written
    samples = []
    for task in content["configs"]:
        path = results.with_name(results.name.replace(SUFFIX, f"_samples_{task}.jsonl"))
        if problem := _problem(content, task, path):
            return None, f"{task}: {problem}"
        samples.append(path)
    return ((results, content), samples), None


def _problem(content: dict[str, Any], task: str, samples: Path) -> str | None:
    """Why a task of a results file is incomplete: no score, or not one sample for each document; None if complete."""
    # Keys are "metric,filter"; standard errors have other metric names.
    values = content["results"].get(task, {}).items()
    scores = [value for key, value in values if key.split(",")[0] in content["higher_is_better"][task]]
    if not any(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        return "it left no score"
    if not samples.exists():
        return f"it left no {samples.name}"
    lines = read_text(samples).splitlines()
    answered, expected = len({json.loads(line)["doc_id"] for line in lines}), content["n-samples"][task]["effective"]
    # A task with several filters logs a document once for each.
    if answered != expected or len(lines) % expected:
        return f"it left {len(lines)} samples of {answered} documents, where {expected} were evaluated"
    return None
