"""SparseVLM: keep what the image's own words attend to, and recycle the best of the rest into merged tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK
from lmms_prune.methods.view import Tokens, TokenView

# Rows of a distance matrix that exist at once.


@dataclass(frozen=True)
class SparseVLM(Method):
    """Keeps the visual tokens that raters, text tokens akin to the image, attended to in the layer before.

    Raters are the text tokens with more than the mean of softmax_text(E_V·E_Tᵀ), mean over all original visual tokens
    (none: all text). The score is the mean over raters and heads. Of the D dropped tokens the best q = ⌊0.3·D⌋+1 are
    clustered by density peaks into C = ⌊q/10⌋+1 means, which follow the kept tokens in the order of their centres.
    Published as three stages (presets ``sparsevlm-192``, ``sparsevlm-v2-192``, …). Acts at layer 1 or deeper.

    Args:
        version: "v1.5", or "v2.0": attention is divided by ⟨RoPE(1), RoPE(1)⟩/√d of the two positions, the 14 of 32
            heads (another number of heads in proportion) with the largest sum count, nothing is recycled.
        native_count: False leaves exactly N tokens, by recycling none (in v2.0 always so); True N and C more.

    Paper: https://arxiv.org/abs/2410.04417.
    Differs from the reference: lists of counts, not the paper's rank rule; a rater must exceed the mean by more than rounding; no random noise on densities, the earlier of
    two equally dense tokens counts as the denser; densities compared as logarithms, so that they cannot vanish; an image that keeps or is asked for all
    its tokens is left as it was; a merged token takes its centre's position under positions=original (v1.5 renumbers);
    if nothing follows the image, the last token rates.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    version: Literal["v1.5", "v2.0"] = "v1.5"
    native_count: bool = True

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        score = view.ranking(self._score(view))
        recycles = self.version == "v1.5" and self.native_count
        pairs = list(zip(budget.tolist(), view.counts, strict=True))
        asked: Sequence[int | None] = view.asked or [None] * len(pairs)
        clusters = [_clusters(*pair, n) if recycles else 0 for pair, n in zip(pairs, asked, strict=True)]
        kept = highest(score, view.valid, budget - torch.tensor(clusters))
        centres, merged = torch.zeros_like(kept[:, :0], dtype=torch.long), view.hidden[:, :0]
        keep = kept
        if any(clusters):
            dropped = [present - total + c for (total, present), c in zip(pairs, clusters, strict=True)]
            pool = [_pool(d) if c else 0 for d, c in zip(dropped, clusters, strict=True)]
            centres, merged = _recycle(view, highest(score, view.valid & ~kept, torch.tensor(pool)), pool, clusters)
            exists = torch.arange(centres.shape[1], device=kept.device) < torch.tensor(clusters)[:, None].to(
                kept.device
            )
            # What stands in for the centres of a row with fewer clusters marks nothing.
            marks = torch.zeros_like(kept, dtype=torch.int32).scatter_add_(1, centres, exists.int())
            keep = kept | (marks > 0)
        view.memory[f"sparsevlm {view.layer}"] = (kept, centres, merged)
        return keep

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        """The kept tokens in order, then the merged ones, each at its centre's index."""
        handed: Any = view.memory[f"sparsevlm {view.layer}"]
        kept, centres, merged = handed
        if not centres.shape[1]:
            return view.hidden, view.index
        rows = torch.arange(len(keep), device=keep.device)[:, None]
        number = (keep.cumsum(1) - 1).clamp(min=0)
        of_merged = (number - kept.sum(1, keepdim=True)).clamp(max=centres.shape[1] - 1)
        in_order = (~kept).long().argsort(dim=1, stable=True)
        is_merged, of_merged = of_merged >= 0, of_merged.clamp(min=0)
        source = torch.where(is_merged, centres.gather(1, of_merged), in_order.gather(1, number))
        hidden = torch.where(
            is_merged[..., None], merged[rows, of_merged].to(view.hidden.dtype), view.hidden[rows, source]
        )
        return hidden, view.index.gather(1, source)

    def _score(self, view: TokenView) -> Float[Tensor, "B V"]:
        """Mean attention of the raters over heads; in v2.0 debiased, and of the best heads."""
        raters = _raters(view)
        # A prompt that ends with the image has no raters; its last token stands in.
        weight = torch.cat([raters, ~raters.any(1, keepdim=True)], dim=1)
        queries = Tokens(torch.cat([view.text.slots, view.last.slots], dim=1), weight)
        total: Tensor | float = 0.0
        for piece, attention in view.attention_chunks(queries):
            if self.version == "v2.0":
                here, there = (
                    view.rotated_ones(tokens).to(attention)
                    for tokens in (Tokens(queries.slots[:, piece], weight[:, piece]), view.visual)
                )
                attention = attention / (here @ there.transpose(1, 2) * here.shape[-1] ** -0.5)[:, None]
            total = total + torch.where(weight[:, None, piece, None], attention, 0).sum(2)
        assert isinstance(total, Tensor)
        total = total / weight.sum(1)[:, None, None]
        if self.version == "v2.0":
            heads = total.shape[1]
            sums = torch.where(view.valid[:, None], total, 0).sum(2)
            best = highest(sums, torch.ones_like(sums, dtype=torch.bool), torch.full((len(sums),), _best_heads(heads)))
            return torch.where(best[..., None], total, 0).sum(1) / _best_heads(heads)
        return total.mean(1)


def _best_heads(heads: int) -> int:
    return max(1, round(14 * heads / 32))


def _pool(dropped: int) -> int:
    """How many of the dropped tokens are clustered."""
    return 3 * dropped // 10 + 1


def _clusters(total: int, present: int, asked: int | None) -> int:
    """How many of the `total` tokens that are left are merged ones, if `asked` were to be kept."""
    # Two ways may lead to the same total, so what was asked for comes first.
    likely = [] if asked is None else [total - asked]
    for clusters in [*likely, *range(1, total + 1)] if total < present else []:
        if clusters > 0 and _pool(present - total + clusters) // 10 + 1 == clusters:
            return clusters
    return 0


def _raters(view: TokenView) -> Bool[Tensor, "B T"]:
    """Text tokens that are more akin to the image than the mean text token; all of them where none is."""
    fine = torch.promote_types(view.text_embeddings.dtype, torch.float32)
    text, exists = view.text_embeddings.to(fine), view.text.valid
    likeness = view.visual_embeddings.to(fine) @ text.transpose(1, 2)
    # A text that is all padding has no softmax; it is masked out again below.
    likeness = likeness.masked_fill(~exists[:, None], torch.finfo(likeness.dtype).min).softmax(-1)
    valid = view.original.valid[..., None]
    share = torch.where(valid, likeness, 0).sum(1) / valid.sum(1)
    mean = torch.where(exists, share, 0).sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)
    # Words that are all alike must not become raters by their rounding errors.
    raters = exists & (share > mean * (1 + 16 * torch.finfo(fine).eps))
    return torch.where(raters.any(1, keepdim=True), raters, exists)


def _recycle(
    view: TokenView, pool: Bool[Tensor, "B V"], sizes: list[int], clusters: list[int]
) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C D"]]:
    """Density-peak clustering of the `pool`: the places of its centres, densest and farthest first, and the means."""
    device = pool.device
    places = (~pool).long().argsort(dim=1, stable=True)[:, : max(sizes)]
    valid = torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device)[:, None]
    count = torch.tensor(clusters, device=device)
    features = view.hidden.gather(1, places[..., None].expand(-1, -1, view.hidden.shape[-1]))
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    rank = _peaks(features, valid, count, max(clusters))
    order = rank.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, : max(clusters)]
    exists = torch.arange(max(clusters), device=device) < count[:, None]

    rows = torch.arange(len(features), device=device)[:, None]
    distance = _distances(features, features[rows, order]).masked_fill(~exists[:, None], torch.inf)
    own = torch.arange(max(sizes), device=device)[:, None] == torch.where(exists, order, -1)[:, None]
    # A centre joins itself, even where another is equal to it.
    nearest = torch.where(own.any(2), own.long().argmax(2), distance.argmin(2))
    member = (nearest[:, None] == torch.arange(max(clusters), device=device)[:, None]) & valid[:, None]
    sums = member.to(features.dtype) @ torch.where(valid[..., None], features, 0)
    return places.gather(1, order), sums / (member.sum(2, keepdim=True) + 1e-6)


def _peaks(
    features: Float[Tensor, "B Q D"], valid: Bool[Tensor, "B Q"], count: Int[Tensor, " B"], most: int
) -> Float[Tensor, "B Q"]:
    """Logarithm of density times distance to the nearest denser token (for the densest: the largest distance)."""
    place = torch.arange(features.shape[1], device=features.device)
    blocks = [slice(start, start + BLOCK) for start in range(0, features.shape[1], BLOCK)]
    spread, farthest = [], []
    for block in blocks:
        distance = _distances(features[:, block], features).masked_fill(~valid[:, None], torch.inf)
        near = distance.square().topk(min(most, distance.shape[2]), dim=2, largest=False).values
        counted = torch.arange(near.shape[2], device=near.device) < count[:, None, None]
        spread.append(torch.where(counted, near, 0).sum(2) / count.clamp(min=1)[:, None])
        both = valid[:, block, None] & valid[:, None]
        farthest.append(distance.masked_fill(~both, 0).flatten(1).amax(1))
    sparsity, largest = torch.cat(spread, dim=1), torch.stack(farthest).amax(0)
    isolation = []
    for block in blocks:
        mine, other = sparsity[:, block, None], sparsity[:, None]
        denser = (other < mine) | ((other == mine) & (place < place[block, None]))
        distance = _distances(features[:, block], features).masked_fill(~denser | ~valid[:, None], torch.inf)
        isolation.append(torch.minimum(distance.amin(2), largest[:, None]))
    return torch.cat(isolation, dim=1).log() - sparsity


def _distances(a: Float[Tensor, "B P D"], b: Float[Tensor, "B Q D"]) -> Float[Tensor, "B P Q"]:
    """Euclidean distance over √D, from differences: two tokens are exactly as far from each other both ways."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[-1] ** 0.5
