"""FasterVLM against a hand-computed case and loops over the vision encoder's attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import slow
import torch
from encoders import chunks_by_image
from observed import HandView, Observed, Tiny, assert_agree, chosen, image_count, kept

from lmms_prune.methods.fastervlm import FasterVLM
from lmms_prune.methods.view import TokenView
from lmms_prune.models.shape import EncoderShape


def hand(saliency: list[list[float]], counts: list[int]) -> HandView:
    hidden = torch.randn(len(counts), max(counts) + 3, 2, dtype=torch.float64)
    encoder = SimpleNamespace(saliency=lambda: torch.tensor(saliency, dtype=torch.float64))
    return HandView(hidden, counts, encoder=encoder)


def test_by_hand() -> None:
    """Of shares 0.1, 0.3, 0.2, 0.3, 0.05 the two 0.3 come first, the lower index before the higher."""
    view = hand([[0.1, 0.3, 0.2, 0.3, 0.05]], [5])
    for count, tokens in enumerate([set(), {1}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]):
        assert chosen(FasterVLM().select(view, torch.tensor([count]))) == [tokens]


def test_scores_are_those_of_the_tokens_present() -> None:
    """After an earlier stage kept tokens 4, 1 and 3, their scores are those at raster indices 4, 1 and 3."""
    view = hand([[0.1, 0.3, 0.2, 0.25, 0.4]], [3])
    view.index, view.sizes = torch.tensor([[4, 1, 3]]), [5]
    assert chosen(FasterVLM().select(view, torch.tensor([2]))) == [{0, 1}]


def test_it_needs_one_block() -> None:
    asks = FasterVLM().signals(EncoderShape(24, 22, 1))
    assert (asks.attention, asks.outputs, asks.features, asks.pixels) == (frozenset({22}), frozenset(), False, False)


def slow_fastervlm(tiny: Tiny, view: TokenView, ratio: float) -> list[tuple[set[int], float]]:
    """Column means of the selected block's attention: CLIP's class row, or all rows of a Qwen2.5-VL image."""
    patches = 1 if tiny.family == "llava" else 4
    totals = [torch.zeros(size * patches + (patches == 1), dtype=torch.float64) for size in view.sizes]
    rows = [0] * len(totals)
    for owner, queries, keys, attention in chunks_by_image(view.encoder, view.encoder.shape.selected):
        image = view.encoder.owner.index(owner)
        if patches == 1:
            attention = attention[:, queries == 0]
        rows[image] += attention.shape[0] * attention.shape[1]
        for head in attention:
            for weights in head:
                totals[image][keys] += weights
    found = []
    for total, count, size in zip(totals, rows, view.sizes, strict=True):
        means = (total / count).tolist()
        scores = {t: means[t + 1] if patches == 1 else sum(means[4 * t : 4 * t + 4]) / 4 for t in range(size)}
        order, number = slow.best_first(scores), round(ratio * size)
        margin = scores[order[number - 1]] - scores[order[number]] if 0 < number < size else float("inf")
        found.append((set(order[:number]), margin))
    return found


@pytest.mark.slow
def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    got, want = [], []
    for layer, seen in enumerate(batches):
        trace, _ = tiny.run(seen.inputs, f"fastervlm@{layer}:0.33")
        got += kept(trace)
        want += slow_fastervlm(tiny, encoder_view(tiny, seen), 0.33)
    assert layer == 7
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_a_few_equal_the_slow_reference(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(22)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 1)])
    trace, _ = tiny.run(inputs, "fastervlm@0:0.5")
    assert_agree(kept(trace), slow_fastervlm(tiny, capture_view(tiny, inputs, 0), 0.5))


def test_at_deeper_layers_it_ranks_the_tokens_present(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(23)
    inputs = tiny.batch([tiny.row(rng) for _ in range(4)])
    view = capture_view(tiny, inputs, 0)
    scores = view.encoder.saliency()
    trace, _ = tiny.run(inputs, "random@1:0.5,fastervlm@3:0.2")
    for image, row in enumerate(trace.rows):
        [present], [later] = row.indices(0), row.indices(1)
        order = slow.best_first({token: float(scores[image, token]) for token in present})
        assert later == sorted(order[: len(later)])
        assert len(later) == round(0.2 * row.images[0])
