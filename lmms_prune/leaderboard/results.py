"""Reading lmms-eval's result folders into records, with a list of what could not be read."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from os.path import isdir
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.benchmarks import ORDER, TASKS, documents, fault, score
from lmms_prune.leaderboard.other_tasks import register
from lmms_prune.leaderboard.records import Problem, RunRecord, Source, TaskRecord
from lmms_prune.leaderboard.samples import UNREADABLE
from lmms_prune.models import MODEL_NAMES
from lmms_prune.record.files import find
from lmms_prune.record.packs import SUFFIX as PACK
from lmms_prune.record.packs import manifest, members, pack_of
from lmms_prune.record.results import SUFFIX, ResultsError, orphans, read_results_file, results_files
from lmms_prune.record.run import RunReport
from lmms_prune.record.stored import is_stored

# lmms-eval's own options that change answers; recorded in addition to the model's settings.
_HARNESS = ("limit", "offset", "gen_kwargs", "num_fewshot", "system_instruction")


@dataclass
class Results:
    """The records and problems found below some paths."""

    records: list[RunRecord] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)  # tasks that cannot be columns, and why
    folders: list[Path] = field(default_factory=list)  # the paths that were given


def read_results(paths: Iterable[Path]) -> Results:
    """Read every results file below `paths`, and merge those that agree in all settings into one record each.

    A file or folder that should hold results but does not is listed among the problems, so that no row is silently left
    out.
    """
    results = Results()
    by_settings: dict[tuple[str, ...], list[RunRecord]] = {}
    by_pack: dict[Path, list[RunRecord]] = {}
    seen: set[Path] = set()
    for path in paths:
        results.folders.append(path)
        used: list[Path] = []
        problems_before = len(results.problems)
        for file in _files(path, results.problems):
            try:
                record = _read(file, results.ignored, named=file == path)
            except (OSError, *UNREADABLE) as error:
                results.problems.append(Problem(str(file), _unreadable(error)))
                continue
            used += [] if record is None else [file]
            if record is not None and (pack := pack_of(file)) is not None:
                by_pack.setdefault(pack, []).append(record)
            if record is not None and record.tasks and (real := file.resolve()) not in seen:
                seen.add(real)
                by_settings.setdefault(record.key(), []).append(record)
        if used or len(results.problems) == problems_before:
            results.problems += _empty_folders(path, used)
        results.problems += _misstated(_packs(path), by_pack)
    for same in by_settings.values():
        results.records.append(_merged([on_scale(record) for record in same], results.problems))
    results.ignored = {task: reason for task, reason in results.ignored.items() if task not in TASKS}
    return results


def on_scale(record: RunRecord) -> RunRecord:
    """Return the record with each score on its column's scale: that of a task not known by name may show in a later file."""
    return replace(record, tasks={name: task.times(TASKS[name].factor) for name, task in record.tasks.items()})


def _files(path: Path, problems: list[Problem]) -> list[Path]:
    """Return the results files below a folder, or the named file; unreadable folders are added to `problems`."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"{error.strerror}; what is below is left out."))

    try:
        path.lstat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problems.append(Problem(str(path), "no such file or folder." if missing else f"{error.strerror}."))
        return []
    if not isdir(path):
        return _members([path], problems) if path.name.endswith(PACK) else [path]
    for file, samples in orphans(path, lambda error: None).items():
        problems.append(Problem(str(file), f"gone, though {samples.name} stands beside. Run the evaluation again."))
    return [*results_files(path, unreadable), *_members(_packs(path), problems)]


def _packs(path: Path) -> list[Path]:
    """Return the packs below a folder, or the named pack."""
    if isdir(path):
        return find(path, f"*{PACK}", lambda error: None)
    return [path] if path.name.endswith(PACK) else []


def _misstated(packs: Iterable[Path], by_pack: Mapping[Path, Sequence[RunRecord]]) -> Iterator[Problem]:
    """Yield a problem for each pack whose manifest names another row than it holds; those that cannot be read are known."""
    for pack in packs:
        try:
            stated = manifest(pack)
        except OSError:
            continue
        runs = by_pack.get(pack, [])
        held: dict[str, set[str]] = {
            "model": {run.model for run in runs},
            "schedule": {run.schedule or run.wrapper for run in runs},
            "seeds": {str(run.seed) for run in runs},
            "tasks": {task for run in runs for task in run.tasks},
        }
        in_manifest: dict[str, set[str]] = {
            "model": {stated.model},
            "schedule": {stated.schedule},
            "seeds": set(map(str, stated.seeds)),
            "tasks": set(stated.tasks),
        }
        for name, values in held.items():
            if values != in_manifest[name]:
                in_pack = " and ".join(sorted(values)) or "nothing that can be read"
                names = " and ".join(sorted(in_manifest[name]))
                yield Problem(
                    str(pack), f"its manifest states {name} {names}, but it holds {in_pack}. Pack the row again."
                )
                break


def _members(packs: Iterable[Path], problems: list[Problem]) -> list[Path]:
    """Return the results files in packs; packs that cannot be read are added to `problems`."""
    files: list[Path] = []
    for pack in packs:
        try:
            files += [file for file in members(pack) if file.name.endswith(SUFFIX)]
        except OSError as error:
            problems.append(Problem(str(error.filename), f"{error.strerror}."))
    return files


def _unreadable(error: Exception) -> str:
    if isinstance(error, ResultsError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}."
    return f"not as lmms-eval writes its results ({type(error).__name__}: {error})."


def _empty_folders(path: Path, used: list[Path]) -> Iterator[Problem]:
    """Yield a problem for `path` if it has no results, else for empty folders among the folders of other runs."""
    if not used:
        yield Problem(str(path), f"no results of lmms-eval (*{SUFFIX}) here or below.")
    # lmms-eval writes into a folder named after the model, inside the run's own output folder.
    runs = {file.parent.parent for file in used}
    for parent, count in Counter(run.parent for run in runs).items():
        if count < 2 or path not in (parent, *parent.parents):
            continue
        for folder in sorted(child for child in parent.iterdir() if child.is_dir() and child not in runs):
            if not folder.name.startswith(".") and not results_files(folder, lambda error: None):
                yield Problem(str(folder), "no results below: the run failed or goes on; its log may tell.")


def _read(file: Path, ignored: dict[str, str], *, named: bool) -> RunRecord | None:
    """Read one results file; None if another program wrote it for another purpose."""
    content = read_results_file(file, named=named)
    if content is None:
        return None
    config = content["config"]
    run = RunReport.of_results(content)
    if run is None and config["model"] in MODEL_NAMES:
        raise ResultsError(f"damaged: a run of {config['model']} without its report in 'config.batch_sizes'.")
    throughput = content.get("throughput") or {}
    seconds, latency = throughput.get("total_elapsed_time") or 0.0, throughput.get("avg_latency") or 0.0
    pack = pack_of(file)
    packed = None if pack is None else manifest(pack)
    source = Source(
        path=file,
        date=str(content.get("date", "")),
        command=_command(config, content["results"]),
        facts=_facts(config, run),
        requests=float(round(seconds / latency)) if latency else 0.0,
        seconds=float(seconds),
        other_load=None if run is None else run.circumstances.other_load,
        unpruned=0 if run is None else run.unpruned_samples,
        submitter="" if packed is None else packed.submitter,
        packed="" if packed is None else packed.packed,
        peak_memory=None if run is None else run.circumstances.peak_memory,
        peak_memory_of="" if run is None else run.circumstances.peak_memory_of or "",
    )
    ignored |= register(content)
    tasks = {task: _task(content, task, run, source) for task in content["results"] if task in TASKS}
    settings = dict(run.settings) if run else _stock_settings(content)
    settings |= {name: str(config[name]) for name in _HARNESS if config.get(name)}
    settings |= {name: str(content[name]) for name in _HARNESS if content.get(name)}
    if sample := _sample(config):
        settings["sample"] = sample
        settings.pop("limit", None)  # the number of drawn documents, which may differ between tasks
    return RunRecord(str(config["model"]), settings, run is not None, tasks)


def _sample(config: Mapping[str, Any]) -> str:
    """Return how the evaluated documents were drawn at random; "" if they were not."""
    return str((config.get("resolved_cli_args") or {}).get("sample") or "")


def _facts(config: Mapping[str, Any], run: RunReport | None) -> dict[str, str]:
    """Return the facts of a run's report; for a model that is not ours only the requested batch size."""
    size = config.get("batch_size")
    return {**({} if size is None else {"batch_size": str(size)}), **({} if run is None else run.facts)}


def _task(content: Mapping[str, Any], task: str, run: RunReport | None, source: Source) -> TaskRecord:
    answered, total = documents(content, task)
    samples = source.path.with_name(source.path.name.removesuffix(SUFFIX) + f"_samples_{task}.jsonl")
    averages = None if run is None else run.tasks.get(task)
    # lmms-eval writes functions with their addresses, which differ between processes.
    asked = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(content["configs"].get(task), sort_keys=True, default=str))
    return TaskRecord(
        task=task,
        score=score(content, task),
        factor=TASKS[task].factor,
        fault=fault(content, task),
        answered=answered,
        documents=total,
        samples=samples if is_stored(samples) else None,
        accounting=averages.totals if averages and averages.samples else None,
        asked=blake2b(asked.encode(), digest_size=8).hexdigest(),
        source=source,
        target=""
        if str(target := (content["configs"].get(task) or {}).get("doc_to_target", "")).startswith("<")
        else str(target),
    )


def _stock_settings(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a model that is not ours: its arguments."""
    arguments = content["config"].get("model_args") or ""
    pairs = (
        arguments.items()
        if isinstance(arguments, dict)
        else (piece.partition("=")[::2] for piece in arguments.split(",") if piece)
    )
    settings = {str(name).strip(): str(value).strip() for name, value in pairs}
    settings.setdefault("pretrained", str(content.get("model_name") or content["config"]["model"]))
    return settings


def _command(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the command that repeats a run, from lmms-eval's own record of its arguments."""
    called_with = config.get("resolved_cli_args") or {}
    arguments = called_with.get("model_args") or config.get("model_args") or ""
    if isinstance(arguments, dict):
        texts = {name: ",".join(value) if isinstance(value, list) else value for name, value in arguments.items()}
        arguments = ",".join(f"{name}={value}" for name, value in texts.items())
    parts = ["lmms-eval", "--model", str(config["model"])]
    parts += ["--model_args", arguments] if arguments else []
    parts += ["--tasks", str(called_with.get("tasks") or ",".join(results))]
    for name in ("include_path", "batch_size", *_HARNESS, "output_path"):
        value = called_with.get(name, config.get(name))
        if value and (name, str(value)) != ("batch_size", "1"):
            parts += [f"--{name}", str(value)]
    sample = _sample(config)
    drawn = f"  # on documents drawn at random by `horizon --sample`: {sample}" if sample else ""
    return shlex.join([*parts, "--log_samples"]) + drawn


def _merged(same: list[RunRecord], problems: list[Problem]) -> RunRecord:
    """Merge records of equal settings; a task with two different scores is left out and reported as a problem."""
    tasks: dict[str, TaskRecord] = {}
    clashes: set[str] = set()
    for record in sorted(same, key=lambda record: record.sources[0].date):
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
            # A clock may have been set back, so a record with samples, which can be checked, precedes a newer one without.
            if earlier is None or later.samples is not None or earlier.samples is None:
                tasks[task] = later
    agreeing = {task: tasks[task] for task in sorted(tasks, key=ORDER.__getitem__) if task not in clashes}
    first = same[0]
    return RunRecord(first.wrapper, first.settings, first.ours, agreeing)
