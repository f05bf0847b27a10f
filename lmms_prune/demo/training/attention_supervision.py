"""Attention supervision: a training loss that asks for attention to where an answer is, from no particular layer or head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "attention_supervision"  # of the attention implementation, as transformers registers it


class AttentionSupervision:
    """Collects in a decoder's forward pass how much attention supervised tokens give to their targets.

    Args:
        supervised: columns of the supervised tokens in each row, padded with 0.
        targets: for each of them, the columns that it should attend to; none for padding.
    """

    _current: ContextVar[AttentionSupervision | None] = ContextVar("attention_supervision", default=None)

    def __init__(self, supervised: Int[Tensor, "B G"], targets: Bool[Tensor, "B G T"]) -> None:
        self.supervised, self.targets = supervised, targets
        self.shares: list[Float[Tensor, "B H G"]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within this context, every layer of a decoder prepared by `supervise_attention` adds its shares."""
        token = self._current.set(self)
        try:
            yield
        finally:
            self._current.reset(token)

    def loss(self, among: Bool[Tensor, "B G"]) -> Float[Tensor, ""]:
        """Minus the log of the attention to the targets, averaged over all layers and heads.

        Only supervised tokens `among` which are true count. The best head's share would not do as a loss: heads that
        always attend to one fixed position each would minimise it.
        """
        shares = torch.cat(self.shares, 1).mean(1)  # (B, G)
        counted = self.targets.any(-1) & among  # padding has no target
        # A zero that depends on the shares keeps the loss differentiable in batches without targets.
        return -shares[counted].clamp_min(1e-12).log().mean() if counted.any() else shares.sum() * 0

    def add(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> None:
        """Add one layer's shares, from its queries (B, H, T, d), keys (B, K, T, d) and mask (B, 1, T, T)."""
        # Only the supervised tokens' rows of the attention matrix are computed.
        columns = self.supervised[:, None, :, None]
        query = query.gather(2, columns.expand(-1, query.shape[1], -1, query.shape[3])) * scaling
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        # Grouped heads share keys.
        seen = mask.gather(2, columns.expand(-1, 1, -1, mask.shape[3]))
        weights = (query @ key.mT).float().masked_fill(~seen, -torch.inf).softmax(-1)
        self.shares.append((weights * self.targets[:, None]).sum(-1))


def supervise_attention(decoder: Any) -> None:
    """Let a decoder's layers report to the `AttentionSupervision` that is collecting; without one, they use plain SDPA."""
    decoder.config._attn_implementation = _NAME


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if (supervision := AttentionSupervision._current.get()) is not None:
        assert attention_mask is not None, "attention supervision needs the batch's mask"
        supervision.add(module, query, key, attention_mask, options["scaling"])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
