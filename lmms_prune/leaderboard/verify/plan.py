"""Token accounting against the schedule's plan, and the schedule against the command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.verify.evidence import RecordedSample, RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt, NotRecordedError, doubts_of
from lmms_prune.record.redaction import MARK
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.stage import PER, Stage
from lmms_prune.schedule.text import read_number

COMPARED = ("pretrained", "revision", "seed", "positions")
"""Arguments of a run, other than its schedule, that its command states too."""


def planned(task: RecordedTask) -> list[Doubt]:
    """Compare what each stage kept of each image, and what each layer saw, with the schedule."""
    try:
        schedule = task.schedule
    except NotRecordedError as error:
        return [Doubt(str(error), contradicted=False)]
    return doubts_of(task.samples, lambda sample: sample.name, lambda sample: _contradiction(sample, schedule))


def _contradiction(sample: RecordedSample, schedule: Schedule) -> str:
    counted, stages = sample.counted, schedule.stages
    kept = counted.kept_visual_tokens
    if len(kept) != len(stages):
        return f"{len(kept)} stages acted, but schedule {schedule} has {len(stages)}"
    if not counted.layer_visual_tokens:
        raise NotRecordedError("no visual tokens by layer")
    entering = list(layer_counts(sample, schedule))
    if entering != list(counted.layer_visual_tokens):
        layer = next(i for i, (a, b) in enumerate(zip(entering, counted.layer_visual_tokens, strict=True)) if a != b)
        return (
            f"layer {layer} saw {counted.layer_visual_tokens[layer]} visual tokens; by schedule {schedule} and the "
            f"tokens kept, {entering[layer]}"
        )
    if any(stage.per != PER[0] for stage in stages):
        raise NotRecordedError("the tiles of the images are not recorded, and a stage's keep holds for each tile")
    images = sample.images
    # One image's tokens are its row's; of several, only the bitmaps tell which image they are of.
    after = [[sample.patches(count)] for count in kept] if len(images) <= 1 else _by_image(sample)
    return next(_off_plan(stages, images, after), "")


def layer_counts(sample: RecordedSample, schedule: Schedule) -> Iterator[int]:
    """Yield the visual tokens that enter each layer, by the schedule's layers and the tokens that its stages kept."""
    counted, present = sample.counted, sample.counted.visual_tokens
    kept_at = {stage.layer: kept for stage, kept in zip(schedule.stages, counted.kept_visual_tokens, strict=True)}
    for layer in range(len(counted.layer_visual_tokens)):
        present = kept_at.get(layer, present)
        yield present


def _by_image(sample: RecordedSample) -> list[list[int]]:
    return [[int(mask.sum()) for mask in masks] for masks in sample.masks]


def _off_plan(stages: tuple[Stage, ...], images: list[int], after: list[list[int]]) -> Iterator[str]:
    present = images
    for stage, kept in zip(stages, after, strict=True):
        most = stage.kept(images, present) if images else [0] * len(kept)
        exact = not stage.at_most
        if any(count > limit or (exact and count != limit) for count, limit in zip(kept, most, strict=True)):
            rule = "" if exact else "at most "
            yield f"stage {stage} kept {_plain(kept)} of {_plain(present)} visual tokens; its plan is {rule}{_plain(most)}"
        present = kept


def _plain(counts: list[int]) -> str:
    return " and ".join(map(str, counts))


def settings_agree(content: Mapping[str, Any]) -> list[Doubt]:
    """Compare a run's recorded schedule and settings with its report's title and with the command that started it."""
    report = RunReport.of_results(content)
    if report is None:
        return [Doubt("not a run of this plugin", contradicted=False)]
    entry = next(entry for entry in content["config"]["batch_sizes"] if isinstance(entry, dict))
    doubts = []
    if entry.get("schedule", report.schedule) != report.schedule:
        text = f"the report names schedule {entry['schedule']}, its settings {report.schedule}"
        doubts.append(Doubt(text, contradicted=True))
    config = content["config"]
    stated = (config.get("model_args"), (config.get("resolved_cli_args") or {}).get("model_args"))
    texts = [arguments for arguments in stated if arguments]
    if not texts:
        doubts.append(Doubt("the command is not recorded", contradicted=False))
    for arguments in texts:
        doubts += _against_command(report, arguments)
    return list(dict.fromkeys(doubts))


def _against_command(report: RunReport, model_args: Any) -> Iterator[Doubt]:
    from lmms_prune.harness.argument_text import ArgumentError, split
    from lmms_prune.harness.arguments import ModelArguments

    try:
        arguments = split(model_args) if isinstance(model_args, str) else dict(model_args)
        compared = {name: arguments[name] for name in COMPARED if arguments.get(name) is not None}
        as_recorded = ModelArguments.read(compared).settings()
        asked = _asked(arguments)
        executed = Schedule.parse(report.schedule or "none")
    except (ArgumentError, ScheduleError, TypeError, ValueError) as error:
        yield Doubt(f"the command's arguments cannot be read ({error})", contradicted=False)
        return
    for name in compared:
        recorded = report.settings.get(name)
        if recorded is not None and recorded != as_recorded[name] and MARK not in f"{compared[name]}{recorded}":
            yield Doubt(f"the command says {name}={compared[name]}, the record {recorded}", contradicted=True)
    if asked is not None and MARK not in f"{asked}{executed}" and not executes(executed, asked):
        yield Doubt(f"the command asks for schedule {asked}, the record names {executed}", contradicted=True)


def _asked(arguments: Mapping[str, Any]) -> Schedule | None:
    """Return the schedule of a command's arguments, its ``?`` not solved; None for one that a file decides."""
    asked = arguments.get("schedule", "none")
    return None if str(asked).strip() == "auto" else Schedule.with_budget(asked)[0]


def executes(executed: Schedule, asked: Schedule) -> bool:
    """Tell whether a schedule is another one with its ``?`` solved."""
    if len(executed.stages) != len(asked.stages):
        return False
    # Runs record the file of a method without its folder.
    return all(
        (done.method, done.layer) == (stage.method, stage.layer)
        and _same_options(done, stage)
        and stage.keep in (None, done.keep)
        for done, stage in zip(executed.portable.stages, asked.portable.stages, strict=True)
    )


def _same_options(executed: Stage, asked: Stage) -> bool:
    """Tell whether a stage's options are those asked for; of a method of one's own, types and defaults are not known."""
    if not executed.spec.own:
        return executed.options == asked.options
    wanted = dict(asked.options)
    return all(name in wanted and _same_text(str(value), str(wanted[name])) for name, value in executed.options)


def _same_text(executed: str, asked: str) -> bool:
    """Tell whether an option as runs record it is the one asked for: numbers, flags and choices may be written otherwise."""
    numbers = read_number(executed), read_number(asked)
    return executed.lower() == asked.lower() if None in numbers else numbers[0] == numbers[1]
