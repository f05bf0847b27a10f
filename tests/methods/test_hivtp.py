"""HIVTP against hand-computed cases, its published counts and a slow reference in plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

import pytest
import torch
from encoders import CLIP, QWEN, deeper, half_even, hand_view, is_llava, tensor, top
from observed import Observed, Tiny, assert_agree, chosen, image_count, kept

from lmms_prune import Schedule
from lmms_prune.methods.hivtp import HIVTP
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals

Grid = tuple[int, int]


def reference(
    scores: Sequence[float], grid: Grid, count: int | None, present: Collection[int] | None = None
) -> tuple[set[int], float]:
    """HIVTP of one image (https://arxiv.org/abs/2509.23663); `count` None is the published rule.

    With a count the share is found by trying: all shares at which some quadrant gets one token more.
    """
    rows, columns = grid
    here = sorted(range(rows * columns) if present is None else present)
    quadrants: dict[tuple[bool, bool], list[int]] = {}
    for i in here:
        row, column = divmod(i, columns)
        # The first half of an odd side is the larger one.
        quadrants.setdefault((row < rows / 2, column < columns / 2), []).append(i)
    side = 2
    while count is not None and count_windows(grid, side) >= count and count_windows(grid, side) > 1:
        side *= 2
    windows: dict[tuple[int, int], list[int]] = {}
    for i in here:
        row, column = divmod(i, columns)
        windows.setdefault((row // side, column // side), []).append(i)

    def picks(share: Fraction) -> tuple[set[int], set[int], float]:
        overall: set[int] = set()
        gap = 1.0
        for members in quadrants.values():
            best, between = top({i: scores[i] for i in members}, int(len(members) * share))
            overall, gap = overall | set(best), min(gap, between)
        local: set[int] = set()
        for members in windows.values():
            free = {i: scores[i] for i in members if i not in overall}
            if free:
                [best], between = top(free, 1)
                local, gap = local | {best}, min(gap, between)
        return overall, local, gap

    if count is None:
        overall, local, gap = picks(Fraction(1, 4))
        return overall | local, gap
    shares = {Fraction(k, len(members)) for members in quadrants.values() for k in range(len(members) + 1)}
    for share in sorted(shares):
        overall, local, gap = picks(share)
        if len(overall) + len(local) >= count:
            break
    best, between = top({i: scores[i] for i in overall}, min(count, len(overall)))
    more, gap_local = top({i: scores[i] for i in local}, count - len(best))
    return set(best) | set(more), min(gap, between, gap_local)


def count_windows(grid: Grid, side: int) -> int:
    return -(-grid[0] // side) * -(-grid[1] // side)


def select(scores: Sequence[float], grid: Grid, count: int | None, present: Sequence[int] | None = None) -> set[int]:
    received = {block: tensor([scores]) for block in (6, 7, 8)}
    view = hand_view(CLIP, grids=[grid], received=received, present=present)
    budget = view.counts[0] if count is None else count
    [found] = chosen(HIVTP().select(view, torch.tensor([budget])))
    return {int(view.index[0, column]) for column in found}


# A grid of 4 × 4, by quadrants and 2 × 2 windows at once:   16 12 |  9  3
#                                                            11  1 |  2  4
#                                                            ------+------
#                                                             8  7 | 15 14
#                                                             6  5 | 13 10
SQUARE = [16, 12, 9, 3, 11, 1, 2, 4, 8, 7, 15, 14, 6, 5, 13, 10]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # One token (25 % of four) a quadrant: 16, 9, 8, 15. The best that is left of each window: 12, 4, 7, 14.
        (None, {16, 9, 8, 15, 12, 4, 7, 14}),
        (8, {16, 9, 8, 15, 12, 4, 7, 14}),
        # One short: the lowest local pick goes.
        (7, {16, 9, 8, 15, 12, 7, 14}),
        # No share of the quadrants is needed for five only if there are five windows: a share of one, 4 + 4, less three.
        (5, {16, 9, 8, 15, 14}),
        # Four windows are not fewer than four tokens: one window of 4 × 4, and no share reaches less than four.
        (4, {16, 9, 15, 8}),
        (1, {16}),
        # Two of each quadrant and four picks are twelve, three and four sixteen.
        (12, {16, 12, 11, 9, 4, 3, 8, 7, 6, 15, 14, 13}),
        (13, {16, 12, 11, 9, 4, 3, 8, 7, 6, 15, 14, 13, 10}),
        (15, set(range(2, 17))),
        (0, set()),
    ],
)
def test_by_hand(count: int | None, expected: set[int]) -> None:
    scores = [value / 16 for value in SQUARE]
    assert {SQUARE[i] for i in select(scores, (4, 4), count)} == expected
    assert {SQUARE[i] for i in reference(scores, (4, 4), count)[0]} == expected


def test_windows_of_odd_grids_are_smaller_at_the_border() -> None:
    # 3 × 5. Quadrants: 2 × 3, 2 × 2, 1 × 3, 1 × 2 tokens, of which a quarter is 1, 1, 0, 0: tokens 0 and 3.
    # Windows 2 × 2 from the top left: {0 1 5 6}, {2 3 7 8}, {4 9}, {10 11}, {12 13}, {14}: 1, 2, 4, 10, 12, 14.
    scores = [(15 - i) / 15 for i in range(15)]
    assert select(scores, (3, 5), None) == {0, 3, 1, 2, 4, 10, 12, 14}
    assert reference(scores, (3, 5), None)[0] == {0, 3, 1, 2, 4, 10, 12, 14}


@pytest.mark.parametrize(("kind", "count"), [("spread", 288), ("crowded", 252)])
def test_published_counts(kind: str, count: int) -> None:
    """576 tokens: 144 of the quadrants, and one of each of the 144 windows that is not full by then.

    Spread: no window is full. Crowded: each quadrant's best 36 fill nine windows: 144 + 144 - 4 · 9 = 252.
    """
    windows = {(r, c): (r // 2) * 12 + c // 2 for r in range(24) for c in range(24)}
    if kind == "spread":
        generator = torch.Generator().manual_seed(0)
        scores = (torch.rand(576, generator=generator, dtype=torch.float64) * 0.1).tolist()
        for (r, c), _ in windows.items():
            if r % 2 == 0 and c % 2 == 0:
                scores[24 * r + c] += 1
    else:
        scores = [1 / (1 + windows[r, c]) for r in range(24) for c in range(24)]
    found = select(scores, (24, 24), None)
    assert len(found) == count
    assert 144 < count <= 288
    for rows in (range(12), range(12, 24)):
        for columns in (range(12), range(12, 24)):
            quadrant = {24 * r + c: scores[24 * r + c] for r in rows for c in columns}
            assert found >= set(top(quadrant, 36)[0])


def test_exact_counts_of_576() -> None:
    """192 = 4 · 12 + 144; 128 and 64 are not more than 144 windows, so 4 × 4: 4 · 23 + 36 and 4 · 7 + 36."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(576, generator=generator, dtype=torch.float64).tolist()
    for count, share, side in ((192, 12, 2), (128, 23, 4), (64, 7, 4), (145, 1, 2), (144, 27, 4)):
        found = select(scores, (24, 24), count)
        assert len(found) == count
        assert found == reference(scores, (24, 24), count)[0]
        for rows in (range(12), range(12, 24)):
            for columns in (range(12), range(12, 24)):
                quadrant = {24 * r + c: scores[24 * r + c] for r in rows for c in columns}
                assert found >= set(top(quadrant, share)[0])
        for row in range(0, 24, side):
            for column in range(0, 24, side):
                window = {24 * r + c for r in range(row, row + side) for c in range(column, column + side)}
                # What 4·share and one a window exceed the count by is missing somewhere.
                assert found & window or 4 * share + 576 // side**2 > count


def test_ties_go_to_the_lower_index() -> None:
    # The corners of the quadrants, then their neighbours.
    assert select([0.5] * 16, (4, 4), None) == {0, 2, 8, 10, 1, 3, 9, 11}
    assert select([0.5] * 16, (4, 4), 6) == {0, 2, 8, 10, 1, 3}


def test_dropped_tokens_are_no_candidates() -> None:
    """Shares are of what is present, and windows that are empty pick nothing."""
    present = [i for i, value in enumerate(SQUARE) if value not in (16, 15, 1, 2, 3, 4, 9)]
    scores = [value / 16 for value in SQUARE]
    # Quadrants of 2, 0, 4 and 3 tokens: a quarter is 0, 0, 1 and 0. Windows: 12, none, 7, 14.
    found = {SQUARE[i] for i in select(scores, (4, 4), None, present)}
    assert found == {8, 12, 7, 14}
    for count in range(1, 10):
        if count < len(present):
            assert select(scores, (4, 4), count, present) == reference(scores, (4, 4), count, present)[0]


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 7), (5, 1), (2, 2), (3, 3), (2, 5), (7, 6)])
def test_small_grids(grid: Grid) -> None:
    size = grid[0] * grid[1]
    scores = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).tolist()
    for count in (None, *range(size)):
        found = select(scores, grid, count)
        assert found == reference(scores, grid, count)[0]
        assert count is None or len(found) == count


def test_blocks_that_are_recorded() -> None:
    """Means over blocks: here they disagree, and only together say that token 1 is best."""
    assert HIVTP().signals(CLIP) == Signals(attention=frozenset({6, 7, 8}), grids=True)
    assert HIVTP().signals(QWEN) == Signals(attention=frozenset({8, 9, 10}), grids=True)
    received = {6: tensor([[0.5, 0.4, 0.1]]), 7: tensor([[0.1, 0.4, 0.2]]), 8: tensor([[0.1, 0.1, 0.4]])}
    view = hand_view(CLIP, grids=[(1, 3)], received=received)
    assert chosen(HIVTP().select(view, torch.tensor([1]))) == [{1}]


def wanted(
    tiny: Tiny, view: TokenView, ratio: float | None, present: Sequence[Collection[int]] | None = None
) -> list[tuple[set[int], float]]:
    # 6, 7, 8 of 24 are blocks 0, 0, 1 of 3 and 1, 1, 1 of 4.
    scores = view.encoder.received(1)
    if is_llava(tiny):
        scores = (scores + view.encoder.received(0)) / 2
    return [
        reference(
            scores[i].tolist(),
            view.grids[i],
            None if ratio is None else half_even(ratio * size),
            present[i] if present else None,
        )
        for i, size in enumerate(view.sizes)
    ]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    ratios = (None, None, 0.33, 0.11, 0.75, 0.5, 0.22, 0.9)
    native, exact, want_native, want_exact = [], [], [], []
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        view = encoder_view(tiny, seen)
        trace, _ = tiny.run(seen.inputs, f"hivtp@{number % 3}" + ("" if ratio is None else f":{ratio}"))
        (native if ratio is None else exact).extend(kept(trace))
        (want_native if ratio is None else want_exact).extend(wanted(tiny, view, ratio))
    assert len(native) + len(exact) == image_count(batches)
    assert_agree(native, want_native)
    assert_agree(exact, want_exact)


def test_a_stage_without_a_keep() -> None:
    [stage] = Schedule.parse("hivtp@0").stages
    assert str(stage) == "hivtp@0"
    assert stage.at_most
    assert not Schedule.parse("hivtp@0:0.4").at_most


@pytest.mark.parametrize("keep", ["", ":0.4"])
def test_several_images_are_independent(tiny: Tiny, capture_view: Callable[..., TokenView], keep: str) -> None:
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    trace, _ = tiny.run(inputs, f"hivtp@0{keep}")
    assert_agree(kept(trace), wanted(tiny, capture_view(tiny, inputs, 2), 0.4 if keep else None))


@pytest.mark.parametrize("keep", ["", ":0.4", ":0.1"])
def test_after_an_earlier_stage(tiny: Tiny, capture_view: Callable[..., TokenView], keep: str) -> None:
    rng = random.Random(4)
    inputs = tiny.batch([tiny.row(rng) for _ in range(10)])
    present, found, view = deeper(tiny, inputs, capture_view, f"hivtp@3{keep}")
    ratio = float(keep[1:]) if keep else None
    assert_agree(found, wanted(tiny, view, ratio, present))
    if ratio:
        assert [len(tokens) for tokens in found] == [half_even(ratio * size) for size in view.sizes]
