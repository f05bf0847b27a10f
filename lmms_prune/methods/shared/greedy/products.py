"""Products of all pairs of tokens. Dimension letters: B images, V visual tokens, D features."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.methods.shared.tensors import BLOCK, joined, settled

MOST_STORED = 4096
"""Tokens of the largest image whose products of all pairs are stored (64 MiB in float32). Those of larger ones are computed
for each pick anew."""
# Whole numbers in which a cosine of 1 is written.
_STEPS = 2**24


def products(unit: Float[Tensor, "B V D"], dtype: torch.dtype) -> Float[Tensor, "B V V"]:
    """The cosines of all pairs, on the grid of `settled`, for images of at most `MOST_STORED` tokens."""
    blocks = [
        settled(unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).to(dtype)
        for start in range(0, unit.shape[1], BLOCK)
    ]
    return joined(blocks)


def cosines(chosen: Float[Tensor, "B n D"], unit: Float[Tensor, "B V D"]) -> Int[Tensor, "B n V"]:
    """The cosines of some tokens to all, as whole numbers whose sums are exact in any order."""
    blocks = [
        (chosen[:, start : start + BLOCK] @ unit.transpose(1, 2)).mul_(_STEPS).round_().to(torch.int32)
        for start in range(0, chosen.shape[1], BLOCK)
    ]
    return joined(blocks)
