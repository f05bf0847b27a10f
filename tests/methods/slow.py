"""Slow references of the methods: plain Python, one image, float64, written from the published descriptions.

A sequence is a list of vectors (lists of floats) without padding; `visual` and `text` are absolute indices into it.
Each reference returns the kept raster indices and a margin: the smallest gap between a decision that it took and the
runner-up. Where another implementation keeps another set although the margin is not tiny, one of the two is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from operator import mul

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(map(mul, a, b))


def unit(x: Vector) -> list[float]:
    """`x` at length 1; a zero vector stays zero, so that its cosine to anything is 0."""
    length = math.sqrt(dot(x, x))
    return [value / length if length else 0.0 for value in x]


def cosine(a: Vector, b: Vector) -> float:
    return dot(unit(a), unit(b))


def rms_norm(x: Vector, weight: Vector, eps: float) -> list[float]:
    scale = 1.0 / math.sqrt(dot(x, x) / len(x) + eps)
    return [w * value * scale for w, value in zip(weight, x, strict=True)]


def best_first(scores: dict[int, float]) -> list[int]:
    """Keys by falling score, ties to the smaller key."""
    return sorted(scores, key=lambda key: (-scores[key], key))


def fastv(attention: Sequence[Sequence[Vector]], visual: Sequence[int], count: int) -> tuple[set[int], float]:
    """FastV (https://arxiv.org/abs/2403.06764): the head mean of the last query's softmax, largest first.

    Args:
        attention: the softmax of one layer, indexed [head][query][key], normalised over all keys.
        visual: absolute indices of the visual tokens.
        count: how many to keep.
    """
    scores = {}
    for raster, column in enumerate(visual):
        total = 0.0
        for head in attention:
            total += head[-1][column]
        scores[raster] = total / len(attention)
    order = best_first(scores)
    margin = math.inf
    if 0 < count < len(order):
        margin = scores[order[count - 1]] - scores[order[count]]
    return set(order[:count]), margin


def dart_pivots(keys: Sequence[Vector], tokens: Sequence[int]) -> tuple[list[int], float]:
    """The four of `tokens` with the largest L1 norm of their keys, by falling norm."""
    norms = {}
    for token in tokens:
        total = 0.0
        for value in keys[token]:
            total += abs(value)
        norms[token] = total
    order = best_first(norms)
    margin = math.inf
    for first, second in pairwise(order[:5]):
        margin = min(margin, norms[first] - norms[second])
    return order[:4], margin


def dart(
    features: Sequence[Vector],
    keys: Sequence[Vector],
    visual: Sequence[int],
    text: Sequence[int],
    requested: int,
    *,
    order: str = "stable",
    native_count: bool = True,
) -> tuple[set[int], float]:
    """DART (https://arxiv.org/abs/2502.11494): four visual pivots, and equal quotas of what is least like eight pivots.

    Args:
        features: the layer's input after the decoder's final norm.
        keys: the rotated keys of the layer before, KV heads side by side.
        visual: absolute indices of the visual tokens.
        text: absolute indices of all text tokens after the image.
        asked: N.
        order: "stable", or "reference" for a Python set of the pivots' absolute indices.
        native_count: keep 8⌊N/8⌋+4; otherwise N, the first pivots picking one more.
    """
    n = len(visual)
    count = 8 * (requested // 8) + 4 if native_count and requested else requested
    if requested >= n or count >= n:
        return set(range(n)), math.inf
    by_visual, margin_visual = dart_pivots(keys, visual)
    by_text, margin_text = dart_pivots(keys, text)
    margin = min(margin_visual, margin_text)
    start = visual[0]
    if count <= 4:
        return {pivot - start for pivot in by_visual[:count]}, margin
    pivots = [*by_visual, *by_text]
    if order == "reference":
        as_set: set[int] = set()
        for pivot in pivots:
            as_set.add(pivot)
        pivots = list(as_set)
    units = {token: unit(features[token]) for token in {*visual, *pivots}}
    kept = set(by_visual)
    candidates = [token for token in visual if token not in kept]
    share, extra = divmod(count - 4, len(pivots))
    for turn, pivot in enumerate(pivots):
        quota = share + 1 if turn < extra else share
        unlike = {token: -dot(units[pivot], units[token]) for token in candidates}
        ranked = best_first(unlike)
        if 0 < quota < len(ranked):
            margin = min(margin, unlike[ranked[quota - 1]] - unlike[ranked[quota]])
        for token in ranked[:quota]:
            kept.add(token)
            candidates.remove(token)
    return {token - start for token in kept}, margin


def divprune(tokens: Sequence[Vector], count: int) -> tuple[set[int], float]:
    """DivPrune (https://arxiv.org/abs/2503.02175): greedy max-min over the whole matrix of cosine distances."""
    n = len(tokens)
    units = [unit(x) for x in tokens]
    distance = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i):
            distance[i][j] = distance[j][i] = 1.0 - dot(units[i], units[j])
    kept: list[int] = []
    margin = math.inf
    while len(kept) < count:
        scores = {}
        for i in range(n):
            if i not in kept:
                others = kept or [j for j in range(n) if j != i]
                scores[i] = min((distance[i][j] for j in others), default=math.inf)
        ranked = best_first(scores)
        best = scores[ranked[0]]
        # Exact ties are no near-ties: two tokens that are each other's nearest neighbour have the same distance, and
        # the lower index is taken.
        margin = min([margin, *(best - score for score in scores.values() if score != best)])
        kept.append(ranked[0])
    return set(kept), margin
