"""Runs all checks on results, and adds what they find to a leaderboard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.records import Problem, RunRecord
from lmms_prune.leaderboard.rows import STOCK, Leaderboard, TableRow
from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.verify.across import RunDigest, digest_of
from lmms_prune.leaderboard.verify.checks import CHECKS
from lmms_prune.leaderboard.verify.evidence import executed_schedule, recorded_task, results_content
from lmms_prune.leaderboard.verify.findings import Finding, NotRecordedError, findings
from lmms_prune.leaderboard.verify.rescoring import Rescoring, scored_tasks

NUMBERS = frozenset(check.name for check in CHECKS if check.a_number)


@dataclass(frozen=True)
class VerifiedRun:
    """A run with all findings.

    Args:
        run: the run.
        findings: of all checks.
    """

    run: RunRecord
    findings: tuple[Finding, ...]

    @property
    def contradicted(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.state == "contradicted"]

    @property
    def unverified(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.state == "unverified"]

    @property
    def submitter(self) -> str:
        """Return who packed the run, and when; "" outside a pack."""
        packed = dict.fromkeys(f"{source.submitter}, {source.packed}" for source in self.run.sources if source.packed)
        return "; ".join(packed)


@dataclass(frozen=True)
class Verification:
    """The verified runs, and what could not be read.

    Args:
        runs: in the order of the results; unpruned ones first.
        problems: files and folders that could not be read.
    """

    runs: tuple[VerifiedRun, ...]
    problems: tuple[Problem, ...]

    @property
    def passed(self) -> bool:
        """Tell whether everything could be read and nothing is contradicted."""
        return not self.problems and not any(run.contradicted for run in self.runs)


def verification(
    runs: Sequence[RunRecord],
    problems: Iterable[Problem],
    reader: SamplesReader,
    rescoring: Rescoring,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Run all checks.

    Args:
        runs: the runs to verify, compared with each other too.
        problems: what could not be read before.
        reader: reads samples as the leaderboard does.
        rescoring: the scorers of the tasks.
        counted: called with the number of runs that were checked by themselves, and of all.

    Raises:
        ArgumentError: a benchmark's data cannot be read.
    """
    # A row is compared with those before it: unpruned runs first, since others are measured by them, then by date.
    ordered = sorted((run for run in runs if run.tasks), key=_order)
    rescoring.prepare(scored_tasks(ordered))
    all_findings: dict[str, list[Finding]] = {}
    digests: list[RunDigest] = []
    all_problems = list(problems)
    for run in ordered:
        digest = RunDigest(name_of_run(run), run, _schedule(run))
        digests.append(digest)
        all_findings[digest.name] = list(_of_run(run, digest, reader, rescoring, all_problems))
        counted(len(digests), len(ordered))
    for check in CHECKS:
        if check.of_rows is None:
            continue
        by_run = check.of_rows(digests)
        for name, held in all_findings.items():
            doubts = by_run.get(name, [])
            held += [finding for task, doubt in doubts for finding in findings(check.name, task, [doubt])]
            held += [] if doubts else [Finding(check.name, "holds")]
    verified = tuple(VerifiedRun(digest.run, tuple(all_findings[digest.name])) for digest in digests)
    return Verification(verified, tuple(dict.fromkeys(all_problems)))


def _order(run: RunRecord) -> tuple[bool, str, str]:
    dates = [source.packed or source.date for source in run.sources]
    return run.schedule not in (None, "none"), min(dates), name_of_run(run)


def name_of_run(run: RunRecord) -> str:
    """Return the path of a run's first results file, by which findings name it."""
    return str(run.sources[0].path)


def _schedule(run: RunRecord) -> Any:
    try:
        return executed_schedule(run)
    except NotRecordedError:
        return None


def _of_run(
    run: RunRecord, digest: RunDigest, reader: SamplesReader, rescoring: Rescoring, problems: list[Problem]
) -> Iterator[Finding]:
    """Yield the findings of one run, and fill in what other runs are compared with."""
    contents: dict[Path, Mapping[str, Any]] = {source.path: results_content(source.path) for source in run.sources}
    for check in CHECKS:
        if check.of_results is not None:
            doubts = [doubt for content in contents.values() for doubt in check.of_results(content)]
            yield from findings(check.name, "", dict.fromkeys(doubts))
    for name, record in run.tasks.items():
        try:
            task = recorded_task(run, record, contents[record.source.path])
            scored = None if record.samples is None else reader.read(record.samples, TASKS[name])
        except (OSError, ValueError) as error:
            path = str(record.samples)
            reason = getattr(error, "strerror", None) or str(error)
            problems.append(Problem(path, reason.removeprefix(path).lstrip(":, ")))
            yield Finding("totals", "unverified", name, "its samples cannot be read")
            continue
        if task.samples:
            digest.tasks[name] = digest_of(task)
            if digest.schedule is not None:
                digest.implied.add(task.samples, digest.schedule)
        yield from _of_task(task, scored, rescoring)


def _of_task(task: Any, scored: Samples | None, rescoring: Rescoring) -> Iterator[Finding]:
    for check in CHECKS:
        if check.of_scores is not None:
            yield from findings(check.name, task.name, check.of_scores(task, scored, rescoring))
        elif check.of_task is not None and task.samples:
            doubts = check.of_task(task)
            if doubts is not None:
                yield from findings(check.name, task.name, doubts)


def with_verdicts(board: Leaderboard, verified: Verification) -> Leaderboard:
    """Return a leaderboard whose rows have contradictions as faults and marks, and know which numbers are unverified."""
    by_source = {source.path: run.findings for run in verified.runs for source in run.run.sources}
    models = tuple(
        replace(
            model,
            budgets=tuple(
                replace(budget, rows=tuple(_judged(row, by_source) for row in budget.rows)) for budget in model.budgets
            ),
        )
        for model in board.models
    )
    problems = (*board.problems, *(problem for problem in verified.problems if problem not in board.problems))
    return replace(board, models=models, problems=problems)


def _judged(row: TableRow, by_source: Mapping[Path, tuple[Finding, ...]]) -> TableRow:
    of_sources = (by_source.get(source.path, ()) for run in row.runs for source in run.sources)
    of_runs = dict.fromkeys(finding for source_findings in of_sources for finding in source_findings)
    held = [finding for finding in of_runs if not finding.task or finding.task in row.runs[0].tasks]
    # What is no run of this plugin has no token accounting; its scores are what others are compared with.
    named = NUMBERS - {"accounting", "plan"} if row.kind == STOCK else NUMBERS
    contradictions = tuple(dict.fromkeys(sentence(f) for f in held if f.state == "contradicted"))
    unverified = tuple(dict.fromkeys(sentence(f) for f in held if f.state == "unverified" and f.check in named))
    return replace(
        row,
        marks=tuple(dict.fromkeys((*row.marks, *contradictions))),
        faults=tuple(dict.fromkeys((*row.faults, *contradictions))),
        unverified=unverified,
    )


def sentence(finding: Finding) -> str:
    """Return a finding as a short text: check, benchmark and reason."""
    where = f"{TASKS[finding.task].name}: " if finding.task in TASKS else ""
    return f"{finding.check}: {where}{finding.reason}"
