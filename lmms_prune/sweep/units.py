"""What a sweep consists of: each task of each configuration is evaluated, kept and skipped by itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import Any

from lmms_prune.configs.check import Checked, check
from lmms_prune.configs.runs import ConfigError, Run, files, read
from lmms_prune.harness.fingerprint import inputs
from lmms_prune.harness.tasks import single_tasks, task_configs

# What lmms-eval's command does around all of its configurations, and what knows no versions.
_REFUSED = {
    "env": "the runs share a process; set the variables where you start the sweep.",
    "use_cache": "a sweep skips what is complete, and the cache does not know when code or versions change.",
    "wandb_args": "log finished results instead.",
    "swanlab_args": "log finished results instead.",
    "predict_only": "a sweep judges by the scores that were written.",
    "power_analysis": "it evaluates nothing.",
}
PARTIAL = ".partial"


class SweepError(ValueError):
    """A sweep that cannot begin; the message says what to change."""


@dataclass(frozen=True)
class Unit:
    """One task of one configuration.

    Args:
        name: of the configuration.
        task: lmms-eval's name.
        settings: lmms-eval's options, for this task alone.
        weights: equal where the same weights serve.
        out: the sweep's folder.
        part: the shard that is this configuration alone.
        inputs: local files that the settings name, with what tells whether they have changed.
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
        """Where the complete result stands."""
        return self.out / self.name / self.task

    @property
    def partial(self) -> Path:
        """Where it is made; below a folder whose name begins with a dot."""
        return self.out / PARTIAL / f"{self.name}@{self.task}"

    @property
    def journal(self) -> Path:
        """Finished answers of an evaluation that goes on, or was interrupted; gone with the complete result."""
        return self.partial.with_name(f"{self.partial.name}.journal")

    def __str__(self) -> str:
        return f"{self.name}, {self.task}"


def plan(
    paths: Sequence[Path], out: Path, tasks: str | None = None, limit: int | None = None, shard: str | None = None
) -> list[Unit]:
    """The units of some ``--config`` files; those that share their weights follow each other.

    Args:
        paths: files, or folders of files.
        out: where results go.
        tasks: instead of the files' own.
        limit: documents of each task, instead of the files' own.
        shard: "3/8": the third of eight parts of the configurations.

    Raises:
        ConfigError: a file that is not there.
        SweepError: files with mistakes, all named; two configurations of one name; or a shard that is none.
    """
    if "," in str(out):
        raise SweepError(f"--out {out}: lmms-eval cuts paths at commas; use another folder.")
    checked = _checked(files(paths), tasks, limit)
    part, parts = _shard(shard)
    units = []
    for number, one in list(enumerate(checked, 1))[part - 1 :: parts]:
        assert one.arguments is not None
        settings = {**one.run.settings, "log_samples": True, "include_path": _include(one.run.settings)}
        named = inputs(one.arguments)
        weights = (str(settings["model"]), *one.arguments.weights())
        for task in single_tasks(settings["tasks"]):
            where = {"tasks": task, "config": str(one.run.path), "output_path": str(out / one.run.name / task)}
            alone = f"{number}/{len(checked)}"
            units.append(Unit(one.run.name, task, {**settings, **where}, weights, out, alone, named))
    order = list(dict.fromkeys(unit.weights for unit in units))
    return sorted(units, key=lambda unit: order.index(unit.weights))


def _runs(path: Path, problems: list[str]) -> list[Run]:
    """The runs of one file; none if it cannot be read, which `problems` then says."""
    try:
        return read(path)
    except ConfigError as error:
        problems.append(f"{path}: {error}")
        return []


def _checked(paths: Sequence[Path], tasks: str | None, limit: int | None) -> list[Checked]:
    """Every configuration with the command's own options in it, if none has a mistake."""
    checked: list[Checked] = []
    problems: list[str] = []
    for run in (run for path in paths for run in _runs(path, problems)):
        problems += [f"{run}: {key}: {_REFUSED[key]}" for key in _REFUSED if run.settings.get(key)]
        own = {"tasks": tasks, "limit": limit}
        run.settings.update({name: value for name, value in own.items() if value is not None})
        # Each unit gets an output path below the sweep's folder.
        run.settings.pop("output_path", None)
        run.settings.pop("log_samples", None)
        checked.append(check(run))
        problems += [f"{run}: {problem}" for problem in checked[-1].problems]
        if checked[-1].arguments is not None and checked[-1].arguments.journal is not None:
            problems.append(f"{run}: model_args: journal: a sweep keeps one for each of its evaluations; leave it out.")
    for run in (one.run for one in checked):
        if "," in run.name:
            problems.append(
                f"{run}: lmms-eval cuts paths at commas, and results go to a folder of this name; rename it."
            )
        if run.name.startswith("."):
            problems.append(f"{run}: results go to a folder of this name, where a dot hides them; rename it.")
    many = [name for name, count in Counter(one.run.name for one in checked).items() if count > 1]
    for name in many:
        same = " and ".join(str(one.run) for one in checked if one.run.name == name)
        problems.append(f"{same} would share the folder '{name}'; rename one of them.")
    if problems:
        raise SweepError("\n".join(problems))
    return checked


def _shard(text: str | None) -> tuple[int, int]:
    read = re.fullmatch(r"([0-9]+)/([0-9]+)", text or "1/1")
    if read is None or not 1 <= int(read[1]) <= int(read[2]):
        raise SweepError(f"--shard {text}: write the part and the number of parts, such as 3/8, from 1/8 to 8/8.")
    return int(read[1]), int(read[2])


def _include(settings: Mapping[str, Any]) -> str | list[str]:
    """This package's tasks, wherever the sweep is started, and a folder of the file's own."""
    own, given = task_configs(), settings.get("include_path")
    if given is None or not isdir(given) or Path(given).resolve() == own.resolve():
        return str(own)
    return [str(given), str(own)]
