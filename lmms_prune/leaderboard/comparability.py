"""Reasons why a row is not directly comparable with its baseline. Such rows are shown, but flagged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.entries import Entry, kinds_of
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.leaderboard.rows import ORACLE, STOCK, UNPRUNED, TableRow
from lmms_prune.record.run import VERSIONS
from lmms_prune.schedule import Schedule

FACTS = ("attention", "dtype", "device", *VERSIONS, "code")
SETTINGS = (
    *("prompt", "image_aspect", "unpad", "min_pixels", "max_pixels", "system_prompt", "chat_template"),
    *("load_in_4bit", "load_in_8bit"),
    *("limit", "offset", "gen_kwargs", "num_fewshot", "system_instruction"),
)
_NAMED = 3  # most rows that a sentence names


def marks(entry: Entry, baseline: Entry | None) -> tuple[str, ...]:
    """Return the reasons why `entry` is not directly comparable, a short text each."""
    reasons = list(_own(entry))
    if baseline is not None and entry is not baseline:
        reasons += _against_baseline(entry, baseline)
    return tuple(dict.fromkeys(reasons))


def control_marks(entry: Entry, control: Entry) -> tuple[str, ...]:
    """Return how the protocol of a row's random control differs from the row's, a short text each."""
    return tuple(_protocol(entry, control, "its random control"))


def unlike_rows(rows: Sequence[TableRow]) -> Iterator[str]:
    """Yield a sentence for each setting of the protocol in which rows of one model differ."""
    plugin_rows = [row for row in rows if row.runs and row.kind != STOCK]
    for name in (*SETTINGS, "positions"):
        labels: dict[str, list[str]] = {}
        for row in plugin_rows:
            # Without a stage, no position is ever renumbered.
            if name != "positions" or row.kind != UNPRUNED:
                labels.setdefault(_short(row.runs[0].settings.get(name)), []).append(f"'{row.label}'")
        if len(labels) > 1:
            groups = [f"{value} ({_some(names)})" for value, names in labels.items()]
            yield f"Rows of different {name} cannot be compared with each other: {'; '.join(groups)}."


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_NAMED]) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")


def distance(entry: Entry, other: Entry) -> int:
    """Count the settings and circumstances in which two entries differ; unrecorded ones count as different."""
    return len(list(_differences(entry, other)))


def _own(entry: Entry) -> Iterator[str]:
    if entry.kind == STOCK:
        yield "not a run of this plugin: no measured budget, and its circumstances are not recorded"
    elif entry.accounting is None:
        yield "no measured budget (answers from a cache carry no token accounting)"
    if entry.kind == ORACLE:
        kinds = [pair for run in entry.runs for pair in kinds_of(run.schedule).items()]
        oracles = {name for name, kind in kinds if kind == "oracle"}
        yield f"{', '.join(sorted(oracles))} is told the right answers: a bound, not a method"
    tasks = [(TASKS[name].name, task) for run in entry.runs for name, task in run.tasks.items()]
    partial = dict.fromkeys(f"{name} ({t.answered} of {t.documents})" for name, t in tasks if t.answered < t.documents)
    if partial:
        yield f"--limit, only a part of the documents: {', '.join(partial)}"
    if unscored := dict.fromkeys(name for name, task in tasks if task.score is None):
        yield f"no score: {', '.join(unscored)}"
    yield from entry.faults
    if unpruned := sum(source.unpruned for run in entry.runs if not _keeps_all(run) for source in run.sources):
        yield f"{unpruned} samples lost no visual token: their images have no more than the schedule keeps"
    yield from entry.flaws
    if entry.kind == STOCK:
        return
    for fact in FACTS:
        values = _facts(entry, fact)
        if len(values) > 1:
            yield f"{fact}: {' and '.join(values)} in one row"
        if "not recorded" in values:
            yield f"{fact} not recorded"
    # The code digest distinguishes versions; only the commit tells whether others can check out this one.
    if any(value.endswith("-dirty") for value in _facts(entry, "commit")):
        yield "the plugin's code had changes that were not committed"


def _keeps_all(run: RunRecord) -> bool:
    """Tell whether the run's schedule keeps all tokens."""
    return not run.schedule or Schedule.parse(run.schedule).keeps_all


def _against_baseline(entry: Entry, baseline: Entry) -> Iterator[str]:
    if alone := [TASKS[task].name for task in entry.tasks if task not in baseline.tasks]:
        yield f"its baseline was not evaluated on {', '.join(alone)}: not in Rel"
    for task in entry.tasks:
        others = [other for other in baseline.tasks if TASKS[other] is TASKS[task] and other not in entry.tasks]
        if task not in baseline.tasks and others:
            yield f"{TASKS[task].name}: {task}; its baseline: {', '.join(others)}, which asks or scores differently"
    if STOCK in (entry.kind, baseline.kind):
        if baseline.kind == STOCK:
            yield "its baseline is not a run of this plugin: their circumstances cannot be compared"
        return
    yield from _differences(entry, baseline)


def _differences(entry: Entry, baseline: Entry) -> Iterator[str]:
    for fact in FACTS:
        own, baseline_values = _facts(entry, fact), _facts(baseline, fact)
        if own != baseline_values:
            yield f"{fact}: {', '.join(own)}; its baseline: {', '.join(baseline_values)}"
    yield from _protocol(entry, baseline, "its baseline")


def _protocol(entry: Entry, other: Entry, role: str) -> Iterator[str]:
    """Yield how prompts, images, positions and tasks of two entries differ; `role` is what the other one is."""
    # Without a stage, no position is ever renumbered.
    positions = () if UNPRUNED in (entry.kind, other.kind) else ("positions",)
    for name in (*SETTINGS, *positions):
        own_setting, other_setting = (either.runs[0].settings.get(name) for either in (entry, other))
        if own_setting != other_setting:
            yield f"{name}: {_short(own_setting)}; {role}: {_short(other_setting)}"
    for task in [task for task in entry.tasks if task in other.tasks]:
        if len({run.tasks[task].asked for either in (entry, other) for run in either.runs}) > 1:
            yield f"{TASKS[task].name}: other prompts or generation settings of the task than {role}"


def _facts(entry: Entry, name: str) -> list[str]:
    return sorted(set.union(*(run.facts(name) for run in entry.runs)))


def _short(value: str | None) -> str:
    text = value or "none"
    return text if len(text) <= 40 else f"{text[:39]}…"
