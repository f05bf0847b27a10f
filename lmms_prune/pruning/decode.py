"""The decode steps after a prefill: the positions, masks and rotary tables of what the stages kept.

Dimension letters: B rows, L sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.errors import PruningError
from lmms_prune.pruning.segment import DecodeMasks

if TYPE_CHECKING:
    from lmms_prune.pruning.prefill import Prefill

OTHER_CACHE = "this cache was not filled inside the block by its latest prompt; start from the whole prompt."


class DecodeSteps:
    """Gives each decode step what the segments of its prefill need.

    Args:
        prefill: that filled the cache.
    """

    def __init__(self, prefill: Prefill):
        self.prefill = prefill
        self.steps = self.entered = 0
        self.first_masks: DecodeMasks | None = None

    def begin(self, inputs: dict[str, Any], cache: Any, kwargs: dict) -> dict:
        """Prepare a decode step; returns the decoder's arguments.

        Raises:
            PruningError: more than one token, or another cache than the prefill's.
        """
        ids = inputs["input_ids"]
        if cache is not self.prefill.cache:
            raise PruningError(OTHER_CACHE)
        if ids.shape[1] != 1:
            message = f"{ids.shape[1]} tokens at once after the prefill: chunked prefill, assisted decoding and "
            raise PruningError(message + "continuing a conversation are not supported while pruning.")
        self.steps, self.entered = self.steps + 1, 0
        block, segments = self.prefill.block, {id(s): s for s in self.prefill.segments if s is not None}.values()
        for segment in segments:
            segment.begin_step(self.steps, block.parts, block.positions)
        if segments and inputs.get("position_ids") is None:
            # The library counts from the length of layer 0's cache, which a stage at layer 0 has shortened.
            kwargs = {**kwargs, "position_ids": self.prefill.next_position + (self.steps - 1)}
        # Without a mask the library builds none, for which it would look at every one of its entries.
        return {**kwargs, "attention_mask": None}

    def enter(self, layer: int, hidden: Tensor, kwargs: dict) -> dict:
        """The arguments of a layer in a decode step."""
        self.entered += 1
        segment = self.prefill.segments[layer]
        if segment is not None:
            return {**kwargs, **segment.step_arguments(hidden.device)}
        if not self.prefill.padded:
            return kwargs
        if self.first_masks is None:
            self.first_masks = DecodeMasks(self.prefill.present, self.prefill.block.parts.form, hidden.dtype)
        mask = self.first_masks.at(self.steps)
        return {**kwargs, "attention_mask": mask.to(hidden.device), "position_ids": None}

    def finish(self) -> None:
        """After a decode step.

        Raises:
            PruningError: not all layers ran.
        """
        if self.entered != len(self.prefill.segments):
            raise PruningError(f"{self.entered} of {len(self.prefill.segments)} decoder layers ran in a decode step.")


def next_position(positions: Tensor | None, present: Bool[Tensor, "B L"]) -> Int[Tensor, "#B 1"]:
    """The position after a prompt: 1 more than the largest of its tokens (with M-RoPE, of all channels).

    Args:
        positions: (B or 1, L), (3, B or 1, L), or (4, B or 1, L) with the column numbers first; None if columns are positions.
        present: which columns hold a token.
    """
    if positions is None:
        return torch.full((1, 1), present.shape[1], device=present.device)
    if positions.dim() == 3:
        positions = positions[-3:].amax(0)
    return torch.where(present, positions, 0).amax(1, keepdim=True) + 1
