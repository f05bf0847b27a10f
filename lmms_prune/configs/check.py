"""Checks in milliseconds whether a ``--config`` file can run: without torch, GPU or download."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from os.path import expanduser, isdir, isfile
from pathlib import Path
from typing import Any

from lmms_prune.configs.budget import ClaimError, kept_average
from lmms_prune.configs.runs import Run, unknown_keys
from lmms_prune.efficiency.estimate import TEXT_TOKENS, estimate, prompt_sizes
from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.harness.arguments import ArgumentError, ModelArguments
from lmms_prune.harness.tasks import UNSCORED, known_tasks, single_tasks, split_pairs, task_configs
from lmms_prune.harness.unseen import refuse_unseen
from lmms_prune.models import MODEL_NAMES, Family
from lmms_prune.models.architectures import of_checkpoint
from lmms_prune.models.sizes import Architecture, ArchitectureError
from lmms_prune.schedule import Schedule


@dataclass
class Checked:
    """The result of checking one run.

    Args:
        run: the run, as read.
        problems: mistakes that must be changed.
        notes: things that could not be checked.
        arguments: the parsed ``model_args``; None if they are wrong.
        schedule: the schedule; its ``?`` is solved if the model's sizes are known.
        percent: kept visual tokens, averaged over the layers, in percent; None if the sizes are not known.
        flops: the decoder's FLOPs, in percent of the unpruned model's; None if the sizes are not known.
    """

    run: Run
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    arguments: ModelArguments | None = None
    schedule: Schedule | None = None
    percent: float | None = None
    flops: float | None = None


def check(run: Run) -> Checked:
    """Check all of a run that can be checked without its model. Mistakes in the file are returned, never raised."""
    checked, settings = Checked(run, unknown_keys(run)), run.settings
    checked.problems += [*_outputs(settings), *_tasks(settings, checked.notes, run.path)]
    name = settings.get("model")
    if not isinstance(name, str) or name not in MODEL_NAMES:
        hint = did_you_mean(name, list(MODEL_NAMES)) if isinstance(name, str) else f" Use {' or '.join(MODEL_NAMES)}."
        checked.problems.append(f"model: {name!r} is not one of this package's models.{hint}")
        return checked
    family = MODEL_NAMES[name]
    try:
        refuse_unseen(settings)
        # lmms-eval's default batch size is the int 1; one in `model_args` overrides it.
        harness = {"batch_size": settings.get("batch_size", 1), "device": settings.get("device")}
        checked.arguments = ModelArguments.read(settings.get("model_args"), harness, family)
        if checked.arguments.trust_remote_code:
            checked.notes.append("trust_remote_code: the checkpoint's own code would run")
        _own_methods(checked, checked.arguments.schedule)
        checked.arguments.refuse_combinations(family)
        _check_sizes(checked, family)
    except (ArgumentError, ScheduleError, ArchitectureError, ClaimError) as error:
        checked.problems.append(str(error))
    return checked


def _own_methods(checked: Checked, schedule: Schedule) -> None:
    """Say whose code a schedule would run. Nothing of it is imported: a configuration may be a stranger's."""
    for stage in schedule.stages:
        if not stage.spec.own:
            continue
        checked.notes.append(
            f"schedule: the code of {stage.method} would run; its options and layers are not checked here"
        )
        file = re.sub(r"(\.py):\w+$", r"\1", stage.method)
        if file.endswith(".py") and not isfile(expanduser(file)):
            checked.problems.append(
                f"schedule: there is no file {file} below {Path.cwd()}, where lmms-eval would look."
            )


def _check_sizes(checked: Checked, family: Family) -> None:
    """Check the schedule against the model's sizes, and the claimed budget against the schedule."""
    arguments = checked.arguments
    assert arguments is not None
    checked.schedule = arguments.schedule
    sizes = of_checkpoint(arguments.pretrained)
    sizes = sizes and sizes.in_dtype(arguments.dtype)
    if sizes is None:
        # A name on the hub is "name" or "owner/name"; anything else must be a folder.
        if arguments.pretrained.startswith((".", "/", "~")) or arguments.pretrained.count("/") > 1:
            raise ArgumentError(f"model_args: pretrained={arguments.pretrained}: there is no such folder.")
        checked.notes.append(f"layers and budget not checked: the sizes of {arguments.pretrained} are not known here")
        return
    fixed = sizes.tokens_per_image
    if sizes.family != family:
        raise ArgumentError(
            f"pretrained={arguments.pretrained} is a {sizes.name}, which {family.model_name} cannot load."
        )
    if arguments.budget is not None:
        checked.schedule = arguments.schedule.solve(arguments.budget, prompt_sizes(sizes))
    checked.schedule.check(sizes.layers, [fixed] if fixed else None)
    if family.tiled:
        checked.schedule.check_tiles(family.title)
    _check_claim(checked, checked.schedule, sizes)


def _check_claim(checked: Checked, schedule: Schedule, sizes: Architecture) -> None:
    """Record what the schedule keeps and costs, and check the claimed budget."""
    share = kept_average(schedule, sizes, "%")
    pruned, unpruned = (estimate(sizes, s, sizes.example_tokens, TEXT_TOKENS).flops for s in (schedule, Schedule()))
    checked.percent, checked.flops = float(share), float(100 * pruned / unpruned)
    if claim := checked.run.claim:
        claim.check(kept_average(schedule, sizes, claim.unit), schedule.at_most)


def _outputs(settings: Mapping[str, Any]) -> list[str]:
    """Mistakes in outputs and limit, which lmms-eval would only find after loading the model."""
    problems, path = [], settings.get("output_path")
    if path is not None and (not isinstance(path, str) or "," in path):
        problems.append(f"output_path: {path!r} must be a text without commas: lmms-eval would split it there.")
    if settings.get("log_samples") and path is None:
        problems.append("log_samples: needs an output_path.")
    limit = settings.get("limit")
    is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if limit is not None and limit != -1 and not (is_number and 0 < limit < inf):
        problems.append(f"limit: {limit!r} must be a number of documents, a share below 1, or -1 for all.")
    elif message := split_pairs(limit, settings.get("offset"), single_tasks(str(settings.get("tasks")))):
        problems.append(message.replace(" ", ": ", 1))
    return problems


def _tasks(settings: Mapping[str, Any], notes: list[str], path: Path) -> list[str]:
    """Mistakes in task names. Only this package's tasks are known here; lmms-eval checks all others."""
    tasks, known = settings.get("tasks"), known_tasks()
    if not isinstance(tasks, str) or not tasks.strip():
        return [f"tasks: {tasks!r} must be a text of names with commas, such as 'mme,pope'."]
    names = [name.strip() for name in tasks.split(",")]
    problems = [
        f"tasks: '{name}' is not known.{did_you_mean(name, sorted(known))}"
        for name in names
        if name.startswith("prune_") and name not in known
    ]
    problems += [
        f"tasks: '{name}' contains a test split, which cannot be scored locally. Use {UNSCORED[name]}."
        for name in names
        if name in UNSCORED
    ]
    # Results go to folders with these names, so a name must not lead out of the results folder.
    problems += [
        f"tasks: {name!r} is not a task name: it has a slash or starts with a dot."
        for name in names
        if re.search(r"^\.|[/\\\0]", name)
    ]
    others = [name for name in names if name not in known and not name.startswith("prune_")]
    notes += [f"tasks not checked: {', '.join(others)}"] if others else []
    folder = settings.get("include_path")
    if folder is not None and not isinstance(folder, str):
        problems.append(f"include_path: {folder!r} must be the text of one folder's path.")
    elif folder is not None and not isdir(folder):
        problems.append(_missing_folder(folder, path))
    return problems


def _missing_folder(folder: str, path: Path) -> str:
    """Say that lmms-eval would not find a task folder, and from where it would."""
    above = next((parent for parent in path.absolute().parents if (parent / folder).is_dir()), None)
    start = f" Start it in {above}, or" if above else " Start it where there is one, or"
    return (
        f"include_path: there is no folder {folder} below the working directory, where lmms-eval looks for it.{start} write "
        f"include_path: {(above / folder) if above else task_configs()}"
    )
