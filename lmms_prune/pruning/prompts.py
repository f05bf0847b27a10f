"""What a batch of prompts holds: each row's name, and the columns of each image's visual tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.errors import BrokenImageError, PruningError
from lmms_prune.methods.shared.tensors import owners
from lmms_prune.models.mosaic import Mosaic
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.trace import RowTrace


@dataclass(frozen=True)
class ImageColumns:
    """One image in a batch of prompts.

    Args:
        row: its row.
        patches: the columns of its patches' tokens, in raster order.
        newlines: the columns of its newline tokens.
        mosaic: its tiles; None where it is encoded whole.
        encoded: its number among the images that were encoded in tiles, which several answers to a prompt share.
    """

    row: int
    patches: Sequence[int]
    newlines: Sequence[int] = ()
    mosaic: Mosaic | None = None
    encoded: int = 0

    @classmethod
    def of(cls, row: int, start: int, mosaic: Mosaic, encoded: int) -> ImageColumns:
        """The image in tiles whose tokens begin at column `start`."""
        patches, newlines = mosaic.columns_of_patches, mosaic.columns_of_newlines
        return cls(row, [start + n for n in patches], [start + n for n in newlines], mosaic, encoded)

    @property
    def end(self) -> int:
        """The column after its last token."""
        return max([self.patches[-1], *self.newlines[-1:]]) + 1


def read_rows(
    parts: ModelParts,
    inputs: dict[str, Any],
    ids: list[list[int]],
    pads: Sequence[int],
    samples: Sequence[str] | None,
) -> tuple[list[RowTrace], list[ImageColumns]]:
    """The rows of a batch of prompts, and the columns of each image.

    Args:
        parts: the model.
        inputs: the multimodal module's arguments; the sizes of the images are used.
        ids: its token ids, on the host.
        pads: padding tokens of each row.
        samples: as for `Layout.of`.

    Raises:
        BrokenImageError: visual tokens that do not form complete images, or more images than tokens for them.
        PruningError: a wrong number of samples.
    """
    names = _sample_ids(ids, pads, samples)
    image_token = (
        parts.config.image_token_id
    )  # read once: an attribute of the library's configurations takes microseconds
    visual = [[token == image_token for token in row] for row in ids]
    images = (_in_tiles if parts.tiled else _whole)(parts, inputs, visual)
    traces = []
    for b, (row, pad) in enumerate(zip(ids, pads, strict=True)):
        own = [image for image in images if image.row == b]
        mosaics = [image.mosaic for image in own if image.mosaic is not None]
        trace = RowTrace(
            sample=names[b],
            text_tokens=len(row) - pad - sum(visual[b]),
            images=[len(image.patches) for image in own],
            newlines=[mosaic.newline_count for mosaic in mosaics],
            tiles=[mosaic.tile_sizes for mosaic in mosaics],
        )
        traces.append(trace)
    return traces, images


def _whole(parts: ModelParts, inputs: dict[str, Any], visual: list[list[bool]]) -> list[ImageColumns]:
    """The images of rows, of a family that encodes them whole; raises as `read_rows`."""
    fixed, sizes, images = parts.tokens_per_image, parts.image_sizes(inputs), list[ImageColumns]()
    for b, row in enumerate(visual):
        spans = parts.family.spans(row, fixed, sizes)
        sizes = sizes[len(spans) :]
        images += [ImageColumns(b, range(start, start + size)) for start, size in spans]
    if sizes:
        raise BrokenImageError(f"the prompts hold {len(images)} images, but {len(sizes)} more were given with them.")
    return images


def _in_tiles(parts: ModelParts, inputs: dict[str, Any], visual: list[list[bool]]) -> list[ImageColumns]:
    """The images of rows, of a family that encodes them in tiles; raises as `read_rows`."""
    mosaics, images = parts.mosaics(inputs), list[ImageColumns]()
    tokens, encoded = sum(map(sum, visual)), sum(mosaic.tokens for mosaic in mosaics)
    # For several answers to a prompt `generate` repeats the rows, but not the images' sizes.
    repeats = tokens // encoded if encoded and tokens % encoded == 0 and len(visual) % (tokens // encoded) == 0 else 1
    first = following = 0
    for b, row in enumerate(visual):
        first = following if b % repeats == 0 else first
        spans = parts.family.spans(row, None, [mosaic.tokens for mosaic in mosaics[first:]])
        following = first + len(spans)
        if following > len(mosaics):
            missing = following - len(mosaics)
            raise BrokenImageError(
                f"the prompts hold {missing} images whose sizes are not known, which say what their tokens are; give "
                "pixel_values and image_sizes inside the block."
            )
        images += [ImageColumns.of(b, start, mosaics[number], number) for number, (start, _) in enumerate(spans, first)]
    if following < len(mosaics):
        more = len(mosaics) - following
        raise BrokenImageError(f"the prompts hold {len(images)} images, but {more} more were given with them.")
    return images


def grids_of(
    parts: ModelParts, inputs: dict[str, Any], images: Sequence[ImageColumns], encoded: Tensor | None
) -> list[tuple[int, int]]:
    """The grid of each image, where it is known."""
    grids = parts.grids(inputs, [len(image.patches) for image in images])
    if encoded is not None:
        grids = parts.family.grids_of_thw(parts.config, encoded)
    if grids and len(images) > len(grids) and len(images) % len(grids) == 0:
        # For several answers to a prompt `generate` repeats the rows, but not the grids.
        grids = [grids[i] for i in owners([image.row for image in images], len(images) // len(grids))]
    return grids


def note_grids(traces: Sequence[RowTrace], grids: Sequence[list[tuple[int, int]]]) -> None:
    """Note in the rows' traces the grids of their images, where they are known."""
    of_images = iter(grids)
    for trace in traces:
        trace.grids = [next(of_images, []) for _ in trace.images]


def on_host(ids: Int[Tensor, "B L"], present: Bool[Tensor, "B L"] | None) -> tuple[list[list[int]], list[int]]:
    """The token ids and the padding of each row, in one transfer from the device.

    Args:
        ids: of the prompts.
        present: which columns hold a token; None if all do.

    Raises:
        PruningError: right padding, or padding inside a row.
    """
    if present is None:
        return ids.tolist(), [0] * len(ids)
    host_ids, host_present = torch.stack([ids, present.to(ids)]).tolist()
    pads = [len(row) - sum(row) for row in host_present]
    if any(any(row[:pad]) for row, pad in zip(host_present, pads, strict=True)):
        raise PruningError("pruning needs left padding: set tokenizer.padding_side = 'left'.")
    return host_ids, pads


def refuse_shared_names(ids: list[list[int]], pads: Sequence[int], samples: Sequence[str] | None) -> None:
    """Refuse one sample id for different prompts: only answers to one prompt may share it, and with it random draws."""
    if samples is None or len(samples) == len(ids):
        return
    repeats = len(ids) // len(samples)
    prompts = [row[pad:] for row, pad in zip(ids, pads, strict=True)]
    if any(prompt != prompts[row - row % repeats] for row, prompt in enumerate(prompts)):
        raise PruningError(
            f"{len(samples)} samples were named for a batch of {len(ids)} rows, which are not {repeats} answers to each of them; "
            "name one for each row."
        )


def _sample_ids(ids: list[list[int]], pads: Sequence[int], samples: Sequence[str] | None) -> list[str]:
    if samples is None:
        return [
            hashlib.blake2b(repr(row[pad:]).encode(), digest_size=8).hexdigest()
            for row, pad in zip(ids, pads, strict=True)
        ]
    if not samples or len(ids) % len(samples):
        raise PruningError(f"{len(samples)} samples were named for a batch of {len(ids)} rows; name one for each row.")
    repeats = len(ids) // len(samples)
    return [sample for sample in samples for _ in range(repeats)]


def text_after(ids: list[list[int]], images: Sequence[ImageColumns], image_token: int) -> list[list[int]]:
    """The columns of the text tokens after each image."""
    return [
        [column for column in range(image.end, len(ids[image.row])) if ids[image.row][column] != image_token]
        for image in images
    ]
