"""Nüwa against hand-computed cases and plain loops over the encoder's signals, and its published keeps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace

import pytest
import slow
import torch
from observed import HandView, Observed, Tiny, assert_agree, chosen, image_count, kept, observe
from torch import Tensor

from lmms_prune import Schedule, prune
from lmms_prune.methods.nuwa import Nuwa
from lmms_prune.methods.view import TokenView
from lmms_prune.models.shape import EncoderShape

CaptureView = Callable[..., TokenView]


def elected(scores: Sequence[float], grid: tuple[int, int], count: int) -> tuple[set[int], float]:
    """The first stage's choice in plain loops, and its margin."""
    rows, columns = grid
    cells: dict[tuple[int, int], dict[int, float]] = {}
    for row in range(rows):
        for column in range(columns):
            raster = row * columns + column
            cells.setdefault((row // 2, column // 2), {})[raster] = scores[raster]
    most, candidates, margin = 0, set(), math.inf
    while len(candidates) < count:
        most += 1
        candidates = {token for cell in cells.values() for token in slow.best_first(cell)[:most]}
    for cell in cells.values():
        order = slow.best_first(cell)
        if most < len(order):
            margin = min(margin, cell[order[most - 1]] - cell[order[most]])
    order = slow.best_first({token: scores[token] for token in candidates})
    if count < len(order):
        margin = min(margin, scores[order[count - 1]] - scores[order[count]])
    return set(order[:count]), margin


def gathered(
    token: int,
    taken: set[int],
    scores: Sequence[float],
    grid: tuple[int, int],
    directions: Sequence[slow.Vector],
    features: Sequence[slow.Vector],
) -> list[float]:
    """What a kept token becomes before it is projected: the weights of the paper, row by row; directions have length 1."""
    among = sorted(scores[other] for other in taken)
    rank = Fraction(55, 100) * (len(among) - 1)
    low = among[math.floor(rank)]
    quantile = low + float(rank - math.floor(rank)) * (among[math.ceil(rank)] - low)
    if scores[token] >= quantile:
        return list(features[token])
    rows, columns = grid
    weights = []
    for other in range(len(scores)):
        distance = math.dist(divmod(token, columns), divmod(other, columns))
        near = 1 - min(distance / math.sqrt(280 * rows * columns / 576), 1)
        weights.append(max(slow.dot(directions[token], directions[other]), 0) * near)
    total = sum(weights) + 1e-8
    weights = [weight / total for weight in weights]
    weights[token] = 1.0
    return [slow.dot(weights, column) for column in zip(*features, strict=True)]


def eight_tokens(scores: Sequence[float], grid: tuple[int, int] = (2, 4)) -> HandView:
    """A view whose encoder says these scores; three blocks, of which the last two say how tokens resemble each other."""
    size = grid[0] * grid[1]
    # Token 3 has direction (1, 0) in the mean over blocks 1 and 2, token 2 (0.6, 0.8), token 7 (-1, 0), others (0, 1).
    mean = torch.tensor([[0.0, 1.0]]).repeat(size, 1)
    if size == 8:
        mean[2], mean[3], mean[7] = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    skew = torch.randn(size, 2, generator=torch.Generator().manual_seed(0))
    blocks = {0: torch.full((size, 2), math.nan), 1: 3 * mean + skew, 2: 3 * mean - skew}
    features = torch.arange(1.0, size + 1)[:, None] * torch.tensor([1.0, 10.0])
    encoder = SimpleNamespace(
        saliency=lambda: torch.tensor([scores], dtype=torch.float32),
        features=lambda: features[None],
        output=lambda block: blocks[block][None],
        shape=EncoderShape(depth=3, selected=1, class_tokens=1),
        project=lambda x: torch.cat([x, -x], dim=-1),
    )
    return HandView(torch.zeros(1, 2 + size, 4), size, encoder=encoder, grids=[grid], layer=0)


# Two cells: tokens 0, 1, 4, 5 and tokens 2, 3, 6, 7.
SCORES = (8, 7, 1, 4, 6, 5, 2, 3)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, set()),
        (1, {0}),
        (2, {0, 3}),  # one of each cell, although 0 and 1 are the two highest
        (3, {0, 1, 3}),  # two of each: 0, 1 and 3, 7
        (4, {0, 1, 3, 7}),
        (5, {0, 1, 4, 3, 7}),  # three of each: 0, 1, 4 and 3, 7, 6
        (6, {0, 1, 4, 3, 7, 6}),
        (7, {0, 1, 4, 5, 3, 7, 6}),
        (8, set(range(8))),
    ],
)
def test_election_by_hand(count: int, expected: set[int]) -> None:
    assert chosen(Nuwa().select(eight_tokens(SCORES), torch.tensor([count]))) == [expected]
    assert elected(SCORES, (2, 4), count)[0] == expected


def test_weights_by_hand() -> None:
    # Of {0, 3} with scores 8 and 4 the quantile is 4 + 0.55 * 4 = 6.2: token 0 stays as it is, token 3 gathers.
    # The reach of a 2 x 4 grid is sqrt(280 * 8 / 576) = 1.972027. Of token 3's neighbours token 2 (at distance 1) has
    # cosine 0.6 and weight 0.6 * (1 - 1 / 1.972027) = 0.295744; token 7 has cosine -1, so 0; token 6 cosine 0.
    # Divided by 1 + 0.295744: 0.228243; its own weight is then set to 1. Features are (t + 1) * (1, 10):
    # 4 + 0.228243 * 3 = 4.684729, and the same with 10.
    view = eight_tokens(SCORES)
    keep = Nuwa().select(view, torch.tensor([2]))
    hidden, index = Nuwa().rewrite(view, keep)
    assert index is view.index
    expected = torch.tensor([[1, 10, -1, -10], [4.684729, 46.84729, -4.684729, -46.84729]])
    torch.testing.assert_close(hidden[keep], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 11, 21, 41, 64])
def test_which_tokens_are_not_summed(count: int) -> None:
    """At 21 and 41 kept tokens 0.55 (N - 1) is an integer, and the token of that rank is not below the quantile."""
    rng = random.Random(count)
    scores = [float(x) for x in rng.sample(range(1000), 64)]
    view = eight_tokens(scores, (8, 8))
    hidden, _ = Nuwa().rewrite(view, keep := Nuwa().select(view, torch.tensor([count])))
    plain = view.encoder.project(view.encoder.features())
    alone = {t for t in chosen(keep)[0] if torch.equal(hidden[0, t], plain[0, t])}
    among = sorted((scores[t] for t in chosen(keep)[0]), reverse=True)
    assert alone == {
        t for t in chosen(keep)[0] if scores[t] in among[: count - math.ceil(Fraction(11 * (count - 1), 20))]
    }


def test_odd_edges_have_smaller_cells() -> None:
    # 3 x 3: cells of 4, 2, 2 and 1 tokens. Two of each would be 7, so that 8 needs three of each.
    for count in range(10):
        mask = Nuwa().select(eight_tokens([5, 4, 3, 2, 1, 9, 8, 7, 6], (3, 3)), torch.tensor([count]))
        assert chosen(mask) == [elected([5, 4, 3, 2, 1, 9, 8, 7, 6], (3, 3), count)[0]]
        assert int(mask.sum()) == count


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_tiny_grids_and_ties(grid: tuple[int, int]) -> None:
    size = grid[0] * grid[1]
    view = eight_tokens([1.0] * size, grid)
    for count in range(size + 1):
        keep = Nuwa().select(view, torch.tensor([count]))
        assert chosen(keep) == [elected([1.0] * size, grid, count)[0]]
        hidden, _ = Nuwa().rewrite(view, keep)
        assert torch.isfinite(hidden).all()


@pytest.mark.parametrize(("count", "most"), [(112, 1), (224, 2), (336, 3)])
def test_published_numbers_per_cell(count: int, most: int) -> None:
    rng = random.Random(count)
    view = eight_tokens([rng.random() for _ in range(576)], (24, 24))
    [tokens] = chosen(Nuwa().select(view, torch.tensor([count])))
    cells: dict[tuple[int, int], int] = {}
    for token in tokens:
        cell = (token // 24 // 2, token % 24 // 2)
        cells[cell] = cells.get(cell, 0) + 1
    assert len(tokens) == count
    assert max(cells.values()) == most


def entering(tiny: Tiny, inputs: dict[str, Tensor], schedule: str) -> tuple[list[set[int]], Tensor]:
    """The kept tokens, and what enters layer 0 after the stage there."""
    seen: list[Tensor] = []
    model = tiny.model()
    with torch.no_grad(), prune(model, schedule) as trace:
        layer = model.model.language_model.layers[0]
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs, logits_to_keep=1)
        handle.remove()
    return kept(trace), seen[0]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    """Which tokens are kept, in which order, and what they carry into the decoder."""
    ratios = (0.26, 0.41, 0.05, 0.5, 0.75, 0.15, 0.33, 0.6)
    got, want = [], []
    for seen, ratio in zip(batches, ratios, strict=True):
        encoder = encoder_view(tiny, seen).encoder
        depth = encoder.shape.depth
        third = range(15 * depth // 24, depth)
        assert 0 < third[0] < depth
        scores, features = encoder.saliency().tolist(), encoder.features().tolist()
        states = sum(encoder.output(block) for block in third).tolist()
        tokens, hidden = entering(tiny, seen.inputs, f"nuwa@0:{ratio}")
        got += tokens
        for image, (span, grid) in enumerate(zip(seen.spans, encoder.grids, strict=True)):
            size = len(span.visual)
            count = round(ratio * size)
            want.append(elected(scores[image][:size], grid, count))
            length = span.length - size + count
            found = hidden[span.row, len(hidden[0]) - length + span.visual[0] :][:count]
            directions = [slow.unit(x) for x in states[image][:size]]
            rich = [
                gathered(t, tokens[image], scores[image][:size], grid, directions, features[image][:size])
                for t in sorted(tokens[image])
            ]
            expected = encoder.project(torch.tensor([rich], dtype=torch.float64).view(1, count, len(features[0][0])))[0]
            torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_second_stage_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    got, want = [], []
    for layer, seen in enumerate(batches[:7], 1):
        got += kept(tiny.run(seen.inputs, f"nuwa@{layer}:0.3")[0])
        for span in seen.spans:
            want.append(slow.fastv(seen.attention(span, layer - 1), span.visual, round(0.3 * len(span.visual))))
    assert_agree(got, want)


def test_both_stages(tiny: Tiny) -> None:
    """The second stage ranks the tokens that the first has kept, and does not change them."""
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    both, logits = tiny.run(inputs, "nuwa@0:0.6,nuwa@4:0.2")
    first, _ = tiny.run(inputs, "nuwa@0:0.6")
    other, same = tiny.run(inputs, "nuwa@0:0.6,fastv@4:0.2")
    assert kept(both) == kept(first)
    assert kept(both, stage=1) == kept(other, stage=1)
    assert torch.equal(logits, same)


def test_several_images_are_independent(tiny: Tiny, capture_view: CaptureView) -> None:
    rng = random.Random(5)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    encoder = capture_view(tiny, inputs, 0).encoder
    image_spans = observe(tiny, inputs).spans
    sizes = [len(span.visual) for span in image_spans]
    want = [
        elected(scores[:size], grid, round(0.4 * size))
        for scores, size, grid in zip(encoder.saliency().tolist(), sizes, encoder.grids, strict=True)
    ]
    assert_agree(kept(tiny.run(inputs, "nuwa@0:0.4")[0]), want)


def test_blocks_of_the_published_encoders() -> None:
    """Hidden states 16 to 24 of CLIP are the outputs of its blocks 15 to 23."""
    asks = Nuwa().signals(EncoderShape(depth=24, selected=22, class_tokens=1))
    assert sorted(asks.outputs) == list(range(15, 24))
    assert asks.attention == {22}
    assert asks.features
    assert sorted(Nuwa().signals(EncoderShape(32, 31)).outputs) == list(range(20, 32))


@pytest.mark.parametrize(("budget", "first", "second"), [(192, 336, 48), (128, 224, 32), (64, 112, 16)])
def test_published_budgets(budget: int, first: int, second: int) -> None:
    schedule = Schedule.parse(f"nuwa-{budget}")
    assert schedule.plan([576]) == [[first], [second]]
    assert [stage.layer for stage in schedule.stages] == [0, 16]
    assert schedule.avg_visual_tokens(32, [576]) == budget
