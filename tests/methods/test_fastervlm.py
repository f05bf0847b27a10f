"""FasterVLM against a hand-computed case and loops over the vision tower's attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import slow
import torch
from observed import HandView, Tiny, assert_agree, chosen, kept

from lmms_prune.methods.fastervlm import FasterVLM
from lmms_prune.tower import TowerShape
from lmms_prune.view import TokenView


def hand(saliency: list[list[float]], counts: list[int]) -> HandView:
    hidden = torch.randn(len(counts), max(counts) + 3, 2, dtype=torch.float64)
    tower = SimpleNamespace(saliency=lambda: torch.tensor(saliency, dtype=torch.float64))
    return HandView(hidden, counts, tower=tower)


def test_by_hand() -> None:
    """Of shares 0.1, 0.3, 0.2, 0.3, 0.05 the two 0.3 come first, the lower index before the higher."""
    view = hand([[0.1, 0.3, 0.2, 0.3, 0.05]], [5])
    for count, tokens in enumerate([set(), {1}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]):
        assert chosen(FasterVLM().select(view, torch.tensor([count]))) == [tokens]


def test_scores_follow_the_tokens_that_are_left() -> None:
    """After an earlier stage left tokens 4, 1 and 3, their scores are those of places 4, 1 and 3."""
    view = hand([[0.1, 0.3, 0.2, 0.25, 0.4]], [3])
    view.index, view.sizes = torch.tensor([[4, 1, 3]]), [5]
    assert chosen(FasterVLM().select(view, torch.tensor([2]))) == [{0, 1}]


def test_it_asks_for_one_block() -> None:
    asks = FasterVLM().asks(TowerShape(24, 22, True))
    assert (asks.attention, asks.outputs, asks.features, asks.pixels) == (frozenset({22}), frozenset(), False, False)


def slow_fastervlm(tiny: Tiny, view: TokenView, image: int, count: int) -> tuple[set[int], float]:
    """Column means of the selected block's attention in loops: CLIP's class row, or all rows of a Qwen2.5-VL image."""
    size = view.sizes[image]
    patches = 1 if tiny.family == "llava" else 4
    totals, rows = [0.0] * (size * patches + (patches == 1)), 0
    for owner, queries, keys, attention in view.tower.attention_chunks(view.tower.shape.selected):
        if owner != view.tower.owner[image]:
            continue
        for head in attention.tolist():
            for query, weights in zip(queries.tolist(), head, strict=True):
                if patches == 1 and query:
                    continue
                rows += 1
                for key, weight in zip(keys.tolist(), weights, strict=True):
                    totals[key] += weight
    means = [total / rows for total in totals]
    scores = (
        {t: means[t + 1] for t in range(size)}
        if patches == 1
        else {t: sum(means[4 * t : 4 * t + 4]) / 4 for t in range(size)}
    )
    order = slow.best_first(scores)
    margin = scores[order[count - 1]] - scores[order[count]] if 0 < count < size else float("inf")
    return set(order[:count]), margin


@pytest.mark.slow
def test_equals_slow_reference(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    got, want, rng = [], [], random.Random(21)
    for layer in range(8):
        inputs = tiny.batch([tiny.row(rng) for _ in range(25)])
        trace, _ = tiny.run(inputs, f"fastervlm@{layer}:0.33")
        got += kept(trace)
        view = capture_view(tiny, inputs, layer)
        want += [slow_fastervlm(tiny, view, image, round(0.33 * n)) for image, n in enumerate(view.sizes)]
    assert len(got) == 200
    assert_agree(got, want)


def test_a_few_equal_the_slow_reference(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(22)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 1)])
    trace, _ = tiny.run(inputs, "fastervlm@0:0.5")
    view = capture_view(tiny, inputs, 0)
    want = [slow_fastervlm(tiny, view, image, round(0.5 * n)) for image, n in enumerate(view.sizes)]
    assert_agree(kept(trace), want)


def test_deeper_it_ranks_what_is_still_there(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(23)
    inputs = tiny.batch([tiny.row(rng) for _ in range(4)])
    view = capture_view(tiny, inputs, 0)
    scores = view.tower.saliency()
    trace, _ = tiny.run(inputs, "random@1:0.5,fastervlm@3:0.2")
    for image, row in enumerate(trace.rows):
        [present], [later] = row.indices(0), row.indices(1)
        order = slow.best_first({token: float(scores[image, token]) for token in present})
        assert later == sorted(order[: len(later)])
        assert len(later) == round(0.2 * row.images[0])
