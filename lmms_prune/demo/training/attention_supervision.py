"""A loss that tells attention where an answer stands, but neither which layer nor which head should look there."""

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


class Gaze:
    """Collects, from a decoder's forward pass, how much the asking places attend to where their answers stand."""

    _current: ContextVar[Gaze | None] = ContextVar("gaze", default=None)

    def __init__(self, asking: Int[Tensor, "B G"], grounds: Bool[Tensor, "B G T"]) -> None:
        self.asking, self.grounds = asking, grounds
        self.shares: list[Float[Tensor, "B H G"]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, every layer of a decoder that `watch` prepared adds its shares."""
        token = self._current.set(self)
        try:
            yield
        finally:
            self._current.reset(token)

    def loss(self, among: Bool[Tensor, "B G"]) -> Float[Tensor, ""]:
        """Minus the log of the attention to the grounds `among` all, as all layers and heads have it on average.

        The best head's share would not do: heads that stare at one place each, whatever is asked, would reach it.
        """
        shares = torch.cat(self.shares, 1).mean(1)  # (B, G)
        asked = self.grounds.any(-1) & among
        return -shares[asked].clamp_min(1e-12).log().mean() if asked.any() else shares.sum() * 0

    def add(self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor, scaling: float) -> None:
        """One layer's shares, from its queries (B, H, T, d), keys (B, K, T, d) and mask (B, 1, T, T)."""
        asking = self.asking[:, None, :, None]
        query = query.gather(2, asking.expand(-1, query.shape[1], -1, query.shape[3])) * scaling
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        seen = mask.gather(2, asking.expand(-1, 1, -1, mask.shape[3]))
        weights = (query @ key.mT).float().masked_fill(~seen, -torch.inf).softmax(-1)
        self.shares.append((weights * self.grounds[:, None]).sum(-1))


def watch(decoder: Any) -> None:
    """Let a decoder's layers report to the `Gaze` that is collecting; without one they attend as with SDPA."""
    decoder.config._attn_implementation = "gaze"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if (gaze := Gaze._current.get()) is not None:
        assert attention_mask is not None, "a gaze needs the batch's own mask"
        gaze.add(module, query, key, attention_mask, options["scaling"])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("gaze", _attention)
AttentionMaskInterface.register("gaze", sdpa_mask)
