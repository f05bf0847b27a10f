"""Draws the kept tokens of controls again: methods that read nothing choose by seed, sample, layer and count alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lmms_prune.leaderboard.verify.evidence import Mask, RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt, NotRecordedError
from lmms_prune.schedule.stage import PER, Stage

if TYPE_CHECKING:
    from lmms_prune.methods.view import TokenView

BATCH = 256
"""Images that are drawn at a time."""


@dataclass(frozen=True, eq=False)
class _Draw:
    """One image at one stage: the seed of its draw, the tokens present and the tokens recorded as kept."""

    document: int
    seed: str
    present: Mask
    kept: Mask


def redrawable(stage: Stage) -> bool:
    """Tell whether a stage's method chooses without reading anything of the model, and so can be asked again.

    The code of strangers' methods is not run.
    """
    whole_images = stage.per == PER[0]
    return (
        whole_images
        and not stage.spec.own
        and not stage.spec.reads
        and not stage.spec.rewrites
        and not stage.spec.drops_all
    )


def drawn_again(task: RecordedTask) -> list[Doubt] | None:
    """Compare the tokens that a run's controls kept with those that the same methods choose again.

    Returns:
        the doubts; None if no stage of the schedule is such a control.
    """
    try:
        stages = task.schedule.stages
    except NotRecordedError as error:
        return [Doubt(str(error), contradicted=False)]
    if not any(map(redrawable, stages)):
        return None
    doubts: list[Doubt] = []
    for number, stage in enumerate(stages):
        if redrawable(stage):
            doubts += _stage_doubts(task, number, stage)
    return doubts


def _stage_doubts(task: RecordedTask, number: int, stage: Stage) -> Iterator[Doubt]:
    before = task.schedule.stages[:number]
    if rewriting := [other for other in before if other.spec.rewrites or other.spec.own]:
        yield Doubt(f"the order of the tokens after {rewriting[-1]} is not recorded", contradicted=False)
        return
    if not task.split:
        yield Doubt("the task's split, which is part of the seed, is not recorded", contradicted=False)
        return
    draws: list[_Draw] = []
    gaps: dict[str, int] = {}
    for sample in task.samples:
        try:
            draws += _draws(task, sample.document, number, stage, sample.masks)
        except ValueError as error:  # also NotRecordedError
            gaps[str(error)] = gaps.get(str(error), 0) + 1
    yield from (Doubt(f"{gap} ({count} of {len(task.samples)})", contradicted=False) for gap, count in gaps.items())
    wrong = [draw.document for draw in unlike(stage, draws)]
    if wrong:
        documents = sorted(set(wrong))
        others = f" and {len(documents) - 1} more documents" if len(documents) > 1 else ""
        text = f"stage {stage} kept other tokens in document {documents[0]}{others} than {stage.method} chooses"
        yield Doubt(f"{text} with seed {task.run.seed}", contradicted=True)


def _draws(task: RecordedTask, document: int, number: int, stage: Stage, masks: list[list[Mask]]) -> Iterator[_Draw]:
    """Yield each image of a sample at a stage, with the seed that `lmms_prune.pruning` gives it."""
    if len(masks) != len(task.schedule.stages):
        raise NotRecordedError(f"{len(masks)} stages acted, not those of the schedule")
    sample = f"{task.name}/{task.split}/{document}"
    for image, kept in enumerate(masks[number]):
        present = masks[number - 1][image] if number else np.ones_like(kept)
        yield _Draw(document, f"{task.run.seed}|{sample}|image {image}|layer {stage.layer}", present, kept)


def unlike(stage: Stage, draws: list[_Draw]) -> Iterator[_Draw]:
    """Yield the images of which the stage's method chooses other tokens than are recorded."""
    if not draws:
        return
    import torch

    method = stage.spec.build(dict(stage.options))
    ordered = sorted(draws, key=lambda draw: len(draw.present))
    for _, group in groupby(enumerate(ordered), key=lambda item: item[0] // BATCH):
        batch = [draw for _, draw in group]
        view = _view(batch)
        budget = torch.tensor([int(draw.kept.sum()) for draw in batch])
        chosen = method.select(view, torch.minimum(budget, torch.tensor(view.counts))).numpy()
        for row, draw in enumerate(batch):
            again = np.zeros_like(draw.present)
            tokens = np.flatnonzero(draw.present)
            again[tokens[chosen[row, : len(tokens)]]] = True
            if not np.array_equal(again, draw.kept):
                yield draw


def _view(batch: list[_Draw]) -> TokenView:
    """Return a view of images of which nothing is known but the tokens present and their seeds."""
    import torch

    from lmms_prune.methods.view import Tokens, TokenView

    counts = [int(draw.present.sum()) for draw in batch]
    column = torch.arange(max(1, *counts)).expand(len(batch), -1)
    view = TokenView.__new__(TokenView)  # the other signals are of a model, which is not there
    view.visual = Tokens(column, column < torch.tensor(counts)[:, None])
    view.counts, view.seeds = counts, [draw.seed for draw in batch]
    return view
