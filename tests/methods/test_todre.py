"""ToDRE against hand-computed cases and a slow reference in plain Python: the diverse search and the withdrawal."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace

import pytest
import slow
import torch
from observed import (
    HandView,
    Observed,
    Tiny,
    angles,
    assert_agree,
    chosen,
    eager_attentions,
    image_count,
    kept,
    observe,
)
from torch import Tensor

from lmms_prune import Schedule
from lmms_prune.methods.todre import ToDRE
from lmms_prune.methods.view import TokenView
from lmms_prune.schedule.presets import PRESETS


def diverse(tokens: Sequence[slow.Vector], saliency: Sequence[float], count: int) -> tuple[set[int], float]:
    """Stage 1: each sum made anew over all tokens that are kept; the margin counts every choice of the search."""
    units = [slow.unit(x) for x in tokens]
    likeness = cache(lambda a, b: slow.dot(units[a], units[b]))
    order = slow.best_first(dict(enumerate(saliency)))
    margin = saliency[order[0]] - saliency[order[1]] if len(order) > 1 and count else math.inf
    kept_now = [order[0]] if count else []
    while len(kept_now) < count:
        sums = {}
        for v in range(len(tokens)):
            if v not in kept_now:
                sums[v] = -sum(likeness(v, u) for u in kept_now)
        ranked = slow.best_first(sums)
        if len(ranked) > 1:
            margin = min(margin, sums[ranked[0]] - sums[ranked[1]])
        kept_now.append(ranked[0])
    return set(kept_now), margin


def attended(attention: Sequence[Sequence[slow.Vector]], visual: Sequence[int]) -> float:
    """Stage 2's alpha from [head][text row][key]: mean over heads and text rows of what goes to the image."""
    total, count = 0.0, 0
    for head in attention:
        for row in head:
            total += sum(row[column] for column in visual)
            count += 1
    return total / count


def salient(*values: float) -> SimpleNamespace:
    return SimpleNamespace(saliency=lambda: torch.tensor([values], dtype=torch.float64))


def test_diverse_by_hand() -> None:
    # Angles of v0 … v5: 0, 60, 90, 180, 200, 300 degrees; the encoder looks most at v1 (60°), the pivot.
    #   cosines to 60°:  v0 0.500, v2 0.866, v3 -0.500, v4 -0.766, v5 -0.500          v4 (200°) comes next;
    #   plus to 200°:    v0 -0.440, v2 0.524, v3 0.440, v5 -0.500 - 0.174 = -0.674     then v5 (300°);
    #   plus to 300°:    v0 -0.440 + 0.500 = 0.060, v2 0.524 - 0.866 = -0.342, v3 0.440 - 0.500 = -0.060      then v2.
    # A search for the farthest point (version 1) would take v0 after v1, v4, v5: its nearest kept token is at 60°.
    features = angles(0, 0, 60, 90, 180, 200, 300, 10, 20, length=[1, 5, 2, 3, 1, 2, 4, 1, 1])
    for count, expected in ((1, {1}), (2, {1, 4}), (3, {1, 4, 5}), (4, {1, 2, 4, 5}), (5, {1, 2, 3, 4, 5})):
        view = HandView(features, visual=6, encoder=salient(0.1, 0.5, 0.2, 0.1, 0.0, 0.1), layer=0)
        assert chosen(ToDRE().select(view, torch.tensor([count]))) == [expected]
        assert diverse(features[0, 1:7].tolist(), [0.1, 0.5, 0.2, 0.1, 0.0, 0.1], count)[0] == expected


def looking(*shares: Sequence[float]) -> HandView:
    """Four visual tokens and two text tokens; every query sees these shares (system, v0 … v3, text, text)."""
    keys = torch.tensor(shares, dtype=torch.float64).log().T[None]
    queries = torch.eye(len(shares), dtype=torch.float64)[None, :, None].expand(-1, -1, 7, -1)
    return HandView(torch.randn(1, 7, 3, dtype=torch.float64), 4, keys=keys, queries=queries, layer=28)


def test_withdrawal_by_hand() -> None:
    # Two heads, two text tokens; the first does not see the second. To the image go
    #   head A: 4 of 20 - 4 = 16 and 4 of 20;      head B: 1 of 10 - 5 = 5 and 1 of 10.
    #   alpha = (0.25 + 0.2 + 0.2 + 0.1) / 4 = 0.1875
    view = looking([10, 1, 1, 1, 1, 2, 4], [2, 0.25, 0.25, 0.25, 0.25, 2, 5])
    own = torch.tensor([4])
    assert chosen(ToDRE().select(view, own)) == [{0, 1, 2, 3}]
    assert chosen(ToDRE(tau=0.1874).select(view, own)) == [{0, 1, 2, 3}]
    assert chosen(ToDRE(tau=0.1876).select(view, own)) == [set()]
    rows = [[[10, 1, 1, 1, 1, 2, 0], [10, 1, 1, 1, 1, 2, 4]], [[2, *[0.25] * 4, 2, 0], [2, *[0.25] * 4, 2, 5]]]
    shares = [[[x / sum(row) for x in row] for row in head] for head in rows]
    assert attended(shares, range(1, 5)) == pytest.approx(0.1875)


def test_ties_go_to_the_lower_index() -> None:
    view = HandView(angles(0, *[30] * 5, 0), 5, encoder=salient(*[1.0] * 5), layer=0)
    assert chosen(ToDRE().select(view, torch.tensor([3]))) == [{0, 1, 2}]


def test_one_token() -> None:
    view = HandView(angles(0, 30, 0), 1, encoder=salient(1.0), layer=0)
    assert chosen(ToDRE().select(view, torch.tensor([0]))) == [set()]


@pytest.mark.parametrize("layer", [0, 3])
def test_stage_1_equals_slow_reference(
    tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView], layer: int
) -> None:
    ratios = (0.25, 0.1, 0.5, 0.3, 0.66, 0.05, 0.4, 0.35)
    got, want = [], []
    for seen, ratio in zip(batches, ratios, strict=True):
        saliency = encoder_view(tiny, seen).encoder.saliency()
        trace, _ = tiny.run(seen.inputs, f"todre@{layer}:{ratio}")
        got += kept(trace)
        for image, span in enumerate(seen.spans):
            states = seen.states(span, layer)
            tokens, size = [states[column] for column in span.visual], len(span.visual)
            want.append(diverse(tokens, saliency[image, :size].tolist(), round(ratio * size)))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_after_an_earlier_stage(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """The pivot is the most salient token that is still there."""
    rows = [tiny.row(random.Random(4)) for _ in range(4)]
    view = capture_view(tiny, tiny.batch(rows), 3, "random@1:0.5,")
    saliency = view.of_image(view.encoder.saliency())
    budget = torch.tensor([count // 2 for count in view.counts])
    want = []
    for image, count in enumerate(view.counts):
        tokens, salience = view.hidden[image, :count].tolist(), saliency[image, :count].tolist()
        want.append(diverse(tokens, salience, count // 2))
    assert_agree(chosen(ToDRE().select(view, budget)), want)


def text_rows(seen: Observed, attentions: list[Tensor], layer: int) -> list[list]:
    """For each image [head][text row][key] of `layer`, padding left out."""
    rows = []
    for span in seen.spans:
        columns = [span.pad + column for column in span.text]
        rows.append(attentions[layer][span.row][:, columns, span.pad :].tolist())
    return rows


def test_stage_2_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    """Thresholds among the images' own values, so that some of a batch go and some stay."""
    gone = total = 0
    for number, seen in enumerate(batches):
        layer = 1 + number % 7
        attentions = eager_attentions(tiny, seen.inputs, torch.float64)
        pairs = zip(text_rows(seen, attentions, layer - 1), seen.spans, strict=True)
        alphas = [attended(rows, span.visual) for rows, span in pairs]
        ranked = sorted(alphas)
        below = (number + 6) * len(ranked) // 25
        tau = (ranked[below - 1] + ranked[below]) / 2
        trace, _ = tiny.run(seen.inputs, f"todre@{layer};tau={tau}")
        for row, alpha, span in zip(trace.rows, alphas, seen.spans, strict=True):
            expected = 0 if alpha < tau else len(span.visual)
            assert row.kept == [[expected]]
            gone, total = gone + (expected == 0), total + 1
    assert total == image_count(batches)
    assert total / 5 < gone < total * 4 / 5


def test_each_image_is_withdrawn_by_itself(tiny: Tiny) -> None:
    rng = random.Random(3)
    seen = observe(tiny, tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)]))
    attentions = eager_attentions(tiny, seen.inputs, torch.float64)
    pairs = zip(text_rows(seen, attentions, 4), seen.spans, strict=True)
    alphas = [attended(rows, span.visual) for rows, span in pairs]
    tau = sum(sorted(alphas)[2:4]) / 2
    trace, _ = tiny.run(seen.inputs, f"todre@5;tau={tau}")
    got = [len(tokens) for tokens in kept(trace)]
    assert got == [0 if alpha < tau else len(span.visual) for alpha, span in zip(alphas, seen.spans, strict=True)]
    assert sorted(got)[0] == 0 < sorted(got)[-1]


@pytest.mark.parametrize(("tau", "stays"), [(0.0, True), (1.1, False)])
def test_both_stages(tiny: Tiny, tau: float, stays: bool) -> None:
    """What is withdrawn before a layer is not in that layer's cache either, which the trace's lengths are held against."""
    inputs = tiny.batch([tiny.row(random.Random(1)) for _ in range(3)])
    trace, logits = tiny.run(inputs, f"todre@0:0.25,todre@7;tau={tau}")
    plain, expected = tiny.run(inputs, "todre@0:0.25" + ("" if stays else ",vtw@7"))
    assert [row.visual for row in trace.rows] == [row.visual for row in plain.rows]
    torch.testing.assert_close(logits, expected)


def test_layer_0_without_a_keep(tiny: Tiny, batches: list[Observed]) -> None:
    """There is no layer before: the first layer's own attention decides."""
    seen = batches[0]
    attentions = eager_attentions(tiny, seen.inputs, torch.float64)
    pairs = zip(text_rows(seen, attentions, 0), seen.spans, strict=True)
    alphas = [attended(rows, span.visual) for rows, span in pairs]
    tau = sum(sorted(alphas)[11:13]) / 2
    trace, _ = tiny.run(seen.inputs, f"todre@0;tau={tau}")
    assert [not tokens for tokens in kept(trace)] == [alpha < tau for alpha in alphas]


def test_presets() -> None:
    """25 % and 10 % of the tokens, 7/8 of 32 layers deep; 720 and 288 of the 2880 tokens of the paper's model."""
    for name, count in (("todre-25", 720), ("todre-10", 288)):
        first, second = Schedule.parse(PRESETS[name]).stages
        assert (first.layer, second.layer) == (0, 7 * 32 // 8)
        assert Schedule((first,)).plan([2880]) == [[count]]
        assert Schedule.parse(name).at_most
