"""One image, one question: which visual tokens survive each stage of a schedule, and what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmms_prune.harness.generation import clean, own_tokens
from lmms_prune.harness.prompts import question_text
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.canvas import dimmed, grids_of, seen_images
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.trace import RowTrace
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class Shown:
    """What happened to one prompt.

    Args:
        question: as asked.
        schedule: what pruned.
        images: as the model sees them.
        kept: for each stage and image, which visual tokens (rows, columns) go on.
        answer, unpruned: the answers with and without pruning.
        trace: of the pruned run.
    """

    question: str
    schedule: Schedule
    images: list[Image.Image]
    kept: list[list[np.ndarray]]
    answer: str
    unpruned: str
    trace: RowTrace


def show(
    wrapper: PrunedModel, images: Sequence[Image.Image], question: str, schedule: Schedule, new_tokens: int = 64
) -> Shown:
    """Ask one question about some images, with and without pruning.

    Args:
        wrapper: the model.
        images: shown in this order, before the question.
        question: as a user types it.
        schedule: without an unknown.
        new_tokens: the longest answer.
    """
    content = [{"type": "image", "url": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = dict(wrapper.inputs_of(messages))
    grids = grids_of(wrapper, inputs)
    unpruned, _ = _answer(wrapper, inputs, messages, Schedule(), new_tokens)
    answer, trace = _answer(wrapper, inputs, messages, schedule, new_tokens)
    kept = [
        [mask.cpu().numpy().reshape(grid) for mask, grid in zip(masks, grids, strict=True)] for masks in trace.masks
    ]
    seen = seen_images(wrapper, inputs, grids)
    return Shown(question, schedule, seen, kept, answer, unpruned, trace)


@torch.no_grad()
def _answer(
    wrapper: PrunedModel, inputs: dict, messages: list, schedule: Schedule, new_tokens: int
) -> tuple[str, RowTrace]:
    asked = question_text(wrapper.chat(messages))
    chosen = wrapper.arguments
    with prune(
        wrapper.model, schedule, seed=chosen.seed, positions=chosen.positions, samples=["shown"], questions=[asked]
    ) as trace:
        output = wrapper.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    tokenizer = wrapper.processor.tokenizer
    new = own_tokens(output[0, inputs["input_ids"].shape[1] :].tolist(), tokenizer)
    return clean(wrapper.decode(new), []), trace.rows[0]


def draw_shown(shown: Shown, path: Path) -> None:
    """Draw each image whole and after each stage, with both answers below; `path` ends with .png, .svg or .pdf."""
    from lmms_prune.terminal.drawing import pyplot, save, wrapped

    columns = 1 + len(shown.kept)
    heights = [3.2 * image.height / image.width for image in shown.images]
    figure, axes = pyplot.subplots(
        len(shown.images),
        columns,
        figsize=(3.2 * columns, sum(min(6.4, height) + 0.4 for height in heights) + 1.3),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for number, (image, row) in enumerate(zip(shown.images, axes, strict=True)):
        whole = int(np.prod(shown.kept[0][number].shape)) if shown.kept else 0
        row[0].imshow(image)
        row[0].set_title(f"{whole} visual tokens" if whole else "unpruned", fontsize=9)
        for stage, masks, panel in zip(shown.schedule.stages, shown.kept, row[1:], strict=True):
            panel.imshow(dimmed(image, masks[number]))
            panel.set_title(f"{stage}\n{int(masks[number].sum())} of {whole}", fontsize=9)
        for panel in row:
            panel.axis("off")
    figure.suptitle(wrapped(shown.question, figure, 10), fontsize=10)
    figure.supxlabel(wrapped(f"unpruned: {shown.unpruned}\npruned: {shown.answer}", figure, 10), fontsize=10)
    save(figure, path, dpi=130)
