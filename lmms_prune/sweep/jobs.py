"""Plans the jobs of a sweep. Each job evaluates one task of one configuration, and has its own result folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import Any

from lmms_prune.configs.check import Checked, check
from lmms_prune.configs.runs import Run, files, read
from lmms_prune.errors import ConfigError
from lmms_prune.harness.fingerprint import inputs
from lmms_prune.harness.tasks import single_tasks, task_configs

# lmms-eval options that a sweep refuses, and why: they act on all configurations at once, or ignore code and versions.
_REFUSED = {
    "env": "the runs share a process; set the variables in the environment of the sweep.",
    "use_cache": "a sweep skips what is complete, and the cache does not know when code or versions change.",
    "wandb_args": "log finished results instead.",
    "swanlab_args": "log finished results instead.",
    "predict_only": "a sweep needs the written scores to see that a result is complete.",
    "power_analysis": "it evaluates nothing.",
}
PARTIAL = ".partial"


class SweepError(ValueError):
    """A sweep cannot start; the message says what to change."""


@dataclass(frozen=True)
class Job:
    """One evaluation of a sweep: one task of one configuration.

    Args:
        name: the configuration's name.
        task: lmms-eval's name of the task.
        settings: lmms-eval's options for this task.
        weights: a key that is equal for jobs that can share the loaded weights.
        out: the sweep's results folder.
        part: the shard ("3/8") that contains exactly this configuration.
        inputs: local files that the settings name, each with numbers that change when the file changes.
    """

    name: str
    task: str
    settings: Mapping[str, Any]
    weights: tuple[str, ...]
    out: Path
    part: str
    inputs: Mapping[str, list[int]]

    @property
    def folder(self) -> Path:
        """The folder of the complete result."""
        return self.out / self.name / self.task

    @property
    def partial(self) -> Path:
        """The folder that the evaluation writes to, below the hidden folder `PARTIAL`."""
        return self.out / PARTIAL / f"{self.name}@{self.task}"

    @property
    def journal(self) -> Path:
        """The answers of a running or interrupted evaluation; deleted when the result is complete."""
        return self.partial.with_name(f"{self.partial.name}.journal")

    def __str__(self) -> str:
        return f"{self.name}, {self.task}"


def plan(
    paths: Sequence[Path],
    out: Path,
    tasks: str | None = None,
    limit: int | None = None,
    shard: str | None = None,
) -> list[Job]:
    """The jobs of some ``--config`` files, ordered so that jobs with the same weights follow each other.

    Args:
        paths: files, or folders of files.
        out: the results folder.
        tasks: replaces the files' tasks.
        limit: documents of each task; replaces the files' limit.
        shard: the part of the configurations to plan: "3/8" is the third of eight.

    Raises:
        ConfigError: a file does not exist.
        SweepError: files with mistakes (all are named), two configurations of one name, or an invalid shard.
    """
    if "," in str(out):
        raise SweepError(f"--out {out}: lmms-eval splits paths at commas; use another folder.")
    checked = _checked(files(paths), tasks, limit)
    part, parts = shard_of(shard)
    jobs = []
    for number, config in list(enumerate(checked, 1))[part - 1 :: parts]:
        assert config.arguments is not None
        run = config.run
        settings = {**run.settings, "log_samples": True, "include_path": _include(run.settings)}
        weights = (str(settings["model"]), *config.arguments.weights())
        for task in single_tasks(settings["tasks"]):
            own: dict[str, Any] = {"tasks": task, "config": str(run.path), "output_path": str(out / run.name / task)}
            shard_of_config = f"{number}/{len(checked)}"
            files_named = inputs(config.arguments)
            jobs.append(Job(run.name, task, {**settings, **own}, weights, out, shard_of_config, files_named))
    order = list(dict.fromkeys(job.weights for job in jobs))
    return sorted(jobs, key=lambda job: order.index(job.weights))


def _runs(path: Path, problems: list[str]) -> list[Run]:
    """The runs of one file. If it cannot be read: no runs, and the reason is appended to `problems`."""
    try:
        return read(path)
    except ConfigError as error:
        problems.append(f"{path}: {error}")
        return []


def _checked(paths: Sequence[Path], tasks: str | None, limit: int | None) -> list[Checked]:
    """Every configuration, checked, with the command's options applied.

    Raises:
        SweepError: some have mistakes; names all.
    """
    checked: list[Checked] = []
    problems: list[str] = []
    for run in (run for path in paths for run in _runs(path, problems)):
        problems += [f"{run}: {key}: {_REFUSED[key]}" for key in _REFUSED if run.settings.get(key)]
        overrides = {"tasks": tasks, "limit": limit}
        run.settings.update({name: value for name, value in overrides.items() if value is not None})
        # Each job gets its own output path below the sweep's folder.
        run.settings.pop("output_path", None)
        run.settings.pop("log_samples", None)
        # lmms-eval is given this package's tasks by their full path, wherever the sweep starts.
        if (include := run.settings.get("include_path")) and _is_ours_elsewhere(include):
            del run.settings["include_path"]
        checked.append(check(run))
        problems += [f"{run}: {problem}" for problem in checked[-1].problems]
        if checked[-1].arguments is not None and checked[-1].arguments.journal is not None:
            problems.append(f"{run}: model_args: journal: a sweep keeps one for each of its evaluations; leave it out.")
    runs = [config.run for config in checked]
    for run in runs:
        if "," in run.name:
            problems.append(
                f"{run}: lmms-eval splits paths at commas, and results go to a folder of this name; rename it."
            )
        if run.name.startswith("."):
            problems.append(f"{run}: results go to a folder of this name, where a dot hides them; rename it.")
    repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    for name in repeated:
        namesakes = " and ".join(str(run) for run in runs if run.name == name)
        problems.append(f"{namesakes} would share the folder '{name}'; rename one of them.")
    if problems:
        raise SweepError("\n".join(problems))
    return checked


def shard_of(text: str | None) -> tuple[int, int]:
    """``3/8`` as its two numbers; 1/1 without a text.

    Raises:
        SweepError: it is not a part and a number of parts.
    """
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise SweepError(f"--shard {text}: write the part and the number of parts, such as 3/8, from 1/8 to 8/8.")
    return int(match[1]), int(match[2])


def _is_ours_elsewhere(include: Any) -> bool:
    """Tell whether a file names this package's tasks by a path that holds only in another working directory."""
    return isinstance(include, str) and not isdir(include) and Path(include).name == task_configs().name


def _include(settings: Mapping[str, Any]) -> str | list[str]:
    """The task folders for lmms-eval: this package's, which must be found from any working directory, and the file's."""
    package, configured = task_configs(), settings.get("include_path")
    if configured is None or not isdir(configured) or Path(configured).resolve() == package.resolve():
        return str(package)
    return [str(configured), str(package)]
