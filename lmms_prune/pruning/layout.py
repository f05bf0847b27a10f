"""Layout: the columns of each image's visual tokens in a batch, before and after every stage.

Everything that decides a shape (lengths, counts) is known on the host from the plan, so that nothing has to be read back
from the device. Dimension letters: B rows, L sequence, I images of the whole batch, V visual tokens of an image, T text tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import LayerInput, Tokens, TokenView
from lmms_prune.models.mosaic import Kind, Mosaic, Tiles
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.tensors import to_device
from lmms_prune.pruning.division import Division, divided, rewritten_slots, share_present
from lmms_prune.pruning.prompts import grids_of, note_grids, on_host, read_rows, refuse_shared_names, text_after
from lmms_prune.pruning.ragged import Packing, pack
from lmms_prune.pruning.trace import RowTrace
from lmms_prune.schedule import Stage


@dataclass
class Layout:
    """The tokens of one batch that are present now.

    Args:
        traces: one per row, with its name and its images.
        rows: the row of each image.
        present: which columns of the sequence hold a token.
        visual: the visual tokens still present of each image.
        text: the text tokens after each image.
        index: the raster index of each visual token.
        origin: the original column of each column of the sequence.
        columns: the original column of each of an image's original visual tokens, by raster index.
        newlines: the newline tokens present of each image, which belong to no patch.
        grids: rows and columns of each image's original tokens, where known and one rectangle (host).
        mosaics: the tiles of each image, of a family that encodes images in tiles (host).
        encoded: the number of each of these images among those that were encoded (host).
        ends_in_image: whether each row's last token is visual (host).
        counts: visual tokens present in each image (host).
        lengths: tokens present in each row (host).
        memories: what methods pass from stage to stage, for one prefill, by what the stages divide images into.
        region_counts: visual tokens present in each tile (or rectangle) of the images, as far as they are planned.
    """

    traces: list[RowTrace]
    rows: Int[Tensor, " I"]
    present: Bool[Tensor, "B L"]
    visual: Tokens
    text: Tokens
    index: Int[Tensor, "I V"]
    origin: Int[Tensor, "B L"]
    columns: Int[Tensor, "I M"]
    newlines: Tokens
    grids: list[tuple[int, int]]
    mosaics: list[Mosaic]
    encoded: list[int]
    ends_in_image: list[bool]
    counts: list[int]
    lengths: list[int]
    memories: dict[Kind, Memory] = field(default_factory=lambda: defaultdict(Memory))
    region_counts: dict[Kind, list[int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, parts: ModelParts, inputs: dict[str, Any], samples: Sequence[str] | None, encoded: Tensor | None
    ) -> Layout:
        """Read a batch of prompts.

        Args:
            parts: the model.
            inputs: the multimodal module's arguments; ``input_ids`` (B, L) and ``attention_mask`` are used.
            samples: one id per row, or one for each group of consecutive rows (several answers per sample).
            encoded: the images' grids as passed to the vision encoder, if its run was recorded.

        Raises:
            PruningError: right padding, or a wrong number of samples.
            BrokenImageError: visual tokens that do not form complete images.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        host_ids, pads = on_host(ids, None if mask is None else present)
        traces, images = read_rows(parts, inputs, host_ids, pads, samples)
        refuse_shared_names(host_ids, pads, samples)
        counts = [len(image.patches) for image in images]
        text = text_after(host_ids, images, parts.config.image_token_id)
        # One copy to the device for all that is known on the host: token sets and rows.
        host = [_padded([image.patches for image in images]), _padded(text), _padded([x.newlines for x in images])]
        host.append(torch.tensor([image.row for image in images], dtype=torch.long)[:, None])
        widths = [part.shape[1] for part in host]
        *slots, rows = to_device(torch.cat(host, dim=1), ids.device).split(widths, dim=1)
        visual, text_tokens, newlines = (Tokens(columns.clamp(min=0), columns >= 0) for columns in slots)
        index = torch.arange(max(counts, default=0), device=ids.device).expand(len(images), -1)
        origin = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mosaics = [image.mosaic for image in images if image.mosaic is not None]
        grids = grids_of(parts, inputs, images, encoded)
        note_grids(traces, [list(mosaic.rectangles) for mosaic in mosaics] or [[grid] for grid in grids])
        return cls(
            traces=traces,
            rows=rows[:, 0],
            present=present,
            visual=visual,
            text=text_tokens,
            index=index,
            origin=origin,
            columns=visual.slots,
            newlines=newlines,
            grids=grids,
            mosaics=mosaics,
            encoded=[image.encoded for image in images],
            ends_in_image=[row[-1] == parts.config.image_token_id for row in host_ids],
            counts=counts,
            lengths=[ids.shape[1] - pad for pad in pads],
            region_counts={kind: _region_sizes(mosaics, kind) for kind in ("rectangle", "tile")},
        )

    def copy(self) -> Layout:
        """The same tokens, with a memory of their own; pruning one leaves the other as it is."""
        return replace(
            self,
            counts=list(self.counts),
            lengths=list(self.lengths),
            memories=defaultdict(Memory),
            region_counts=dict(self.region_counts),
        )

    @property
    def owning_rows(self) -> list[int]:
        """The row of each image, on the host."""
        return [b for b, row in enumerate(self.traces) for _ in row.images]

    @property
    def sizes(self) -> list[int]:
        """Original visual tokens of each image."""
        return [size for row in self.traces for size in row.images]

    @property
    def visual_counts(self) -> list[int]:
        """Visual tokens present in each image, its newline tokens included."""
        newlines = [n for row in self.traces for n in row.newlines] or [0] * len(self.counts)
        return [count + (extra if count else 0) for count, extra in zip(self.counts, newlines, strict=True)]

    def divided(self, kind: Kind) -> Division:
        """The images as a stage's method sees them; reads counts back from the device if an earlier stage left them open."""
        if kind != "image" and self.mosaics:
            return divided(kind, self.mosaics, self.visual, self.index, self.region_counts.get(kind))
        images = list(range(len(self.counts)))
        return Division(
            kind, images, [], list(self.counts), self.sizes, self.grids, self.index, self.visual, self.index, self.index
        )

    def planned(self, stage: Stage, division: Division) -> list[int]:
        """Tokens that each row of a division keeps at `stage`, of those present now, by the stage's count rule."""
        if division.kind == "tile":
            return self._by_row(stage.kept, division, division.counts)
        by_image = self._by_row(stage.kept, self.divided("image"), self.counts)
        return by_image if division.whole else share_present(by_image, division.owner, division.counts)

    def requested(self, stage: Stage, division: Division) -> list[int]:
        """Tokens that the stage requests in each row of a division, before the method's count rule."""
        if division.kind == "tile":
            return self._by_row(lambda sizes, _: stage.requested(sizes), division, division.counts)
        by_image = [n for row in self.traces for n in stage.requested(row.images)]
        return by_image if division.whole else share_present(by_image, division.owner, division.sizes)

    def _by_row(
        self, rule: Callable[[list[int], list[int]], list[int]], division: Division, present: Sequence[int]
    ) -> list[int]:
        """What `rule` says of the original and present tokens of the images (or tiles) of each row of the batch."""
        rows, first, numbers = self.owning_rows, 0, []
        owners_of = [rows[image] for image in division.owner]
        for b in range(len(self.traces)):
            last = first + owners_of.count(b)
            numbers += rule(division.sizes[first:last], list(present[first:last]))
            first = last
        return numbers

    def view(
        self,
        parts: ModelParts,
        state: LayerInput,
        before: LayerInput | None,
        seed: int,
        division: Division | None = None,
        **more: Any,
    ) -> TokenView:
        """The view for a method at the input `state` of a layer.

        Args:
            parts: the model.
            state, before: inputs of the layer and of the layer before.
            seed: of random draws.
            division: the rows of the view; by default the images.
            more: further fields of the view.
        """
        self.follow(state.hidden.device)
        division = self.divided("image") if division is None else division
        names = [(row.sample, number) for row in self.traces for number in range(len(row.images))]
        images = [names[image] for image in division.owner]
        seeds = [f"{seed}|{sample}|image {number}|layer {state.layer}" for sample, number in images]
        if not division.whole:
            seeds = [f"{text}|{division.kind} {row}" for text, row in zip(seeds, _numbers(division.owner), strict=True)]
        owning = self.owning_rows
        return TokenView(
            layer=state.layer,
            rows=division.of_images(self.rows),
            visual=division.visual,
            text=Tokens(division.of_images(self.text.slots), division.of_images(self.text.valid)),
            index=division.index,
            counts=list(division.counts),
            seeds=seeds,
            images=images,
            _parts=parts,
            _state=state,
            _before=before,
            _present=self.present,
            memory=self.memories["image" if division.whole else division.kind],
            sizes=division.sizes,
            _owning_rows=[owning[image] for image in division.owner],
            _origin=self.origin,
            _columns=division.of_raster(self.columns),
            _grid_list=division.grids,
            _tiles=self._tiles(division),
            **more,
        )

    def _tiles(self, division: Division) -> Tiles | None:
        """What the rows of a view are of the images that were encoded in tiles."""
        if not self.mosaics:
            return None
        regions = division.regions or [mosaic.regions("image")[0] for mosaic in self.mosaics]
        mosaics = dict(zip(self.encoded, self.mosaics, strict=True))
        rows = [(self.encoded[image], region) for image, region in zip(division.owner, regions, strict=True)]
        return Tiles([mosaics[number] for number in sorted(mosaics)], self.encoded, rows)

    def write(
        self,
        hidden: Float[Tensor, "B L D"],
        division: Division,
        visual: Float[Tensor, "U N D"],
        index: Int[Tensor, "U N"],
    ) -> Float[Tensor, "B L D"]:
        """`hidden` with a method's rewritten visual tokens; the layout takes over their raster indices and columns."""
        rows, slots = rewritten_slots(division, hidden, self.rows)
        spare = torch.cat([hidden, hidden[:, :1]], dim=1)
        origins = torch.cat([self.origin, self.origin[:, :1]], dim=1)
        valid, raster = division.visual.valid, division.raster_index(index)
        # Entries that are not kept may have any index.
        own = division.of_images(self.columns)
        columns = own.gather(1, raster.clamp(0, own.shape[1] - 1))
        if division.whole:
            self.index = torch.where(valid, index, self.index)
        else:
            # Padding writes to a spare last column.
            owner = to_device(division.owner, valid.device)[:, None].expand_as(raster)
            indices = torch.cat([self.index, self.index[:, :1]], dim=1)
            entry = torch.where(valid, division.entry, self.index.shape[1])
            self.index = indices.index_put((owner, entry), raster)[:, :-1]
        self.origin = origins.index_put((rows, slots), columns)[:, :-1]
        return spare.index_put((rows, slots), visual.to(hidden.dtype))[:, :-1]

    def add(self, hidden: Float[Tensor, "B L D"], extra: Float[Tensor, "N D"]) -> Float[Tensor, "B L D"]:
        """`hidden` with the rows of `extra` added to the visual tokens present.

        Args:
            hidden: states of the current sequence.
            extra: one row for each original visual token of the batch, image by image.
        """
        self.follow(hidden.device)
        [tokens] = self.of_tokens(self.divided("image"), [extra.to(hidden)])
        rows, slots, spare = self._writable(hidden)
        return spare.index_put((rows, slots), spare[rows, slots] + tokens)[:, :-1]

    def of_tokens(self, division: Division, extras: Sequence[Float[Tensor, "N D"]]) -> list[Float[Tensor, "U V D"]]:
        """The rows of each of `extras` (as for `add`) for the visual tokens present; arbitrary where padding."""
        if not extras:
            return []
        rows = self._rows_of(division, division.index)
        return [extra[rows.to(extra.device)] for extra in extras]

    def with_rows(
        self,
        extras: Sequence[Float[Tensor, "N D"]],
        division: Division,
        rows: Float[Tensor, "U V A"],
        index: Int[Tensor, "U V"],
        keep: Bool[Tensor, "U V"],
    ) -> list[Float[Tensor, "N D"]]:
        """`extras` (as for `add`) with other rows for the kept tokens.

        Args:
            extras: E tensors.
            division: the rows of the view.
            rows: the new rows of all of them, side by side: A is E·D.
            index: the raster indices, in the view's rows, of the tokens to which they belong.
            keep: the tokens that are kept.
        """
        changed, places = [], self._rows_of(division, index)
        for extra, new in zip(extras, rows.chunk(len(extras), dim=-1), strict=True):
            # Entries that are not kept write to a spare last row.
            target = torch.where(keep & division.visual.valid, places, len(extra)).to(extra.device)
            changed.append(torch.cat([extra, extra[:1]]).index_put((target,), new.to(extra))[:-1])
        return changed

    def _rows_of(self, division: Division, index: Int[Tensor, "U V"]) -> Int[Tensor, "U V"]:
        """The number, among all original visual tokens of the batch, of the tokens at raster indices; 0 where padding."""
        firsts = [0, *accumulate(self.sizes)]
        starts = to_device([firsts[image] for image in division.owner], index.device, torch.long)[:, None]
        return torch.where(division.visual.valid, starts + division.raster_index(index), 0)

    def _writable(self, hidden: Float[Tensor, "B L D"]) -> tuple[Tensor, Tensor, Tensor]:
        """The row and column to write each visual token to, and `hidden` with a spare last column for padding entries."""
        slots = torch.where(self.visual.valid, self.visual.slots, hidden.shape[1])
        return self.rows[:, None].expand_as(slots), slots, torch.cat([hidden, hidden[:, :1]], dim=1)

    def prune(self, keep: Bool[Tensor, "I V"], counts: list[int]) -> Packing:
        """Remove all visual tokens but the kept ones, `counts` in each image.

        Newline tokens are kept as long as their image keeps any other token.

        Returns:
            the new column of each column of the sequence.
        """
        keep = keep & self.visual.valid
        dropped = self.visual.valid & ~keep
        # Counted rather than set: padding entries point at column 0 and must not undo a token's drop there.
        drops = torch.zeros_like(self.present, dtype=torch.int32)
        drops.index_put_((self.rows[:, None].expand_as(dropped), self.visual.slots), dropped.int(), accumulate=True)
        before, self.counts = self.visual_counts, list(counts)
        for b, kept, present in zip(self.owning_rows, self.visual_counts, before, strict=True):
            self.lengths[b] -= present - kept
        if self.newlines.valid.shape[1]:
            ended = self.newlines.valid & to_device([not count for count in counts], keep.device)[:, None]
            drops.index_put_((self.rows[:, None].expand_as(ended), self.newlines.slots), ended.int(), accumulate=True)
            self.newlines = Tokens(self.newlines.slots, self.newlines.valid & ~ended)
        packing = pack(self.present & (drops == 0), self.lengths, pad="left")
        images = pack(keep, counts, pad="right")
        moved = packing.moved
        slots = gather(self.visual.slots, images.index)
        self.visual = Tokens(_move(moved, self.rows, slots, images.valid), images.valid)
        self.text = Tokens(_move(moved, self.rows, self.text.slots, self.text.valid), self.text.valid)
        self.index = gather(self.index, images.index)
        self.origin = gather(self.origin, packing.index)
        self.newlines = Tokens(_move(moved, self.rows, self.newlines.slots, self.newlines.valid), self.newlines.valid)
        self.present, self.region_counts = packing.valid, {}
        return packing

    def count_regions(self, kind: Kind) -> None:
        """Read back how many tokens are present in each region, for a later stage that divides the images so."""
        if kind != "image" and self.mosaics and kind not in self.region_counts:
            self.region_counts[kind] = self.divided(kind).counts

    def plan_regions(self, division: Division, counts: list[int]) -> None:
        """Take over what a stage has kept in each row of its division, so that later stages need not read it back."""
        if division.whole:
            return
        self.region_counts = {division.kind: counts}
        if division.kind == "tile":
            # The base is tile 0, the canvas all others.
            sums: list[int] = []
            for number, count in zip(_numbers(division.owner), counts, strict=True):
                sums += [count] if number < 2 else []
                sums[-1] += count if number >= 2 else 0
            self.region_counts["rectangle"] = sums

    def follow(self, device: torch.device) -> None:
        """Move to the device of the layer about to run (the layers of a large model may be on several devices)."""
        if self.present.device == device:
            return
        self.rows, self.present, self.index = self.rows.to(device), self.present.to(device), self.index.to(device)
        self.origin, self.columns = self.origin.to(device), self.columns.to(device)
        self.newlines = Tokens(self.newlines.slots.to(device), self.newlines.valid.to(device))
        self.visual = Tokens(self.visual.slots.to(device), self.visual.valid.to(device))
        self.text = Tokens(self.text.slots.to(device), self.text.valid.to(device))


def _move(
    moved: Int[Tensor, "B L"], rows: Int[Tensor, " I"], slots: Int[Tensor, "I N"], valid: Bool[Tensor, "I N"]
) -> Tensor:
    return torch.where(valid, moved[rows[:, None], slots], 0)


def _region_sizes(mosaics: Sequence[Mosaic], kind: Kind) -> list[int]:
    return [len(region.raster) for mosaic in mosaics for region in mosaic.regions(kind)]


def _numbers(owner: Sequence[int]) -> list[int]:
    """The number within its image of each row of a division, whose rows of one image are adjacent."""
    return [number for _, rows in groupby(owner) for number, _ in enumerate(rows)]


def _padded(lists: Sequence[Sequence[int]]) -> Int[Tensor, "I N"]:
    """Lists as one tensor, padded on the right with -1."""
    size = max(map(len, lists), default=0)
    rows = [[*entries, *[-1] * (size - len(entries))] for entries in lists]
    return torch.tensor(rows, dtype=torch.long).view(len(lists), size)
