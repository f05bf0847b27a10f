"""A segment: the masks and rotary tables that replace the library's own in all layers from one stage to the next.

Dimension letters: B rows, N sequence after pruning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.ragged import attention_mask

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine tables."""


@dataclass
class Segment:
    """The sequence that these layers see.

    Args:
        valid: which columns hold a token.
        padded: whether any column is padding, known on the host.
        mask: attention mask of the prefill, in the form of the attention kernel.
        rotary: tables of the tokens' positions.
        lengths: tokens of each row.
        origin: the original column of each column.
        host_lengths: `lengths`, on the host.
        decode_mask, decode_rotary: for the current decode step; None uses the library's own.
    """

    valid: Bool[Tensor, "B N"]
    padded: bool
    mask: Tensor | None
    rotary: Rotary
    lengths: Int[Tensor, " B"]
    origin: Int[Tensor, "B N"]
    host_lengths: list[int]
    decode_mask: Tensor | None = None
    decode_rotary: Rotary | None = None

    def prefill_arguments(self, device: torch.device) -> dict:
        """The arguments of a layer on `device` in the prefill."""
        self.rotary = on(device, self.rotary)
        self.mask = None if self.mask is None else self.mask.to(device)
        # Without position_ids, so that FlashAttention does not take the gaps in kept positions for packed sequences.
        return {"attention_mask": self.mask, "position_embeddings": self.rotary, "position_ids": None}

    def begin_step(self, step: int, parts: ModelParts, positions: str) -> None:
        """Prepare decode step `step`, counted from 1."""
        valid = pad(self.valid, (0, step), value=True)
        self.decode_mask = attention_mask(valid, 1, self.padded, parts.form, self.rotary[0].dtype)
        if positions == "compact":
            position = self.lengths[:, None] + (step - 1)
            self.decode_rotary = parts.rotary(self.rotary[0], position)

    def step_arguments(self, device: torch.device) -> dict:
        """The arguments of a layer on `device` in a decode step."""
        if self.decode_mask is not None:
            self.decode_mask = self.decode_mask.to(device)
        arguments = {"attention_mask": self.decode_mask, "position_ids": None}
        if self.decode_rotary is not None:
            arguments["position_embeddings"] = self.decode_rotary = on(device, self.decode_rotary)  # type: ignore[assignment]
        return arguments


def on(device: torch.device, rotary: Rotary) -> Rotary:
    """Tables moved to a device."""
    return rotary[0].to(device), rotary[1].to(device)
