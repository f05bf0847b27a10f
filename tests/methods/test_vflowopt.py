"""VFlowOpt against hand-computed cases, a slow reference of importance and merging, and its published budgets."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from encoders import chunks_by_image
from observed import HandView, Observed, Tiny, assert_agree, chosen, image_count, kept, observe
from slow import best_first
from slow_merging import Token, assert_same_tokens, mean, outcome
from torch import Tensor

from lmms_prune import Schedule
from lmms_prune.methods import vflowopt
from lmms_prune.methods.vflowopt import VFlowOpt, _entropy
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.encoder import Encoder, cells
from lmms_prune.models.shape import EncoderShape

Matrix = list[list[float]]


def attentions(encoder: Encoder) -> list[Matrix]:
    """Head-mean attention between the tokens of each image: mean over a token's rows, sum over its columns."""
    first, patches = (encoder.shape.class_tokens, encoder.shape.patches_per_token)
    sizes = [first + patches * rows * columns for rows, columns in encoder.grids]
    full = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
    for image, queries, keys, attention in chunks_by_image(encoder, encoder.shape.selected):
        full[image][queries[:, None], keys] = attention.mean(0).double()
    tokens = []
    for matrix in full:
        rows = matrix[first:, first:].tolist()
        n = len(rows) // patches
        pooled = [[0.0] * n for _ in range(n)]
        for q, row in enumerate(rows):
            for k, value in enumerate(row):
                pooled[q // patches][k // patches] += value / patches
        tokens.append(pooled)
    return tokens


def importance(attention: Matrix, t: float) -> tuple[list[float], float]:
    n = len(attention)
    received = [sum(row[k] for row in attention) / n for k in range(n)]
    limit = t * sum(received) / n
    asking = [k for k in range(n) if received[k] > limit]
    margin = min(abs(value - limit) / limit for value in received) if limit else 1.0
    if not asking:
        ranked = best_first(dict(enumerate(received)))
        asking = ranked[:1]
        if n > 1:
            margin = min(margin, received[ranked[0]] - received[ranked[1]])
    return [sum(attention[q][k] for q in asking) / len(asking) for k in range(n)], margin


def merged(
    scores: list[float], states: list[list[float]], grid: tuple[int, int], count: int, m: float
) -> tuple[list[Token], float]:
    """From the least important token up, tokens join the group of their cell until `count` tokens and groups are left."""
    n = len(scores)
    ranked = best_first(dict(enumerate(scores)))
    groups: dict[tuple[int, int], list[int]] = {}
    left, low = n, 0
    while left > count and low < n:
        token = ranked[n - 1 - low]
        cell = (math.floor(token // grid[1] / m), math.floor(token % grid[1] / m))
        left -= cell in groups
        groups.setdefault(cell, []).append(token)
        low += 1
    margin = scores[ranked[n - 1 - low]] - scores[ranked[n - low]] if 0 < low < n else 1.0
    tokens = {token: Token(token, states[token], []) for token in ranked[: n - low]}
    for group in groups.values():
        # The last one that joined is the most important.
        lead = group[-1]
        tokens[lead] = Token(lead, mean([states[i] for i in group], [scores[i] for i in group]), [])
    # More cells than tokens requested: the most important ones.
    kept_tokens = sorted(sorted(tokens, key=lambda i: (-scores[i], i))[:count])
    return [tokens[token] for token in kept_tokens], margin


class FakeEncoder(ClipEncoder):
    """One image with one token per patch, and the given attention of every head."""

    def __init__(self, attention: Tensor, grid: tuple[int, int], image: Tensor | None = None):
        self.shape, self.grids, self.owner = EncoderShape(1, 0, class_tokens=1), [grid], [0]
        self.attention, self.image = attention, image

    def attention_chunks(self, block: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        assert block == 0
        entries = torch.arange(self.attention.shape[-1])[None]
        yield entries, entries, self.attention[None]

    def images(self) -> list[Tensor]:
        assert self.image is not None
        return [self.image]


def hand_tower(image: Tensor | None = None) -> FakeEncoder:
    """Two heads, a class token and four patches. The means of the heads over patches, in sixteenths:

        query \\ key   p0  p1  p2  p3
        p0              1   1   9   1
        p1              2   2   8   2
        p2              6   1   2   5
        p3              1   1   9   3
        received       10   5  28  11   sixteenths in all, the mean is 13.5

    At t = 2, 28 > 27: p2 alone asks, importance is its row: 6, 1, 2, 5. At t = 0.8, 28 and 11 exceed 10.8: p2 and p3,
    the mean of their rows 3.5, 1, 5.5, 4. At t = 3 none asks, so that the most attended one does: as at t = 2.
    """
    rows = torch.tensor([[1, 1, 9, 1], [2, 2, 8, 2], [6, 1, 2, 5], [1, 1, 9, 3]], dtype=torch.float64) / 16
    whole = torch.full((5, 5), 0.9, dtype=torch.float64)  # the class token's row and column must not matter
    whole[1:, 1:] = rows
    change = torch.zeros_like(whole)
    change[1:, 1:] = 1 / 32
    return FakeEncoder(torch.stack([whole + change, whole - change]), (2, 2), image)


def view_of(encoder: FakeEncoder, states: Tensor, layer: int = 0) -> HandView:
    """One image of tokens with one feature each."""
    hidden = torch.nn.functional.pad(states, (1, 1))[None, :, None]
    view = HandView(hidden, len(states), encoder=encoder, grids=encoder.grids)
    view.layer = layer
    return view


@pytest.mark.parametrize(("t", "expected"), [(2.0, [6, 1, 2, 5]), (0.8, [3.5, 1, 5.5, 4]), (3.0, [6, 1, 2, 5])])
def test_importance_by_hand(t: float, expected: list[float]) -> None:
    view = view_of(hand_tower(), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(VFlowOpt(t=t)._importance(view)[0], torch.tensor(expected, dtype=torch.float64) / 16)


def test_dropping_by_hand() -> None:
    # Importance 6, 1, 2, 5 at t = 2: by rank 0, 3, 2, 1.
    for count, expected in enumerate([set(), {0}, {0, 3}, {0, 2, 3}, {0, 1, 2, 3}]):
        view = view_of(hand_tower(), torch.zeros(4, dtype=torch.float64), layer=2)
        assert chosen(VFlowOpt(t=2.0).select(view, torch.tensor([count]))) == [expected]


def test_merging_by_hand() -> None:
    # States 10, 20, 30, 40; importance 6, 1, 2, 5; the whole 2×2 grid is one cell at m = 2.
    # N = 3: 1 and 2 are merged: (1·20 + 2·30)/3 = 80/3 at 2. N = 2: 1, 2 and 3: (20 + 60 + 200)/8 = 35 at 3.
    # N = 1: all: (60 + 20 + 60 + 200)/14 at 0.
    states = torch.tensor([10.0, 20, 30, 40], dtype=torch.float64)
    for count, image_spans, values in ((3, [0, 2, 3], [10, 80 / 3, 40]), (2, [0, 3], [10, 35]), (1, [0], [340 / 14])):
        view, method = view_of(hand_tower(), states), VFlowOpt(t=2.0, m=2.0)
        mask = method.select(view, torch.tensor([count]))
        found, index = method.rewrite(view, mask)
        assert chosen(mask) == [set(image_spans)]
        torch.testing.assert_close(found[0, mask[0], 0], torch.tensor(values, dtype=torch.float64))
        assert torch.equal(index, view.index)


def test_cells_by_hand() -> None:
    # m = 1.5: rows and columns 0 and 1 both lie in cell ⌊1/1.5⌋ = 0; m = 1 makes every token its own cell, where nothing
    # can be merged: all four are low, and the N most important stay as they are.
    states = torch.tensor([10.0, 20, 30, 40], dtype=torch.float64)
    for m, values in ((1.5, [10, 35]), (1.0, [10, 40])):
        view, method = view_of(hand_tower(), states), VFlowOpt(t=2.0, m=m)
        mask = method.select(view, torch.tensor([2]))
        assert chosen(mask) == [{0, 3}]
        torch.testing.assert_close(method.rewrite(view, mask)[0][0, mask[0], 0], torch.tensor(values).double())


def test_cells_of_two_rows_by_hand() -> None:
    # A 2×4 grid at m = 2: left and right cells. Importance by place: 8 1 2 3 / 7 6 5 4.
    # N = 5: from below join 1 (left), 2 (right), 3 (right, -1), 7 (right, -2), 6 (right, -3): 8 - 5 + 2 = 5 left.
    # The groups: {1} stays at 1, {2, 3, 7, 6} with importance 2, 3, 4, 5 becomes its mean at 6.
    rows = torch.zeros(9, 9, dtype=torch.float64)
    rows[1:, 1:] = torch.tensor([8.0, 1, 2, 3, 7, 6, 5, 4], dtype=torch.float64)
    states = torch.arange(8, dtype=torch.float64)
    view, method = view_of(FakeEncoder(rows[None], (2, 4)), states), VFlowOpt(t=1.0, m=2.0)
    mask = method.select(view, torch.tensor([5]))
    assert chosen(mask) == [{0, 1, 4, 5, 6}]
    found = method.rewrite(view, mask)[0][0, mask[0], 0]
    last = (2 * 2 + 3 * 3 + 4 * 7 + 5 * 6) / 14
    torch.testing.assert_close(found, torch.tensor([0, 1, 4, 5, last], dtype=torch.float64))


def grey(pixel: list[float]) -> int:
    red, green, blue = (math.trunc(value * 255) % 256 for value in pixel)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) // 65536


def entropy(image: Tensor, rows: int, columns: int) -> list[float]:
    high, wide = image.shape[1] // rows, image.shape[2] // columns
    found = []
    for row in range(rows):
        for column in range(columns):
            values = [
                grey(image[:, y, x].tolist())
                for y in range(row * high, (row + 1) * high)
                for x in range(column * wide, (column + 1) * wide)
            ]
            shares = [count / len(values) for count in Counter(values).values()]
            found.append(-sum(share * math.log2(share) for share in shares))
    return found


def test_entropy_by_hand() -> None:
    # 2×2 tokens of 2×2 pixels, all channels equal, so that the grey value is the byte itself: 0.5·255 = 127.5 -> 127,
    # -0.5 -> -127 -> 129, -1 -> -255 -> 1, 1 -> 255, 1.004 -> 256.02 -> 0.
    values = torch.tensor(
        [[0.5, 0.5, 0.5, -0.5], [0.5, 0.5, 0.5, -0.5], [-1.0, 1.0, 0.0, 1.004], [0.5, -0.5, 1.0, 1.0]]
    )
    assert [grey([x] * 3) for x in (0.5, -0.5, -1.0, 1.0, 1.004)] == [127, 129, 1, 255, 0]
    # One value: 0 bits; two: 1 bit; four: 2 bits; {0, 0, 255, 255}: 1 bit, as 1.004 wraps round.
    found = _entropy(cells(values.expand(1, 3, 4, 4), 2, 2)[0])
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0, 1.0]))


def test_entropy_equals_slow_reference() -> None:
    image = torch.randn(3, 12, 18, generator=torch.Generator().manual_seed(0)) * 1.5
    torch.testing.assert_close(_entropy(cells(image[None], 2, 3)[0]), torch.tensor(entropy(image, 2, 3)))
    # Not squares, and pixels beyond the last token are left out.
    torch.testing.assert_close(
        _entropy(cells(image[None, :, :11, :17], 2, 4)[0]), torch.tensor(entropy(image[:, :11, :17], 2, 4))
    )


def test_entropy_adds_to_importance() -> None:
    image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    image[:, :4, :4] = 0.25
    view = view_of(hand_tower(image), torch.zeros(4, dtype=torch.float64))
    bits = [math.exp(x) for x in entropy(image, 2, 2)]
    expected = [x / 16 + 3 * e / sum(bits) for x, e in zip([6, 1, 2, 5], bits, strict=True)]
    found = VFlowOpt(t=2.0, alpha=3.0)._importance(view)[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert VFlowOpt(alpha=0.5).signals(EncoderShape(3, 1, 1)).pixels
    assert not VFlowOpt().signals(EncoderShape(3, 1, 1)).pixels


# Ratio, t, m: thresholds above and below what tokens reach, cells from one token to the whole image.
SETTINGS = (
    (0.6, 28.683, 11.757),
    (0.5, 1.5, 3.0),
    (0.33, 2.0, 2.5),
    (0.2, 1.2, 4.0),
    (0.8, 0.5, 2.0),
    (0.1, 1.0001, 3.7),
    (0.4, 3.0, 1.0),
    (0.26, 0.9, 5.0),
)


@pytest.mark.parametrize("layer", [0, 4])
def test_equals_slow_reference(
    tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView], layer: int
) -> None:
    # All prompts for the published place, fewer for the deeper stage.
    asked_many, number, step = 0, 0, 3 if layer else 1
    for seen, (ratio, t, m) in list(zip(batches, SETTINGS, strict=True))[::step]:
        text = f"vflowopt@{layer}:{ratio};t={t};m={m}"
        view = encoder_view(tiny, seen)
        scores = [importance(attention, t) for attention in attentions(view.encoder)]
        asked_many += t < 2
        counts = [round(ratio * size) for size in view.sizes]
        if layer:
            trace, _ = tiny.run(seen.inputs, text)
            want = []
            for (values, margin), count in zip(scores, counts, strict=True):
                ranked = best_first(dict(enumerate(values)))
                gap = values[ranked[count - 1]] - values[ranked[count]] if 0 < count < len(ranked) else 1.0
                want.append((set(ranked[:count]), min(margin, gap)))
            assert_agree(kept(trace), want)
        else:
            trace, states = outcome(tiny, seen, text)
            assert [len(image) for image in kept(trace)] == counts
            expected = []
            for span, grid, (values, margin), count in zip(seen.spans, view.grids, scores, counts, strict=True):
                vectors = seen.states(span, 0)
                tokens, gap = merged(values, [vectors[c] for c in span.visual], grid, count, m)
                expected.append((tokens, min(margin, gap * 100)))
            assert_same_tokens(trace, states, expected)
        number += len(seen.spans)
    assert number == image_count(batches[::step])
    assert asked_many


def test_importance_of_real_images(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """Its scale counts beside the entropy's softmax: a row sums to 1 but for what the class token gets."""
    rows = [tiny.row(random.Random(i), images=n) for i, n in enumerate((1, 2))]
    view = capture_view(tiny, tiny.batch(rows), 0)
    found = VFlowOpt(t=1.5, alpha=0.7)._importance(view)
    images = zip(view.encoder.images(), attentions(view.encoder), view.grids, strict=True)
    for image, (pixels, attention, grid) in enumerate(images):
        bits = [math.exp(x) for x in entropy(pixels, *grid)]
        looked, _ = importance(attention, 1.5)
        want = torch.tensor([a + 0.7 * b / sum(bits) for a, b in zip(looked, bits, strict=True)])
        torch.testing.assert_close(found[image, : len(want)].float(), want, atol=1e-6, rtol=1e-5)


def test_several_images_and_stages(tiny: Tiny) -> None:
    inputs = tiny.batch([tiny.row(random.Random(i), images=n) for i, n in enumerate((2, 1, 0))])
    trace, logits = tiny.run(inputs, "vflowopt@0:0.6;m=3,vflowopt@2:0.4,vflowopt@5:0.2;alpha=0.5")
    assert torch.isfinite(logits).all()
    for row in trace.rows:
        assert row.kept == [[round(ratio * size) for size in row.images] for ratio in (0.6, 0.4, 0.2)]
        first, second, third = ([set(image) for image in row.indices(stage)] for stage in range(3))
        assert all(c <= b <= a for a, b, c in zip(first, second, third, strict=True))


def test_importance_is_computed_once_per_prefill(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], vflowopt._attention_of_global_tokens
    monkeypatch.setattr(vflowopt, "_attention_of_global_tokens", lambda *args: calls.append(args) or original(*args))
    tiny.run(tiny.batch([tiny.row(random.Random(0))]), "vflowopt@0:0.6,vflowopt@2:0.4,vflowopt@5:0.2")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("share", "ratios", "t", "m"),
    [
        (50, (0.7233, 0.7487, 0.487), 28.683, 11.757),
        (25, (0.2651, 0.9833, 0.8773), 34.76, 15.58),
        (10, (0.1166, 1.0, 0.6011), 39.265, 17.387),
    ],
)
def test_presets(share: int, ratios: tuple[float, float, float], t: float, m: float) -> None:
    """Published ratios are of the tokens still present; over the 28 layers of LLaVA-OneVision they average to the share."""
    schedule = Schedule.parse(f"vflowopt-{share}")
    expected, left = [], 1.0
    for layer, ratio in zip((0, 9, 18), ratios, strict=True):
        left *= ratio
        if ratio < 1:
            expected.append((layer, round(left, 4)))
    assert [(stage.layer, float(stage.keep)) for stage in schedule.stages] == expected
    built = [stage.spec.build(dict(stage.options)) for stage in schedule.stages]
    assert {method.t for method in built} == {t}
    assert built[0].m == m
    assert float(schedule.avg_visual_tokens(28, [10_000])) / 10_000 == pytest.approx(share / 100, abs=0.002)


def test_published_share_of_merged_tokens() -> None:
    """On 24×24 tokens at 50 % there are as many cells as ⌊n/m²⌋ says, so that as many are merged as in the reference."""
    m = VFlowOpt().m
    assert len({(math.floor(r / m), math.floor(c / m)) for r in range(24) for c in range(24)}) == 4
    assert math.floor(576 / m**2) == 4


def test_the_count_is_met_whatever_the_cells(tiny: Tiny) -> None:
    seen = observe(tiny, tiny.batch([tiny.row(random.Random(i)) for i in range(3)]))
    for m in (1.0, 2.2, 3.0, 8.0, 100.0):
        for count in (1, 2, 5, 9):
            trace, states = outcome(tiny, seen, f"vflowopt@0:{count}t;m={m}")
            assert [len(image) for image in kept(trace)] == [count] * 3
            assert all(torch.isfinite(x).all() for x in states)
