"""IVC-Prune: keep tokens at rotary coordinates, and tokens whose values resemble those of the question.

Worked example: N = 5 of twelve tokens, head width 2, so that the one frequency is 1; the image begins at position 3.

    position   3   4   5   6   7   8   9  10  11  12  13  14
    cos      -.99 -.65 .28 .96 .75 -.15 -.91 -.84 .00 .84 .91 .14
    sin       .14 -.76 -.96 -.28 .66 .99 .41 -.54 -1.0 -.54 .42 .99

round(5/5) = 1 token by each table: v3 (position 6, cos .96) and v11 (14, sin .99; 8 has .989, 14 has .991). With φ¹ highest at
v7, max(1, round(5/50)) = 1 seed is v7. N - 3 = 2 more by φ². With φ² falling as v7 v3 v1 v0 v2 …: v1 and v0.
Kept: v0 v1 v3 v7 v11.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import settled
from lmms_prune.methods.view import Tokens, TokenView
from lmms_prune.models.encoder import MOST
from lmms_prune.models.tensors import finest, to_device

_SKIPPED = 2
"""How many tokens after the image are no queries."""


@dataclass(frozen=True)
class _Counts:
    """Tokens of each image: by each rotary table, seeds, and those that φ² fills up to, or adds."""

    by_table: list[int]
    seeds: list[int]
    final: list[int]
    adds: list[bool]


@dataclass(frozen=True)
class IVCPrune(Method):
    """Keeps tokens at whose positions the rotary tables come nearest to 1 or 90°, and foreground by value vectors.

    IVC: the tokens with the highest mean cosine, and those with the highest mean sine, over all frequencies of their
    original positions (M-RoPE: over time, height and width, each with all frequencies). Foreground: φ¹ is the mean, over the
    question's tokens from the third after the image on, of the head mean of the softmax of V·V/√d (values of the layer
    before, no mask, no rotation); its highest are the seeds, and φ² is the same mean with the seeds as further queries.

    With a keep N: round(N/5) tokens by each table, max(1, round(N/50)) seeds, then the highest φ² up to N (a choice of ours
    that gives the published shares at N = n/2). Without one, the rules of the code: "fill" takes round(n/10), max(1,
    round(n/100)) and fills up to round(n/2); "union" takes round(n/20), the same seeds, and the round(n/5) highest φ² beside them.

    Generated tokens do not see dropped tokens in any layer: all caches before the stage are cropped. Published:
    ``ivcprune@16;rule=union`` for LLaVA-1.5-7B, ``ivcprune@16`` for Qwen2.5-VL-7B (3B: ``ivcprune@22``).

    Args:
        rule: "fill", whose softmax is over the image, as in the code for Qwen2.5-VL; or "union", over the whole prompt, as in
            that for LLaVA-1.5.

    Paper: https://arxiv.org/abs/2602.03060.
    Differs from the reference:
        - every image is pruned, with the text after it as queries (the reference prunes the first, and others are queries)
        - layer 0's cache is cropped too (the code for LLaVA leaves it whole)
        - the image's start is found (in LLaVA's evaluation it is fixed 30 tokens too early)
        - fewer than three tokens after the image: all are queries; none: φ is 0
        - rotary means from float32 tables, softmax in float64 (bf16 tables tie most tokens)
        - ties go to the lower index.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.03060"
    rule: Literal["fill", "union"] = "fill"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        valid, device = view.valid, view.valid.device
        counts = self._counts(budget.tolist(), list(view.counts))
        by_table, seed_count, final, adds = to_device(
            [counts.by_table, counts.seeds, counts.final, counts.adds], device, torch.long
        )
        # Both tables at once, as if they were of different images.
        anchors = highest(torch.cat(view.rotary_means()), valid.repeat(2, 1), by_table.repeat(2))
        anchors = anchors.unflatten(0, (2, -1)).any(0)
        keys = view.row_tokens if self.rule == "union" else view.visual
        asked = self._received(view, _queries(view.text), keys)
        seeds = highest(asked, valid, seed_count)
        columns = (~seeds).to(torch.uint8).argsort(dim=1, stable=True)[:, : max([1, *counts.seeds])]
        as_queries = Tokens(view.visual.slots.gather(1, columns), seeds.gather(1, columns))
        # Sums rank as the means do.
        score = view.ranking(asked + self._received(view, as_queries, keys))
        first = anchors | seeds
        if not any(counts.adds):
            return first | highest(score, valid & ~first, final - first.sum(1))
        taken = first & (adds == 0)[:, None]
        return first | highest(score, valid & ~taken, final - taken.sum(1))

    def _counts(self, requested: list[int], present: list[int]) -> _Counts:
        counts = _Counts([], [], [], [])
        for n, size in zip(requested, present, strict=True):
            # A budget of all tokens means an adaptive keep; with a given keep, the result for such an image is ignored.
            union = n == size and self.rule == "union"
            target = Fraction(size, 2) if n == size else Fraction(n)
            counts.by_table.append(round(target / (10 if union else 5)))
            counts.seeds.append(min(n, max(1, round(target / 50))))
            counts.final.append(round(Fraction(size, 5)) if union else round(target))
            counts.adds.append(union)
        return counts

    def _received(self, view: TokenView, queries: Tokens, keys: Tokens) -> Float[Tensor, "B V"]:
        """Sum over the queries of the head mean of their softmax over the keys, for each visual token."""
        fine = finest(view.valid.device)
        query, key = view.values(queries).to(fine), view.values(keys).to(fine)
        batch, heads, length, width = key.shape
        total = torch.zeros_like(key[:, 0, :, 0])
        size = max(1, MOST // max(1, batch * heads * length))
        # In pieces, because a long text times a large image does not fit into memory at once.
        for start in range(0, query.shape[2], size):
            piece = slice(start, start + size)
            scores = query[:, :, piece] @ key.transpose(-1, -2) * width**-0.5
            weights = scores.masked_fill(~keys.valid[:, None, None], -torch.inf).softmax(-1).mean(1)
            total = total + torch.where(queries.valid[:, piece, None], weights, 0).sum(1)
        # On a grid, so that equal tokens tie.
        return settled(total if keys is view.visual else total.gather(1, view.visual.slots))


def _queries(text: Tokens) -> Tokens:
    """The text after an image without its first tokens; all of a shorter text."""
    column = torch.arange(text.slots.shape[1], device=text.slots.device)
    shorter = text.valid.sum(1, keepdim=True) <= _SKIPPED
    return Tokens(text.slots, text.valid & ((column >= _SKIPPED) | shorter))
