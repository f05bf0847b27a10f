"""What makes a row less than comparable: it is shown all the same, and says so."""

from __future__ import annotations

from collections.abc import Iterator

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.entries import ORACLE, STOCK, Entry, methods_of
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.methods import METHODS
from lmms_prune.record.run import VERSIONS
from lmms_prune.schedule import Schedule

FACTS = ("attention", "dtype", "device", *VERSIONS, "code")
SETTINGS = (
    *("prompt", "image_aspect", "min_pixels", "max_pixels", "system_prompt", "chat_template"),
    *("limit", "offset", "gen_kwargs", "num_fewshot", "system_instruction"),
)


def marks(entry: Entry, baseline: Entry | None) -> tuple[str, ...]:
    """All that keeps `entry` from being compared without a word of warning, each in a few words."""
    found = list(_own(entry))
    if baseline is not None and entry is not baseline:
        found += _beside(entry, baseline)
    return tuple(dict.fromkeys(found))


def distance(entry: Entry, other: Entry) -> int:
    """In how many settings and circumstances two entries differ; what was not recorded differs."""
    return len(list(_differences(entry, other)))


def _own(entry: Entry) -> Iterator[str]:
    if entry.kind == STOCK:
        yield "not a run of this plugin: no measured budget, and its circumstances are not recorded"
    elif entry.accounting is None:
        yield "no measured budget (answers from a cache carry no token accounting)"
    if entry.kind == ORACLE:
        oracles = {name for run in entry.runs for name in methods_of(run.schedule) if METHODS[name].kind == "oracle"}
        yield f"{', '.join(sorted(oracles))} is told the right answers: a bound, not a method"
    tasks = [(TASKS[name].name, task) for run in entry.runs for name, task in run.tasks.items()]
    limited = dict.fromkeys(f"{name} ({t.answered} of {t.documents})" for name, t in tasks if t.answered < t.documents)
    if limited:
        yield f"--limit, only a part of the documents: {', '.join(limited)}"
    if unscored := dict.fromkeys(name for name, task in tasks if task.score is None):
        yield f"no score: {', '.join(unscored)}"
    yield from entry.faults
    if unpruned := sum(source.unpruned for run in entry.runs if not _control(run) for source in run.sources):
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
    # The code's digest tells versions apart; only the commit tells whether anybody else can have this one.
    if any(value.endswith("-dirty") for value in _facts(entry, "commit")):
        yield "the plugin's code had changes that were not committed"


def _control(run: RunRecord) -> bool:
    """Whether the run's schedule asks for all tokens."""
    return not run.schedule or Schedule.parse(run.schedule).keeps_all


def _beside(entry: Entry, baseline: Entry) -> Iterator[str]:
    if alone := [TASKS[task].name for task in entry.tasks if task not in baseline.tasks]:
        yield f"its baseline was not evaluated on {', '.join(alone)}: not in Rel"
    if STOCK in (entry.kind, baseline.kind):
        if baseline.kind == STOCK:
            yield "its baseline is not a run of this plugin: their circumstances cannot be compared"
        return
    yield from _differences(entry, baseline)


def _differences(entry: Entry, baseline: Entry) -> Iterator[str]:
    for fact in FACTS:
        mine, its = _facts(entry, fact), _facts(baseline, fact)
        if mine != its:
            yield f"{fact}: {', '.join(mine)}; its baseline: {', '.join(its)}"
    for name in SETTINGS:
        asked, by_it = (one.runs[0].settings.get(name) for one in (entry, baseline))
        if asked != by_it:
            yield f"{name}: {_short(asked)}; its baseline: {_short(by_it)}"
    for task in [task for task in entry.tasks if task in baseline.tasks]:
        if len({run.tasks[task].asked for one in (entry, baseline) for run in one.runs}) > 1:
            yield f"{TASKS[task].name}: other prompts or generation settings of the task than its baseline"


def _facts(entry: Entry, name: str) -> list[str]:
    return sorted(set.union(*(run.facts(name) for run in entry.runs)))


def _short(value: str | None) -> str:
    text = value or "none"
    return text if len(text) <= 40 else f"{text[:39]}…"
