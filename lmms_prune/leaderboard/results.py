"""lmms-eval's result folders, read back into records, and what could not be read."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from os.path import isdir, lexists
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.benchmarks import ORDER, TASKS, documents, fault, score
from lmms_prune.leaderboard.records import Problem, RunRecord, Source, TaskRecord
from lmms_prune.leaderboard.samples import UNREADABLE
from lmms_prune.models import MODEL_NAMES
from lmms_prune.record.results import SUFFIX, ResultsError, orphans, read_results_file, results_files
from lmms_prune.record.run import RunReport

# The harness's own options that change answers; they stand beside the model's settings.
_HARNESS = ("limit", "offset", "gen_kwargs", "num_fewshot", "system_instruction")


@dataclass
class Results:
    """All that was found below some paths."""

    records: list[RunRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)  # tasks that are none of the benchmarks
    folders: list[Path] = field(default_factory=list)  # that were named


def read_results(paths: Iterable[Path]) -> Results:
    """Read every results file below `paths`, and merge those that agree in all settings into one record each.

    What must be results and is not is named among the problems, so that no row is ever left out without a word.
    """
    results = Results()
    parts: dict[tuple[str, ...], list[RunRecord]] = {}
    seen: set[Path] = set()
    for path in paths:
        results.folders.append(path)
        used: list[Path] = []
        unread = len(results.problems)
        for file in _files(path, results.problems):
            try:
                record = _read(file, results.ignored, named=file == path)
            except (OSError, *UNREADABLE) as error:
                results.problems.append(Problem(str(file), _unreadable(error)))
                continue
            used += [] if record is None else [file]
            if record is not None and record.tasks and (real := file.resolve()) not in seen:
                seen.add(real)
                parts.setdefault(record.key(), []).append(record)
        if used or len(results.problems) == unread:
            results.problems += _empty_folders(path, used)
    for same in parts.values():
        results.records.append(_merged(same, results.problems))
    return results


def _files(path: Path, problems: list[Problem]) -> list[Path]:
    """The results files of a folder, or the one that was named; folders that cannot be read are problems."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"{error.strerror}; what is below is left out."))

    try:
        path.lstat()
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        problems.append(Problem(str(path), "no such file or folder." if absent else f"{error.strerror}."))
        return []
    if not isdir(path):
        return [path]
    for file, samples in orphans(path, lambda error: None).items():
        problems.append(Problem(str(file), f"gone, though {samples.name} stands beside. Run the evaluation again."))
    return results_files(path, unreadable)


def _unreadable(error: Exception) -> str:
    if isinstance(error, ResultsError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}."
    return f"not as lmms-eval writes its results ({type(error).__name__}: {error})."


def _empty_folders(path: Path, used: list[Path]) -> Iterator[Problem]:
    """`path` if no results are below; else the folders without results that stand among those of other runs."""
    if not used:
        yield Problem(str(path), f"no results of lmms-eval (*{SUFFIX}) here or below.")
    # The harness puts its files into a folder with the model's name, inside the one that it was given.
    runs = {file.parent.parent for file in used}
    for parent, many in Counter(run.parent for run in runs).items():
        if many < 2 or path not in (parent, *parent.parents):
            continue
        for folder in sorted(one for one in parent.iterdir() if one.is_dir() and one not in runs):
            if not folder.name.startswith(".") and not results_files(folder, lambda error: None):
                yield Problem(str(folder), "no results below: the run failed or goes on; its log may tell.")


def _read(file: Path, ignored: set[str], *, named: bool) -> RunRecord | None:
    """One results file; None if somebody else wrote it for something else."""
    content = read_results_file(file, named=named)
    if content is None:
        return None
    config = content["config"]
    run = RunReport.of_results(content)
    if run is None and config["model"] in MODEL_NAMES:
        raise ResultsError(f"damaged: a run of {config['model']} without its report in 'config.batch_sizes'.")
    throughput = content.get("throughput") or {}
    seconds, latency = throughput.get("total_elapsed_time") or 0.0, throughput.get("avg_latency") or 0.0
    source = Source(
        path=file,
        date=str(content.get("date", "")),
        command=_command(config, content["results"]),
        facts=_facts(config, run),
        requests=float(round(seconds / latency)) if latency else 0.0,
        seconds=float(seconds),
        other_load=None if run is None else run.circumstances.other_load,
        unpruned=0 if run is None else run.unpruned_samples,
    )
    tasks = {}
    for task in content["results"]:
        if task in TASKS:
            tasks[task] = _task(content, task, run, source)
        elif not content.get("group_subtasks", {}).get(task):
            ignored.add(task)
    settings = dict(run.settings) if run else _stock_settings(content)
    settings |= {name: str(config[name]) for name in _HARNESS if config.get(name)}
    settings |= {name: str(content[name]) for name in _HARNESS if content.get(name)}
    return RunRecord(str(config["model"]), settings, run is not None, tasks)


def _facts(config: Mapping[str, Any], run: RunReport | None) -> dict[str, str]:
    """What a run's report says; of a model that is not ours, the batch size that was asked for."""
    size = config.get("batch_size")
    return {**({} if size is None else {"batch_size": str(size)}), **({} if run is None else run.facts)}


def _task(said: Mapping[str, Any], task: str, run: RunReport | None, source: Source) -> TaskRecord:
    answered, whole = documents(said, task)
    samples = source.path.with_name(source.path.name.removesuffix(SUFFIX) + f"_samples_{task}.jsonl")
    averages = None if run is None else run.tasks.get(task)
    # Functions are written with their addresses, which differ from process to process.
    asked = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(said["configs"].get(task), sort_keys=True, default=str))
    return TaskRecord(
        task=task,
        score=score(said, task),
        fault=fault(said, task),
        answered=answered,
        documents=whole,
        samples=samples if lexists(samples) else None,
        accounting=averages.totals if averages and averages.samples else None,
        asked=blake2b(asked.encode(), digest_size=8).hexdigest(),
        source=source,
        target=""
        if str(named := (said["configs"].get(task) or {}).get("doc_to_target", "")).startswith("<")
        else str(named),
    )


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
            # The date is what a clock said, which may have gone back: what can be checked comes before what is newer.
            if earlier is None or later.samples is not None or earlier.samples is None:
                tasks[task] = later
    kept = {task: tasks[task] for task in sorted(tasks, key=ORDER.__getitem__) if task not in clashes}
    first = same[0]
    return RunRecord(first.wrapper, first.settings, first.ours, kept)
