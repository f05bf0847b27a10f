"""VisPruner against hand-computed cases and a slow reference in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import pairwise

import pytest
import slow
import torch
from encoders import CLIP, QWEN, deeper, half_even, hand_view, is_llava
from observed import Observed, Tiny, angles, assert_agree, chosen, image_count, kept

from lmms_prune.methods.shared.greedy import plain_passes, products, searches
from lmms_prune.methods.shared.tensors import directions
from lmms_prune.methods.view import TokenView
from lmms_prune.methods.vispruner import VisPruner
from lmms_prune.models.encoder import Signals


def reference(
    saliency: Sequence[float],
    features: Sequence[slow.Vector],
    count: int,
    important: float = 0.5,
    present: Collection[int] | None = None,
) -> tuple[set[int], float]:
    """VisPruner of one image (second version of https://arxiv.org/abs/2412.01818), list by list."""
    here = sorted(range(len(saliency)) if present is None else present)
    first = math.floor(count * important + 1e-9)
    ranked = slow.best_first({i: saliency[i] for i in here})
    kept_first, others = ranked[:first], ranked[first:]
    margin = min([math.inf, *(saliency[a] - saliency[b] for a, b in pairwise(ranked))])
    units = {i: slow.unit(features[i]) for i in here}
    likeness = cache(lambda i, j: slow.dot(units[i], units[j]))
    while len(others) > count - first:
        gone = min(8, len(others) - (count - first), (len(others) + 1) // 2)
        hand, other = others[0::2], others[1::2]
        alike = {span: max((likeness(i, j) for j in other), default=0) for span, i in enumerate(hand)}
        order = slow.best_first(alike)
        margin = min([margin, *(alike[a] - alike[b] for a, b in pairwise(order))])
        others = [hand[span] for span in order[gone:]] + other
    return set(kept_first) | set(others), margin


def select(
    saliency: torch.Tensor, features: torch.Tensor, count: int, important: float = 0.5, shape=CLIP, present=None
) -> set[int]:
    view = hand_view(shape, grids=[(1, saliency.shape[1])], saliency=saliency, features=features, present=present)
    [found] = chosen(VisPruner(important).select(view, torch.tensor([count])))
    return {int(view.index[0, column]) for column in found}


def falling(n: int) -> torch.Tensor:
    return torch.linspace(1, 0.5, n, dtype=torch.float64)[None]


@pytest.mark.parametrize("shape", [CLIP, QWEN])
@pytest.mark.parametrize(
    ("count", "important", "expected"),
    [
        # By attention 0 and 1; list 2 … 9 at 0, 5, 90, 100, 180, 220, 270, 300 degrees. Hands: 2 4 6 8 at 0, 90, 180, 270
        # and 3 5 7 9 at 5, 100, 220, 300; least angles 5, 10, 40, 30: one goes, 2. Seven are left:
        (9, 0.23, {0, 1, 3, 4, 5, 6, 7, 8, 9}),
        # two go, 2 and 4,
        (8, 0.25, {0, 1, 3, 5, 6, 7, 8, 9}),
        # three go, and 8,
        (7, 0.3, {0, 1, 3, 5, 6, 7, 9}),
        # all four: 3 5 7 9.
        (6, 0.34, {0, 1, 3, 5, 7, 9}),
        # A second pass: 3 7 | 5 9 at 5, 220 | 100, 300: least angles 65 (to 300) and 80; 3 goes.
        (5, 0.4, {0, 1, 5, 7, 9}),
        # both go,
        (4, 0.5, {0, 1, 5, 9}),
        # and a third: 5 | 9, of which 5 goes.
        (3, 0.67, {0, 1, 9}),
        (2, 1.0, {0, 1}),
        (0, 0.5, set()),
    ],
)
def test_by_hand(shape, count: int, important: float, expected: set[int]) -> None:
    features = angles(37, 43, 0, 5, 90, 100, 180, 220, 270, 300, length=[3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    assert select(falling(10), features, count, important, shape) == expected
    assert reference(falling(10)[0].tolist(), features[0].tolist(), count, important)[0] == expected


def test_the_next_list_is_most_duplicated_first_then_odd_entries() -> None:
    """Eight of 20 go in the first pass; which of the others meet in the second shows their order.

    Hands: even places at 0, 30, …, 270 degrees and odd ones at their sides, 1 to 10 degrees away, the nearest last.
    """
    degrees = []
    for number in range(10):
        degrees += [30 * number, 30 * number + 10 - number]
    features = angles(*degrees)
    # Duplication rises with the number: 9 … 2 go, and 1 (9 degrees) stands before 0 (10 degrees).
    # The second list: tokens 2, 0, then 1, 3, 5, …, 19. Hands: 2 1 5 9 13 17 and 0 3 7 11 15 19.
    # Their degrees: 30 10 68 126 184 242 and 0 39 97 155 213 271; least angles 9 10 29 29 29 29.
    assert select(falling(20), features, 11, 0.0) == set(range(1, 20, 2)) | {0}
    assert select(falling(20), features, 10, 0.0) == (set(range(1, 20, 2)) | {0}) - {1}


def test_published_half_is_important() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 576, 8, generator=generator, dtype=torch.float64)
    for count, best in ((192, 96), (128, 64), (64, 32), (65, 32), (1, 0)):
        found = select(falling(576), features, count)
        assert len(found) == count
        assert found >= set(range(best))
        assert found == reference(falling(576)[0].tolist(), features[0].tolist(), count)[0]


@pytest.mark.parametrize("n", range(1, 14))
def test_odd_lists_and_small_images(n: int) -> None:
    """Every parity, down to nothing: the first hand has one more, and no more go than it holds."""
    features = torch.randn(1, n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for count in range(n + 1):
        for important in (0.0, 0.5, 0.9, 1.0):
            found = select(falling(n), features, count, important)
            assert len(found) == count
            assert found == reference(falling(n)[0].tolist(), features[0].tolist(), count, important)[0]


def test_ties_go_to_the_earlier_in_the_list() -> None:
    """Axes and their copies: the first hand's are all equally alike, and exactly so."""
    features = torch.eye(4, dtype=torch.float64).repeat_interleave(2, dim=0)[None]
    # 0 2 4 6 | 1 3 5 7, cosine 1 each.
    assert select(falling(8), features, 6, 0.0) == {1, 3, 4, 5, 6, 7}
    # The order of attention, not of the raster: reversed, the list is 7 6 … 0, and 7 and 5 go.
    assert select(falling(8).flip(1), features, 6, 0.0) == {0, 1, 2, 3, 4, 6}
    # Equal attention goes to the lower index.
    assert select(torch.ones(1, 8, dtype=torch.float64), features, 4, 1.0) == {0, 1, 2, 3}


def test_a_share_of_one_is_exact() -> None:
    """0.29 of 100 is 29, though 0.29 * 100 is less in floating point: the 29th token stays by its attention alone.

    Token 28 is a copy of token 29, which, in a list that began with it, would make it the first to go.
    """
    n = 130
    features = torch.eye(n, dtype=torch.float64)[None].clone()
    features[0, 28] = features[0, 29]
    assert 28 in select(falling(n), features, 100, 0.29)
    assert 28 not in select(falling(n), features, 100, 0.28)


@pytest.mark.parametrize("neighbours", [1, 2, 5])
def test_large_images_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    """Short lists of nearest tokens are renewed again and again."""
    features = torch.randn(1, 60, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = select(falling(60), features, 20)
    monkeypatch.setattr(searches, "_NEIGHBOURS", neighbours)
    monkeypatch.setattr(plain_passes, "BLOCK", 7)
    assert select(falling(60), features, 20) == whole


@pytest.mark.parametrize("stored", [True, False])
def test_the_search_of_a_gpu_without_the_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    unit = directions(torch.randn(3, 61, 8, generator=generator))
    # Equal tokens, and lists that end in different passes, one of them of a single entry.
    unit[:, 40] = unit[:, 3]
    lists = [([61, 60, 17], goals) for goals in ([20, 1, 17], [0, 59, 3], [61, 60, 0])] + [([1, 61, 2], [0, 5, 1])]
    on_cpu = [searches.thinned(unit, *sizes, 8) for sizes in lists]
    monkeypatch.setattr(plain_passes, "_nearest", lambda unit, *_: plain_passes._without_waiting(unit))
    monkeypatch.setattr(plain_passes, "BLOCK", 7)
    if not stored:
        monkeypatch.setattr(products, "MOST_STORED", 0)
    for sizes, expected in zip(lists, on_cpu, strict=True):
        assert torch.equal(searches.thinned(unit, *sizes, 8), expected)
        assert expected.sum(1).tolist() == sizes[1]


def test_tables_of_many_passes_go_over_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = directions(torch.randn(2, 61, 8, generator=torch.Generator().manual_seed(2)))
    whole = searches.thinned(unit, [61, 40], [5, 7], 8)
    monkeypatch.setattr(plain_passes, "_MOST_COLUMNS", 100)
    assert torch.equal(searches.thinned(unit, [61, 40], [5, 7], 8), whole)


def test_what_is_recorded() -> None:
    assert VisPruner().signals(CLIP) == Signals(attention=frozenset({22}), features=True)


def test_float32_features_are_compared_in_float64() -> None:
    """Cosines 1 - 2e-9 and 1 - 1e-9 are the same in float32."""
    features = angles(0, math.degrees(6e-5), 90, 90 + math.degrees(4.4e-5)).float()
    assert float(features[0, 0] @ features[0, 1]) == float(features[0, 2] @ features[0, 3])
    saliency = falling(4).float()
    # 0 and 2 are the first hand; 2 is the nearer to its neighbour.
    assert select(saliency, features, 3, 0.0) == {0, 1, 3}


def wanted(
    view: TokenView, ratio: float, important: float, present: Sequence[Collection[int]] | None = None
) -> list[tuple[set[int], float]]:
    saliency, features = view.encoder.saliency(), view.encoder.features()
    return [
        reference(
            saliency[i, :size].tolist(),
            features[i, :size].tolist(),
            half_even(ratio * size),
            important,
            present[i] if present else None,
        )
        for i, size in enumerate(view.sizes)
    ]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    ratios, shares = (0.33, 0.22, 0.11, 0.5, 0.75, 0.4, 0.6, 0.2), (0.5, 0.5, 0.5, 0.5, 0.3, 0.0, 0.8, 0.25)
    got, want = [], []
    for number, (seen, ratio, share) in enumerate(zip(batches, ratios, shares, strict=True)):
        trace, _ = tiny.run(seen.inputs, f"vispruner@{number % 3}:{ratio};important={share}")
        got += kept(trace)
        want += wanted(encoder_view(tiny, seen), ratio, share)
    assert len(got) == image_count(batches)
    # The margin is over hundreds of decisions, nearly all of which decide nothing, so it excuses too much here.
    assert got == [tokens for tokens, _ in want]


def test_all_important_is_fastervlm(tiny: Tiny, batches: list[Observed]) -> None:
    inputs = batches[0].inputs
    one = tiny.run(inputs, "vispruner@0:0.3;important=1")[0]
    assert kept(one) == kept(tiny.run(inputs, "fastervlm@0:0.3")[0])
    assert kept(one) != kept(tiny.run(inputs, "vispruner@0:0.3")[0])


def test_several_images_are_independent(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    trace, _ = tiny.run(inputs, "vispruner@0:0.4")
    assert_agree(kept(trace), wanted(capture_view(tiny, inputs, 2), 0.4, 0.5))


def test_after_an_earlier_stage(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(4)
    inputs = tiny.batch([tiny.row(rng) for _ in range(10)])
    present, found, view = deeper(tiny, inputs, capture_view, "vispruner@3:0.4")
    assert_agree(found, wanted(view, 0.4, 0.5, present))


def test_features_are_those_before_the_projector(all_tiny: dict[str, Tiny], capture_view: Callable) -> None:
    for tiny in all_tiny.values():
        view = capture_view(tiny, tiny.batch([tiny.row(random.Random(5))]), 2)
        after = tuple(view.visual_embeddings.shape) == tuple(view.encoder.features().shape) and torch.allclose(
            view.visual_embeddings, view.encoder.features()
        )
        assert after is not (is_llava(tiny) or tiny.family == "llava_next")
