"""The controls, which read no signal or only the complete image; every table needs them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from observed import HandView, Tiny, chosen, kept, observe
from PIL import Image
from torch import Tensor

from lmms_prune import Schedule, ScheduleError
from lmms_prune.methods.base import grid_within
from lmms_prune.methods.downsample import Downsample
from lmms_prune.methods.keepfirst import KeepFirst
from lmms_prune.methods.keeplast import KeepLast
from lmms_prune.methods.pool import Pool
from lmms_prune.methods.stride import Stride
from lmms_prune.methods.view import TokenView


def view(*counts: int, **more: object) -> HandView:
    hidden = torch.randn(len(counts), max(counts) + 3, 2, dtype=torch.float64)
    return HandView(hidden, list(counts), **more)


def test_stride_by_hand() -> None:
    """Of 10 tokens 4: (2k+1)·10/8 = 1.25, 3.75, 6.25, 8.75. Of 6 tokens 3: 1, 3, 5. Of 5 tokens 5: all."""
    assert chosen(Stride().select(view(10, 6, 5), torch.tensor([4, 3, 5]))) == [
        {1, 3, 6, 8},
        {1, 3, 5},
        {0, 1, 2, 3, 4},
    ]
    assert chosen(Stride().select(view(10, 6, 5), torch.tensor([0, 1, 0]))) == [set(), {3}, set()]


@pytest.mark.parametrize("n", [1, 2, 7, 64, 575, 576])
def test_stride_gaps_differ_by_one_at_most(n: int) -> None:
    for count in {1, 2, 3, n // 3, n // 2, n - 1, n} & set(range(1, n + 1)):
        [image_spans] = chosen(Stride().select(view(n), torch.tensor([count])))
        gaps = {b - a for a, b in zip(sorted(image_spans), sorted(image_spans)[1:], strict=False)}
        assert len(image_spans) == count
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_first_and_last_by_hand() -> None:
    budget = torch.tensor([2, 3, 0])
    assert chosen(KeepFirst().select(view(5, 3, 4), budget)) == [{0, 1}, {0, 1, 2}, set()]
    assert chosen(KeepLast().select(view(5, 3, 4), budget)) == [{3, 4}, {0, 1, 2}, set()]


@pytest.mark.parametrize("method", ["stride", "keepfirst", "keeplast"])
def test_kept_columns_equal_a_slow_reference(tiny: Tiny, method: str) -> None:
    rng = random.Random(5)
    rows = [tiny.row(rng, images=rng.choice([1, 1, 2])) for _ in range(12)]
    for keep in (0.1, 0.33, 0.75):
        trace, _ = tiny.run(tiny.batch(rows), f"{method}@1:{keep}")
        for row in trace.rows:
            for n, tokens in zip(row.images, row.indices(0), strict=True):
                count = round(keep * n)
                want = {
                    "stride": [(2 * k + 1) * n // (2 * count) for k in range(count)],
                    "keepfirst": list(range(count)),
                    "keeplast": list(range(n - count, n)),
                }[method]
                assert tokens == want


def test_blind_equals_withdrawal_before_the_decoder(tiny: Tiny) -> None:
    inputs = tiny.batch([tiny.row(random.Random(3)) for _ in range(3)])
    blind, without = tiny.run(inputs, "blind@0"), tiny.run(inputs, "vtw@0")
    assert torch.equal(blind[1], without[1])
    assert kept(blind[0]) == [set()] * 3


@pytest.mark.parametrize(
    ("rows", "columns", "most", "grid"),
    [
        (24, 24, 192, (13, 13)),
        (24, 24, 144, (12, 12)),
        (24, 24, 5, (2, 2)),
        (24, 24, 1, (1, 1)),
        (24, 24, 576, (24, 24)),
        (8, 4, 8, (4, 2)),
        (4, 8, 9, (2, 4)),
        (2, 30, 5, (1, 5)),
        (30, 2, 5, (5, 1)),
        (3, 3, 0, (1, 1)),
        (1, 7, 7, (1, 7)),
    ],
)
def test_grid_within(rows: int, columns: int, most: int, grid: tuple[int, int]) -> None:
    assert grid_within(rows, columns, most) == grid


def test_pool_by_hand() -> None:
    """A 2 × 4 grid to at most 2 cells: columns 0 and 1 of both rows, columns 2 and 3 of both rows.

    Values 0 … 7 in raster order: (0+1+4+5)/4 = 2.5 and (2+3+6+7)/4 = 4.5. Middles: row 1, columns 1 and 3: 5 and 7.
    """
    values = torch.arange(11, dtype=torch.float64)
    hidden = torch.stack([values - 1, 10 * (values - 1)], dim=-1)[None]
    hand = HandView(hidden, 8, grids=[(2, 4)])
    mask = Pool().select(hand, torch.tensor([3]))
    assert chosen(mask) == [{0, 1}]
    pooled, index = Pool().rewrite(hand, mask)
    torch.testing.assert_close(pooled[0, :2], torch.tensor([[2.5, 25.0], [4.5, 45.0]], dtype=torch.float64))
    assert index[0, :2].tolist() == [5, 7]


def test_pool_equals_the_library_where_cells_are_equal(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    inputs = tiny.batch([([tiny.image(random.Random(1), (6, 4))], "is it red")])
    seen = capture_view(tiny, inputs, 0)
    [(rows, columns)] = seen.grids
    mask = Pool().select(seen, torch.tensor([rows * columns // 4]))
    pooled, index = Pool().rewrite(seen, mask)
    grid = seen.hidden[0].T.reshape(-1, rows, columns)
    want = torch.nn.functional.avg_pool2d(grid, 2).flatten(1).T
    torch.testing.assert_close(pooled[0, : len(want)], want)
    middles = [(2 * r + 1) * columns + 2 * c + 1 for r in range(rows // 2) for c in range(columns // 2)]
    assert index[0, : len(want)].tolist() == middles


def test_pool_at_deeper_layers_averages_the_tokens_present(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """A plain loop over the tokens that an earlier stage kept, cell by cell; empty cells are omitted."""
    rng = random.Random(2)
    seen = capture_view(tiny, tiny.batch([tiny.row(rng) for _ in range(6)]), 3, before="random@1:0.3,")
    budget = [round(0.2 * n) for n in seen.sizes]
    mask = Pool().select(seen, torch.tensor(budget))
    pooled, index = Pool().rewrite(seen, mask)
    vanished = 0
    for image, (rows, columns) in enumerate(seen.grids):
        r, c = grid_within(rows, columns, budget[image])
        cells: dict[tuple[int, int], list[Tensor]] = {}
        for span in range(seen.counts[image]):
            token = int(seen.index[image, span])
            cell = (token // columns * r // rows, token % columns * c // columns)
            cells.setdefault(cell, []).append(seen.hidden[image, span])
        assert mask[image].sum() == len(cells)
        vanished += r * c - len(cells)
        for span, cell in enumerate(sorted(cells)):
            torch.testing.assert_close(pooled[image, span], torch.stack(cells[cell]).mean(0))
            middle = (2 * cell[0] + 1) * rows // (2 * r) * columns + (2 * cell[1] + 1) * columns // (2 * c)
            assert index[image, span] == middle
    assert vanished, "some cells are empty, or the case is not tried"


def resized_image(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def test_downsample_is_the_encoder_on_a_smaller_image(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """A picture of broad stripes resized by Pillow beforehand gives nearly the same tokens as our resizing inside."""
    wide = (8, 8) if tiny.family == "llava" else (6, 8)
    side = 14 if tiny.family == "llava" else 28
    ramp = Image.linear_gradient("L").resize((wide[1] * side, wide[0] * side)).convert("RGB")
    view = capture_view(tiny, tiny.batch([([ramp], "what")]), 0)
    assert view.grids == [wide]
    method = Downsample()
    mask = method.select(view, torch.tensor([wide[0] * wide[1] // 4]))
    tokens, index = method.rewrite(view, mask)
    count = wide[0] * wide[1] // 4
    assert mask.sum() == count
    small = resized_image(ramp, wide[1] * side // 2, wide[0] * side // 2)
    processor = tiny.processor.image_processor
    pixels = torch.tensor(
        [[[p / 255 for p in row] for row in channel] for channel in _channels(small)], dtype=torch.float64
    )
    mean, std = (
        torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (processor.image_mean, processor.image_std)
    )
    [want] = view.encoder.encode([(pixels - mean) / std])
    # Pillow rounds to 256 levels, so the match is close but not exact; a shuffled raster is far off.
    error = (tokens[0, :count] - want).norm() / want.norm()
    shuffled = (tokens[0, :count].flip(0) - want).norm() / want.norm()
    assert error < 0.12
    assert error < shuffled / 3
    assert index[0, :count].tolist() == [
        (2 * r + 1) * wide[1] + 2 * c + 1 for r in range(wide[0] // 2) for c in range(wide[1] // 2)
    ]


def _channels(image: Image.Image) -> list[list[list[int]]]:
    width, height = image.size
    return [[[image.getpixel((x, y))[k] for x in range(width)] for y in range(height)] for k in range(3)]


def test_downsample_of_a_small_image_costs_the_tokens_it_produces(tiny: Tiny) -> None:
    rng = random.Random(4)
    inputs = tiny.batch([tiny.row(rng, images=2), tiny.row(rng)])
    trace, logits = tiny.run(inputs, "downsample@0:0.3,random@3:0.1")
    assert torch.isfinite(logits).all()
    for row in trace.rows:
        for n, count in zip(row.images, row.kept[0], strict=True):
            assert 0 < count <= round(0.3 * n)
        assert row.visual[0] == sum(row.kept[0])


def test_downsample_acts_before_the_decoder_only() -> None:
    with pytest.raises(ScheduleError, match="the layers at which it can act: 0"):
        Schedule.parse("downsample@1:0.3")


def test_pooling_survives_a_stage_after_it(tiny: Tiny) -> None:
    """Pooled tokens are tokens: later stages choose among them, and what was planned is at most what is kept."""
    inputs = observe(tiny, tiny.batch([tiny.row(random.Random(6))])).inputs
    trace, _ = tiny.run(inputs, "pool@0:0.5,fastv@2:0.2")
    [row] = trace.rows
    assert row.kept[1][0] == min(round(0.2 * row.images[0]), row.kept[0][0])
    assert set(row.indices(1)[0]) <= set(row.indices(0)[0])
