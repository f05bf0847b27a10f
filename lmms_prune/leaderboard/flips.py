"""Documents behind a row's flips: the question, both answers, and which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.benchmarks import Benchmark
from lmms_prune.leaderboard.samples import (
    Samples,
    SamplesError,
    answer_text,
    line_at,
    read_samples,
    right_pair,
    sample_accounting,
)
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.record.bitmaps import decode


@dataclass(frozen=True)
class Flip:
    """One document of a unit (see `Samples`) that turned from right to wrong, or from wrong to right.

    Args:
        doc_id: the document's number in the task's split.
        worse: whether the unit was right before.
        question: the text as lmms-eval builds it, without the model's chat template.
        target: what the task logs as its target.
        before, after: the answers.
        kept: number of visual tokens kept after each stage of the second run.
        visual_tokens: number of visual tokens of its images.
        grids: rows and columns of the visual tokens of each image; empty where the run did not log them.
        boxes: of each grid its image, and the part that shows it (`TokenAccounting.grid_boxes`).
        bitmaps: token bitmaps: which visual tokens are kept, by stage and image, as `lmms_prune.record.bitmaps` writes them.
    """

    doc_id: int
    worse: bool
    question: str
    target: str
    before: str
    after: str
    kept: tuple[int, ...]
    visual_tokens: int
    grids: tuple[tuple[int, int], ...] = ()
    bitmaps: tuple[tuple[str, ...], ...] = ()
    boxes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Answers:
    """A samples file and what was read of it; single lines are read again where a document is shown."""

    path: Path
    samples: Samples

    def line(self, document: int) -> Mapping[str, Any]:
        """Read the line of one document."""
        return line_at(self.path, self.samples, document)


def read_answers(path: Path, benchmark: Benchmark) -> Answers:
    """Read one samples file.

    Raises:
        SamplesError: a file that cannot be used.
        OSError: the file cannot be read.
    """
    return Answers(path, read_samples(path, benchmark))


def flips(before: Answers, after: Answers) -> list[Flip]:
    """Return the documents of all units that flipped between two runs of a task, ordered by number.

    Raises:
        SamplesError: the runs are of different documents, or kept tokens that do not fit their images.
        OSError: a file cannot be read.
    """
    return [flip(before, after, document, worse) for document, worse in flipped(before, after)]


def flipped(before: Answers, after: Answers) -> list[tuple[int, bool]]:
    """Return the numbers of all documents that `flips` returns, and whether each was right before.

    Raises:
        SamplesError: the runs are of different documents.
    """
    first, second = before.samples, after.samples
    if first.signature != second.signature:
        raise SamplesError(f"{after.path}: not the documents of {before.path}.")
    right, right_after = right_pair(first, second)
    changed = (right != right_after)[first.unit]
    return list(zip(first.documents[changed].tolist(), right[first.unit][changed].tolist(), strict=True))


def flip(before: Answers, after: Answers, document: int, worse: bool) -> Flip:
    """Read both lines of one flipped document.

    Raises:
        SamplesError: a file has changed since, or kept tokens that do not fit their images.
        OSError: a file cannot be read.
    """
    old, new = before.line(document), after.line(document)
    cost = sample_accounting(new)
    grids, bitmaps = ((), ()) if cost is None else (cost.visual_grids, cost.token_bitmaps)
    try:
        for stage in bitmaps:
            for text, grid in zip(stage, grids, strict=True):
                decode(text, grid)
        _check_boxes(cost)
    except ValueError as error:
        raise SamplesError(f"{after.path}: kept tokens of document {document}: {error}") from error
    return Flip(
        doc_id=document,
        worse=worse,
        question=str(new["input"]),
        target=str(new["target"]),
        before=answer_text(old),
        after=answer_text(new),
        kept=() if cost is None else cost.kept_visual_tokens,
        visual_tokens=0 if cost is None else cost.visual_tokens,
        grids=grids,
        boxes=() if cost is None else cost.grid_boxes,
        bitmaps=bitmaps,
    )


def _check_boxes(cost: TokenAccounting | None) -> None:
    """Refuse boxes that do not lie in their grids.

    Raises:
        ValueError: names the first of them.
    """
    for box, (rows, columns) in (
        zip(cost.grid_boxes, cost.visual_grids, strict=True) if cost and cost.grid_boxes else ()
    ):
        fits = len(box) == 5 and min(box) >= 0 and box[1] + box[3] <= rows and box[2] + box[4] <= columns
        if not fits:
            raise ValueError(f"the box {list(box)} is no part of a grid of {rows} x {columns} visual tokens.")
