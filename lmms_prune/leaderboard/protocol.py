"""How a run's protocol differs from that of the paper's row: task, prompt, images, positions, options of methods.

A score is compared with a printed one only where nothing differs. The protocol is that of the row's file in
``model_configs/``; it stands in ``published.json``, since the leaderboard reads no configurations, and a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.entries import Entry
from lmms_prune.leaderboard.published import PublishedRow
from lmms_prune.leaderboard.records import TaskRecord
from lmms_prune.leaderboard.rows import TableRow
from lmms_prune.schedule import Schedule, Stage

# Options of lmms-eval and of how weights are loaded that change answers; the paper's rows take none. (--limit and --offset show in
# the documents.)
_NONE = ("gen_kwargs", "num_fewshot", "system_instruction", "peft", "load_in_4bit", "load_in_8bit")


def differences(entry: Entry, task: str, printed: PublishedRow) -> tuple[str, ...]:
    """Return how `entry`'s run of a task differs from the protocol of a printed row, a short text each."""
    column = TASKS[task].name
    reasons = []
    if (wanted := printed.protocol.tasks.get(column, task)) != task:
        reasons.append(f"task {task}, not {wanted}")
    records = [run.tasks[task] for run in entry.runs if task in run.tasks]
    if partial := next(filter(_is_partial, records), None):
        reasons.append(f"{partial.answered} of {partial.documents} documents of {task}")
    return (*reasons, *_settings(entry, printed), *_schedule(entry, printed))


def rel_differences(row: TableRow, baseline: Entry | None, in_means: Collection[str]) -> tuple[str, ...]:
    """Return why a row's Rel is not comparable with the printed one: protocols of row and baseline, and the benchmarks.

    Args:
        row, baseline: the row, and what it is compared with.
        in_means: tasks that count in Rel.
    """
    printed = row.published
    if printed is None:
        return ()
    reasons = [reason for cell in row.cells.values() for reason in cell.unlike]
    columns = [TASKS[task].name for task in row.cells]
    if missing := [name for name in printed.scores if name not in columns]:
        reasons.append(f"without {', '.join(missing)}")
    if further := [task for task in row.cells if task in in_means and not _is_printed(task, printed)]:
        reasons.append(f"with {', '.join(further)}")
    if baseline is not None:
        own = [reason for task in baseline.tasks if task in in_means for reason in differences(baseline, task, printed)]
        reasons += [f"baseline: {reason}" for reason in own if reason not in reasons]
    return tuple(dict.fromkeys(reasons))


def _is_printed(task: str, printed: PublishedRow) -> bool:
    return TASKS[task].name in printed.scores


def _is_partial(record: TaskRecord) -> bool:
    return record.answered < record.documents


def _settings(entry: Entry, printed: PublishedRow) -> Iterator[str]:
    """Yield the settings that differ from the row's."""
    settings = entry.runs[0].settings
    for name, wanted in printed.protocol.settings.items():
        # Without a stage, no position is ever renumbered.
        if name == "positions" and entry.schedule == "none":
            continue
        own = settings.get(name, "not recorded")
        if own != wanted:
            yield f"{name} {_short(own)}, not {wanted}"
    for name in _NONE:
        if name in settings:
            yield f"{name} {_short(settings[name])}, not none"


def _schedule(entry: Entry, printed: PublishedRow) -> Iterator[str]:
    """Yield the stages whose options differ from the row's."""
    for stage in Schedule.parse(entry.schedule or "none").stages:
        wanted = Stage(stage.method, stage.layer, stage.keep, printed.protocol.options(stage.method), stage.per)
        if stage.options != wanted.options and entry.schedule != "none":
            yield f"{stage}, not {wanted}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
