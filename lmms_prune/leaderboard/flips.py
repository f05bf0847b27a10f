"""The documents behind a row's flips: what was asked, and both answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.benchmarks import Benchmark
from lmms_prune.leaderboard.samples import SamplesError, answer_text, read_samples


@dataclass(frozen=True)
class Flip:
    """One document of a unit (see `Samples`) that turned from right to wrong, or from wrong to right.

    Args:
        doc_id: its number in the task's split.
        worse: whether the unit was right before.
        question: as the harness asks it, without the model's chat template.
        target: what the task logs as its target.
        before, after: the answers.
        kept: visual tokens left after each stage of the second run.
        visual_tokens: those of its images.
    """

    doc_id: int
    worse: bool
    question: str
    target: str
    before: str
    after: str
    kept: tuple[int, ...]
    visual_tokens: int


def read_flips(before: Path, after: Path, benchmark: Benchmark) -> list[Flip]:
    """The documents of all flipped units, by their numbers.

    Args:
        before, after: samples files of two runs of one task.
        benchmark: that it measures.

    Raises:
        SamplesError: a file that cannot be used, or files of different documents.
        OSError: a file cannot be read.
    """
    first, second = read_samples(before, benchmark), read_samples(after, benchmark)
    if first.signature != second.signature:
        raise SamplesError(f"{after}: not the documents of {before}.")
    old, new = _documents(before), _documents(after)
    turned = (first.right != second.right)[first.unit]
    pairs = zip(first.documents[turned].tolist(), first.right[first.unit][turned].tolist(), strict=True)
    return [_flip(old[document], new[document], worse) for document, worse in pairs]


def _documents(path: Path) -> dict[int, dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        said = [json.loads(line) for line in stream if line.strip()]
    return {int(one["doc_id"]): one for one in said}


def _flip(old: dict[str, Any], new: dict[str, Any], worse: bool) -> Flip:
    counts = (new.get("token_counts") or [None])[0] or {}
    return Flip(
        doc_id=int(new["doc_id"]),
        worse=worse,
        question=str(new["input"]),
        target=str(new["target"]),
        before=answer_text(old),
        after=answer_text(new),
        kept=tuple(counts.get("kept_visual_tokens", ())),
        visual_tokens=int(counts.get("visual_tokens", 0)),
    )
