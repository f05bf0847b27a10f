"""Choosing the changed answers that the page shows: those on which most rows changed, up to a size limit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.flips import Answers, Flip, flip, flipped
from lmms_prune.leaderboard.page.data import plain_text
from lmms_prune.leaderboard.page.pictures import Pictured, Wanted
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.rows import Leaderboard, ModelTable, TableRow
from lmms_prune.leaderboard.samples import ChangedError, SamplesError

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


@dataclass(frozen=True)
class Flipped:
    """All flips between the first run of a row's baseline and its own first run, on one task.

    Args:
        before, after: the samples of both runs.
        documents: number of each changed document, and whether it was right before.
    """

    before: Answers
    after: Answers
    documents: Sequence[tuple[int, bool]]


def changes(board: Leaderboard, reader: SamplesReader) -> tuple[list[Change], list[list[dict[str, list[int]]]]]:
    """Choose the changed answers that the page shows, and count all of them.

    Only the lines of answers that may be shown are read again.

    Args:
        board: the leaderboard.
        reader: what has read its samples.

    Returns:
        the chosen changes; and for each model and row, by task, how many documents turned wrong and right. A task has no
        entry if the row and its baseline cannot be compared document by document.

    Raises:
        ChangedError: a samples file has changed since the leaderboard was made.
    """
    candidates: list[Change] = []
    counts: list[list[dict[str, list[int]]]] = []
    for number, model in enumerate(board.models):
        counts.append([{} for _ in model.rows])
        for task in model.tasks:
            by_row = _flipped(model, task, reader)
            shared = Counter(document for row_flips in by_row.values() for document, _ in row_flips.documents)
            for row, row_flips in by_row.items():
                try:
                    candidates += _ranked(number, model, task, row, row_flips, shared)
                except ChangedError:
                    raise
                except (SamplesError, OSError):
                    continue  # kept tokens that do not fit their images: nothing of the row can be drawn
                wrong = sum(worse for _, worse in row_flips.documents)
                counts[number][row][task] = [wrong, len(row_flips.documents) - wrong]
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
    boxes = {"boxes": flip.boxes} if flip.boxes else {}
    return {**card, "grids": flip.grids, "bitmaps": flip.bitmaps, **boxes}


def _flipped(model: ModelTable, task: str, reader: SamplesReader) -> dict[int, Flipped]:
    """Return by row the flips between the first run of its baseline and its own first run."""
    labels = {row.label: row for row in model.rows}
    by_row = {}
    for number, row in enumerate(model.rows):
        baseline = labels.get(row.baseline or "")
        if baseline is None or task not in row.cells or row.cells[task].comparison is None:
            continue
        try:
            before, after = _answers(baseline, task, reader), _answers(row, task, reader)
            by_row[number] = Flipped(before, after, flipped(before, after))
        except (SamplesError, OSError):
            # The table read the same files and already lists the problem.
            continue
    return by_row


def _answers(row: TableRow, task: str, reader: SamplesReader) -> Answers:
    path = row.runs[0].tasks[task].samples
    assert path is not None, "a comparison without samples"
    return Answers(path, reader.read(path, TASKS[task]))


def _ranked(
    number: int, model: ModelTable, task: str, row: int, row_flips: Flipped, shared: Mapping[int, int]
) -> list[Change]:
    """Return the flips of one row and task that may be shown: those on which most rows flipped."""
    run = model.rows[row].runs[0]
    wanted = Wanted.of(run, task)
    ranked = []
    for worse in (True, False):
        same = (document for document, was_right in row_flips.documents if was_right == worse)
        for rank, document in enumerate(nsmallest(MOST, same, key=lambda document: (-shared[document], document))):
            shown = flip(row_flips.before, row_flips.after, document, worse)
            # If the data have no field of that name, lmms-eval logs the name itself as the target (TextVQA).
            reference = "" if shown.target == run.tasks[task].target else shown.target
            ranked.append(Change(number, row, task, shown, rank, shared[document], wanted.at(shown), reference))
    return ranked


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
