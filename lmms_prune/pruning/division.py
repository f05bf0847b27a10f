"""Division: the rows of a method's view at one stage: whole images, or the rectangles or tiles of images.

Dimension letters: I images of the batch, V visual tokens of an image, U rows of the view, N tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lmms_prune.methods.shared.tensors import add_up, gather
from lmms_prune.methods.view import Tokens
from lmms_prune.models.mosaic import Kind, Mosaic, Region
from lmms_prune.models.tensors import to_device
from lmms_prune.pruning.ragged import pack
from lmms_prune.schedule.stage import share


@dataclass(frozen=True)
class Division:
    """The images of a batch, divided into the rows of a view.

    Args:
        kind: into what they are divided.
        owner: the image of each row (host).
        regions: the region of each row in its image; empty where images are not divided.
        counts: visual tokens present in each row (host).
        sizes: original visual tokens of each row (host).
        grids: rows and columns of each row's original tokens, where it is one rectangle (host).
        entry: the entry, among its image's visual tokens present, of each token of a row.
        visual: the visual tokens present of each row.
        index: the raster index of each of them in its region.
        raster: the raster index in the image of each of a region's original tokens.
    """

    kind: Kind
    owner: list[int]
    regions: list[Region]
    counts: list[int]
    sizes: list[int]
    grids: list[tuple[int, int]]
    entry: Int[Tensor, "U N"]
    visual: Tokens
    index: Int[Tensor, "U N"]
    raster: Int[Tensor, "U M"]

    @property
    def whole(self) -> bool:
        """Whether each row is an image."""
        return not self.regions

    def of_images(self, x: Shaped[Tensor, " I *D"]) -> Shaped[Tensor, " U *D"]:
        """One value (or row) of each image, for the rows."""
        return x if self.whole else x[to_device(self.owner, x.device)]

    def of_raster(self, x: Shaped[Tensor, "I M *D"]) -> Shaped[Tensor, "U N *D"]:
        """Values of the images' original tokens, for those of the rows."""
        return x if self.whole else gather(self.of_images(x), self.raster)

    def kept(self, keep: Bool[Tensor, "U N"], like: Bool[Tensor, "I V"]) -> Bool[Tensor, "I V"]:
        """A mask over the rows' tokens as one over the images'."""
        if self.whole:
            return keep
        owner = to_device(self.owner, keep.device)[:, None].expand_as(self.entry)
        # Tokens of padding write to a spare last column.
        target = torch.where(self.visual.valid, self.entry, like.shape[1])
        spare = torch.zeros(len(like), like.shape[1] + 1, dtype=torch.bool, device=keep.device)
        return spare.index_put((owner, target), keep)[:, :-1]

    def all_of(self, flags: Bool[Tensor, " U"]) -> Bool[Tensor, " I"]:
        """Whether a flag is set in all rows of each image."""
        return flags if self.whole else self.sums((~flags).long()) == 0

    def sums(self, x: Int[Tensor, " U"]) -> Int[Tensor, " I"]:
        """Numbers of the rows, added up for each image."""
        if self.whole:
            return x
        return add_up(x[None, :], to_device(self.owner, x.device)[None], max(self.owner, default=-1) + 1)[0]

    def host_sums(self, numbers: Sequence[int]) -> list[int]:
        """Numbers of the rows, added up for each image, on the host."""
        totals = [0] * (max(self.owner, default=-1) + 1)
        for image, number in zip(self.owner, numbers, strict=True):
            totals[image] += number
        return totals

    def raster_index(self, index: Int[Tensor, "U N"]) -> Int[Tensor, "U N"]:
        """Raster indices in the regions as those in the images."""
        return index if self.whole else self.raster.gather(1, index.clamp(0, self.raster.shape[1] - 1))


def divided(
    kind: Kind, mosaics: Sequence[Mosaic], visual: Tokens, index: Int[Tensor, "I V"], counts: Sequence[int] | None
) -> Division:
    """Divide images into their rectangles or tiles.

    Args:
        kind: into what.
        mosaics: of the images.
        visual: the visual tokens present of each image.
        index: their raster indices.
        counts: the tokens present in each region where it is planned; None where it is read back from the device.
    """
    device = index.device
    pairs = [(image, region) for image, mosaic in enumerate(mosaics) for region in mosaic.regions(kind)]
    owner, regions = [image for image, _ in pairs], [region for _, region in pairs]
    sizes = [len(region.raster) for region in regions]
    raster = torch.zeros(len(regions), max(sizes), dtype=torch.long)
    # For each original token of an image the row that it belongs to, and its number there.
    lookup = torch.zeros(2, len(mosaics), max(mosaic.patches for mosaic in mosaics), dtype=torch.long)
    for row, (image, region) in enumerate(pairs):
        numbers = torch.tensor(region.raster)
        raster[row, : len(numbers)] = numbers
        lookup[0, image, numbers], lookup[1, image, numbers] = row, torch.arange(len(numbers))
    rows = torch.arange(len(regions), device=device)[:, None]
    owner_rows, raster, lookup = to_device(owner, device), to_device(raster, device), to_device(lookup, device)
    safe = torch.where(visual.valid, index, 0)
    row_of, number = lookup[0].gather(1, safe), lookup[1].gather(1, safe)
    member = (row_of[owner_rows] == rows) & visual.valid[owner_rows]
    counts = member.sum(1).tolist() if counts is None else list(counts)
    packed = pack(member, counts, pad="right")
    entry = packed.index
    slots = visual.slots[owner_rows].gather(1, entry)
    grids = [region.grid for region in regions if region.grid is not None]
    return Division(
        kind,
        owner,
        regions,
        counts,
        sizes,
        grids,
        entry,
        Tokens(slots, packed.valid),
        number[owner_rows].gather(1, entry),
        raster,
    )


def share_present(total: Sequence[int], owner: Sequence[int], present: Sequence[int]) -> list[int]:
    """Distribute each image's `total` tokens among its rows, in proportion to the tokens that are `present` in them."""
    counts = [list(present)[first:last] for first, last in _runs(owner)]
    return [n for tokens, sizes in zip(total, counts, strict=True) for n in share(tokens, sizes)]


def _runs(owner: Sequence[int]) -> list[tuple[int, int]]:
    """First and last position of each image's rows, which are adjacent."""
    lengths = [sum(image == other for other in owner) for image in dict.fromkeys(owner)]
    ends = list(accumulate(lengths))
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def rewritten_slots(
    division: Division, hidden: Float[Tensor, "B L D"], rows: Int[Tensor, " I"]
) -> tuple[Int[Tensor, "U N"], Int[Tensor, "U N"]]:
    """The row and column of the batch to write each of a view's visual tokens to; padding goes to a spare last column."""
    slots = torch.where(division.visual.valid, division.visual.slots, hidden.shape[1])
    return division.of_images(rows)[:, None].expand_as(slots), slots
