"""Records of what was executed, per sample and per run, as lmms-eval's results contain them."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lmms_prune.efficiency.cost import decode_flops, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.harness.checkout import code_state
from lmms_prune.harness.fingerprint import code
from lmms_prune.models.mosaic import Mosaic
from lmms_prune.models.sizes import Architecture
from lmms_prune.pruning.trace import RowTrace
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.record.averages import Averages, TaskAverages
from lmms_prune.record.bitmaps import encode
from lmms_prune.record.run import VERSIONS, Provenance


@dataclass(frozen=True)
class ImageGrids:
    """How an image's visual tokens are drawn: the grids of tokens that show it.

    Args:
        grids: rows and columns of each.
        boxes: the part of each grid that shows the image: first row and column, height and width; empty for a single
            grid that the image fills.
        encoded: the grid of patches from which the encoder's FLOPs follow.
    """

    grids: tuple[tuple[int, int], ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    encoded: tuple[int, int]


def image_grids(grids: Sequence[tuple[int, int]], mosaics: Sequence[Mosaic]) -> list[ImageGrids]:
    """Return the grids of images that are one grid each, or that are encoded in tiles."""
    in_tiles = [ImageGrids(x.rectangles, x.boxes, (x.encoded * x.side, x.side)) for x in mosaics]
    return in_tiles or [ImageGrids((grid,), (), grid) for grid in grids]


def token_accounting(
    row: RowTrace, images: Sequence[ImageGrids], model: Architecture, input_tokens: int, output_tokens: int
) -> TokenAccounting:
    """Return the token accounting of one executed row with these images; its masks are on the CPU."""
    lengths = [row.text_tokens + visual for visual in row.visual]
    cached = [lengths[_layer_held(row.computed, layer, n)] for layer, n in enumerate(row.cached)]
    cached_bytes = tuple(int(size) for size in kv_bytes(model, cached))
    return TokenAccounting(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        visual_tokens=row.visual_tokens,
        avg_visual_tokens=row.avg_visual_tokens,
        text_tokens=row.text_tokens,
        kept_visual_tokens=tuple(row.kept_tokens),
        recycled_visual_tokens=tuple(sum(images) for images in row.recycled),
        layer_visual_tokens=tuple(row.visual),
        visual_grids=tuple(grid for picture in images for grid in picture.grids),
        grid_boxes=tuple((i, *box) for i, picture in enumerate(images) for box in picture.boxes),
        token_bitmaps=tuple(
            tuple(text for mask, picture in zip(masks, images, strict=True) for text in _bitmaps(mask, picture))
            for masks in row.masks
        ),
        kv_bytes=sum(cached_bytes),
        layer_kv_bytes=cached_bytes,
        encoder_flops=sum(encoder_flops(model.encoder, picture.encoded) for picture in images),
        selection_flops=round(row.selection_flops or 0),
        prefill_flops=int(prefill_flops(model, lengths)),
        # The prefill already produces the first new token.
        decode_flops=int(decode_flops(model, lengths, max(0, output_tokens - 1))),
    )


def _layer_held(computed: Sequence[int], layer: int, length: int) -> int:
    """Return the layer whose tokens a layer's cache of `length` tokens holds, padding included.

    These are its own, unless a method cropped the caches of earlier layers: then those of the next layer of that length. An
    earlier layer may have the same padded length, but other tokens: a longer row that is not pruned decides it.
    """
    return next(later for later in range(layer, len(computed)) if computed[later] == length)


def _bitmaps(mask: Bool[Tensor, " V"], picture: ImageGrids) -> Iterator[str]:
    """Yield the token bitmap of each grid of one image, without a class token before them."""
    sizes = [rows * columns for rows, columns in picture.grids]
    for part, grid in zip(mask[len(mask) - sum(sizes) :].split(sizes), picture.grids, strict=True):
        yield encode(part.numpy().reshape(grid))


@dataclass(frozen=True)
class AnsweredSample:
    """One answered sample, with its cost.

    Args:
        text: the answer.
        accounting: the token accounting of its own tokens, without padding.
        computed: executed tokens summed over all layers, padding included.
        cached: bytes of its KV cache after the prefill, padding included.
        rows: number of rows of its batch.
        seconds: its share of the batch's generation time.
    """

    text: str
    accounting: TokenAccounting
    computed: int
    cached: int
    rows: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return this in JSON types."""
        return {part.name: getattr(self, part.name) for part in fields(self)} | {
            "accounting": self.accounting.to_dict()
        }

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> AnsweredSample:
        """Read what `to_dict` returned."""
        accounting = TokenAccounting.read(entry["accounting"])
        assert accounting is not None  # guaranteed by `to_dict`
        return cls(**{part.name: entry[part.name] for part in fields(cls)} | {"accounting": accounting})


@dataclass
class Answered:
    """The samples of one process by task, both newly answered and from the journal.

    Args:
        tasks: the answers by task.
        resumed: number of answers taken from the journal.
    """

    tasks: dict[str, list[AnsweredSample]] = field(default_factory=dict)
    resumed: int = 0

    def add(self, task: str, answer: AnsweredSample) -> None:
        """Add one sample."""
        self.tasks.setdefault(task, []).append(answer)

    @property
    def answers(self) -> list[AnsweredSample]:
        """Return the answers of all tasks."""
        return [answer for answers in self.tasks.values() for answer in answers]

    def averages(self) -> Averages:
        """Return the averages over all samples."""
        return Averages.of([answer.accounting for answer in self.answers])

    def by_task(self) -> dict[str, TaskAverages]:
        """Return each task's averages over its samples."""
        return {
            task: TaskAverages.of_task(
                [answer.accounting for answer in answers],
                [answer.computed for answer in answers],
                [answer.cached for answer in answers],
            )
            for task, answers in self.tasks.items()
        }


def provenance(model: Any, device: torch.device) -> Provenance:
    """Return the provenance of a loaded model's answers, which lmms-eval does not record."""
    cuda = device.type == "cuda"
    return Provenance(
        versions={name: version(name) for name in VERSIONS},
        code=code(),
        commit=code_state(),
        device=torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})",
        attention=str(model.config._attn_implementation),
        dtype=str(model.dtype).removeprefix("torch."),
    )
