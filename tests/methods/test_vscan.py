"""VScan against hand-computed cases, its published counts and slow references in plain Python."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest
import slow
import torch
from encoders import CLIP, QWEN, half_even, hand_view, is_llava, tensor, top
from observed import HandView, Observed, Tiny, assert_agree, image_count, kept, run_to
from torch import Tensor

from lmms_prune import Schedule
from lmms_prune.methods import vscan
from lmms_prune.methods.pdrop import PDrop
from lmms_prune.methods.view import TokenView
from lmms_prune.methods.vscan import VScan
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.schedule.presets import PRESETS

Vectors = Sequence[Sequence[float]]


@dataclass
class Result:
    """Kept raster indices, those of the shallow map among them, the tokens, and a margin."""

    kept: list[int]
    local: list[int]
    tokens: list[list[float]]
    margin: float


def window_of(token: int, rows: int, columns: int, side: int) -> tuple[int, int]:
    row, column = divmod(token, columns)
    return min(row // side, max(1, rows // side) - 1), min(column // side, max(1, columns // side) - 1)


def quotas(shallow: Sequence[float], grid: tuple[int, int], half: int) -> tuple[list[int], float]:
    """LLaVA's rule: an equal share of every 6×6 window."""
    windows: dict[tuple[int, int], dict[int, float]] = {}
    for token, score in enumerate(shallow):
        windows.setdefault(window_of(token, *grid, 6), {})[token] = score
    found, margin = [], float("inf")
    for scores in windows.values():
        best, gap = top(scores, half // len(windows))
        found += best
        margin = min(margin, gap)
    return found, margin


def capped(shallow: Sequence[float], grid: tuple[int, int], half: int) -> tuple[list[int], float]:
    """Qwen2.5-VL's rule: the best of all, but no more than the limit of any 4×4 window."""
    windows = {window_of(token, *grid, 4) for token in range(len(shallow))}
    limit, taken, found = -(-half // len(windows)), Counter(), []
    order = slow.best_first(dict(enumerate(shallow)))
    for token in order:
        window = window_of(token, *grid, 4)
        if len(found) < half and taken[window] < limit:
            taken[window] += 1
            found.append(token)
    gaps = [shallow[a] - shallow[b] for a, b in pairwise(order)]
    return found, min(gaps, default=1.0)


def reference(
    shallow: Sequence[float],
    deep: Sequence[float],
    features: Vectors,
    grid: tuple[int, int],
    count: int,
    has_class: bool,
) -> Result:
    """VScan's first stage for one image (https://arxiv.org/abs/2505.22654), token by token."""
    local, margin = (quotas if has_class else capped)(shallow, grid, count // 2)
    others, gap = top({i: score for i, score in enumerate(deep) if i not in local}, count - len(local))
    found = sorted(local + others)
    margin = min(margin, gap)
    units = [slow.unit(x) for x in features]
    groups: dict[int, list[int]] = {i: [i] for i in found}
    for i in range(len(features)):
        if i not in groups:
            [goal], gap = top({j: slow.dot(units[i], units[j]) for j in found}, 1)
            groups[goal].append(i)
            margin = min(margin, gap)
    tokens = [[sum(features[i][c] for i in g) / len(g) for c in range(len(features[0]))] for g in groups.values()]
    return Result(found, local, tokens, margin)


def view_of(
    shallow: Sequence[float], deep: Sequence[float], features: Vectors, grid: tuple[int, int], shape: EncoderShape
) -> HandView:
    view = hand_view(shape, grids=[grid], hidden=tensor([features]))
    maps = {5 if shape is CLIP else 7: tensor([shallow]), shape.selected: tensor([deep])}
    view.encoder.saliency = maps.__getitem__
    return view


def scanned(view: HandView, count: int) -> tuple[list[int], list[list[float]]]:
    method = VScan()
    keep = method.select(view, torch.tensor([count]))
    hidden, index = method.rewrite(view, keep)
    return index[keep].tolist(), hidden[keep].tolist()


def test_the_worked_example() -> None:
    angle = tensor([0, 90, 20, 80, 40, 30]).deg2rad()
    # The third channel carries the features; it is far too small to turn a direction.
    tokens = torch.stack([angle.cos(), angle.sin(), 2.0 ** torch.arange(6) * 1e-12], dim=1)
    shallow, deep = [0.1, 0.3, 0.2, 0.1, 0.2, 0.1], [0.5, 0.9, 0.1, 0.1, 0.3, 0.2]
    for shape in (CLIP, QWEN):
        index, found = scanned(view_of(shallow, deep, tokens.tolist(), (2, 3), shape), 4)
        text = vscan.__doc__ or ""
        assert f"Kept: {' '.join(f'v{i}' for i in index)}." in text
        assert [round(token[2] * 1e12, 6) for token in found] == [1, 5, 18, 16]
    assert "v1 becomes (2 + 8)/2 = 5 and v2 becomes (4 + 32)/2 = 18." in text


LLAVA = {32: 16, 64: 32, 96: 48, 128: 64, 160: 80, 192: 96, 288: 144, 48: 16, 100: 48}
"""Published: local tokens by N; of 48 and 100 the code keeps 40 and 98, we the deep map's next ones too."""


@pytest.mark.parametrize(("count", "local"), LLAVA.items())
def test_published_counts_of_llava(count: int, local: int) -> None:
    generator = torch.Generator().manual_seed(count)
    shallow, deep = torch.rand(2, 576, generator=generator).double().tolist()
    features = torch.randn(576, 4, generator=generator).double().tolist()
    index, tokens = scanned(view_of(shallow, deep, features, (24, 24), CLIP), count)
    want = reference(shallow, deep, features, (24, 24), count, True)
    assert (len(index), len(want.local)) == (count, local)
    assert index == want.kept
    # Exactly an equal share of the local tokens is in each of the 16 windows.
    assert set(Counter(window_of(i, 24, 24, 6) for i in want.local).values()) == {local // 16}
    for token, expected in zip(tokens, want.tokens, strict=True):
        assert token == pytest.approx(expected)


@pytest.mark.parametrize(
    ("grid", "keep", "count"),
    [((24, 37), "0.167", 148), ((32, 32), "0.167", 171), ((24, 24), "0.167", 96)],
)
def test_published_counts_of_qwen(grid: tuple[int, int], keep: str, count: int) -> None:
    size = grid[0] * grid[1]
    assert Schedule.parse(f"vscan@0:{keep}").plan([size])[0][0] == count
    generator = torch.Generator().manual_seed(size)
    shallow, deep = torch.rand(2, size, generator=generator).double().tolist()
    features = torch.randn(size, 3, generator=generator).double().tolist()
    index, _ = scanned(view_of(shallow, deep, features, grid, QWEN), count)
    want = reference(shallow, deep, features, grid, count, False)
    assert index == want.kept
    assert (len(want.local), len(index) - len(want.local)) == (count // 2, count - count // 2)
    windows = (grid[0] // 4) * (grid[1] // 4)
    assert max(Counter(window_of(i, *grid, 4) for i in want.local).values()) <= -(-(count // 2) // windows)


def test_presets_have_the_published_averages() -> None:
    for name, layers, average in (("vscan-64", 32, 64), ("vscan-128", 32, 128), ("vscan-192", 32, 192)):
        counts = Schedule.parse(PRESETS[name]).layer_counts(layers, [576])
        assert Fraction(sum(counts), layers) == average
    for name, share in (("vscan-11pct", 0.1113), ("vscan-50pct", 0.501)):
        counts = Schedule.parse(PRESETS[name]).layer_counts(28, [10_000])
        assert sum(counts) / 28 / 10_000 == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("shape", [CLIP, QWEN])
def test_small_grids_and_every_keep(shape: EncoderShape) -> None:
    """A direction shorter than a window has one; the surplus belongs to the last."""
    rng = random.Random(0)
    for grid in ((1, 1), (2, 3), (3, 9), (7, 7), (13, 5), (11, 4)):
        size = grid[0] * grid[1]
        shallow, deep = ([rng.random() for _ in range(size)] for _ in range(2))
        features = [[rng.random(), rng.random()] for _ in range(size)]
        for count in sorted({1, min(2, size), max(1, size // 3), max(1, size // 2), max(1, size - 1), size}):
            index, tokens = scanned(view_of(shallow, deep, features, grid, shape), count)
            want = reference(shallow, deep, features, grid, count, shape is CLIP)
            assert index == want.kept
            assert tokens == [pytest.approx(token) for token in want.tokens]


def test_mass_is_conserved_and_ties_go_to_the_lower_index() -> None:
    features = torch.ones(1, 36, 2).double()
    features[0, :, 1] = torch.arange(36)
    view = view_of([0.5] * 36, [0.5] * 36, [[1.0, 0.0]] * 36, (6, 6), CLIP)
    index, tokens = scanned(view, 4)
    assert index == [0, 1, 2, 3]
    # All are equally near to all, so the 32 others join the first, and nothing is lost.
    assert tokens == [[1.0, 0.0]] * 4
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 36, 3, generator=generator).double()
    view = view_of(list(range(36)), list(range(36)), hidden[0].tolist(), (6, 6), QWEN)
    method = VScan()
    keep = method.select(view, torch.tensor([7]))
    merged, _ = method.rewrite(view, keep)
    nearest = vscan._nearest_kept(view, keep)
    joined = torch.where(keep, torch.arange(36), nearest)[0].bincount(minlength=36)
    torch.testing.assert_close((merged[0] * joined[:, None])[keep[0]].sum(0), hidden[0].sum(0))


def test_blocks_that_are_recorded() -> None:
    assert VScan().signals(CLIP) == Signals(attention=frozenset({5, 22}), grids=True)
    assert VScan().signals(QWEN) == Signals(attention=frozenset({7, 31}), grids=True)


# -- whole runs --------------------------------------------------------------------------------------------------------


def shallow_block(tiny: Tiny) -> int:
    """5/24 of 3 and 7/32 of 4 blocks."""
    return 0


def wanted(tiny: Tiny, view: TokenView, features: Sequence[Vectors], keep: str) -> list[Result]:
    encoder = view.encoder
    maps = [
        encoder.class_attention(block).mean(1) if is_llava(tiny) else encoder.received(block)
        for block in (shallow_block(tiny), encoder.shape.selected)
    ]
    results = []
    for i, (size, grid) in enumerate(zip(view.sizes, view.grids, strict=True)):
        shallow, deep = (values[i, :size].tolist() for values in maps)
        count = half_even(float(keep) * size)
        results.append(reference(shallow, deep, features[i], grid, count, is_llava(tiny)))
    return results


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    """The tokens too: in the sequence that enters layer 0."""
    keeps = ("0.33", "0.11", "0.5", "0.4", "0.75", "0.2", "0.6", "0.25")
    got, want = [], []
    for seen, keep in zip(batches, keeps, strict=True):
        trace, entering = run_to(tiny, seen.inputs, f"vscan@0:{keep}", 0)
        features = [[seen.states(span, 0)[i] for i in span.visual] for span in seen.spans]
        results = wanted(tiny, encoder_view(tiny, seen), features, keep)
        sets = kept(trace)
        for i, (span, result) in enumerate(zip(seen.spans, results, strict=True)):
            got.append(sets[i])
            want.append((set(result.kept), result.margin))
            if sets[i] == set(result.kept) and result.margin > 1e-6:
                row = entering[span.row]
                # Rows are packed to the right: the text after the image follows its tokens.
                end = row.shape[0] - (span.length - 1 - span.visual[-1])
                tokens = torch.tensor(result.tokens, dtype=torch.float64)
                torch.testing.assert_close(row[end - len(tokens) : end], tokens, atol=1e-6, rtol=1e-6)
    assert len(got) == image_count(batches)
    assert_agree(got, want)


@pytest.mark.parametrize("rope", [True, False])
def test_second_stage_equals_slow_reference(tiny: Tiny, batches: list[Observed], rope: bool) -> None:
    """The last token's attention in the layer itself; its queries and keys from the model's projections, rotated or not."""
    got, want = [], []
    for number, seen in enumerate(batches):
        layer, ratio = 2 + number % 4, (0.33, 0.11, 0.5, 0.7)[number % 4]
        trace, _ = tiny.run(seen.inputs, f"vscan@{layer}:{ratio}" + ("" if rope else ";rope=false"))
        got += kept(trace)
        module = tiny.model().model.language_model.layers[layer]
        for span in seen.spans:
            if rope:
                rows = seen.attention(span, layer)
            else:
                rows = [[row] for row in unrotated(module, torch.tensor(seen.states(span, layer)))]
            want.append(slow.fastv(rows, span.visual, half_even(ratio * len(span.visual))))
    assert_agree(got, want)


def unrotated(module: torch.nn.Module, states: Tensor) -> list[list[float]]:
    """Each head's softmax of the last token over all, without positions."""
    attention = module.self_attn
    with torch.no_grad():
        normed = module.input_layernorm(states)
        width = attention.head_dim
        query = attention.q_proj(normed[-1:]).unflatten(-1, (-1, width))[0]
        key = attention.k_proj(normed).unflatten(-1, (-1, width))
    group = len(query) // key.shape[1]
    return [(key[:, head // group] @ query[head] / width**0.5).softmax(-1).tolist() for head in range(len(query))]


def test_second_stage_of_llava_is_pdrops(tiny: Tiny, batches: list[Observed]) -> None:
    seen = batches[0]
    runs = [kept(tiny.run(seen.inputs, f"{name}@4:0.3")[0]) for name in ("vscan", "pdrop")]
    assert runs[0] == runs[1]
    assert PDrop.paper != VScan.paper
