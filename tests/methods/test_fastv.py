"""FastV against a hand-computed case and eager attention; the recomputed attention row by itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import slow
import torch
from observed import HandView, Observed, Tiny, assert_agree, chosen, image_count, image_spans, kept, observe

from lmms_prune import Schedule, prune
from lmms_prune.methods.fastv import FastV
from lmms_prune.methods.view import TokenView


@pytest.fixture
def four_tokens() -> HandView:
    """One system token, four visual tokens, two text tokens; two query heads that share one KV head.

    The last token's query of head A reads the keys' first entry, of head B the second; as these are logarithms, the
    softmax is the plain share:    system   v0  v1  v2  v3   text  last   sum
                         head A       5      4   1   1   2     1     2     16
                         head B       1      1   2   3   1     1     1     10
    Head means of v0 … v3: (4/16 + 1/10)/2 = 0.175, (1/16 + 2/10)/2 = 0.13125, (1/16 + 3/10)/2 = 0.18125,
    (2/16 + 1/10)/2 = 0.1125.
    """
    shares = torch.tensor([[5, 4, 1, 1, 2, 1, 2], [1, 1, 2, 3, 1, 1, 1]], dtype=torch.float64)
    queries = torch.eye(2, dtype=torch.float64)[None, :, None]
    return HandView(torch.randn(1, 7, 3, dtype=torch.float64), 4, keys=shares.log().T[None], queries=queries)


def test_by_hand(four_tokens: HandView) -> None:
    expected = torch.tensor([[0.175, 0.13125, 0.18125, 0.1125]], dtype=torch.float64)
    torch.testing.assert_close(FastV().score(four_tokens), expected)
    # Normalised over the image alone, v0 would come first: (4/8 + 1/7)/2 = 0.32 against (1/8 + 3/7)/2 = 0.28.
    ranked = [2, 0, 1, 3]
    for count in range(5):
        assert chosen(FastV().select(four_tokens, torch.tensor([count]))) == [set(ranked[:count])]
    head_a, head_b = ([x / sum(row) for x in row] for row in ([5, 4, 1, 1, 2, 1, 2], [1, 1, 2, 3, 1, 1, 1]))
    assert slow.fastv([[head_a], [head_b]], range(1, 5), 2)[0] == {0, 2}


def test_ties_go_to_the_lower_index() -> None:
    queries = torch.zeros(1, 1, 1, 1)
    view = HandView(torch.zeros(1, 8, 3), 5, keys=torch.zeros(1, 8, 1), queries=queries)
    assert chosen(FastV().select(view, torch.tensor([3]))) == [{0, 1, 2}]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    ratios = (0.26, 0.41, 0.02, 0.5, 0.75, 0.1, 0.33, 0.6)
    got, want = [], []
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        layer = 1 + number % 7
        trace, _ = tiny.run(seen.inputs, f"fastv@{layer}:{ratio}")
        got += kept(trace)
        for span in seen.spans:
            attention = seen.attention(span, layer - 1)
            want.append(slow.fastv(attention, span.visual, round(ratio * len(span.visual))))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_several_images_share_the_last_query(tiny: Tiny) -> None:
    rng = random.Random(3)
    seen = observe(tiny, tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)]))
    trace, _ = tiny.run(seen.inputs, "fastv@3:0.5")
    want = [slow.fastv(seen.attention(p, 2), p.visual, round(0.5 * len(p.visual))) for p in seen.spans]
    assert len(want) == 6
    assert_agree(kept(trace), want)


@pytest.mark.parametrize("schedule", ["random@1:0.7,fastv@2:0.4", "divprune@0:0.7,fastv@3:0.4"])
def test_after_an_earlier_stage(tiny: Tiny, schedule: str) -> None:
    """The softmax then runs over the keys present; row by row, as the library's eager padding is broken."""
    rng = random.Random(4)
    layer = Schedule.parse(schedule).stages[1].layer
    eager = tiny.model(torch.float64, "eager")
    want, rows = [], [tiny.row(rng) for _ in range(6)]
    for row in rows:
        inputs = tiny.batch([row])
        with torch.no_grad(), prune(eager, schedule) as trace:
            attention = eager(**inputs, output_attentions=True).attentions[layer - 1]
        [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], eager.config.image_token_id)
        [present] = trace.rows[0].indices(0)
        visual = range(span.visual[0], span.visual[0] + len(present))
        requested = min(round(0.4 * len(span.visual)), len(present))
        found, margin = slow.fastv(attention[0, :, -1:].tolist(), visual, requested)
        assert attention.shape[-1] == span.length - len(span.visual) + len(present)
        want.append(({present[token] for token in found}, margin))
    trace, _ = tiny.run(tiny.batch(rows), schedule)
    assert_agree(kept(trace, stage=1), want)


@pytest.mark.parametrize("layer", [1, 2, 4, 7])
def test_attention_row_equals_eager(tiny: Tiny, capture_view: Callable[..., TokenView], layer: int) -> None:
    """In float32, from an SDPA run, with left padding, two images and a row without one."""
    rng = random.Random(layer)
    rows = [tiny.row(rng, images=images, words=words) for images, words in ((1, 2), (2, 30), (0, 4), (1, 9))]
    inputs = tiny.batch(rows, torch.float32)
    assert (inputs["attention_mask"] == 0).any()
    seen = observe(tiny, inputs, torch.float32)
    view = capture_view(tiny, inputs, layer, dtype=torch.float32)
    attention = view.attention(view.last)[:, :, 0]
    heads = tiny.model().model.language_model.layers[0].self_attn.config.num_attention_heads
    assert attention.shape[:2] == (4, heads)
    for image, span in enumerate(seen.spans):
        eager = seen.last_rows[layer - 1][span.row][:, [span.pad + column for column in span.visual]]
        assert eager.max() > 0.01, "attention is sharp enough for 1e-5 to mean something"
        torch.testing.assert_close(attention[image, :, : len(span.visual)], eager, atol=1e-5, rtol=0)


def test_grouped_heads_are_really_grouped(all_tiny: dict[str, Tiny]) -> None:
    """The checks above would say nothing of groups otherwise."""
    config = all_tiny["qwen2_5_vl"].model().model.language_model.config
    assert config.num_attention_heads > config.num_key_value_heads > 1


@pytest.mark.parametrize(
    ("schedule", "average"),
    [
        ("fastv@3:0.26", 189.7),
        ("fastv@3:0.41,random@20:0.06", 192.4),
        ("fastv@3:0.41,vtw@21", 186.8),
        ("fastv@3:0.02", 64.4),
        ("fastv@2:0.06,random@20:0.03", 61.9),
        ("fastv@2:0.06,vtw@26", 61.9),
    ],
)
def test_averages_as_printed(schedule: str, average: float) -> None:
    """Table 5 of https://arxiv.org/abs/2512.07580 multiplies the ratios; whole tokens differ by half of one at most."""
    assert float(Schedule.parse(schedule).avg_visual_tokens(32, [576])) == pytest.approx(average, abs=0.55)


@pytest.mark.parametrize(("kept_tokens", "average"), [(148, 201.5), (11, 81.625)])
def test_averages_as_measured(kept_tokens: int, average: float) -> None:
    """The paper's cost table fits four full layers, which cost more than its budgets of 192 and 64."""
    assert float(Schedule.parse(f"fastv@4:{kept_tokens}t").avg_visual_tokens(32, [576])) == average
