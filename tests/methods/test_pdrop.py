"""PDrop against a hand-computed case and the eager attention of the stage's own layer."""

from __future__ import annotations

import random

import pytest
import slow
import torch
from observed import HandView, Observed, Tiny, assert_agree, chosen, image_count, image_spans, kept, observe

from lmms_prune import Schedule, prune
from lmms_prune.methods.fastv import FastV
from lmms_prune.methods.pdrop import PDrop
from lmms_prune.schedule.presets import PRESETS


def test_by_hand() -> None:
    """One system token, four visual tokens, two text tokens; two query heads; logarithms make the softmax plain shares.

               system   v0  v1  v2  v3   text  last   sum
    head A       2      1   5   2   2     4     4     20
    head B       3      2   1   1   1     1     1     10
    Means of v0 … v3: (1/20 + 2/10)/2 = 0.125, (5/20 + 1/10)/2 = 0.175, (2/20 + 1/10)/2 = 0.1 twice: the tie goes to v2.
    """
    shares = torch.tensor([[2, 1, 5, 2, 2, 4, 4], [3, 2, 1, 1, 1, 1, 1]], dtype=torch.float64)
    queries = torch.eye(2, dtype=torch.float64)[None, :, None]
    view = HandView(torch.randn(1, 7, 3, dtype=torch.float64), 4, keys=shares.log().T[None], queries=queries)
    want = torch.tensor([[0.125, 0.175, 0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(PDrop().score(view), want)
    for count, tokens in enumerate([set(), {1}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]):
        assert chosen(PDrop().select(view, torch.tensor([count]))) == [tokens]


def test_it_looks_ahead() -> None:
    """At its own layer's input: the layer before may say the opposite."""
    hidden = torch.randn(1, 7, 3, dtype=torch.float64)
    view = HandView(hidden, 4, keys=torch.zeros(1, 7, 1), queries=torch.zeros(1, 1, 1, 1))
    by_layer = {0: torch.arange(7.0), 1: -torch.arange(7.0)}
    view._parts.keys = lambda layer, hidden, rotary: by_layer[layer].view(1, 1, 7, 1)
    view._parts.queries = lambda layer, hidden, rotary: torch.ones(1, 1, 1, 1)
    assert chosen(FastV().select(view, torch.tensor([2]))) == [{2, 3}]
    assert chosen(PDrop().select(view, torch.tensor([2]))) == [{0, 1}]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    got, want = [], []
    for number, (seen, ratio) in enumerate(zip(batches, (0.5, 0.25, 0.125, 0.56, 0.31, 0.03, 0.75, 0.4), strict=True)):
        layer = number % 8
        trace, _ = tiny.run(seen.inputs, f"pdrop@{layer}:{ratio}")
        got += kept(trace)
        for span in seen.spans:
            want.append(slow.fastv(seen.attention(span, layer), span.visual, round(ratio * len(span.visual))))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_looking_ahead_is_the_next_layers_looking_back(tiny: Tiny, batches: list[Observed]) -> None:
    for layer in (0, 3):
        ahead, _ = tiny.run(batches[layer].inputs, f"pdrop@{layer}:0.3")
        back, _ = tiny.run(batches[layer].inputs, f"fastv@{layer + 1}:0.3")
        assert kept(ahead) == kept(back)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_later_stages_read_the_tokens_present(tiny: Tiny, positions: str) -> None:
    """The published form has three stages; each normalises over the tokens present, at their positions."""
    if positions == "compact" and tiny.family != "llava":
        pytest.skip("compact positions are for one-dimensional ones")
    rng = random.Random(4)
    eager = tiny.model(torch.float64, "eager")
    rows, want = [tiny.row(rng) for _ in range(6)], []
    for row in rows:
        inputs = tiny.batch([row])
        with torch.no_grad(), prune(eager, "pdrop@1:0.6", positions=positions) as trace:
            attention = eager(**inputs, output_attentions=True).attentions[4]
        [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], eager.config.image_token_id)
        [present] = trace.rows[0].indices(0)
        visual = range(span.visual[0], span.visual[0] + len(present))
        found, margin = slow.fastv(attention[0, :, -1:].tolist(), visual, round(0.25 * len(span.visual)))
        want.append(({present[token] for token in found}, margin))
    inputs = tiny.batch(rows)
    if tiny.family == "llava":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    trace, _ = tiny.run(inputs, "pdrop@1:0.6,pdrop@4:0.25", positions=positions)
    assert_agree(kept(trace, stage=1), want)


def test_several_images_share_the_last_query(tiny: Tiny) -> None:
    rng = random.Random(3)
    seen = observe(tiny, tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)]))
    trace, _ = tiny.run(seen.inputs, "pdrop@3:0.5")
    want = [slow.fastv(seen.attention(p, 3), p.visual, round(0.5 * len(p.visual))) for p in seen.spans]
    assert_agree(kept(trace), want)


@pytest.mark.parametrize(("preset", "average"), [("270", 270.0), ("192", 191.4), ("128", 127.4), ("64", 63.9)])
def test_presets(preset: str, average: float) -> None:
    """The default keeps 1/2, 1/4, 1/8; for lower budgets the author's rule keeps λ, λ², λ³ from earlier layers."""
    schedule = Schedule.parse(PRESETS[f"pdrop-{preset}"])
    assert float(schedule.avg_visual_tokens(32, [576])) == pytest.approx(average, abs=0.06)
    counts = [stage.keep for stage in schedule.stages]
    factor = {"270": 0.5, "192": 0.5596, "128": 0.4197, "64": 0.1916}[preset]
    assert counts == [int(576 * factor**power) for power in (1, 2, 3)]
