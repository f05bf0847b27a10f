"""SparseVLM: keep the tokens that image-related words attend to, and recycle the best of the rest into merged tokens.

Worked example: keep 2 of six visual tokens v0 to v5, with two text tokens a and b.

Raters. Every visual embedding is (1,0), those of the text are a (log 3, 5) and b (0,9). For each visual token the
softmax over the text is 3/4 for a and 1/4 for b, so their means over the image are the same, and the mean of the two is
1/2. Only a exceeds it: a is the only rater.

Scores. The attention of a in the layer before:  v0 6   v1 1   v2 5   v3 3   v4 4   v5 2   (of 24)

Kept are v0 and v2. D = 4 tokens are dropped. The best q = ⌊0.3·4⌋+1 = 2 of them, v4 and v3, are clustered into
C = ⌊2/10⌋+1 = 1 token: their mean, at the index of the cluster's centre. Both are equally dense, so the earlier one, v3,
is the centre. Kept: v0 v2 v3. These are three tokens for a keep of 2, and v3 is the mean of v3 and v4.
With native_count=false a keep of 3 leaves exactly three tokens, none of them merged. Kept: v0 v2 v4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK, gather
from lmms_prune.methods.view import Tokens, TokenView
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class _Recycled:
    """Tokens kept as they are, the columns of the cluster centres, and the clusters' merged states."""

    kept: Bool[Tensor, "B V"]
    centres: Int[Tensor, "B C"]
    merged: Float[Tensor, "B C D"]


@dataclass(frozen=True)
class SparseVLM(Method):
    """Keeps the visual tokens that the raters, text tokens similar to the image, attended to in the layer before.

    Raters are the text tokens with more than the mean of softmax_text(E_V·E_Tᵀ), mean over all original visual tokens
    (none: all text). The score is the mean over raters and heads. Of the D dropped tokens the best q = ⌊0.3·D⌋+1 are
    clustered by density peaks into C = ⌊q/10⌋+1 means, which follow the kept tokens in the order of their centres.
    Published as three stages (presets ``sparsevlm-192``, ``sparsevlm-v2-192``, …). Acts at layer 1 or deeper.

    Args:
        version: "v1.5", or "v2.0": attention is divided by ⟨RoPE(1), RoPE(1)⟩/√d of the two positions, the 14 of 32
            heads (another number of heads in proportion) with the largest sum count, nothing is recycled.
        native_count: True keeps N tokens and C merged ones; False keeps exactly N and recycles none (as v2.0 always does).

    Paper: https://arxiv.org/abs/2410.04417.
    Differs from the reference:
        - lists of counts, not the paper's rank rule
        - a rater must exceed the mean by more than rounding
        - no random noise on densities: the earlier of two equally dense tokens counts as the denser
        - densities are compared as logarithms, so that they cannot vanish
        - an image that keeps all its tokens, or for which the stage requests all of them, is unchanged
        - a merged token takes its centre's position under positions=original (v1.5 renumbers)
        - if nothing follows the image, the last token rates.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    version: Literal["v1.5", "v2.0"] = "v1.5"
    native_count: bool = True

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        score = view.ranking(self._score(view))
        recycles = self.version == "v1.5" and self.native_count
        totals = list(zip(budget.tolist(), view.counts, strict=True))
        requested: Sequence[int | None] = view.requested or [None] * len(totals)
        # The budget counts the merged tokens too: how many of them they are follows from the total.
        clusters = [_clusters(*total, n) if recycles else 0 for total, n in zip(totals, requested, strict=True)]
        kept = highest(score, view.valid, budget - torch.tensor(clusters))
        centres, merged = torch.zeros_like(kept[:, :0], dtype=torch.long), view.with_additions(view.hidden)[:, :0]
        keep = kept
        if any(clusters):
            dropped = [present - total + c for (total, present), c in zip(totals, clusters, strict=True)]
            pool = [_pool_size(d) if c else 0 for d, c in zip(dropped, clusters, strict=True)]
            centres, merged = _recycle(view, highest(score, view.valid > kept, torch.tensor(pool)), pool, clusters)
            number = torch.arange(centres.shape[1], device=kept.device)
            exists = number < to_device(clusters, kept.device)[:, None]
            # Rows with fewer clusters are padded with arbitrary centres, which must not mark a token as kept.
            marks = torch.zeros_like(kept, dtype=torch.int32).scatter_add_(1, centres, exists.int())
            keep = kept | (marks > 0)
        view.carry = _Recycled(kept, centres, merged)
        return keep

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        """The kept tokens in order, then the merged ones, each at its centre's index."""
        recycled = view.carried(_Recycled)
        kept, centres, merged = recycled.kept, recycled.centres, recycled.merged
        if not centres.shape[1]:
            return view.hidden, view.index
        states, rows = view.with_additions(view.hidden), torch.arange(len(keep), device=keep.device)[:, None]
        # The r-th kept entry takes the r-th kept token, or, beyond those, the merged token number r - (kept tokens).
        rank = (keep.cumsum(1) - 1).clamp(min=0)
        merged_rank = (rank - kept.sum(1, keepdim=True)).clamp(max=centres.shape[1] - 1)
        in_order = kept.long().argsort(dim=1, descending=True, stable=True)
        is_merged, merged_rank = merged_rank >= 0, merged_rank.clamp(min=0)
        source = torch.where(is_merged, centres.gather(1, merged_rank), in_order.gather(1, rank))
        hidden = torch.where(is_merged[..., None], merged[rows, merged_rank].to(states.dtype), states[rows, source])
        return hidden, view.index.gather(1, source)

    def _score(self, view: TokenView) -> Float[Tensor, "B V"]:
        """Mean attention of the raters over heads; in v2.0 debiased, and of the best heads."""
        raters = _raters(view)
        # A prompt that ends with the image has no raters; its last token replaces them.
        weight = torch.cat([raters, ~raters.any(1, keepdim=True)], dim=1)
        queries = Tokens(torch.cat([view.text.slots, view.last.slots], dim=1), weight)
        total: Tensor | float = 0.0
        for piece, attention in view.attention_chunks(queries):
            if self.version == "v2.0":
                # Attention between two all-ones vectors is what the positions alone contribute.
                query_ones, visual_ones = (
                    view.rotated_ones(tokens).to(attention)
                    for tokens in (Tokens(queries.slots[:, piece], weight[:, piece]), view.visual)
                )
                bias = query_ones @ visual_ones.transpose(1, 2) * query_ones.shape[-1] ** -0.5
                attention = attention / bias[:, None]
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
    """How many heads v2.0 reads: 14 of 32, in proportion."""
    return max(1, round(14 * heads / 32))


def _pool_size(dropped: int) -> int:
    """How many of the dropped tokens are clustered."""
    return 3 * dropped // 10 + 1


def _clusters(total: int, present: int, requested: int | None) -> int:
    """How many of the `total` remaining tokens are merged ones, if the stage requests `requested` tokens."""
    # Two numbers of clusters may lead to the same total, so the one that follows from the request is tried first.
    likely = [] if requested is None else [total - requested]
    for clusters in [*likely, *range(1, total + 1)] if total < present else []:
        if clusters > 0 and _pool_size(present - total + clusters) // 10 + 1 == clusters:
            return clusters
    return 0


def _raters(view: TokenView) -> Bool[Tensor, "B T"]:
    """Text tokens that are more similar to the image than the mean text token; all of them where none is."""
    fine = torch.promote_types(view.text_embeddings.dtype, torch.float32)
    text, exists = view.text_embeddings.to(fine), view.text.valid
    similarity = view.visual_embeddings.to(fine) @ text.transpose(1, 2)
    # The lowest number instead of -inf: a text of padding alone would give NaN, which no mask removes again.
    similarity = similarity.masked_fill(~exists[:, None], torch.finfo(similarity.dtype).min).softmax(-1)
    valid = view.original.valid[..., None]
    share = torch.where(valid, similarity, 0).sum(1) / valid.sum(1)
    mean = torch.where(exists, share, 0).sum(1, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)
    # Words with equal embeddings must not become raters by their rounding errors.
    raters = exists & (share > mean * (1 + 16 * torch.finfo(fine).eps))
    return torch.where(raters.any(1, keepdim=True), raters, exists)


def _recycle(
    view: TokenView, pool: Bool[Tensor, "B V"], sizes: list[int], clusters: list[int]
) -> tuple[Int[Tensor, "B C"], Float[Tensor, "B C E"]]:
    """Density-peak clustering of the tokens in `pool`.

    Args:
        view: whose hidden states are clustered.
        pool: the tokens, `sizes` in each image.
        sizes: known on the host.
        clusters: how many clusters each image gets.

    Returns:
        the columns of the cluster centres, densest and most isolated first, and the mean of each cluster.
    """
    device = pool.device
    # Columns of the pooled tokens, packed to the left.
    columns = pool.long().argsort(dim=1, descending=True, stable=True)[:, : max(sizes)]
    size, count = to_device([sizes, clusters], device)
    number = torch.arange(max(sizes), device=device)
    valid = number < size[:, None]
    states = gather(view.with_additions(view.hidden), columns)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    # What is merged with the states does not decide.
    features = states[..., : view.hidden.shape[2]]
    peak = _peaks(features, valid, count, max(clusters))
    order = peak.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, : max(clusters)]
    centre = number[: max(clusters)]
    absent = centre >= count[:, None]

    # Every token joins its nearest centre.
    distance = _distances(features, gather(features, order)).masked_fill_(absent[:, None], torch.inf)
    is_centre = number[:, None] == order.masked_fill(absent, -1)[:, None]
    # A centre joins itself, even where another centre is equal to it.
    nearest = torch.where(is_centre.any(2), is_centre.long().argmax(2), distance.argmin(2))
    member = (nearest[:, None] == centre[:, None]) & valid[:, None]
    sums = member.to(states.dtype) @ torch.where(valid[..., None], states, 0)
    # 1e-6 as in the reference, where it avoids a division by zero.
    return columns.gather(1, order), sums / (member.sum(2, keepdim=True) + 1e-6)


def _peaks(
    features: Float[Tensor, "B Q D"], valid: Bool[Tensor, "B Q"], count: Int[Tensor, " B"], most: int
) -> Float[Tensor, "B Q"]:
    """Logarithm of density times distance to the nearest denser token (for the densest: the largest distance).

    The density is exp(-s), with s the mean squared distance to the `count` nearest tokens, the token itself included.
    """
    number, is_padding = torch.arange(features.shape[1], device=features.device), ~valid
    # In blocks of rows, so that the matrix of all distances never exists at once; several are computed twice for that.
    blocks = [slice(start, start + BLOCK) for start in range(0, features.shape[1], BLOCK)]
    spread, farthest = [], []
    for block in blocks:
        between = _distances(features[:, block], features)
        distance = between.masked_fill(is_padding[:, None], torch.inf)
        near = distance.square().topk(min(most, distance.shape[2]), dim=2, largest=False).values
        # Each image has its own number of neighbours; further ones of the batch's largest number are left out.
        counted = torch.arange(near.shape[2], device=near.device) < count[:, None, None]
        spread.append(torch.where(counted, near, 0).sum(2) / count.clamp(min=1)[:, None])
        either_padding = is_padding[:, block, None] | is_padding[:, None]
        farthest.append(distance.masked_fill(either_padding, 0).flatten(1).amax(1))
    sparsity, largest = torch.cat(spread, dim=1), torch.stack(farthest).amax(0)
    isolation = []
    for block in blocks:
        sparsity_here, sparsity_all = sparsity[:, block, None], sparsity[:, None]
        # Equal densities are ordered by index: without that, two tied densest tokens would both count as isolated.
        is_earlier = number < number[block, None]
        denser = (sparsity_all < sparsity_here) | ((sparsity_all == sparsity_here) & is_earlier)
        if len(blocks) > 1:
            between = _distances(features[:, block], features)
        distance = between.masked_fill(~(denser & valid[:, None]), torch.inf)
        isolation.append(torch.minimum(distance.amin(2), largest[:, None]))
    return torch.cat(isolation, dim=1).log() - sparsity


def _distances(a: Float[Tensor, "B P D"], b: Float[Tensor, "B Q D"]) -> Float[Tensor, "B P Q"]:
    """Euclidean distance over √D, from differences: two tokens are exactly as far from each other both ways."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[-1] ** 0.5
