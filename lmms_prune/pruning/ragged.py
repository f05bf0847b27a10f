"""Pure tensor functions for rows that keep different numbers of tokens: pack, gather, masks.

Dimension letters: B rows, L sequence before, N sequence after, Q queries, K keys, D features. A padded sequence
is left-padded, as generation needs it: the last column is every row's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.models.kernels import MaskForm
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class Packing:
    """The new columns of kept entries.

    Args:
        index: the old column of each new column; arbitrary (0) where not `valid`.
        valid: whether a new column holds an entry.
        moved: the new column of each old column; meaningful only where it was kept.
        padded: whether any new column is padding, known on the host.
    """

    index: Int[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]
    moved: Int[Tensor, "B L"]
    padded: bool


def pack(keep: Bool[Tensor, "B L"], lengths: Sequence[int], pad: Literal["left", "right"]) -> Packing:
    """Pack the kept entries of each row together, in their old order, and pad on one side to the longest row.

    Args:
        keep: the entries to keep.
        lengths: how many entries of each row are kept. Planned on the host, so that nothing waits for the device;
            the caller must ensure ``keep.sum(1) == lengths``.
        pad: the side of the padding.
    """
    size, device = max(lengths, default=0), keep.device
    padded = min(lengths, default=size) < size
    moved = keep.cumsum(1) - 1
    valid = torch.ones(len(lengths), size, dtype=torch.bool, device=device)
    if padded:
        length, column = to_device(lengths, device)[:, None], torch.arange(size, device=device)
        if pad == "left":
            moved = moved + (size - length)
        valid = column >= size - length if pad == "left" else column < length
    # Dropped entries are written to a spare last column, which is then removed.
    target = torch.where(keep, moved, size).clamp(0, size)
    columns = torch.arange(keep.shape[1], device=device).expand_as(target)
    index = torch.zeros(keep.shape[0], size + 1, dtype=torch.long, device=device).scatter_(1, target, columns)
    return Packing(index[:, :size], valid, moved, padded)


def gather_rotary(table: Float[Tensor, "*head L D"], index: Int[Tensor, "B N"]) -> Float[Tensor, "... N D"]:
    """The rows of a cosine or sine table at `index`, for tables (1 or B, L, D) and (3, 1 or B, L, D)."""
    index = index.to(table.device)
    table = table.expand(*table.shape[:-3], index.shape[0], *table.shape[-2:])
    index = index[..., None].expand(*table.shape[:-2], index.shape[1], table.shape[-1])
    return table.gather(-2, index)


def attention_mask(
    valid: Bool[Tensor, "B K"], queries: int, padded: bool, form: MaskForm, dtype: torch.dtype
) -> Tensor | None:
    """The causal mask of the last `queries` columns over K keys, in the form that an attention kernel takes.

    Args:
        valid: which keys exist; the others are padding.
        queries: Q, either K (prefill) or 1 (a decode step).
        padded: whether any key is padding, known on the host; without padding the fused kernels need no mask.
        form: the kernel's form.
        dtype: of the additive mask.

    Returns:
        None, a boolean (B, 1, Q, K), an additive (B, 1, Q, K) or a boolean (B, K).
    """
    if form == "flash":
        return valid if padded else None
    if not padded and (form == "sdpa" or queries == 1):
        return None
    keys = valid.shape[1]
    position = torch.arange(keys, device=valid.device)
    query = position[keys - queries :, None]
    # A padding query sees itself, so that no row is empty: some kernels answer NaN to an empty row.
    allowed = ((position <= query) & valid[:, None, None, :]) | (position == query)
    if form == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
