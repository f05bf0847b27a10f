"""FitPrune against a hand-computed case, eager attention in plain loops, and its published tables."""

from __future__ import annotations

import random

import pytest
import torch
from observed import (
    HandView,
    ImageSpan,
    Observed,
    Tiny,
    assert_agree,
    chosen,
    eager_attentions,
    image_count,
    image_spans,
    kept,
    observe,
)
from slow import best_first
from torch import Tensor

import lmms_prune.methods.view
from lmms_prune import Schedule, prune
from lmms_prune.methods.fitprune import FitPrune, measures


def reference(attention: Tensor, visual: list[int], text: list[int], count: int) -> tuple[set[int], float]:
    """FitPrune in plain loops, from one layer's softmax [head][query][key] of a sequence without padding."""
    rows = attention.tolist()
    scores = {}
    for raster, column in enumerate(visual):
        cross = within = 0.0
        for query in text:
            cross += max(head[query][column] for head in rows)
        for query in visual:
            within += max(head[query][column] for head in rows)
        scores[raster] = cross * (within / len(visual))
    order = best_first(scores)
    margin = scores[order[count - 1]] - scores[order[count]] if 0 < count < len(order) else 1.0
    return set(order[:count]), margin


def own(attention: Tensor, span: ImageSpan) -> Tensor:
    return attention[span.row, :, span.pad :, span.pad :]


@pytest.fixture
def three_tokens() -> HandView:
    """One system token, v0 … v2, two text tokens; two heads. Shares of what each row sees, and the heads' maximum:

    head A:  v0 attends to (system, v0)              1 1            = 1/2
             v1 to (system, v0, v1)                  2 1 1          = 1/4 1/4
             v2 to (system, v0, v1, v2)              1 1 4 2        = 1/8 1/2 1/4
             t0 to (system, v0, v1, v2, t0)          1 2 3 1 3      = 0.2 0.3 0.1
             t1 to (system, v0, v1, v2, t0, t1)      2 1 1 4 1 1    = 0.1 0.1 0.4
    head B:  3 1 = 1/4;  1 2 1 = 1/2 1/4;  2 1 1 1 = 0.2 0.2 0.2;  1 1 1 5 2 = 0.1 0.1 0.5;  4 3 1 1 ½ ½ = 0.3 0.1 0.1
    maximum: v0: 0.5;  v1: 0.5 0.25;  v2: 0.2 0.5 0.25;  t0: 0.2 0.3 0.5;  t1: 0.3 0.1 0.4
    """
    head_a = [[1], [1, 1], [2, 1, 1], [1, 1, 4, 2], [1, 2, 3, 1, 3], [2, 1, 1, 4, 1, 1]]
    head_b = [[1], [3, 1], [1, 2, 1], [2, 1, 1, 1], [1, 1, 1, 5, 2], [4, 3, 1, 1, 0.5, 0.5]]
    # Keys are the unit vectors, so that a query's entries are its logits; what a row does not see may be anything.
    queries = torch.full((1, 2, 6, 6), 5.0, dtype=torch.float64)
    for head, rows in enumerate((head_a, head_b)):
        for query, row in enumerate(rows):
            queries[0, head, query, : len(row)] = torch.tensor(row, dtype=torch.float64).log()
    return HandView(torch.randn(1, 6, 2), 3, keys=torch.eye(6, dtype=torch.float64)[None], queries=queries)


def test_by_hand(three_tokens: HandView) -> None:
    # text: v0 0.2 + 0.3 = 0.5, v1 0.3 + 0.1 = 0.4, v2 0.5 + 0.4 = 0.9 (the highest, by itself);
    # image: (0.5 + 0.5 + 0.2) / 3 = 0.4, (0.25 + 0.5) / 3 = 0.25, 0.25 / 3. Products: 0.2, 0.1, 0.075.
    cross, within = measures(three_tokens)
    torch.testing.assert_close(cross, torch.tensor([[0.5, 0.4, 0.9]], dtype=torch.float64))
    torch.testing.assert_close(within, torch.tensor([[0.4, 0.25, 0.25 / 3]], dtype=torch.float64))
    torch.testing.assert_close(FitPrune().score(three_tokens), torch.tensor([[0.2, 0.1, 0.075]], dtype=torch.float64))
    for count in range(4):
        assert chosen(FitPrune().select(three_tokens, torch.tensor([count]))) == [set(range(count))]


def test_pieces_add_up(three_tokens: HandView, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = measures(three_tokens)
    monkeypatch.setattr(lmms_prune.methods.view, "MOST", 1)
    assert len(list(three_tokens.attention_chunks(three_tokens.text))) == 2
    for once, piecewise in zip(at_once, measures(three_tokens), strict=True):
        torch.testing.assert_close(piecewise, once)


def test_ties_and_an_image_without_text_after_it() -> None:
    keys = torch.zeros(1, 5, 1)
    for length in (4, 5):
        view = HandView(torch.zeros(1, length, 3), 3, keys=keys[:, :length], queries=torch.zeros(1, 1, length, 1))
        expected = [{0, 1}]
        assert chosen(FitPrune().select(view, torch.tensor([2]))) == expected, "equal keys: earlier ones are seen more"
    cross, _ = measures(HandView(torch.zeros(1, 4, 3), 3, keys=keys[:, :4], queries=torch.zeros(1, 1, 4, 1)))
    assert cross.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("text", [1, 2])
def test_one_visual_token(text: int) -> None:
    size = 2 + text
    view = HandView(torch.zeros(1, size, 3), 1, keys=torch.zeros(1, size, 1), queries=torch.zeros(1, 1, size, 1))
    assert chosen(FitPrune().select(view, torch.tensor([1]))) == [{0}]


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    ratios = (0.26, 0.41, 0.02, 0.5, 0.75, 0.1, 0.33, 0.6)
    got, want = [], []
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        layer = 1 + number % 7
        trace, _ = tiny.run(seen.inputs, f"fitprune@{layer}:{ratio}")
        got += kept(trace)
        attention = eager_attentions(tiny, seen.inputs, torch.float64)[layer - 1]
        for span in seen.spans:
            count = round(ratio * len(span.visual))
            want.append(reference(own(attention, span), span.visual, span.text, count))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_several_images_each_with_the_text_after_it(tiny: Tiny) -> None:
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    seen = observe(tiny, inputs)
    attention = eager_attentions(tiny, inputs, torch.float64)[2]
    trace, _ = tiny.run(inputs, "fitprune@3:0.5")
    want = [reference(own(attention, p), p.visual, p.text, round(0.5 * len(p.visual))) for p in seen.spans]
    assert len({len(p.text) for p in seen.spans}) > 2
    assert_agree(kept(trace), want)


@pytest.mark.parametrize("first", ["random@1:0.7", "fitprune@2:0.7"])
def test_after_an_earlier_stage(tiny: Tiny, first: str) -> None:
    """Rows and mean are those of the tokens present; one by one, as the library's eager padding is broken."""
    rng = random.Random(4)
    eager, schedule = tiny.model(torch.float64, "eager"), f"{first},fitprune@3:0.4"
    want, rows = [], [tiny.row(rng) for _ in range(6)]
    for row in rows:
        inputs = tiny.batch([row])
        with torch.no_grad(), prune(eager, schedule) as trace:
            attention = eager(**inputs, output_attentions=True).attentions[2]
        [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], eager.config.image_token_id)
        [present] = trace.rows[0].indices(0)
        start, gone = span.visual[0], len(span.visual) - len(present)
        visual, text = list(range(start, start + len(present))), [column - gone for column in span.text]
        count = min(round(0.4 * len(span.visual)), len(present))
        found, margin = reference(attention[0], visual, text, count)
        want.append(({present[token] for token in found}, margin))
    trace, _ = tiny.run(tiny.batch(rows), schedule)
    assert_agree(kept(trace, stage=1), want)


@pytest.mark.parametrize("layer", [0, 3])
def test_equals_deleting_inside_the_layer_before(tiny: Tiny, layer: int) -> None:
    """What the reference deletes between attention and MLP of `layer` is, for the rest, our stage at `layer` + 1."""
    inputs = tiny.batch([tiny.row(random.Random(layer))])
    model = tiny.model()
    between: list[Tensor] = []
    after: list[Tensor] = []
    module, following = model.model.language_model.layers[layer : layer + 2]
    with torch.no_grad(), prune(model, f"fitprune@{layer + 1}:0.4") as trace:
        handles = [
            module.post_attention_layernorm.register_forward_pre_hook(lambda module, args: between.append(args[0])),
            following.register_forward_pre_hook(lambda module, args: after.append(args[0])),
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id)
        tokens = [span.visual[raster] for raster in trace.rows[0].indices(0)[0]]
        columns = sorted([*set(range(span.length)) - set(span.visual), *tokens])
        left = between[0][:, columns]
        expected = left + module.mlp(module.post_attention_layernorm(left))
    assert len(columns) < span.length
    torch.testing.assert_close(after[0], expected)


PUBLISHED = {
    10: (510, None, None),
    20: (427, None, None),
    60: (127, 245.0, 230.9),
    70: (88, 187.9, 172.6),
    80: (62, 130.6, 114.5),
    90: (37, 72.8, 56.0),
}


@pytest.mark.parametrize("percent", [10, 20, 30, 40, 50, 55, 60, 70, 80, 90])
def test_published_schedules(percent: int) -> None:
    """Tokens entering the attention of layer i are what enters layer i here; its MLP sees what enters layer i + 1."""
    schedule = Schedule.parse(f"fitprune-{percent}")
    counts = [*schedule.layer_counts(32, [576]), schedule.plan([576])[-1][0]]
    assert counts[0] == 576
    assert counts == sorted(counts, reverse=True)
    assert all(stage.method == "fitprune" and 1 <= stage.layer <= 31 for stage in schedule.stages)
    last, attention, mlp = PUBLISHED.get(percent, (counts[-1], None, None))
    assert counts[-1] == last
    if attention is not None:
        assert sum(counts[:32]) / 32 == pytest.approx(attention, abs=0.05)
        assert sum(counts[1:]) / 32 == pytest.approx(mlp, abs=0.05)
        assert float(schedule.avg_visual_tokens(32, [576])) == sum(counts[:32]) / 32


def test_more_saved_is_fewer_kept() -> None:
    averages = [
        Schedule.parse(f"fitprune-{p}").avg_visual_tokens(32, [576]) for p in (10, 20, 30, 40, 50, 55, 60, 70, 80, 90)
    ]
    assert averages == sorted(averages, reverse=True)
    # Spelled out once: 262 of 576 go inside layer 0, 153 inside layer 1, 80 inside layer 2.
    assert str(Schedule.parse("fitprune-90")).startswith(
        "fitprune@1:314t,fitprune@2:161t,fitprune@3:81t,fitprune@4:62t"
    )
