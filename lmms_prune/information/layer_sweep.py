"""Evaluates many schedules of one model as a sweep, to measure the accuracy of pruning at each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from lmms_prune.harness.argument_text import extended
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.results import TaskRecord, read_results
from lmms_prune.leaderboard.samples import NoDocumentScoresError, Samples, read_samples
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.record.files import write
from lmms_prune.record.information import InformationError
from lmms_prune.schedule import Schedule
from lmms_prune.sweep.draws import with_documents
from lmms_prune.sweep.jobs import plan
from lmms_prune.sweep.run import JobOutcome, run_sweep

Report = Callable[[JobOutcome], None]
"""Is called with the outcome of each evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """The model and the documents of an evaluation, without a schedule.

    Args:
        model, model_args: as for lmms-eval, without a schedule.
        tasks: names of single tasks, no groups.
        limit: documents of each task; None for all.
        offset: documents at the start of each task that are skipped.
        documents: by task, the numbers of the documents, instead of limit and offset; None if they were not drawn.
        sample: how they were drawn.
        include: a folder of further task YAMLs.
        secrets: values that no file may contain.
    """

    model: str
    model_args: str
    tasks: Sequence[str]
    limit: int | None = None
    offset: int = 0
    documents: Mapping[str, Sequence[int]] | None = None
    sample: str = ""
    include: Path | None = None
    secrets: Collection[str] = field(default=(), repr=False)

    def settings(self, schedule: str) -> dict[str, Any]:
        """lmms-eval's options for one schedule, which may be followed by ``,budget=…``."""
        arguments = extended(self.model_args, {"schedule": schedule})
        settings: dict[str, Any] = {"model": self.model, "model_args": arguments, "tasks": ",".join(self.tasks)}
        if self.limit is not None:
            settings["limit"] = self.limit
        if self.offset:
            settings["offset"] = self.offset
        if self.include is not None:
            settings["include_path"] = str(self.include.absolute())
        return settings


def evaluate(
    evaluation: Evaluation, schedules: Sequence[str], out: Path, launch: str, report: Report
) -> dict[str, dict[str, Samples]]:
    """Evaluate every schedule on every task; complete results in `out` are reused.

    Args:
        evaluation: the model and the documents.
        schedules: schedule texts.
        out: folder of the runs.
        launch: the launcher, as for `run_sweep`.
        report: called with each outcome.

    Returns:
        the documents' scores, by schedule and task.

    Raises:
        InformationError: an evaluation failed.
        ConfigError, SweepError: as for `plan` and `run_sweep`.
    """
    run_all(evaluation, schedules, out, launch, report)
    # All results are read before any samples: only then is the scale of a task's scores known.
    records = {schedule: _records(out / "runs" / slug(schedule)) for schedule in schedules}
    return {
        schedule: _scores(out / "runs" / slug(schedule), evaluation.tasks, records[schedule]) for schedule in schedules
    }


def run_all(evaluation: Evaluation, schedules: Sequence[str], out: Path, launch: str, report: Report) -> None:
    """Evaluate as `evaluate`, without reading the scores: a part of the schedules, whose others run elsewhere."""
    configs = out / "configs"
    paths = []
    for schedule in schedules:
        paths.append(configs / f"{slug(schedule)}.yaml")
        write(paths[-1], yaml.safe_dump(evaluation.settings(schedule), sort_keys=False))
    jobs = plan(paths, out / "runs") if paths else []
    if (documents := evaluation.documents) is not None:
        jobs = [with_documents(job, documents[job.task], evaluation.sample) for job in jobs]
    for outcome in run_sweep(jobs, launch, evaluation.secrets):
        report(outcome)
        if outcome.state == "failed":
            raise InformationError(f"the evaluation of {outcome.job} failed: {outcome.reason}")


def slug(schedule: str) -> str:
    """A schedule as a file name. Layers have two digits, so that names sort by layer; an oracle's folder is omitted.

    An option that names a path, and a method of one's own, are replaced by a digest, since two of them may differ in signs
    that no file name can have.
    """

    def digest(path: re.Match[str]) -> str:
        return "-" + blake2b(path[0].encode(), digest_size=4).hexdigest()

    padded = re.sub(r"@(\d)(?!\d)", r"@0\1", re.sub(r";of=[^,;]*", "", schedule))
    named = re.sub(r"[^,;@]*(?:\.py|:)[^,;@]*(?=@)", lambda own: f"own{digest(own)}", padded)
    return re.sub(r"[^A-Za-z0-9.@]+", "-", re.sub(r";\w+=[^,;]*/[^,;]*", digest, named))


def single_stage(method: str, layer: int, keep: float | str) -> str:
    """The schedule with one method as its only stage.

    Args:
        method: its name, with options or without: ``dart;order=reference``.
        layer: the stage's layer.
        keep: a ratio, or a count such as ``60t``.
    """
    name, _, options = method.partition(";")
    return f"{name}@{layer}:{keep}" + (f";{options}" if options else "")


def _records(folder: Path) -> dict[str, TaskRecord]:
    return {name: task for record in read_results([folder]).records for name, task in record.tasks.items()}


def _scores(folder: Path, tasks: Sequence[str], records: Mapping[str, TaskRecord]) -> dict[str, Samples]:
    scores = {}
    for task in tasks:
        samples = records[task].samples if task in records else None
        if samples is None or task not in TASKS:
            raise InformationError(f"{folder} holds no samples of {task}; remove it and run the command again.")
        try:
            scores[task] = as_gain(read_samples(samples, TASKS[task]))
        except NoDocumentScoresError as error:
            raise InformationError(f"--tasks: {error}. This command needs a score of each document.") from error
        except ValueError as error:
            raise InformationError(f"--tasks: '{task}': {error}") from error
    return scores


def as_gain(samples: Samples) -> Samples:
    """Return the samples with scores of which more is better: 100 minus the score, where lower is better.

    Raises:
        ValueError: lower is better, and the scores are no shares.
    """
    if samples.sign > 0:
        return samples
    if not samples.scaled or samples.num.min() < 0 or samples.num.max() > 100:
        raise ValueError(
            "lower is better, and its scores are not from 0 to 1: there is no share of the unpruned score that a schedule keeps."
        )
    return replace(samples, num=100 * samples.den - samples.num, score=100 - samples.score, sign=1)


def spec_named(method: str) -> MethodSpec:
    """What is known of a method, named with options or without; the code of a method of one's own is imported.

    Raises:
        OptionError, ScheduleError: there is no such method, or its class is not usable.
    """
    name = method.partition(";")[0]
    if name in METHODS:
        return METHODS[name]
    from lmms_prune.methods.own import load

    return load(Schedule.parse(f"{name}@0:1").stages[0].method)


def acts_at(method: str, layer: int) -> bool:
    """Whether a method, named with options or without, can act at a layer."""
    spec = spec_named(method)
    return spec.lowest_layer <= layer and (spec.highest_layer is None or layer <= spec.highest_layer)
