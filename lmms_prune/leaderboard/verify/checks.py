"""The table of checks: what each proves, and what it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.verify.accounting import averages_follow, self_consistent
from lmms_prune.leaderboard.verify.across import RunDigest, copies, models_of_other_sizes, other_documents
from lmms_prune.leaderboard.verify.costs import costs_follow
from lmms_prune.leaderboard.verify.draws import drawn_again
from lmms_prune.leaderboard.verify.evidence import RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt
from lmms_prune.leaderboard.verify.plan import planned, settings_agree
from lmms_prune.leaderboard.verify.rescoring import Rescoring, totals_follow


@dataclass(frozen=True)
class Check:
    """One check; it has one of the four functions.

    Args:
        name: a word.
        proves: what follows from a record that passes.
        cannot: what does not follow from it.
        of_task: examines one task of a run; None if the check does not concern it.
        of_scores: examines one task, with its scores as the leaderboard reads them, and with the tasks' scorers.
        of_results: examines the content of a results file.
        of_rows: examines all runs together; returns tasks and doubts by the run's name.
        a_number: whether a number of the leaderboard, a score or a budget, is unverified if the check cannot be made.
    """

    name: str
    proves: str
    cannot: str
    of_task: Callable[[RecordedTask], list[Doubt] | None] | None = None
    of_scores: Callable[[RecordedTask, Samples | None, Rescoring], list[Doubt]] | None = None
    of_results: Callable[[Mapping[str, Any]], list[Doubt]] | None = None
    of_rows: Callable[[Sequence[RunDigest]], Mapping[str, list[tuple[str, Doubt]]]] | None = None
    a_number: bool = False


def _totals(task: RecordedTask, scored: Samples | None, rescoring: Rescoring) -> list[Doubt]:
    return totals_follow(task, scored)


def _scores(task: RecordedTask, scored: Samples | None, rescoring: Rescoring) -> list[Doubt]:
    return rescoring.scored_again(task) if task.samples else []


CHECKS = (
    Check(
        "settings",
        "the schedule is the one that the command asked for, and that the report names",
        "that this command was run: all three can be written by hand",
        of_results=settings_agree,
    ),
    Check(
        "accounting",
        "averages, layers, prompt, cache and token bitmaps of each sample have the same tokens",
        "that these tokens were really dropped in the run",
        of_task=self_consistent,
        a_number=True,
    ),
    Check(
        "plan",
        "each stage kept of each image what the schedule says, and each layer saw that",
        "what an adaptive keep must keep, or a method that may keep fewer: there the plan is an upper bound",
        of_task=planned,
        a_number=True,
    ),
    Check(
        "averages",
        "the run's averages are those of its samples",
        "times, padding and memory, which only the machine could measure",
        of_task=averages_follow,
    ),
    Check(
        "costs",
        "KV bytes and FLOPs are those of the tokens in each layer, by the sizes of the checkpoint",
        "the FLOPs of the methods' selection, which depend on the batch",
        of_task=costs_follow,
    ),
    Check(
        "totals",
        "the recorded score is that of the samples",
        "anything about a task whose samples were not logged",
        of_scores=_totals,
        a_number=True,
    ),
    Check(
        "scores",
        "each answer has the score that the task's own scorer gives it",
        "that the model gave these answers: only another run of the same model shows that",
        of_scores=_scores,
        a_number=True,
    ),
    Check(
        "draws",
        "random and the other controls that read nothing kept the tokens that they choose with this seed",
        "which tokens a method chooses that reads the model, and that the answers came from the recorded tokens",
        of_task=drawn_again,
    ),
    Check(
        "copies",
        "no two schedules have the same answers from the same tokens",
        "a copy whose answers or tokens were changed",
        of_rows=copies,
    ),
    Check(
        "documents",
        "all rows have the same targets, and rows of one model the same questions",
        "that these are the benchmark's, unless --data reads it; images are never compared",
        of_rows=other_documents,
    ),
    Check(
        "sizes",
        "all rows of a checkpoint have the KV bytes and FLOPs of one model",
        "which model that is, where its sizes are not known",
        of_rows=models_of_other_sizes,
    ),
)
