"""DivPrune against hand-computed cases, a slow reference in plain Python, and its published averages."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import HandView, Observed, Tiny, angles, assert_agree, chosen, image_count, kept, observe

from lmms_prune import Schedule
from lmms_prune.methods.divprune import DivPrune
from lmms_prune.methods.view import TokenView


def select(tokens: torch.Tensor, count: int) -> set[int]:
    """What DivPrune keeps of one image's `tokens` (1, n, d); the rest of the sequence must not matter."""
    other = tokens.new_full((1, 1, tokens.shape[2]), 3.0)
    hidden = torch.cat([other, tokens, other, other], dim=1)
    view = HandView(hidden, visual=tokens.shape[1])
    [found] = chosen(DivPrune().select(view, torch.tensor([count])))
    return found


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, set()), (1, {2}), (2, {2, 5}), (3, {2, 4, 5}), (4, {1, 2, 4, 5}), (5, {1, 2, 3, 4, 5}), (6, set(range(6)))],
)
def test_by_hand(count: int, expected: set[int]) -> None:
    # Angles between plane vectors order as cosine distances do. Tokens at 0, 10, 90, 180, 200, 300 degrees.
    # Nearest neighbours are 10, 10, 80, 20, 20, 60 degrees away: token 2 (at 90°) starts.
    # Distances to it are 90, 80, -, 90, 110, 150: token 5 (300°).
    # Smaller distance to tokens 2 and 5: 60, 70, -, 90, 100, -: token 4 (200°).
    # To 2, 5 and 4: 60, 70, -, 20, -, -: token 1 (10°).  Then 10 for token 0 and 20 for token 3: token 3.
    tokens = angles(0, 10, 90, 180, 200, 300, length=[1, 5, 2, 0.1, 3, 7])
    assert select(tokens, count) == expected
    assert slow.divprune(tokens[0].tolist(), count)[0] == expected


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    layers, ratios = (0, 0, 0, 1, 2, 3, 5, 7), (0.33, 0.11, 0.5, 0.25, 0.75, 0.4, 0.6, 0.2)
    got, want = [], []
    for seen, layer, ratio in zip(batches, layers, ratios, strict=True):
        trace, _ = tiny.run(seen.inputs, f"divprune@{layer}:{ratio}")
        got += kept(trace)
        for span in seen.spans:
            states = seen.states(span, layer)
            tokens = [states[column] for column in span.visual]
            want.append(slow.divprune(tokens, round(ratio * len(tokens))))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_layer_0_reads_the_projected_image_features(tiny: Tiny, batches: list[Observed]) -> None:
    """At layer 0 the tokens are the projector's (or merger's) output, without any norm."""
    seen, model = batches[0], tiny.model()
    names = ("pixel_values", "image_grid_thw")
    arguments = {name: seen.inputs[name] for name in names if name in seen.inputs}
    with torch.no_grad():
        features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
    trace, _ = tiny.run(seen.inputs, "divprune@0:0.3")
    want = [slow.divprune(image.tolist(), round(0.3 * len(image))) for image in features]
    assert_agree(kept(trace), want)


def test_several_images_are_independent(tiny: Tiny) -> None:
    rng = random.Random(3)
    seen = observe(tiny, tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)]))
    trace, _ = tiny.run(seen.inputs, "divprune@0:0.5")
    want = []
    for span in seen.spans:
        states = seen.states(span, 0)
        want.append(slow.divprune([states[c] for c in span.visual], round(0.5 * len(span.visual))))
    assert len(want) == 6
    assert_agree(kept(trace), want)


def test_starts_with_the_most_isolated_token(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(1)
    view = capture_view(tiny, tiny.batch([tiny.row(rng) for _ in range(10)]), 0)
    found = chosen(DivPrune().select(view, torch.ones(10, dtype=torch.long)))
    for image, [first] in enumerate(found):
        tokens = view.hidden[image, : view.counts[image]].tolist()
        nearest = [min(1 - slow.cosine(x, y) for j, y in enumerate(tokens) if j != i) for i, x in enumerate(tokens)]
        assert nearest[first] == pytest.approx(max(nearest), abs=1e-9)


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_come_after_all_distinct_tokens(copies: int) -> None:
    """Axes are all at distance 1 from each other: exact in any arithmetic."""
    axes = torch.eye(6)
    tokens = torch.cat([axes * (1 + copy) for copy in range(copies)])[None]
    for count in range(1, 7):
        directions = [token % 6 for token in select(tokens, count)]
        assert len(directions) == len(set(directions)) == count
    assert select(tokens, 7) >= {0, 1, 2, 3, 4, 5}, "ties go to the lower index"


def test_no_token_twice_when_all_are_equal() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tokens = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype).expand(1, 12, 64)
        for count in range(13):
            assert len(select(tokens.contiguous(), count)) == count


def test_ties_go_to_the_lower_index() -> None:
    # All distances are 1; then opposite tokens: distance 2 from token 0 only.
    assert select(torch.eye(5)[None], 3) == {0, 1, 2}
    tokens = torch.cat([torch.eye(3), -torch.eye(3)])[None]
    # Token 0 starts (all have 1), its opposite 3 is 2 away, then 1, 2, 4, 5 are all at 1.
    assert select(tokens, 2) == {0, 3}
    assert select(tokens, 3) == {0, 1, 3}


def test_zero_vector_is_at_distance_1_to_all() -> None:
    # Tokens at 0°, 10° and a zero one: nearest neighbours are 0.015, 0.015 and 1 away.
    tokens = torch.cat([angles(0, 10), torch.zeros(1, 1, 2)], dim=1)
    assert select(tokens, 1) == {2}
    assert select(tokens, 2) == {0, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mutual_nearest_neighbours_tie(dtype: torch.dtype) -> None:
    """A crowd, and two lonely tokens nearest to each other: one distance, which rounding must not make two."""
    wrong = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        n = 5 + seed % 32
        centre, lonely = torch.randn(2, 64, generator=generator, dtype=dtype)
        tokens = centre + 0.1 * torch.randn(1, n, 64, generator=generator, dtype=dtype)
        pair = sorted(torch.randperm(n, generator=generator)[:2].tolist())
        tokens[0, pair] = lonely + 0.5 * torch.randn(2, 64, generator=generator, dtype=dtype)
        wrong += [(seed, size) for size in (1, 2, 5) if chosen_first(tokens, size) != pair[0]]
        assert slow.divprune(tokens[0].tolist(), 1)[0] == {pair[0]}
    assert not wrong


def chosen_first(tokens: torch.Tensor, size: int) -> int:
    """The token kept at N = 1, in a batch of `size` images of which the others are larger."""
    others = torch.zeros(1, 6, tokens.shape[2], dtype=tokens.dtype)
    hidden = torch.cat([others[:, :1], tokens, others], dim=1)
    noise = torch.randn(size - 1, *hidden.shape[1:], generator=torch.Generator().manual_seed(0), dtype=tokens.dtype)
    n = tokens.shape[1]
    view = HandView(torch.cat([hidden, noise]), [n] + [n + 3] * (size - 1))
    return chosen(DivPrune().select(view, torch.ones(size, dtype=torch.long)))[0].pop()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 14), st.data())
def test_equals_slow_reference_on_any_points(seed: int, n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    tokens = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, margin = slow.divprune(tokens[0].tolist(), count)
    assert select(tokens, count) == found or margin < 1e-12


@pytest.mark.parametrize("n", [1, 2])
def test_smallest_images(n: int) -> None:
    tokens = torch.randn(1, n, 4, generator=torch.Generator().manual_seed(n))
    for count in range(n + 1):
        assert select(tokens, count) == set(range(count))


def test_large_image_crosses_the_blocks() -> None:
    """More tokens than rows of a block of the distance matrix: the most isolated of 1100 tokens is the last."""
    tokens = torch.randn(1, 1100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens[..., 2] = tokens[..., 2].abs() + 1
    tokens[0, 1090] = torch.tensor([0.0, 0.0, -1.0])
    assert select(tokens, 1) == {1090}
    tokens[0, [5, 1090]] = tokens[0, [1090, 5]]
    assert select(tokens, 1) == {5}


@pytest.mark.parametrize(
    ("schedule", "average"),
    [
        ("divprune@0:0.33", 190.1),
        ("divprune@0:0.49,random@20:0.07", 191.5),
        ("divprune@0:0.49,vtw@21", 185.2),
        ("divprune@0:0.11", 63.4),
        ("divprune@0:0.17,random@20:0.02", 65.5),
        ("divprune@0:0.17,vtw@21", 64.3),
    ],
)
def test_averages_as_printed(schedule: str, average: float) -> None:
    """Table 5 of https://arxiv.org/abs/2512.07580 multiplies the ratios; whole tokens differ by half of one at most."""
    assert float(Schedule.parse(schedule).avg_visual_tokens(32, [576])) == pytest.approx(average, abs=0.55)


@pytest.mark.parametrize(
    ("schedule", "average"),
    [
        ("divprune@0:284t,random@20:38t", 191.75),
        ("divprune@0:96t,random@20:10t", 63.75),
        ("divprune@0:284t,vtw@20", 177.5),
        ("divprune@0:284t,vtw@21", 186.375),
        ("divprune@0:98t,vtw@21", 64.3125),
    ],
)
def test_averages_of_released_counts(schedule: str, average: float) -> None:
    assert float(Schedule.parse(schedule).avg_visual_tokens(32, [576])) == average


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [("divprune@0:0.50", 0.5), ("divprune@0:0.53,vtw@26", 0.492), ("divprune@0:0.53,random@25:0.25", 0.5)],
)
def test_qwen_averages(schedule: str, ratio: float) -> None:
    assert float(Schedule.parse(schedule).avg_visual_tokens(28, [1000])) / 1000 == pytest.approx(ratio, abs=6e-4)
