"""HoloV against hand-computed cases and a slow reference in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from encoders import CLIP, QWEN, deeper, half_even, hand_view, is_llava, tensor
from observed import Observed, Tiny, angles, assert_agree, image_count, kept, observe
from slow import dot

from lmms_prune.methods import holov
from lmms_prune.methods.holov import HoloV
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals

Vectors = Sequence[Sequence[float]]


def reference(
    attention: Sequence[float],
    tokens: dict[int, Sequence[float]],
    size: int,
    count: int,
    crops: int,
) -> tuple[list[int], float]:
    """HoloV of one image (https://arxiv.org/abs/2510.02912): the kept tokens, crop by crop and by falling attention.

    `attention` is over all `size` tokens of the image, `tokens` are those present.
    """
    bounds, start = [], 0
    for p in range(crops):
        end = start + size // crops + (1 if p < size % crops else 0)
        bounds.append([i for i in range(start, end) if i in tokens])
        start = end
    scores = {}
    for p, members in enumerate(bounds):
        if not members:
            continue
        if len(members) == 1:
            scores[p] = attention[members[0]]
            continue
        scaled = [1000 * attention[i] for i in members]
        variances = variances_of([tokens[i] for i in members])
        mean_a, mean_v = sum(scaled) / len(members), sum(variances) / len(members)
        parts = [a + 0.09 * v * mean_a / (mean_v + 1e-6) for a, v in zip(scaled, variances, strict=True)]
        scores[p] = sum(parts) / len(parts)
    total = sum(scores.values()) + 1e-6
    weights = {p: score / total for p, score in scores.items()}
    share = {p: math.floor(weight * count) for p, weight in weights.items()}
    margin = min((abs(weights[p] * count - round(weights[p] * count)) for p in weights if count), default=math.inf)
    by_weight = sorted(weights, key=lambda p: (-weights[p], p))
    gaps = [weights[a] - weights[b] for a, b in pairwise(by_weight)]
    # What a crop cannot hold, and what rounding left, one each by falling weight, round by round.
    for p in share:
        share[p] = min(share[p], len(bounds[p]))
    missing = count - sum(share.values())
    while missing > 0:
        for p in by_weight:
            if missing > 0 and share[p] < len(bounds[p]):
                share[p] += 1
                missing -= 1
    found = []
    for p, number in share.items():
        order = sorted(bounds[p], key=lambda i: (-attention[i], i))
        if 0 < number < len(order):
            gaps.append(attention[order[number - 1]] - attention[order[number]])
        found += order[:number]
    return found, min([margin, *gaps])


def variances_of(vectors: Vectors) -> list[float]:
    lengths = [math.sqrt(sum(x * x for x in vector)) + 1e-6 for vector in vectors]
    found = []
    for i, vector in enumerate(vectors):
        row = []
        for j, other in enumerate(vectors):
            row.append(0.0 if i == j else dot(vector, other) / lengths[i] / lengths[j])
        mean = sum(row) / (len(vectors) - 1)
        found.append(sum((x - mean) ** 2 for x in row) / (len(vectors) - 1))
    return found


def view_of(attention: Sequence[float], tokens: torch.Tensor, shape=CLIP, present=None) -> TokenView:
    return hand_view(shape, grids=[(1, len(attention))], saliency=tensor([attention]), hidden=tokens, present=present)


def select(attention: Sequence[float], tokens: torch.Tensor, count: int, crops: int = 0, **named) -> list[int]:
    """The kept tokens in sequence order."""
    order = named.pop("order", "reference")
    view = view_of(attention, tokens, **named)
    method = HoloV(order=order, crops=crops)
    keep = method.select(view, torch.tensor([count]))
    assert int(keep.sum()) == count
    hidden, index = method.rewrite(view, keep)
    standing = index[keep].tolist()
    by_raster = {int(raster): tokens[0, column] for column, raster in enumerate(view.index[0].tolist())}
    assert all(torch.equal(token, by_raster[i]) for token, i in zip(hidden[keep], standing, strict=True))
    return standing


# Two crops of three tokens. All at right angles: no variance, so a crop's weight is its mean attention.
PLAIN = torch.eye(6, dtype=torch.float64)[None]
ATTENTION = [0.3, 0.1, 0.2, 0.05, 0.15, 0.1]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        # Weights 0.2 / 0.3 and 0.1 / 0.3: of one token 0.67 and 0.33, down to none; the one left goes to the first crop.
        (1, [0]),
        # 1.33 and 0.67: 1 and 0, and one more for the first.
        (2, [0, 2]),
        # 2.0 (a little less, by the 1e-6) and 1.0, down to 1 and 0; one more for each.
        (3, [0, 2, 4]),
        # 2.67 and 1.33: 2 and 1, one more for the first.
        (4, [0, 2, 1, 4]),
        # 3.33 and 1.67: 3 and 1; the one left would go to the first, which is full.
        (5, [0, 2, 1, 4, 5]),
        (0, []),
    ],
)
def test_by_hand(count: int, expected: list[int]) -> None:
    assert select(ATTENTION, PLAIN, count, crops=2) == expected
    assert select(ATTENTION, PLAIN, count, crops=2, order="raster") == sorted(expected)
    vectors = dict(enumerate(PLAIN[0].tolist()))
    assert reference(ATTENTION, vectors, 6, count, 2)[0] == expected


def test_tokens_beyond_full_crops_are_distributed_round_by_round() -> None:
    """Four crops of two, with weights 0.85, 0.08, 0.05 and 0.02.

    N = 5: ⌊4.25⌋ = 4, of which two fit, and none for the others. Three are left, one each for crops 1, 2 and 3. With N = 6
    the fourth is a second one of crop 1, with N = 7 the fifth one of crop 2.
    """
    attention = [0.45, 0.4, 0.05, 0.03, 0.02, 0.03, 0.01, 0.01]
    tokens = torch.eye(8, dtype=torch.float64)[None]
    assert select(attention, tokens, 5, crops=4) == [0, 1, 2, 5, 6]
    assert select(attention, tokens, 6, crops=4) == [0, 1, 2, 3, 5, 6]
    assert select(attention, tokens, 7, crops=4) == [0, 1, 2, 3, 5, 4, 6]


def test_variety_adds_to_a_crop() -> None:
    """Crops of three tokens with equal attention of 0.1; the first crop at 0, 60 and 180 degrees, all tokens of the second equal.

    Cosines 0.5 -1 -0.5: token 0 has 0, 0.5, -1, mean -0.25: (0.0625 + 0.5625 + 0.5625) / 2 = 0.59375; token 1 has 0.5, 0,
    -0.5, mean 0: 0.25; token 2 has -1, -0.5, 0, mean -0.75: (0.0625 + 0.0625 + 0.5625) / 2 = 0.34375.
    The second crop's are 0, 1, 1, mean 1: 1/2 each, from the zero of the diagonal alone.
    """
    tokens = torch.cat([angles(0, 60, 180), angles(40, 40, 40)], dim=1) * tensor([1, 2, 3, 1, 5, 1])[:, None]
    assert variances_of(tokens[0, :3].tolist()) == pytest.approx([0.59375, 0.25, 0.34375], abs=1e-5)
    assert variances_of(tokens[0, 3:].tolist()) == pytest.approx([0.5, 0.5, 0.5], abs=1e-5)
    unit = holov._unit(tokens).unflatten(1, (2, 3))
    expected = tensor([[[0.59375, 0.25, 0.34375], [0.5, 0.5, 0.5]]])
    members = torch.ones(1, 2, 3, dtype=torch.bool)
    torch.testing.assert_close(holov._variance(unit, members), expected, atol=1e-5, rtol=0)
    # A variance is scaled to the attention's mean, so that it adds 9 % to a crop's weight, but nothing where it is zero.
    right_angles = torch.cat([angles(0, 60, 180), torch.zeros(1, 3, 2, dtype=torch.float64)], dim=1)
    assert select([0.1] * 3 + [0.1085] * 3, right_angles, 1, crops=2) == [0], "109 against 108.5"
    assert select([0.1] * 3 + [0.1095] * 3, right_angles, 1, crops=2) == [3], "109 against 109.5"
    assert select([0.1] * 3 + [0.101] * 3, tokens, 1, crops=2) == [3], "109 against 110.1"


def test_matrices_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64), dim=-1)
    members = torch.rand(2, 3, 7, generator=generator) < 0.7
    unit = unit * members[..., None]
    variance = holov._variance(unit, members)
    monkeypatch.setattr(holov, "_ENTRIES", 100)
    torch.testing.assert_close(holov._variance(unit, members), variance)
    for b in range(2):
        for p in range(3):
            some = members[b, p]
            if some.sum() > 1:
                want = variances_of((unit[b, p][some] * 2).tolist())
                torch.testing.assert_close(variance[b, p][some], tensor(want), atol=1e-5, rtol=0)


def test_ties_go_to_the_lower_index() -> None:
    flat = [0.1] * 6
    assert select(flat, PLAIN, 3, crops=2) == [0, 1, 3]
    assert select(flat, PLAIN, 3, crops=3) == [0, 2, 4]


def test_crops_of_one_token_and_of_none() -> None:
    """Seven crops of six tokens: six of one each, by plain attention, and an empty one; then two with two tokens.

    Beside a pair, whose score is a thousandfold, a single token has next to no weight.
    """
    assert select(ATTENTION, PLAIN, 2, crops=7, order="raster") == [0, 2]
    # Four crops: {0 1} {2 3} {4} {5}: 200, 125, 0.15, 0.1 of 325.25; of three tokens 1.84 and 1.15, one left for the first.
    assert select(ATTENTION, PLAIN, 3, crops=4) == [0, 1, 2]
    # Of five: 3.07 and 1.92: 2 (full) and 1; two are left, for the second and the third.
    assert select(ATTENTION, PLAIN, 5, crops=4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("shape", [CLIP, QWEN])
def test_smallest_images(n: int, shape) -> None:
    generator = torch.Generator().manual_seed(n)
    attention = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
    tokens = torch.randn(1, n, 3, generator=generator, dtype=torch.float64)
    vectors = dict(enumerate(tokens[0].tolist()))
    for count in range(n + 1):
        crops = 16 if shape is CLIP else max(1, math.floor(1024 / 576 * n / max(1, count)))
        assert select(attention, tokens, count, shape=shape) == reference(attention, vectors, n, count, crops)[0]


@pytest.mark.parametrize(("n", "count", "crops"), [(576, 64, 16), (576, 192, 5), (1000, 334, 5), (1000, 900, 1)])
def test_crops_of_qwen(n: int, count: int, crops: int) -> None:
    """⌊1024/576 · n/N⌋: the 16 crops of LLaVA's 64 of 576."""
    view = view_of([0.1] * n, torch.zeros(1, n, 1, dtype=torch.float64), QWEN)
    assert HoloV()._crop_counts(view, torch.tensor([count])) == [crops]
    assert HoloV(crops=3)._crop_counts(view, torch.tensor([count])) == [3]
    assert HoloV()._crop_counts(view_of([0.1], torch.zeros(1, 1, 1)), torch.tensor([1])) == [16]


def test_dropped_tokens_are_no_candidates() -> None:
    """Crops are of the original image: {0 1 2} and {3 4 5}, of which 2, 4, 5 are present."""
    present = [2, 4, 5]
    tokens = PLAIN[:, present]
    # A single token has its plain attention, 0.2 against 125.
    assert select(ATTENTION, tokens, 1, crops=2, present=present) == [4]
    assert select(ATTENTION, tokens, 2, crops=2, present=present) == [4, 5]


def test_what_is_recorded() -> None:
    assert HoloV().signals(CLIP) == Signals(attention=frozenset({22}))


def wanted(
    tiny: Tiny, view: TokenView, seen: Observed, layer: int, ratio: float, crops: int = 0
) -> list[tuple[list[int], float]]:
    attention, results = view.encoder.saliency().tolist(), []
    for i, span in enumerate(seen.spans):
        size, states = len(span.visual), seen.states(span, layer)
        count = half_even(ratio * size)
        number = crops or (16 if is_llava(tiny) else max(1, math.floor(1024 / 576 * size / count)))
        tokens = {raster: states[column] for raster, column in enumerate(span.visual)}
        results.append(reference(attention[i], tokens, size, count, number))
    return results


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    ratios, layers, crops = (
        (0.33, 0.22, 0.11, 0.5, 0.75, 0.4, 0.6, 0.2),
        (0, 0, 0, 1, 2, 3, 5, 7),
        (0, 0, 0, 0, 0, 5, 7, 1),
    )
    got, want = [], []
    for number, seen in enumerate(batches):
        ratio, layer, order = ratios[number], layers[number], ("raster", "reference")[number % 2]
        view = encoder_view(tiny, seen)
        results = wanted(tiny, view, seen, layer, ratio, crops[number])
        schedule = f"holov@{layer}:{ratio};crops={crops[number]};order={order}"
        trace, _ = tiny.run(seen.inputs, schedule)
        got += kept(trace)
        want += [(set(tokens), margin) for tokens, margin in results]
    assert len(got) == image_count(batches)
    assert_agree(got, want)


@pytest.mark.parametrize("layer", [0, 2])
def test_reference_order(
    tiny: Tiny, batches: list[Observed], capture_view: Callable[..., TokenView], layer: int
) -> None:
    """Crops in order, the tokens of each by falling attention; states and raster indices go along."""
    seen = batches[0]
    view = capture_view(tiny, seen.inputs, layer or 2)
    results = wanted(tiny, view, seen, layer, 0.4)
    full = full_view(tiny, seen, capture_view, layer)
    budget = torch.tensor([half_even(0.4 * size) for size in full.sizes])
    method = HoloV(order="reference")
    keep = method.select(full, budget)
    hidden, index = method.rewrite(full, keep)
    for i, (tokens, _) in enumerate(results):
        assert index[i, keep[i]].tolist() == tokens
        assert torch.equal(hidden[i, keep[i]], full.hidden[i, tokens])
    assert any(tokens != sorted(tokens) for tokens, _ in results)


def full_view(tiny: Tiny, seen: Observed, capture_view: Callable[..., TokenView], layer: int) -> TokenView:
    view = capture_view(tiny, seen.inputs, layer)
    assert list(view.counts) == list(view.sizes)
    return view


def test_several_images_are_independent(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(3)
    seen = observe(tiny, tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)]))
    trace, _ = tiny.run(seen.inputs, "holov@0:0.4")
    results = wanted(tiny, capture_view(tiny, seen.inputs, 2), seen, 0, 0.4)
    assert_agree(kept(trace), [(set(tokens), margin) for tokens, margin in results])


@pytest.mark.parametrize("order", ["raster", "reference"])
def test_after_an_earlier_stage(tiny: Tiny, capture_view: Callable[..., TokenView], order: str) -> None:
    """Crops of the original image, restricted to the tokens present, with hidden states of the pruned run."""
    rng = random.Random(4)
    inputs = tiny.batch([tiny.row(rng) for _ in range(10)])
    present, found, _ = deeper(tiny, inputs, capture_view, f"holov@3:0.4;order={order}")
    cut = capture_view(tiny, inputs, 3, "divprune@0:0.7,")
    attention = cut.encoder.saliency().tolist()
    want = []
    for i, size in enumerate(cut.sizes):
        count = half_even(0.4 * size)
        rasters = cut.index[i, : cut.counts[i]].tolist()
        assert set(rasters) == set(present[i])
        tokens = dict(zip(rasters, cut.hidden[i].tolist(), strict=False))
        crops = 16 if is_llava(tiny) else max(1, math.floor(1024 / 576 * size / count))
        tokens_kept, margin = reference(attention[i], tokens, size, count, crops)
        want.append((set(tokens_kept), margin))
    assert_agree(found, want)


def test_a_later_stage_after_the_reference_order(tiny: Tiny) -> None:
    """HoloV again, on tokens that are not in raster order."""
    inputs = tiny.batch([tiny.row(random.Random(6)) for _ in range(4)])
    for order in ("raster", "reference"):
        trace, _ = tiny.run(inputs, f"holov@0:0.6;order={order},holov@3:0.3;order={order}")
        for before, after in zip(kept(trace, 0), kept(trace, 1), strict=True):
            assert after < before
