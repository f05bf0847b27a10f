"""Layout: the columns of each image's visual tokens in a batch, before and after every stage.

Everything that decides a shape (lengths, counts) is known on the host from the plan, so that nothing has to be read back
from the device. Dimension letters: B rows, L sequence, I images of the whole batch, V visual tokens of an image, T text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.errors import BrokenImageError, PruningError
from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.shared.tensors import gather, owners
from lmms_prune.methods.view import LayerInput, Tokens, TokenView
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.tensors import to_device
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
        starts: the original column of each image's first token.
        grids: rows and columns of each image's original tokens, where known (host).
        ends_in_image: whether each row's last token is visual (host).
        counts: visual tokens present in each image (host).
        lengths: tokens present in each row (host).
        memory: what methods pass from stage to stage, for one prefill.
    """

    traces: list[RowTrace]
    rows: Int[Tensor, " I"]
    present: Bool[Tensor, "B L"]
    visual: Tokens
    text: Tokens
    index: Int[Tensor, "I V"]
    origin: Int[Tensor, "B L"]
    starts: Int[Tensor, " I"]
    grids: list[tuple[int, int]]
    ends_in_image: list[bool]
    counts: list[int]
    lengths: list[int]
    memory: Memory = field(default_factory=Memory)

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
        host_ids, pads = _on_host(ids, None if mask is None else present)
        traces, spans = read_rows(parts, inputs, host_ids, pads, samples)
        _refuse_shared_names(host_ids, pads, samples)
        counts = [size for _, _, size in spans]
        sets = _token_sets(host_ids, spans, parts.config.image_token_id)
        # One copy to the device for all that is known on the host: two token sets, rows and first columns.
        host = [_padded(columns) for columns in sets]
        host += [torch.tensor([entry[i] for entry in spans], dtype=torch.long)[:, None] for i in (0, 1)]
        widths = [part.shape[1] for part in host]
        *slots, rows, starts = to_device(torch.cat(host, dim=1), ids.device).split(widths, dim=1)
        visual, text = (Tokens(columns.clamp(min=0), columns >= 0) for columns in slots)
        rows, starts = rows[:, 0], starts[:, 0]
        index = torch.arange(max(counts, default=0), device=ids.device).expand(len(spans), -1)
        origin = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        grids = parts.grids(inputs, counts)
        if encoded is not None:
            grids = parts.family.grids_of_thw(parts.config, encoded)
        if grids and len(spans) > len(grids) and len(spans) % len(grids) == 0:
            # For several answers to a prompt `generate` repeats the rows, but not the grids.
            grids = [grids[i] for i in owners([b for b, _, _ in spans], len(spans) // len(grids))]
        lengths = [ids.shape[1] - pad for pad in pads]
        ends = [row[-1] == parts.config.image_token_id for row in host_ids]
        return cls(traces, rows, present, visual, text, index, origin, starts, grids, ends, counts, lengths)

    def copy(self) -> Layout:
        """The same tokens, with a memory of their own; pruning one leaves the other as it is."""
        return replace(self, counts=list(self.counts), lengths=list(self.lengths), memory=Memory())

    @property
    def owning_rows(self) -> list[int]:
        """The row of each image, on the host."""
        return [b for b, row in enumerate(self.traces) for _ in row.images]

    @property
    def sizes(self) -> list[int]:
        """Original visual tokens of each image."""
        return [size for row in self.traces for size in row.images]

    def planned(self, stage: Stage) -> list[int]:
        """Tokens that each image keeps at `stage`, of those present now, by the stage's count rule."""
        planned, first = [], 0
        for row in self.traces:
            present = self.counts[first : first + len(row.images)]
            planned += stage.kept(row.images, present)
            first += len(present)
        return planned

    def view(
        self, parts: ModelParts, state: LayerInput, before: LayerInput | None, seed: int, **more: Any
    ) -> TokenView:
        """The view for a method at the input `state` of a layer; `more` are further fields of the view."""
        images = [(row.sample, number) for row in self.traces for number in range(len(row.images))]
        self._follow(state.hidden.device)
        return TokenView(
            layer=state.layer,
            rows=self.rows,
            visual=self.visual,
            text=self.text,
            index=self.index,
            counts=list(self.counts),
            seeds=[f"{seed}|{sample}|image {number}|layer {state.layer}" for sample, number in images],
            images=images,
            _parts=parts,
            _state=state,
            _before=before,
            _present=self.present,
            memory=self.memory,
            sizes=self.sizes,
            _owning_rows=self.owning_rows,
            _origin=self.origin,
            _starts=self.starts,
            _grid_list=self.grids,
            **more,
        )

    def write(
        self, hidden: Float[Tensor, "B L D"], visual: Float[Tensor, "I V D"], index: Int[Tensor, "I V"]
    ) -> Float[Tensor, "B L D"]:
        """`hidden` with a method's rewritten visual tokens; the layout takes over their raster indices and columns."""
        rows, slots, spare = self._writable(hidden)
        columns = torch.cat([self.origin, self.origin[:, :1]], dim=1)
        self.index = torch.where(self.visual.valid, index, self.index)
        self.origin = columns.index_put((rows, slots), self.starts[:, None] + index)[:, :-1]
        return spare.index_put((rows, slots), visual.to(hidden.dtype))[:, :-1]

    def add(self, hidden: Float[Tensor, "B L D"], extra: Float[Tensor, "N D"]) -> Float[Tensor, "B L D"]:
        """`hidden` with the rows of `extra` added to the visual tokens present.

        Args:
            hidden: states of the current sequence.
            extra: one row for each original visual token of the batch, image by image.
        """
        self._follow(hidden.device)
        [tokens] = self.of_tokens([extra.to(hidden)])
        rows, slots, spare = self._writable(hidden)
        return spare.index_put((rows, slots), spare[rows, slots] + tokens)[:, :-1]

    def of_tokens(self, extras: Sequence[Float[Tensor, "N D"]]) -> list[Float[Tensor, "I V D"]]:
        """The rows of each of `extras` (as for `add`) for the visual tokens present; arbitrary where padding."""
        if not extras:
            return []
        rows = self._rows_of(self.index)
        return [extra[rows.to(extra.device)] for extra in extras]

    def with_rows(
        self,
        extras: Sequence[Float[Tensor, "N D"]],
        rows: Float[Tensor, "I V A"],
        index: Int[Tensor, "I V"],
        keep: Bool[Tensor, "I V"],
    ) -> list[Float[Tensor, "N D"]]:
        """`extras` (as for `add`) with other rows for the kept tokens.

        Args:
            extras: E tensors.
            rows: the new rows of all of them, side by side: A is E·D.
            index: the raster indices of the tokens to which they belong.
            keep: the tokens that are kept.
        """
        changed, places = [], self._rows_of(index)
        for extra, new in zip(extras, rows.chunk(len(extras), dim=-1), strict=True):
            # Entries that are not kept write to a spare last row.
            target = torch.where(keep & self.visual.valid, places, len(extra)).to(extra.device)
            changed.append(torch.cat([extra, extra[:1]]).index_put((target,), new.to(extra))[:-1])
        return changed

    def _rows_of(self, index: Int[Tensor, "I V"]) -> Int[Tensor, "I V"]:
        """The number, among all original visual tokens of the batch, of the tokens at raster indices; 0 where padding."""
        firsts = to_device([0, *accumulate(self.sizes)][:-1], index.device, torch.long)[:, None]
        return torch.where(self.visual.valid, firsts + index, 0)

    def _writable(self, hidden: Float[Tensor, "B L D"]) -> tuple[Tensor, Tensor, Tensor]:
        """The row and column to write each visual token to, and `hidden` with a spare last column for padding entries."""
        slots = torch.where(self.visual.valid, self.visual.slots, hidden.shape[1])
        return self.rows[:, None].expand_as(slots), slots, torch.cat([hidden, hidden[:, :1]], dim=1)

    def prune(self, keep: Bool[Tensor, "I V"], counts: list[int]) -> Packing:
        """Remove all visual tokens but the kept ones, `counts` in each image.

        Returns:
            the new column of each column of the sequence.
        """
        keep = keep & self.visual.valid
        dropped = self.visual.valid & ~keep
        # Counted rather than set: padding entries point at column 0 and must not undo a token's drop there.
        drops = torch.zeros_like(self.present, dtype=torch.int32)
        drops.index_put_((self.rows[:, None].expand_as(dropped), self.visual.slots), dropped.int(), accumulate=True)
        for b, kept, present in zip(self.owning_rows, counts, self.counts, strict=True):
            self.lengths[b] -= present - kept
        packing = pack(self.present & (drops == 0), self.lengths, pad="left")
        images = pack(keep, counts, pad="right")
        moved = packing.moved
        slots = gather(self.visual.slots, images.index)
        self.visual = Tokens(_move(moved, self.rows, slots, images.valid), images.valid)
        self.text = Tokens(_move(moved, self.rows, self.text.slots, self.text.valid), self.text.valid)
        self.index = gather(self.index, images.index)
        self.origin = gather(self.origin, packing.index)
        self.present, self.counts = packing.valid, list(counts)
        return packing

    def _follow(self, device: torch.device) -> None:
        """Move to the device of the layer about to run (the layers of a large model may be on several devices)."""
        if self.present.device == device:
            return
        self.rows, self.present, self.index = self.rows.to(device), self.present.to(device), self.index.to(device)
        self.origin, self.starts = self.origin.to(device), self.starts.to(device)
        self.visual = Tokens(self.visual.slots.to(device), self.visual.valid.to(device))
        self.text = Tokens(self.text.slots.to(device), self.text.valid.to(device))


def _move(
    moved: Int[Tensor, "B L"], rows: Int[Tensor, " I"], slots: Int[Tensor, "I N"], valid: Bool[Tensor, "I N"]
) -> Tensor:
    return torch.where(valid, moved[rows[:, None], slots], 0)


def read_rows(
    parts: ModelParts,
    inputs: dict[str, Any],
    ids: list[list[int]],
    pads: Sequence[int],
    samples: Sequence[str] | None,
) -> tuple[list[RowTrace], list[tuple[int, int, int]]]:
    """The rows of a batch of prompts, and the (row, first column, tokens) of each image.

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
    fixed, grids = parts.tokens_per_image, parts.image_sizes(inputs)
    image_token = (
        parts.config.image_token_id
    )  # read once: an attribute of the library's configurations takes microseconds
    traces, spans = [], []
    for b, (row, pad) in enumerate(zip(ids, pads, strict=True)):
        row_spans = parts.family.spans([token == image_token for token in row], fixed, grids)
        grids = grids[len(row_spans) :]
        images = [size for _, size in row_spans]
        traces.append(RowTrace(names[b], len(row) - pad - sum(images), images))
        spans += [(b, start, size) for start, size in row_spans]
    if grids:
        raise BrokenImageError(f"the prompts hold {len(spans)} images, but {len(grids)} more were given with them.")
    return traces, spans


def _on_host(ids: Int[Tensor, "B L"], present: Bool[Tensor, "B L"] | None) -> tuple[list[list[int]], list[int]]:
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


def _refuse_shared_names(ids: list[list[int]], pads: Sequence[int], samples: Sequence[str] | None) -> None:
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


def _token_sets(
    ids: list[list[int]], spans: list[tuple[int, int, int]], image_token: int
) -> tuple[list[range], list[list[int]]]:
    """The columns of each image's visual tokens, and of the text tokens after it."""
    text = [[column for column in range(start + size, len(ids[b])) if ids[b][column] != image_token]
            for b, start, size in spans]  # fmt: skip
    return [range(start, start + size) for _, start, size in spans], text


def _padded(lists: Sequence[Sequence[int]]) -> Int[Tensor, "I N"]:
    """Lists as one tensor, padded on the right with -1."""
    size = max(map(len, lists), default=0)
    rows = [[*entries, *[-1] * (size - len(entries))] for entries in lists]
    return torch.tensor(rows, dtype=torch.long).view(len(lists), size)
