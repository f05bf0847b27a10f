"""What the visual tokens of a decoder cost, so that a search knows what its deletions save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmms_prune.models.parts import ModelParts


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of one decoder layer for its n visual tokens, attention among themselves.

    Attention: 2n·d·(q + k) + 2n²·q, where d is the width, q the width of all query heads, k that of all key heads
    (fewer where heads are grouped). MLP: 3n·d·m.
    """

    width: int
    queries: int
    keys: int
    mlp_width: int

    @classmethod
    def of(cls, parts: ModelParts) -> LayerCost:
        """The cost of `parts`' layers."""
        config, head = parts.decoder.config, parts.layers[0].self_attn.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return cls(config.hidden_size, heads * head, kv_heads * head, config.intermediate_size)

    def attention(self, n: int) -> int:
        """Of the attention of n tokens, with its projections."""
        return 2 * n * self.width * (self.queries + self.keys) + 2 * n * n * self.queries

    def mlp(self, n: int) -> int:
        """Of the MLP of n tokens."""
        return 3 * n * self.width * self.mlp_width

    def layer(self, n: int) -> int:
        """Of a whole layer of n tokens."""
        return self.attention(n) + self.mlp(n)


def saving(cost: LayerCost, size: int, deletions: Sequence[int]) -> float:
    """The share of the FLOPs that deletions save in an image of `size` tokens, one number a layer."""
    present, spent = size, 0
    for count in deletions:
        spent += cost.attention(present)
        present -= count
        spent += cost.mlp(present)
    return 1 - spent / (len(deletions) * cost.layer(size))
