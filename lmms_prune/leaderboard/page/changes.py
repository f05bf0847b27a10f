"""Choosing the changed answers that the page shows: those on which most rows changed, up to a size limit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.flips import Answers, Flip, flips, read_answers
from lmms_prune.leaderboard.page.data import plain_text
from lmms_prune.leaderboard.page.pictures import Pictured, Wanted
from lmms_prune.leaderboard.rows import Leaderboard, ModelTable, TableRow
from lmms_prune.leaderboard.samples import SamplesError

MOST = 4  # most documents per row, benchmark and direction
ROOM = 1_500_000  # characters of JSON for all shown changes
LONGEST = 600  # most characters of a question or an answer


@dataclass(frozen=True)
class Change:
    """One flip of one row, with its rank among those to be shown.

    Args:
        model, row: their indices on the page.
        task: the benchmark's task.
        flip: the changed document.
        rank: rank among the flips of its row, benchmark and direction.
        shared: number of rows that changed on this document.
        wanted: the document's images.
        reference: the right answer; "" if the samples do not have it.
    """

    model: int
    row: int
    task: str
    flip: Flip
    rank: int
    shared: int
    wanted: Wanted
    reference: str


def changes(board: Leaderboard) -> tuple[list[Change], list[list[dict[str, list[int]]]]]:
    """Choose the changed answers that the page shows, and count all of them.

    Returns:
        the chosen changes; and for each model and row, by task, how many documents turned wrong and right. A task has no
        entry if the row and its baseline cannot be compared document by document.
    """
    candidates: list[Change] = []
    counts: list[list[dict[str, list[int]]]] = []
    for number, model in enumerate(board.models):
        counts.append([{} for _ in model.rows])
        for task in model.tasks:
            flipped = _flipped(model, task)
            for row, row_flips in flipped.items():
                wrong = sum(flip.worse for flip in row_flips)
                counts[number][row][task] = [wrong, len(row_flips) - wrong]
            candidates += _ranked(number, model, task, flipped)
    return _fitting(sorted(candidates, key=lambda change: (change.rank, -change.shared))), counts


def described(chosen: Sequence[Change], pictured: Mapping[Wanted, Pictured] | None) -> dict[str, Any]:
    """Return the chosen changes in JSON types.

    Args:
        chosen: the changes in the order shown.
        pictured: images and references of each document; None if the benchmarks' data were not read.
    """
    indices: dict[tuple[Wanted, str], int] = {}
    documents: list[dict[str, Any]] = []
    cards = []
    for change in chosen:
        # Rows with different baselines show the same document twice, with different answers before.
        key = change.wanted, change.flip.before
        if key not in indices:
            indices[key] = len(documents)
            from_data = {} if pictured is None else pictured[change.wanted].described()
            documents.append({**_document(change), **from_data})
        cards.append({"document": indices[key], **_card(change)})
    return {"documents": documents, "cards": cards, "pictured": pictured is not None}


def _document(change: Change) -> dict[str, Any]:
    texts = {"question": change.flip.question, "reference": change.reference, "before": change.flip.before}
    return {
        "task": change.task,
        "id": change.flip.doc_id,
        **{name: plain_text(text, LONGEST) for name, text in texts.items()},
    }


def _card(change: Change) -> dict[str, Any]:
    flip = change.flip
    card = {"model": change.model, "row": change.row, "worse": flip.worse, "after": plain_text(flip.after, LONGEST)}
    return {**card, "grids": flip.grids, "bitmaps": flip.bitmaps}


def _flipped(model: ModelTable, task: str) -> dict[int, list[Flip]]:
    """Return by row the flips between the first run of its baseline and its own first run."""
    labels = {row.label: row for row in model.rows}
    read: dict[str, Answers] = {}
    by_row = {}
    for number, row in enumerate(model.rows):
        baseline = labels.get(row.baseline or "")
        if baseline is None or task not in row.cells or row.cells[task].comparison is None:
            continue
        try:
            if baseline.label not in read:
                read[baseline.label] = _answers(baseline, task)
            by_row[number] = flips(read[baseline.label], _answers(row, task))
        except (SamplesError, OSError):
            # The table read the same files and already lists the problem.
            continue
    return by_row


def _answers(row: TableRow, task: str) -> Answers:
    samples = row.runs[0].tasks[task].samples
    assert samples is not None, "a comparison without samples"
    return read_answers(samples, TASKS[task])


def _ranked(number: int, model: ModelTable, task: str, flipped: dict[int, list[Flip]]) -> Iterator[Change]:
    shared = Counter(flip.doc_id for row_flips in flipped.values() for flip in row_flips)
    for row, row_flips in flipped.items():
        run = model.rows[row].runs[0]
        wanted = Wanted.of(run, task)
        for worse in (True, False):
            ordered = sorted(
                (flip for flip in row_flips if flip.worse == worse),
                key=lambda flip: (-shared[flip.doc_id], flip.doc_id),
            )
            for rank, flip in enumerate(ordered[:MOST]):
                # If the data have no field of that name, lmms-eval logs the name itself as the target (TextVQA).
                reference = "" if flip.target == run.tasks[task].target else flip.target
                yield Change(number, row, task, flip, rank, shared[flip.doc_id], wanted.at(flip), reference)


def _fitting(ranked: Sequence[Change]) -> list[Change]:
    """Choose changes in the given order while they fit into `ROOM`, so that every row's first precedes any row's second."""
    chosen, room = [], ROOM
    documents: set[tuple[Wanted, str]] = set()
    for change in ranked:
        size = len(json.dumps(_card(change)))
        if (key := (change.wanted, change.flip.before)) not in documents:
            size += len(json.dumps(_document(change)))
        if size <= room:
            room -= size
            documents.add(key)
            chosen.append(change)
    return chosen
