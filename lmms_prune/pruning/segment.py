"""A segment: the masks and rotary tables that replace the library's own in all layers from one stage to the next.

Dimension letters: B rows, N sequence after pruning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.models.kernels import MaskForm
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.ragged import attention_mask

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine tables."""


class DecodeMasks:
    """The masks of a padded batch's decode steps: views of one mask over more keys than there are yet, so that no step makes its own.

    Args:
        valid: which keys of the prompt exist; those of the answer all do.
        form: of the attention kernel.
        dtype: of an additive mask.
    """

    def __init__(self, valid: Bool[Tensor, "B N"], form: MaskForm, dtype: torch.dtype):
        self._valid, self._form, self._dtype = valid, form, dtype
        self._mask: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """The mask of decode step `step`, counted from 1."""
        keys = self._valid.shape[1] + step
        if self._mask is None or keys > self._mask.shape[-1]:
            ahead = pad(self._valid, (0, 2 * max(step, 32)), value=True)
            self._mask = attention_mask(ahead, 1, True, self._form, self._dtype)
        assert self._mask is not None
        return self._mask[..., :keys]


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
        decode_masks: of all decode steps; None before the first, and without padding.
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
    decode_masks: DecodeMasks | None = None

    def prefill_arguments(self, device: torch.device) -> dict:
        """The arguments of a layer on `device` in the prefill."""
        self.rotary = on(device, self.rotary)
        self.mask = None if self.mask is None else self.mask.to(device)
        # Without position_ids, so that FlashAttention does not take the gaps in kept positions for packed sequences.
        return {"attention_mask": self.mask, "position_embeddings": self.rotary, "position_ids": None}

    def begin_step(self, step: int, parts: ModelParts, positions: str) -> None:
        """Prepare decode step `step`, counted from 1."""
        if self.padded:
            self.decode_masks = self.decode_masks or DecodeMasks(self.valid, parts.form, self.rotary[0].dtype)
            self.decode_mask = self.decode_masks.at(step)
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
