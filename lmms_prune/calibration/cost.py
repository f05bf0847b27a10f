"""The cost of a decoder's visual tokens, from which a search computes what its deletions save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmms_prune.models.parts import ModelParts


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one decoder layer for n visual tokens that attend to each other only.

    Attention: 2n·d·(q + k) + 2n²·q. MLP: 3n·d·m. Here d is the hidden width, q the width of all query heads together, k
    that of all key heads (smaller with grouped heads) and m the MLP's width.
    """

    width: int
    queries: int
    keys: int
    mlp_width: int

    @classmethod
    def of(cls, parts: ModelParts) -> LayerCost:
        """The cost of a layer of the decoder in `parts`."""
        config, head = parts.decoder.config, parts.layers[0].self_attn.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return cls(config.hidden_size, heads * head, kv_heads * head, config.intermediate_size)

    def attention(self, n: int) -> int:
        """Multiply-adds of the attention of n tokens, including its projections."""
        return 2 * n * self.width * (self.queries + self.keys) + 2 * n * n * self.queries

    def mlp(self, n: int) -> int:
        """Multiply-adds of the MLP of n tokens."""
        return 3 * n * self.width * self.mlp_width

    def layer(self, n: int) -> int:
        """Multiply-adds of a layer, attention and MLP, for n tokens."""
        return self.attention(n) + self.mlp(n)


def saving(cost: LayerCost, size: int, deletions: Sequence[int]) -> float:
    """The share of the FLOPs that deletions save for an image of `size` tokens.

    Args:
        cost: the cost of one layer.
        size: the image's visual tokens.
        deletions: tokens deleted in each layer, between its attention and its MLP.
    """
    kept, spent = size, 0
    for count in deletions:
        spent += cost.attention(kept)
        kept -= count
        spent += cost.mlp(kept)
    return 1 - spent / (len(deletions) * cost.layer(size))
