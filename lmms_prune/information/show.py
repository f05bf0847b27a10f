"""Shows for one question which visual tokens each stage of a schedule keeps, and what the model answers."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.errors import FROM_ONE, PATH, TEXT, Kind, expect, optional, several
from lmms_prune.harness.argument_text import argument_text
from lmms_prune.harness.generation import clean, own_tokens, stop_texts
from lmms_prune.harness.models import as_lmms_eval, unpruned
from lmms_prune.harness.prompts import question_text
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.canvas import dimmed, grids_of, seen_images, split_by_grid
from lmms_prune.pruning.hooks import check, prune
from lmms_prune.pruning.html import figure
from lmms_prune.pruning.trace import RowTrace, figures
from lmms_prune.record.files import read_image
from lmms_prune.record.information import InformationError
from lmms_prune.schedule import Schedule

_WIDEST = 224  # pixels of an image in a notebook
_IMAGES = Kind(
    "image files or opened images, at least one",
    lambda value: all(isinstance(image, (str, PathLike, Image.Image)) for image in value),
    lambda value: len(value) > 0,
)
_PICTURE = Kind(
    "a file whose name ends with .png, .svg or .pdf",
    PATH.holds,
    lambda value: Path(value).suffix.lower() in (".png", ".svg", ".pdf"),
)


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        return f"ShownComparison({str(self.schedule)!r}: unpruned {self.unpruned!r}, pruned {self.answer!r}; {figures([self.trace])})"

    def _repr_html_(self) -> str:
        """The images, unpruned and with the tokens that each stage keeps, above both answers."""
        lines = [f"<p>{escape(self.question)}</p>"]
        for number, image in enumerate(self.images):
            drawings = [figure(_img(image, "the image as the model sees it"), "unpruned")]
            for stage, masks in zip(self.schedule.stages, self.kept, strict=True):
                kept = f"{masks[number].sum()} of {masks[number].size}"
                drawing = _img(dimmed(image, masks[number]), f"{kept} visual tokens kept")
                drawings.append(figure(drawing, f"{escape(str(stage))}<br>{kept}"))
            lines.append(f"<div>{''.join(drawings)}</div>")
        answers = f"unpruned: <b>{escape(self.unpruned)}</b><br>pruned: <b>{escape(self.answer)}</b>"
        return f"<div>{''.join(lines)}<p>{answers}</p></div>"


def show(
    images: str | PathLike[str] | Image.Image | Sequence[str | PathLike[str] | Image.Image],
    question: str,
    schedule: Schedule | str,
    *,
    model: str | PrunedModel | None = None,
    wrapper: str | None = None,
    model_args: str | Mapping[str, Any] = "",
    new_tokens: int = 64,
    out: str | PathLike[str] | None = None,
) -> ShownComparison:
    """Ask one question about some images with and without pruning, and show which visual tokens each stage keeps.

    Args:
        images: files or opened images, one or several, placed before the question in this order.
        question: the user's question.
        schedule: a schedule; a text with ``?`` ends with its budget: ``dart@1:?,budget=0.5``.
        model: a checkpoint's folder or hub name (by default that of the wrapper), or a model that
            `lmms_prune.harness.models.unpruned` has loaded, for several calls.
        wrapper: lmms-eval's name of a model of this package; by default the one that loads the checkpoint.
        model_args: further arguments as for lmms-eval, without checkpoint, schedule and budget: ``dtype=…,prompt=…``, JSON, or
            a mapping.
        new_tokens: the largest number of tokens in an answer.
        out: a file to draw the same picture to: .png, .svg or .pdf.

    Returns:
        the comparison, which a notebook draws on the images.

    Raises:
        TypeError, ValueError: an argument of another type, or an empty one; names it.
        ArgumentError, InformationError, PruningError, ScheduleError, UnsupportedModelError: an image that cannot be read,
            or a model or schedule that cannot be run; see the message.
    """
    listed = several(images, (str, PathLike, Image.Image))
    expect(
        images=(listed, _IMAGES),
        question=(question, TEXT),
        new_tokens=(new_tokens, FROM_ONE),
        out=(out, optional(_PICTURE)),
    )
    arguments = argument_text(model_args)
    parsed, budget = Schedule.with_budget(schedule)
    if oracles := [stage.method for stage in parsed.stages if stage.spec.kind == "oracle"]:
        message = f"--schedule {schedule}: {oracles[0]} needs a right answer, and a question of your own has none."
        raise InformationError(message)
    opened = [_opened(image) for image in listed]
    if isinstance(model, PrunedModel) and (arguments or wrapper):
        raise InformationError(
            f"{wrapper or arguments}: the model is loaded already; name wrapper and arguments where it is."
        )
    loaded = model if isinstance(model, PrunedModel) else unpruned(*as_lmms_eval(model, wrapper, arguments))
    config = loaded.model.config
    if budget is not None:
        parsed = parsed.solve(budget, prompt_sizes(loaded.architecture, loaded.family.tokens_per_image(config)))
    parsed.check(config.text_config.num_hidden_layers)
    check(loaded.model, parsed)
    comparison = compare(loaded, opened, question, parsed, new_tokens)
    if out is not None:
        draw_comparison(comparison, Path(out))
    return comparison


def _opened(image: str | PathLike[str] | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        return read_image(Path(image))
    except OSError as error:
        raise InformationError(f"{image} cannot be read as an image: {error.strerror or error}.") from None


def compare(
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


def _img(image: Image.Image, alt: str) -> str:
    """An image as an HTML element that holds it: a JPEG with sides of at most _WIDEST pixels."""
    small = image.convert("RGB")
    small.thumbnail((_WIDEST, _WIDEST))
    stream = BytesIO()
    small.save(stream, "JPEG", quality=85)
    return f'<img width="{small.width}" alt="{escape(alt)}" style="border:1px solid #8888" src="data:image/jpeg;base64,{b64encode(stream.getvalue()).decode()}">'


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
