"""Which changed answers the page shows: the documents on which most rows changed, as many as there is room for."""

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

MOST = 4  # documents of each row, benchmark and direction
ROOM = 1_500_000  # letters of JSON for all of them
LONGEST = 600  # letters of a question or an answer


@dataclass(frozen=True)
class Change:
    """One flip of one row, and how far it stands from being shown.

    Args:
        model, row: their places on the page.
        task: its benchmark's task.
        flip: what changed.
        rank: among those of its row, benchmark and direction.
        shared: how many rows changed on its document.
        wanted: the document behind it.
        reference: the right answer; "" where the samples do not say it.
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
    """What the page shows of the changed answers, and how many there are.

    Returns:
        the chosen ones, and for each model and row by task how many documents turned wrong and right; a task of which
        the row and its baseline cannot be compared document by document has no entry.
    """
    found: list[Change] = []
    many: list[list[dict[str, list[int]]]] = []
    for number, model in enumerate(board.models):
        many.append([{} for _ in model.rows])
        for task in model.tasks:
            turned = _turned(model, task)
            for row, some in turned.items():
                wrong = sum(flip.worse for flip in some)
                many[number][row][task] = [wrong, len(some) - wrong]
            found += _ranked(number, model, task, turned)
    return _fitting(sorted(found, key=lambda one: (one.rank, -one.shared))), many


def described(chosen: Sequence[Change], pictured: Mapping[Wanted, Pictured] | None) -> dict[str, Any]:
    """The chosen changes in JSON's types.

    Args:
        chosen: in the order in which they are shown.
        pictured: what the benchmarks' data say of each document; None if they were not read.
    """
    places: dict[tuple[Wanted, str], int] = {}
    documents: list[dict[str, Any]] = []
    cards = []
    for one in chosen:
        # A baseline of its own is one more document.
        key = one.wanted, one.flip.before
        if key not in places:
            places[key] = len(documents)
            more = {} if pictured is None else pictured[one.wanted].described()
            documents.append({**_document(one), **more})
        cards.append({"document": places[key], **_card(one)})
    return {"documents": documents, "cards": cards, "pictured": pictured is not None}


def _document(one: Change) -> dict[str, Any]:
    texts = {"question": one.flip.question, "reference": one.reference, "before": one.flip.before}
    return {
        "task": one.task,
        "id": one.flip.doc_id,
        **{name: plain_text(text, LONGEST) for name, text in texts.items()},
    }


def _card(one: Change) -> dict[str, Any]:
    flip = one.flip
    said = {"model": one.model, "row": one.row, "worse": flip.worse, "after": plain_text(flip.after, LONGEST)}
    return {**said, "grids": flip.grids, "bitmaps": flip.bitmaps}


def _turned(model: ModelTable, task: str) -> dict[int, list[Flip]]:
    """By row, what changed between its baseline's first run and its own."""
    labels = {row.label: row for row in model.rows}
    read: dict[str, Answers] = {}
    turned = {}
    for number, row in enumerate(model.rows):
        baseline = labels.get(row.baseline or "")
        if baseline is None or task not in row.cells or row.cells[task].comparison is None:
            continue
        try:
            if baseline.label not in read:
                read[baseline.label] = _answers(baseline, task)
            turned[number] = flips(read[baseline.label], _answers(row, task))
        except (SamplesError, OSError):
            # The table, which has read the same files, names what is wrong with them.
            continue
    return turned


def _answers(row: TableRow, task: str) -> Answers:
    samples = row.runs[0].tasks[task].samples
    assert samples is not None, "a comparison without samples"
    return read_answers(samples, TASKS[task])


def _ranked(number: int, model: ModelTable, task: str, turned: dict[int, list[Flip]]) -> Iterator[Change]:
    shared = Counter(flip.doc_id for some in turned.values() for flip in some)
    for row, some in turned.items():
        run = model.rows[row].runs[0]
        wanted = Wanted.of(run, task)
        for worse in (True, False):
            mine = sorted(
                (flip for flip in some if flip.worse == worse), key=lambda one: (-shared[one.doc_id], one.doc_id)
            )
            for rank, flip in enumerate(mine[:MOST]):
                # Where the data have no field of the name, the harness logs the name itself (TextVQA).
                reference = "" if flip.target == run.tasks[task].target else flip.target
                yield Change(number, row, task, flip, rank, shared[flip.doc_id], wanted.at(flip), reference)


def _fitting(found: Sequence[Change]) -> list[Change]:
    """As many from the front as there is room for: every row's first before any row's second."""
    chosen, room = [], ROOM
    documents: set[tuple[Wanted, str]] = set()
    for one in found:
        size = len(json.dumps(_card(one)))
        if (key := (one.wanted, one.flip.before)) not in documents:
            size += len(json.dumps(_document(one)))
        if size <= room:
            room -= size
            documents.add(key)
            chosen.append(one)
    return chosen
