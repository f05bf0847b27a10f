"""Token accounting against itself, and against the run's averages."""

from __future__ import annotations

from dataclasses import fields

from lmms_prune.leaderboard.verify.evidence import RecordedSample, RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt, NotRecordedError, close, doubts_of
from lmms_prune.record.averages import TaskAverages

# Averages that follow from the samples; the others also count padding.
DERIVED = [item.name for item in fields(TaskAverages) if item.name not in ("computed_tokens", "padding", "cache_mib")]


def self_consistent(task: RecordedTask) -> list[Doubt]:
    """Compare the fields of each sample's token accounting with each other."""
    return doubts_of(task.samples, lambda sample: sample.name, _contradiction)


def _contradiction(sample: RecordedSample) -> str:
    counted = sample.counted
    layers, kept = counted.layer_visual_tokens, counted.kept_visual_tokens
    if not layers or not counted.text_tokens:
        raise NotRecordedError("no visual tokens by layer, or no text tokens")
    average = sum(layers) / len(layers)
    if not close(counted.avg_visual_tokens, average):
        return f"avg_visual_tokens is {counted.avg_visual_tokens:g}, but its layers have {average:g} on average"
    if counted.input_tokens != counted.text_tokens + counted.visual_tokens:
        return (
            f"a prompt of {counted.input_tokens} tokens with {counted.text_tokens} of text and "
            f"{counted.visual_tokens} visual ones"
        )
    if counted.kv_bytes != sum(counted.layer_kv_bytes):
        return f"kv_bytes is {counted.kv_bytes}, but its layers have {sum(counted.layer_kv_bytes)}"
    return _wrong_counts(sample, [*kept, *layers]) or _wrong_masks(sample)


def _wrong_counts(sample: RecordedSample, counts: list[int]) -> str:
    """Return what is impossible among tokens kept and tokens by layer."""
    counted = sample.counted
    if max(counts) > counted.visual_tokens:
        return f"{max(counts)} visual tokens of {counted.visual_tokens}"
    in_grids = sum(rows * columns for rows, columns in counted.visual_grids)
    if in_grids > counted.visual_tokens:
        return f"images of {in_grids} visual tokens in a prompt with {counted.visual_tokens}"
    recycled, kept = counted.recycled_visual_tokens, counted.kept_visual_tokens
    if len(recycled) != len(kept) or any(number > most for number, most in zip(recycled, kept, strict=True)):
        return f"{list(recycled)} tokens are recycled, but {list(kept)} kept"
    return ""


def _wrong_masks(sample: RecordedSample) -> str:
    """Return how the kept tokens differ from their recorded number."""
    kept = [sample.patches(count) for count in sample.counted.kept_visual_tokens]
    try:
        marked = [sum(int(mask.sum()) for mask in images) for images in sample.masks]
    except NotRecordedError:
        raise
    except ValueError as error:
        return f"its token bitmaps cannot be read: {error}"
    return "" if marked == kept else f"{kept} tokens are kept, but its bitmaps mark {marked}"


def averages_follow(task: RecordedTask) -> list[Doubt]:
    """Compute the run's averages of the task from its samples again."""
    if task.report is None:
        return [Doubt("not a run of this plugin", contradicted=False)]
    recorded = task.report.tasks.get(task.name)
    counted = [sample.accounting for sample in task.samples if sample.accounting is not None]
    if recorded is None or not counted or len(counted) < len(task.samples):
        return [Doubt("no averages of all samples (answers from a cache)", contradicted=False)]
    processes = task.report.circumstances.processes
    if recorded.samples != len(counted):
        if processes not in (None, "1"):
            return [Doubt(f"the averages are of the first of {processes} processes", contradicted=False)]
        return [Doubt(f"averages of {recorded.samples} samples, but {len(counted)} are logged", contradicted=True)]
    layers = {len(sample.layer_visual_tokens) for sample in counted}
    stages = {len(sample.recycled_visual_tokens) for sample in counted}
    if len(layers) > 1 or len(stages) > 1 or layers == {0}:
        return [Doubt(f"samples of {sorted(layers)} layers and {sorted(stages)} stages", contradicted=layers != {0})]
    ones = [1] * len(counted)
    derived = TaskAverages.of_task(counted, ones, ones)
    for name in DERIVED:
        derived_values, recorded_values = (_flat(getattr(either, name)) for either in (derived, recorded))
        if len(recorded_values) == len(derived_values) and all(
            close(a, b, 1e-6) for a, b in zip(recorded_values, derived_values, strict=True)
        ):
            continue
        if not recorded_values:
            continue  # not yet recorded by an older version
        shown = [", ".join(f"{value:g}" for value in values[:4]) for values in (recorded_values, derived_values)]
        return [Doubt(f"the run's average {name} is {shown[0]}, but its samples give {shown[1]}", contradicted=True)]
    return []


def _flat(value: float | int | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (float(value),)
