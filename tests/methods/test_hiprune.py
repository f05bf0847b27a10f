"""HiPrune against hand-computed cases and a slow reference in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence

import pytest
import torch
from encoders import CLIP, QWEN, deeper, half_even, hand_view, is_llava, tensor, top
from observed import Observed, Tiny, assert_agree, chosen, image_count, kept

from lmms_prune.methods.hiprune import HiPrune
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape


def reference(
    objects: Sequence[float],
    deep: Sequence[float],
    size: int,
    width: int,
    count: int,
    alpha: float = 0.1,
    present: Collection[int] | None = None,
) -> tuple[set[int], float]:
    """HiPrune of one image (https://arxiv.org/abs/2508.00553), token by token."""
    here = sorted(range(size) if present is None else present)
    anchors, margin = top({i: objects[i] for i in here}, half_even(alpha * count / 5))
    near = set(anchors)
    for anchor in anchors:
        for step in (-1, 1, -width, width):
            near.add(min(max(anchor + step, 0), size - 1))
    near &= set(here)
    if len(near) > count:
        best, gap = top({i: objects[i] for i in near}, count)
        return set(best), min(margin, gap)
    rest, gap = top({i: deep[i] for i in here if i not in near}, count - len(near))
    return near | set(rest), min(margin, gap)


def select(objects: Sequence[float], deep: Sequence[float], grid: tuple[int, int], count: int, **named) -> set[int]:
    alpha, shape, present = named.get("alpha", 0.1), named.get("shape", CLIP), named.get("present")
    block = 8 if shape is CLIP else 15
    received = {block: tensor([objects]), shape.selected: tensor([deep])}
    view = hand_view(shape, grids=[grid], received=received, present=present)
    [found] = chosen(HiPrune(alpha=alpha).select(view, torch.tensor([count])))
    return {int(view.index[0, column]) for column in found}


# A grid of 3 rows and 4 columns. The object layer's best is token 5, then 0; the deep one's are 11, 3, 8, 2.
OBJECTS = [0.9, 0.1, 0.2, 0.1, 0.3, 1.0, 0.15, 0.1, 0.1, 0.12, 0.1, 0.1]
DEEP = [0.0, 0.1, 0.6, 0.8, 0.1, 0.2, 0.1, 0.1, 0.7, 0.3, 0.1, 0.9]


@pytest.mark.parametrize("shape", [CLIP, QWEN])
@pytest.mark.parametrize(
    ("alpha", "count", "expected"),
    [
        # round(0.1 · 7 / 5) = 0 anchors: the deep layer alone.
        (0.1, 7, {11, 3, 8, 2, 9, 5, 1}),
        # round(0.7 · 7 / 5 = 0.98) = 1 anchor, 5, with 4 and 6, 1 and 9; two registers.
        (0.7, 7, {5, 4, 6, 1, 9, 11, 3}),
        # 2 anchors; those of 0 are 1 and 4, and -1 and -4, which the first token stands for: 5, 4, 6, 1, 9, 0, and 11.
        (1.4, 7, {5, 4, 6, 1, 9, 0, 11}),
        # round(1.4 · 5 / 5 = 1.4) = 1 anchor; its five fill the budget.
        (1.4, 5, {5, 4, 6, 1, 9}),
        # round(1.5 · 4 / 5 = 1.2) = 1 anchor; of the five the object layer's best four: 1.0, 0.3, 0.15, 0.12.
        (1.5, 4, {5, 4, 6, 9}),
        (0.1, 0, set()),
        (5.0, 12, set(range(12))),
    ],
)
def test_by_hand(shape: EncoderShape, alpha: float, count: int, expected: set[int]) -> None:
    assert select(OBJECTS, DEEP, (3, 4), count, alpha=alpha, shape=shape) == expected
    assert reference(OBJECTS, DEEP, 12, 4, count, alpha)[0] == expected


def test_buffers_cross_rows_and_pile_up_at_the_corners() -> None:
    objects = [0.0] * 12
    objects[4] = 1.0
    # Token 4 begins the second row: its neighbours are 3 (the first row's end), 5, 0 and 8.
    assert select(objects, DEEP, (3, 4), 5, alpha=1.0) == {3, 4, 5, 0, 8}
    objects[4], objects[11] = 0.0, 1.0
    # The last token: 10, 7, and itself twice; the deep layer fills up with 3 and 8.
    assert select(objects, DEEP, (3, 4), 5, alpha=1.0) == {10, 11, 7, 3, 8}


def test_anchor_counts_of_the_presets() -> None:
    """4, 3 and 1 for 192, 128 and 64 (round of 3.84, 2.56 and 1.28); halves go to the even number."""
    objects = torch.arange(576, dtype=torch.float64).flip(0)
    for count, anchors in ((192, 4), (128, 3), (64, 1), (25, 0), (75, 2), (125, 2), (0, 0)):
        # Anchors are the first tokens: with their buffers they end one row and one token later.
        near = {i for a in range(anchors) for i in (a - 1, a, a + 1, a - 24, a + 24)}
        near = {max(i, 0) for i in near}
        found = select(objects.tolist(), list(range(576)), (24, 24), count)
        assert len(found) == count
        assert found == near | set(range(576 - (count - len(near)), 576))


def test_ties_go_to_the_lower_index() -> None:
    flat = [0.5] * 12
    assert select(flat, flat, (3, 4), 3) == {0, 1, 2}
    # One anchor: token 0, with 1 and 4 (and itself).
    assert select(flat, flat, (3, 4), 5, alpha=1.0) == {0, 1, 4, 2, 3}
    assert select(flat, flat, (3, 4), 2, alpha=2.5) == {0, 1}


def test_dropped_tokens_are_neither_anchors_nor_buffers() -> None:
    present = [0, 2, 3, 4, 6, 8, 9, 10, 11]
    # 5 is gone, so 0 is the anchor; of 1, 4 only 4 is there; then 11, 3 by the deep layer.
    assert select(OBJECTS, DEEP, (3, 4), 4, alpha=1.25, present=present) == {0, 4, 11, 3}
    assert reference(OBJECTS, DEEP, 12, 4, 4, 1.25, present)[0] == {0, 4, 11, 3}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_smallest_images(n: int) -> None:
    scores = [1.0 / (1 + i) for i in range(n)]
    for grid in ((1, n), (n, 1)):
        for count in range(n + 1):
            for alpha in (0.1, 2.0, 5.0):
                assert select(scores, scores, grid, count, alpha=alpha) == set(range(count))


def test_blocks_that_are_recorded() -> None:
    assert HiPrune().signals(CLIP) == Signals(attention=frozenset({8, 22}), grids=True)
    assert HiPrune().signals(QWEN) == Signals(attention=frozenset({15, 31}), grids=True)


def blocks(tiny: Tiny) -> tuple[int, int]:
    """Object and deep block of the small encoders: 8/24 of 3 and 15/32 of 4 blocks."""
    return (1, 1) if is_llava(tiny) else (1, 3)


def wanted(
    tiny: Tiny, view: TokenView, ratio: float, alpha: float, present: Sequence[Collection[int]] | None = None
) -> list[tuple[set[int], float]]:
    objects, deep = (view.encoder.received(block).tolist() for block in blocks(tiny))
    return [
        reference(
            objects[i], deep[i], size, view.grids[i][1], half_even(ratio * size), alpha, present[i] if present else None
        )
        for i, size in enumerate(view.sizes)
    ]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    ratios, alphas = (0.33, 0.22, 0.11, 0.5, 0.75, 0.4, 0.6, 0.2), (0.1, 0.3, 1.0, 2.5, 0.5, 0.1, 1.0, 5.0)
    got, want = [], []
    for number, (seen, ratio, alpha) in enumerate(zip(batches, ratios, alphas, strict=True)):
        trace, _ = tiny.run(seen.inputs, f"hiprune@{number % 3}:{ratio};alpha={alpha}")
        got += kept(trace)
        want += wanted(tiny, encoder_view(tiny, seen), ratio, alpha)
    assert len(got) == image_count(batches)
    assert_agree(got, want)
    if tiny.family == "qwen2_5_vl":
        assert len({size for batch in batches for size in map(lambda p: len(p.visual), batch.spans)}) > 5


def test_several_images_are_independent(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    trace, _ = tiny.run(inputs, "hiprune@0:0.4;alpha=0.5")
    assert_agree(kept(trace), wanted(tiny, capture_view(tiny, inputs, 2), 0.4, 0.5))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 4.0])
def test_after_an_earlier_stage(tiny: Tiny, capture_view: Callable[..., TokenView], alpha: float) -> None:
    rng = random.Random(4)
    inputs = tiny.batch([tiny.row(rng) for _ in range(10)])
    present, found, view = deeper(tiny, inputs, capture_view, f"hiprune@3:0.4;alpha={alpha}")
    want = wanted(tiny, view, 0.4, alpha, present)
    assert_agree(found, want)
    assert all(len(tokens) == half_even(0.4 * size) for tokens, size in zip(found, view.sizes, strict=True))
    assert math.inf not in {margin for _, margin in want}
