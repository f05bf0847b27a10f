"""lmms-eval's result folders, read back into records, and what could not be read."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.benchmarks import ORDER, TASKS, documents, score
from lmms_prune.leaderboard.records import Problem, RunRecord, Source, TaskRecord
from lmms_prune.leaderboard.samples import UNREADABLE, Ledger

_SUFFIX = "_results.json"
# The harness's own options that change answers; they stand beside the model's settings.
_HARNESS = ("limit", "offset", "gen_kwargs", "num_fewshot", "system_instruction")


@dataclass
class Results:
    """All that was found below some paths."""

    records: list[RunRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)  # tasks that are none of the benchmarks


def read_results(paths: Iterable[Path]) -> Results:
    """Read every results file below `paths`, and merge those that agree in all settings into one record each."""
    results = Results()
    parts: dict[tuple[str, ...], list[RunRecord]] = {}
    seen: set[Path] = set()
    for path in paths:
        found: list[Path] = []
        unread = len(results.problems)
        for file in _files(path):
            try:
                record = _read(file, results.ignored)
            except (OSError, *UNREADABLE) as error:
                results.problems.append(Problem(str(file), _unreadable(error)))
                continue
            found += [] if record is None else [file]
            if record is not None and record.tasks and file.resolve() not in seen:
                seen.add(file.resolve())
                parts.setdefault(record.key(), []).append(record)
        if found or len(results.problems) == unread:
            results.problems += _empty_folders(path, found)
    for same in parts.values():
        results.records.append(_merged(same, results.problems))
    return results


def _files(path: Path) -> list[Path]:
    """The results files below; a folder whose name begins with a dot holds what is not finished."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    found = sorted(path.rglob(f"*{_SUFFIX}"))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def _unreadable(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no complete JSON ({error}); the run was cut short while it wrote. Run it again."
    if isinstance(error, UnicodeDecodeError):
        return f"no text ({error})."
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"not as lmms-eval writes its results ({type(error).__name__}: {error})."


def _empty_folders(path: Path, found: list[Path]) -> Iterator[Problem]:
    """`path` if no results are below; else the folders without results that stand among those of other runs."""
    if not path.exists():
        yield Problem(str(path), "no such file or folder.")
    elif not found:
        yield Problem(str(path), f"no results of lmms-eval (*{_SUFFIX}) here or below.")
    # The harness puts its files into a folder with the model's name, inside the one that it was given.
    runs = {file.parent.parent for file in found}
    for parent, many in Counter(run.parent for run in runs).items():
        if many < 2 or path not in (parent, *parent.parents):
            continue
        for folder in sorted(one for one in parent.iterdir() if one.is_dir() and one not in runs):
            if not folder.name.startswith(".") and not any(folder.rglob(f"*{_SUFFIX}")):
                yield Problem(str(folder), "no results below: the run failed or goes on; its log may tell.")


def _read(file: Path, ignored: set[str]) -> RunRecord | None:
    """One results file; None if the harness wrote it for something else (a submission)."""
    said = _printable(json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(said, dict) or "config" not in said:
        return None
    config = said["config"]
    run = next((one for one in config.get("batch_sizes") or [] if isinstance(one, dict) and "identity" in one), None)
    throughput = said.get("throughput") or {}
    seconds, latency = throughput.get("total_elapsed_time") or 0.0, throughput.get("avg_latency") or 0.0
    source = Source(
        path=file,
        date=str(said.get("date", "")),
        command=_command(config, said["results"]),
        facts={name: str(value) for name, value in (run or {}).items() if isinstance(value, str)},
        requests=float(round(seconds / latency)) if latency else 0.0,
        seconds=float(seconds),
    )
    tasks = {}
    for task in said["results"]:
        if task in TASKS:
            tasks[task] = _task(said, task, run, source)
        elif not said.get("group_subtasks", {}).get(task):
            ignored.add(task)
    settings = _identity(run["identity"]) if run else _stock_settings(said)
    settings |= {name: str(config[name]) for name in _HARNESS if config.get(name)}
    settings |= {name: str(said[name]) for name in _HARNESS if said.get(name)}
    if run is not None and ("pretrained" not in settings or not settings.get("seed", "0").isdigit()):
        raise ValueError(f"its identity is {run['identity']!r}")
    return RunRecord(str(config["model"]), settings, run is not None, tasks)


def _printable(value: Any) -> Any:
    """A JSON value without halves of surrogate pairs, as JSON's \\ud83d makes them and no file or terminal takes them."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_printable(one) for one in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(one) for name, one in value.items()}
    return value


def _task(said: Mapping[str, Any], task: str, run: Mapping[str, Any] | None, source: Source) -> TaskRecord:
    answered, whole = documents(said, task)
    samples = source.path.with_name(source.path.name.removesuffix(_SUFFIX) + f"_samples_{task}.jsonl")
    ledger = (run or {}).get("tasks", {}).get(task)
    # Functions are written with their addresses, which differ from process to process.
    asked = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(said["configs"].get(task), sort_keys=True, default=str))
    return TaskRecord(
        task=task,
        score=score(said, task),
        answered=answered,
        documents=whole,
        samples=samples if samples.is_file() else None,
        ledger=Ledger.recorded(ledger) if ledger and ledger["samples"] else None,
        asked=blake2b(asked.encode(), digest_size=8).hexdigest(),
        source=source,
        target=""
        if str(named := (said["configs"].get(task) or {}).get("doc_to_target", "")).startswith("<")
        else str(named),
    )


def _identity(text: str) -> dict[str, str]:
    """The settings in a run's ``identity``; a template at its end may hold commas, so the first of a name counts."""
    settings: dict[str, str] = {}
    for piece in re.split(r", (?=[a-z_]+=)", text):
        name, _, value = piece.partition("=")
        settings.setdefault(name, value)
    return settings


def _stock_settings(said: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a model that is not ours: its arguments."""
    given = said["config"].get("model_args") or ""
    pairs = given.items() if isinstance(given, dict) else (one.partition("=")[::2] for one in given.split(",") if one)
    settings = {str(name).strip(): str(value).strip() for name, value in pairs}
    settings.setdefault("pretrained", str(said.get("model_name") or said["config"]["model"]))
    return settings


def _command(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """What repeats a run, from the harness's own record of how it was called."""
    given = config.get("resolved_cli_args") or {}
    arguments = given.get("model_args") or config.get("model_args") or ""
    if isinstance(arguments, dict):
        texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in arguments.items()}
        arguments = ",".join(f"{name}={value}" for name, value in texts.items())
    parts = ["lmms-eval", "--model", str(config["model"])]
    parts += ["--model_args", arguments] if arguments else []
    parts += ["--tasks", str(given.get("tasks") or ",".join(results))]
    for name in ("include_path", "batch_size", *_HARNESS, "output_path"):
        value = given.get(name, config.get(name))
        if value and (name, str(value)) != ("batch_size", "1"):
            parts += [f"--{name}", str(value)]
    return shlex.join([*parts, "--log_samples"])


def _merged(same: list[RunRecord], problems: list[Problem]) -> RunRecord:
    """One record of all with the same settings; a task that has two different scores is left out and named."""
    tasks: dict[str, TaskRecord] = {}
    clashes: set[str] = set()
    for record in sorted(same, key=lambda one: one.sources[0].date):
        for task, later in record.tasks.items():
            earlier = tasks.get(task)
            if earlier is not None and earlier.score != later.score:
                clashes.add(task)
                message = (
                    f"and {later.source.path} claim the same settings for '{task}' "
                    f"(schedule {record.schedule}, seed {record.settings.get('seed')}) but score {earlier.score} and "
                    f"{later.score}; the number is left out. Remove one of them."
                )
                problems.append(Problem(str(earlier.source.path), message))
            tasks[task] = later
    kept = {task: tasks[task] for task in sorted(tasks, key=ORDER.__getitem__) if task not in clashes}
    first = same[0]
    return RunRecord(first.wrapper, first.settings, first.ours, kept)
