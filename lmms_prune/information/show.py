"""Shows for one question which visual tokens each stage of a schedule keeps, and what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lmms_prune.harness.generation import clean, own_tokens, stop_texts
from lmms_prune.harness.prompts import question_text
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.canvas import dimmed, grids_of, seen_images, split_by_grid
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.trace import RowTrace
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class ShownComparison:
    """One prompt answered with and without pruning.

    Args:
        question: the question, as asked.
        schedule: the schedule of the pruned run.
        images: the images as the model sees them; of an image in tiles its base and its canvas.
        kept: for each stage and image, a boolean array (rows, columns) of the kept visual tokens.
        answer, unpruned: the answers with and without pruning.
        trace: the trace of the pruned run.
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
) -> ShownComparison:
    """Ask one question about some images, with and without pruning.

    Args:
        wrapper: the model.
        images: placed before the question, in this order.
        question: the user's question.
        schedule: a schedule without ``?``.
        new_tokens: the largest number of tokens in an answer.
    """
    content = [{"type": "image", "url": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = dict(wrapper.inputs_of(messages))
    grids = grids_of(wrapper, inputs)
    unpruned, _ = _answer(wrapper, inputs, messages, Schedule(), new_tokens)
    answer, trace = _answer(wrapper, inputs, messages, schedule, new_tokens)
    kept = [split_by_grid(torch.cat(masks), grids) for masks in trace.masks]
    seen = seen_images(wrapper, inputs, grids)
    return ShownComparison(question, schedule, seen, kept, answer, unpruned, trace)


@torch.no_grad()
def _answer(
    wrapper: PrunedModel, inputs: dict, messages: list, schedule: Schedule, new_tokens: int
) -> tuple[str, RowTrace]:
    text = question_text(wrapper.chat(messages))
    arguments = wrapper.arguments
    with prune(
        wrapper.model, schedule, seed=arguments.seed, positions=arguments.positions, samples=["shown"], questions=[text]
    ) as trace:
        output = wrapper.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    tokenizer = wrapper.processor.tokenizer
    new = own_tokens(output[0, inputs["input_ids"].shape[1] :].tolist(), tokenizer)
    # lmms-eval fills in a blank line as the stop text of a task that states none.
    trims = wrapper.family.trims_answers
    return clean(wrapper.decode(new), stop_texts({"until": "\n\n"}, trims), strip=trims), trace.rows[0]


def draw_comparison(comparison: ShownComparison, path: Path) -> None:
    """Draw each image unpruned and after each stage, with both answers below; `path` ends with .png, .svg or .pdf."""
    from lmms_prune.terminal.drawing import pyplot, save, wrapped

    columns = 1 + len(comparison.kept)
    heights = [3.2 * image.height / image.width for image in comparison.images]
    figure, axes = pyplot.subplots(
        len(comparison.images),
        columns,
        figsize=(3.2 * columns, sum(min(6.4, height) + 0.4 for height in heights) + 1.3),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for number, (image, row) in enumerate(zip(comparison.images, axes, strict=True)):
        total = int(np.prod(comparison.kept[0][number].shape)) if comparison.kept else 0
        row[0].imshow(image)
        row[0].set_title(f"{total} visual tokens" if total else "unpruned", fontsize=9)
        for stage, masks, panel in zip(comparison.schedule.stages, comparison.kept, row[1:], strict=True):
            panel.imshow(dimmed(image, masks[number]))
            panel.set_title(f"{stage}\n{int(masks[number].sum())} of {total}", fontsize=9)
        for panel in row:
            panel.axis("off")
    figure.suptitle(wrapped(comparison.question, figure, 10), fontsize=10)
    figure.supxlabel(wrapped(f"unpruned: {comparison.unpruned}\npruned: {comparison.answer}", figure, 10), fontsize=10)
    save(figure, path, dpi=130)
