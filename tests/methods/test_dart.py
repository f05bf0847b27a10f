"""DART against hand-computed cases, a slow reference in plain Python, and its published counts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import slow
import torch
from observed import HandView, ImageSpan, Observed, Tiny, angles, assert_agree, chosen, image_count, kept, observe
from torch import Tensor

from lmms_prune import Schedule, prune
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.methods.dart import DART
from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.view import LayerInput, TokenView


def reference(seen: Observed, span: ImageSpan, layer: int, requested: int, **options: object) -> tuple[set[int], float]:
    features = [slow.rms_norm(x, seen.norm_weight, seen.norm_eps) for x in seen.states(span, layer)]
    return slow.dart(features, seen.key_rows(span, layer - 1), span.visual, span.text, requested, **options)


def text_of(order: str, native_count: bool) -> str:
    return (";order=reference" if order == "reference" else "") + ("" if native_count else ";native_count=false")


def fourteen() -> tuple[Tensor, Tensor]:
    """Features and keys of: one system token, 14 visual tokens, 5 text tokens."""
    visual = [0, 90, 0, 90, 180, 170, 160, 270, 260, 0, 10, 90, 80, 45]
    text = [180, 270, 180, 270, 30]
    features = angles(123, *visual, *text, length=[1 + i % 5 for i in range(20)])
    norms = [100.0, 9, 8, 7, 6, *[1] * 10, 4, 3, 2, 1, 0.5]
    # An L1 norm ignores signs and how the sum is spread over the entries.
    keys = torch.tensor([[[0.25 * x, -0.75 * x] for x in norms]])
    return features, keys


def test_by_hand() -> None:
    # N = 8..15 gives T = 1: the four visual pivots and one pick for each of the eight pivots, 12 of 14 tokens.
    # Key norms make tokens 0, 1, 2, 3 the visual pivots, in that order (the system token's 100 must not count), and
    # the first four text tokens the text pivots. A pick is the free token whose angle differs most from the pivot's:
    #   v0 at   0°: 180° (token 4)      v1 at  90°: 270° (token 7)
    #   v2 at   0°: of 170, 160, 260, … 170° (token 5)      v3 at 90°: 260° (token 8), 170° away
    #   t0 at 180°:   0° (token 9)      t1 at 270°:  90° (token 11)
    #   t2 at 180°: of 160, 10, 80, 45: 10° (token 10), 170° away
    #   t3 at 270°: of 160 (110° away), 80 (170° away), 45 (135° away): token 12
    # Tokens 6 (160°) and 13 (45°) are left over.
    features, keys = fourteen()
    expected = set(range(14)) - {6, 13}
    view = HandView(features, visual=14, keys=keys)
    assert chosen(DART().select(view, torch.tensor([12]))) == [expected]
    vectors, norms = features[0].tolist(), keys[0].tolist()
    assert slow.dart(vectors, norms, range(1, 15), range(15, 20), 8)[0] == expected


def test_exact_count_by_hand() -> None:
    # N = 7 exactly: the four pivots, and the first three pivots pick one token each: 4 (180°), 7 (270°), 5 (170°).
    features, keys = fourteen()
    view = HandView(features, visual=14, keys=keys)
    expected = {0, 1, 2, 3, 4, 7, 5}
    assert chosen(DART(native_count=False).select(view, torch.tensor([7]))) == [expected]
    found, _ = slow.dart(features[0].tolist(), keys[0].tolist(), range(1, 15), range(15, 20), 7, native_count=False)
    assert found == expected


def test_order_of_pivots_by_hand() -> None:
    # Eight visual tokens; the pivots are 5, 4, 3, 2 by falling norm, so at N = 5 the one pick is made
    #   stable:    by token 5 (at 0°), which takes token 0 at 180°;
    #   reference: by the first of the set {6, 5, 4, 3, 9, 10, 11, 12} of absolute indices. As eight small numbers make
    #              CPython's table 32 wide, the set runs upward: 3 comes first, that is visual token 2 (at 90°), which
    #              takes token 1 at 270°.
    features = angles(0, 180, 270, 90, 90, 90, 0, 45, 45, 0, 0, 0, 0)
    norms = [0.0, 1, 1, 6, 7, 8, 9, 1, 1, 4, 3, 2, 1]
    keys = torch.tensor([[[x, 0.0] for x in norms]])
    view = HandView(features, visual=8, keys=keys)
    for order, expected in (("stable", {5, 4, 3, 2, 0}), ("reference", {5, 4, 3, 2, 1})):
        method = DART(native_count=False, order=order)
        assert chosen(method.select(view, torch.tensor([5]))) == [expected]
        options = {"order": order, "native_count": False}
        found, _ = slow.dart(features[0].tolist(), keys[0].tolist(), range(1, 9), range(9, 13), 5, **options)
        assert found == expected


@pytest.mark.parametrize("order", ["stable", "reference"])
def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], order: str) -> None:
    ratios = (0.44, 0.2, 0.6, 0.3, 0.66, 0.8, 0.5, 0.35)
    got, want = [], []
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        layer, native_count = 1 + number % 7, number % 2 == 0
        trace, _ = tiny.run(seen.inputs, f"dart@{layer}:{ratio}{text_of(order, native_count)}")
        got += kept(trace)
        for span in seen.spans:
            requested = round(ratio * len(span.visual))
            want.append(reference(seen, span, layer, requested, order=order, native_count=native_count))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_variants_differ(batches: list[Observed]) -> None:
    """Otherwise the agreement above would not tell the orders apart."""
    results = []
    for options in ({}, {"order": "reference"}):
        options = {**options, "native_count": False}
        results.append([reference(batches[0], span, 3, 7, **options)[0] for span in batches[0].spans])
    assert results[0] != results[1]


def test_several_images_are_independent(tiny: Tiny) -> None:
    rng = random.Random(3)
    rows = [tiny.row(rng, images=images) for images in (2, 1, 0, 3)]
    seen = observe(tiny, tiny.batch(rows))
    trace, _ = tiny.run(seen.inputs, "dart@3:0.5;order=reference")
    want = [reference(seen, span, 3, round(0.5 * len(span.visual)), order="reference") for span in seen.spans]
    assert len(want) == 6
    assert_agree(kept(trace), want)


@pytest.mark.parametrize("second", ["dart@2:0.4", "dart@3:0.4", "dart@5:0.4;order=reference;native_count=false"])
def test_after_an_earlier_stage(tiny: Tiny, second: str) -> None:
    """Keys and hidden states are then those of the shortened sequence, and the indices count in it."""
    rng = random.Random(4)
    seen = observe(tiny, tiny.batch([tiny.row(rng) for _ in range(6)]))
    schedule = Schedule.parse(f"random@2:0.7,{second}" if "@2" not in second else f"random@1:0.7,{second}")
    model, layer = tiny.model(), schedule.stages[1].layer
    entering: list[Tensor] = []
    # Our hook comes before the pruning one of the same layer, so it sees what the method sees.
    handle = model.model.language_model.layers[layer].register_forward_pre_hook(
        lambda m, args: entering.append(args[0])
    )
    with torch.no_grad(), prune(model, schedule) as trace:
        cache = filled_cache(model(**seen.inputs, use_cache=True))
    handle.remove()
    keys = cache.layers[layer - 1].keys.transpose(1, 2).flatten(2)
    want = []
    for span, row in zip(seen.spans, trace.rows, strict=True):
        [present] = row.indices(0)
        gone = len(span.visual) - len(present)
        length, start = span.length - gone, span.visual[0]
        states = [slow.rms_norm(x, seen.norm_weight, seen.norm_eps) for x in entering[0][span.row, -length:].tolist()]
        visual, text = range(start, start + len(present)), range(start + len(present), length)
        options = dict(schedule.stages[1].options)
        requested = min(round(0.4 * len(span.visual)), len(present))
        found, margin = slow.dart(states, keys[span.row, -length:].tolist(), visual, text, requested, **options)
        want.append(({present[token] for token in found}, margin))
    assert_agree(kept(trace, stage=1), want)


@pytest.mark.parametrize("requested", [1, 7, 8, 23, 24, 40, 55])
def test_keeps_quotas_and_all_visual_pivots(tiny: Tiny, requested: int) -> None:
    rng = random.Random(requested)
    rows = [([tiny.image(rng, size=(8, 8))], "is it red") for _ in range(3)]
    seen = observe(tiny, tiny.batch(rows))
    trace, _ = tiny.run(seen.inputs, f"dart@2:{requested}t")
    for span, tokens, row in zip(seen.spans, kept(trace), trace.rows, strict=True):
        assert len(span.visual) == 64
        assert len(tokens) == 4 + 8 * (requested // 8) == row.visual[2]
        assert tokens <= set(range(64))
        pivots, _ = slow.dart_pivots(seen.key_rows(span, 1), span.visual)
        assert {pivot - span.visual[0] for pivot in pivots} <= tokens


@pytest.mark.parametrize("requested", [60, 63])
def test_quota_beyond_the_image_keeps_all(tiny: Tiny, requested: int) -> None:
    """8⌊N/8⌋+4 is 60 of 64 for N = 60 and 63: at most what is there, and never the 68 of N = 64."""
    rng = random.Random(0)
    inputs = tiny.batch([([tiny.image(rng, size=(8, 8))], "is it red")])
    assert list(map(len, kept(tiny.run(inputs, f"dart@2:{requested}t")[0]))) == [60]
    assert list(map(len, kept(tiny.run(inputs, "dart@2:64t")[0]))) == [64]


def scaled(view: TokenView, factor: float) -> TokenView:
    assert view._before is not None
    state = LayerInput(view.layer, view._state.hidden * factor, view._state.rotary)
    return replace(view, _state=state, memory=Memory())


@pytest.mark.parametrize("factor", [0.5, 8.0, 1000.0])
def test_scaling_hidden_changes_nothing(tiny: Tiny, capture_view: Callable[..., TokenView], factor: float) -> None:
    rng = random.Random(5)
    view = capture_view(tiny, tiny.batch([tiny.row(rng) for _ in range(8)]), 3)
    budget = torch.tensor([max(5, count // 2) for count in view.counts])
    assert torch.equal(DART().select(view, budget), DART().select(scaled(view, factor), budget))


def test_repeating_key_heads_changes_nothing(batches: list[Observed]) -> None:
    """With grouped heads the reference may see each KV head once or once per query head."""

    def repeated(keys: Sequence[Sequence[float]]) -> list[list[float]]:
        half = len(keys[0]) // 2
        return [[*row[:half], *row[:half], *row[half:], *row[half:]] for row in keys]

    seen = batches[0]
    for span in seen.spans:
        features, keys = seen.states(span, 2), seen.key_rows(span, 1)
        once = slow.dart(features, keys, span.visual, span.text, 12, native_count=False)
        twice = slow.dart(features, repeated(keys), span.visual, span.text, 12, native_count=False)
        assert once[0] == twice[0]


@pytest.mark.parametrize(
    ("schedule", "average"),
    [
        ("dart@2:0.29;native_count=false", 192.6),
        ("dart@2:0.44;native_count=false,random@20:0.07", 193.7),
        ("dart@2:0.44;native_count=false,vtw@21", 186.5),
        ("dart@2:0.05;native_count=false", 63.0),
        ("dart@1:0.10;native_count=false,random@20:0.05", 63.0),
        ("dart@1:0.10;native_count=false,vtw@26", 63.0),
    ],
)
def test_averages_as_printed(schedule: str, average: float) -> None:
    """Table 5 of https://arxiv.org/abs/2512.07580 multiplies the ratios; whole tokens differ by half of one at most."""
    assert float(Schedule.parse(schedule).avg_visual_tokens(32, [576])) == pytest.approx(average, abs=0.55)


@pytest.mark.parametrize(
    ("schedule", "average"),
    [
        ("dart@2:252t,random@20:38t", 192.0),
        ("dart@1:60t,random@20:27t", 63.75),
        ("dart@2:260t,vtw@21", 190.375),
        ("dart@1:60t,vtw@26", 64.875),
        ("dart@2:168t", 197.25),  # asks for 168, keeps 8 * 21 + 4 = 172
        ("dart@2:32t", 69.75),  # asks for 32, keeps 8 * 4 + 4 = 36
    ],
)
def test_averages_of_released_counts(schedule: str, average: float) -> None:
    assert float(Schedule.parse(schedule).avg_visual_tokens(32, [576])) == average


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [("dart@2:0.46", 0.499), ("dart@2:0.49,vtw@26", 0.491), ("dart@2:0.49,random@25:0.25", 0.501)],
)
def test_qwen_averages(schedule: str, ratio: float) -> None:
    """Table 4, with 28 layers; the quota's rounding of four tokens vanishes in a large image."""
    assert float(Schedule.parse(schedule).avg_visual_tokens(28, [10_000])) / 10_000 == pytest.approx(ratio, abs=1e-3)
