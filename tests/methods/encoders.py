"""Shared by tests of methods that read the vision encoder: a hand-made encoder, and slow helpers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from types import SimpleNamespace

import slow
import torch
from observed import HandView, Tiny, kept
from torch import Tensor

from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Encoder
from lmms_prune.models.shape import EncoderShape

CLIP, QWEN = EncoderShape(24, 22, 1, is_clip=True), EncoderShape(32, 31, patches_per_token=4)


def tensor(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def hand_view(
    shape: EncoderShape = CLIP,
    *,
    grids: Sequence[tuple[int, int]],
    saliency: Tensor | None = None,
    received: dict[int, Tensor] | None = None,
    hidden: Tensor | None = None,
    layer: int = 0,
    present: Sequence[int] | None = None,
    **signals: Tensor,
) -> HandView:
    """A view on a encoder whose signals (B, N, …) are given; `features` are projected to their double.

    `hidden` (B, V, D) are the visual tokens; `present` the raster indices of those that are still there, in each image.
    """
    sizes = [rows * columns for rows, columns in grids]
    counts = [len(present)] * len(sizes) if present is not None else sizes
    visual = torch.zeros(len(sizes), max(counts), 2, dtype=torch.float64) if hidden is None else hidden
    around = visual.new_full((len(sizes), 1, visual.shape[2]), 3.0)
    encoder = SimpleNamespace(
        shape=shape,
        saliency=lambda: saliency,
        received=lambda block: (received or {})[block],
        project=lambda features: 2 * features,
        **{name: (lambda *block, _value=value, **how: _value) for name, value in signals.items()},
    )
    view = HandView(torch.cat([around, visual, around], dim=1), counts, encoder=encoder, grids=grids, layer=layer)
    view.sizes = sizes
    if present is not None:
        view.index = torch.tensor(list(present)).expand(len(sizes), -1)
    return view


def chunks_by_image(encoder: Encoder, block: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The image, queries, keys and attention (H, q, k) of each piece, with entries numbered in their image."""
    firsts = [0, *accumulate(encoder.entries)]
    for queries, keys, attention in encoder.attention_chunks(block):
        for query, key, piece in zip(queries, keys, attention, strict=True):
            image = bisect_right(firsts, int(query[0])) - 1
            yield image, query - firsts[image], key - firsts[image], piece


def top(scores: dict[int, float], count: int) -> tuple[list[int], float]:
    """The `count` keys with the highest score, best first, ties to the smaller key; and the gap to the first that is out."""
    order = slow.best_first(scores)
    gap = scores[order[count - 1]] - scores[order[count]] if 0 < count < len(order) else math.inf
    return order[:count], gap


def is_llava(tiny: Tiny) -> bool:
    return tiny.family == "llava"


def half_even(number: float) -> int:
    """Round half to even, with a tolerance for the float."""
    low = math.floor(number)
    if abs(number - low - 0.5) < 1e-9:
        return low + low % 2
    return math.floor(number + 0.5)


def deeper(tiny: Tiny, inputs: dict[str, Tensor], capture_view: Callable[..., TokenView], schedule: str) -> tuple:
    """A stage after `divprune@0:0.7`: what it was given and kept of each image, and a view on the encoder."""
    view = capture_view(tiny, inputs, 3)
    trace, _ = tiny.run(inputs, f"divprune@0:0.7,{schedule}")
    return kept(trace, 0), kept(trace, 1), view
