"""What the checks read: the results and samples files of one run, task by task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.records import RunRecord, TaskRecord
from lmms_prune.leaderboard.samples import UNREADABLE, lines_of, sample_accounting
from lmms_prune.leaderboard.verify.findings import NotRecordedError
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.record.bitmaps import decode
from lmms_prune.record.results import read_results_file
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import Schedule

Mask = Bool[np.ndarray, " V"]


@dataclass(frozen=True)
class RecordedSample:
    """One line of a samples file.

    Args:
        document: the document's number.
        logged: the line.
        accounting: its token accounting; None if the line has none of ours.
    """

    document: int
    logged: Mapping[str, Any]
    accounting: TokenAccounting | None

    @property
    def name(self) -> str:
        return f"document {self.document}"

    @property
    def answer(self) -> str:
        """Return the answer as the task's scorer was given it; raises `NotRecordedError` for several answers."""
        answer = self.logged.get("filtered_resps")
        if not isinstance(answer, str):
            raise NotRecordedError("several answers to a document, which are not scored again")
        return answer

    @property
    def counted(self) -> TokenAccounting:
        """Return the token accounting; raises `NotRecordedError` if there is none."""
        if self.accounting is None:
            raise NotRecordedError("no token accounting (an answer from a cache, or of another model)")
        return self.accounting

    @property
    def images(self) -> list[int]:
        """Return the original visual tokens of each image; raises `NotRecordedError` if they are not recorded."""
        counted = self.counted
        if not counted.visual_tokens:
            return []
        sizes = [sum(rows * columns for rows, columns in grids) for grids in self.grids]
        if counted.grid_boxes or sum(sizes) == counted.visual_tokens:
            return sizes
        if len(sizes) > 1 or not sizes:
            raise NotRecordedError("the sizes of the images are not recorded")
        return [counted.visual_tokens]

    @property
    def grids(self) -> list[list[tuple[int, int]]]:
        """Return the grids that hold the patches of each image: one, or those of an image in tiles."""
        counted = self.counted
        if not counted.grid_boxes:
            return [[grid] for grid in counted.visual_grids]
        by_image: dict[int, list[tuple[int, int]]] = {}
        for grid, (image, *_) in zip(counted.visual_grids, counted.grid_boxes, strict=True):
            by_image.setdefault(image, []).append(grid)
        return list(by_image.values())

    def patches(self, tokens: int) -> int:
        """Return how many of so many visual tokens present are patches.

        The others are newline tokens of an image in tiles, which stay as long as their image keeps any patch. Raises
        `NotRecordedError` for several such images.
        """
        counted = self.counted
        newlines = counted.visual_tokens - sum(self.images) if counted.grid_boxes else 0
        if newlines and len(self.grids) > 1:
            raise NotRecordedError("of which image the newline tokens are is not recorded")
        return tokens - newlines if tokens else 0

    @cached_property
    def masks(self) -> list[list[Mask]]:
        """Return, for each stage and image, which original visual tokens are kept.

        Raises:
            NotRecordedError: the tokens are not recorded, or not all of them are in the images' grids.
        """
        counted = self.counted
        in_grids = sum(rows * columns for rows, columns in counted.visual_grids)
        if in_grids != counted.visual_tokens and not counted.grid_boxes:
            raise NotRecordedError("the images' grids do not hold all visual tokens")
        if len(counted.token_bitmaps) != len(counted.kept_visual_tokens):
            raise NotRecordedError("which tokens are kept is not recorded")
        return [self._stage_masks(texts) for texts in counted.token_bitmaps]

    def _stage_masks(self, texts: Sequence[str]) -> list[Mask]:
        """Return the masks of one stage, image by image, from the bitmaps of all grids."""
        remaining = iter(texts)
        return [np.concatenate([decode(next(remaining), grid).reshape(-1) for grid in grids]) for grids in self.grids]


@dataclass(frozen=True, eq=False)
class RecordedTask:
    """One task of a run, with all its samples.

    Args:
        run: the run.
        record: the task in it.
        report: the run's report; None for a model of another package.
        config: the task's configuration, as lmms-eval wrote it.
        samples: its samples.
    """

    run: RunRecord
    record: TaskRecord
    report: RunReport | None
    config: Mapping[str, Any]
    samples: tuple[RecordedSample, ...]

    @property
    def name(self) -> str:
        return self.record.task

    @property
    def split(self) -> str:
        """Return the split that was evaluated; it is part of a sample's id."""
        return str(self.config.get("test_split") or self.config.get("validation_split") or "")

    @cached_property
    def schedule(self) -> Schedule:
        """Return the executed schedule; raises `NotRecordedError` if this version cannot read it."""
        return executed_schedule(self.run)


def executed_schedule(run: RunRecord) -> Schedule:
    """Return the schedule of a run; raises `NotRecordedError` if it has none, or one that this version cannot read."""
    if run.schedule is None:
        raise NotRecordedError("not a run of this plugin")
    try:
        return Schedule.parse(run.schedule)
    except ScheduleError as error:
        raise NotRecordedError(f"this version cannot read the schedule ({error})") from error


def recorded_task(run: RunRecord, record: TaskRecord, content: Mapping[str, Any]) -> RecordedTask:
    """Read a task's samples.

    Args:
        run, record: the run, and the task in it.
        content: the results file of the task.

    Raises:
        OSError, ValueError: the samples cannot be read.
    """
    samples = []
    if record.samples is not None:
        for line in lines_of(record.samples):
            samples.append(_sample(json.loads(line)))
    config = (content.get("configs") or {}).get(record.task) or {}
    return RecordedTask(run, record, RunReport.of_results(content), config, tuple(samples))


def _sample(logged: Any) -> RecordedSample:
    try:
        return RecordedSample(int(logged["doc_id"]), logged, sample_accounting(logged))
    except UNREADABLE as error:
        raise ValueError(f"no sample ({type(error).__name__}: {error})") from error


def results_content(path: Path) -> Mapping[str, Any]:
    """Return the content of a results file that has been read before."""
    return read_results_file(path, named=True) or {}
