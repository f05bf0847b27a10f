"""SparseVLM against hand-computed cases, a slow reference in plain Python, and its published counts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import slow
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
    rope_ids,
    run_to,
)
from torch import Tensor

from lmms_prune import Schedule, Trace, prune
from lmms_prune.methods.sparsevlm import SparseVLM, _clusters
from lmms_prune.methods.spec import sparsevlm_count
from lmms_prune.schedule.presets import PRESETS

# -- the slow reference ------------------------------------------------------------------------------------------------


def raters(visual: Sequence[slow.Vector], text: Sequence[slow.Vector]) -> tuple[list[int], float]:
    """Text tokens with more than the mean of the softmax over the text, mean over the image; all where none has."""
    shares = [0.0] * len(text)
    for v in visual:
        logits = [slow.dot(v, t) for t in text]
        highest = max(logits)
        powers = [math.exp(logit - highest) for logit in logits]
        total = sum(powers)
        for i, power in enumerate(powers):
            shares[i] += power / total / len(visual)
    mean = sum(shares) / len(shares)
    # Alike words share equally, whatever their rounding errors are.
    found = [i for i, share in enumerate(shares) if share > mean + 1e-12]
    margin = min((abs(share - mean) for share in shares if abs(share - mean) > 1e-12), default=math.inf)
    return found or list(range(len(text))), margin


def scores(
    attention: Sequence[Sequence[slow.Vector]],
    rows: Sequence[int],
    visual: Sequence[int],
    bias: Sequence[slow.Vector] | None = None,
) -> tuple[dict[int, float], float]:
    """Mean over raters and heads of [head][text row][key]; with `bias` [text row][key] divided by it, best heads only."""
    per_head = []
    for head in attention:
        sums = {}
        for i, column in enumerate(visual):
            sums[i] = sum(head[r][column] / (bias[r][column] if bias else 1.0) for r in rows) / len(rows)
        per_head.append(sums)
    margin = math.inf
    if bias:
        totals = dict(enumerate(sum(sums.values()) for sums in per_head))
        order = slow.best_first(totals)
        count = max(1, round(14 * len(per_head) / 32))
        margin = totals[order[count - 1]] - totals[order[count]] if count < len(order) else math.inf
        per_head = [per_head[h] for h in order[:count]]
    return {i: sum(sums[i] for sums in per_head) / len(per_head) for i in range(len(visual))}, margin


def cluster(pool: Sequence[int], features: Sequence[slow.Vector], count: int) -> tuple[list[int], list[list[int]]]:
    """Centres (by falling density times isolation) and the members of each, as numbers of tokens."""
    scale = math.sqrt(len(features[0]))
    distance: dict[tuple[int, int], float] = {(a, a): 0.0 for a in pool}
    for a in pool:
        for b in pool:
            if a < b:
                squares = sum((x - y) ** 2 for x, y in zip(features[a], features[b], strict=True))
                distance[a, b] = distance[b, a] = math.sqrt(squares) / scale
    density, product = {}, {}
    for a in pool:
        near = sorted(distance[a, b] ** 2 for b in pool)[:count]
        density[a] = math.exp(-sum(near) / count)
    for a in pool:
        denser = [b for b in pool if density[b] > density[a] or (density[b] == density[a] and b < a)]
        product[a] = density[a] * min((distance[a, b] for b in denser), default=max(distance.values()))
    centres = slow.best_first(product)[:count]
    members: list[list[int]] = [[] for _ in centres]
    for a in pool:
        nearest = min(range(count), key=lambda c: distance[a, centres[c]])
        members[centres.index(a) if a in centres else nearest].append(a)
    return centres, members


def sparsevlm(
    score: dict[int, float], features: Sequence[slow.Vector], requested: int, recycle: bool = True
) -> tuple[list[int], list[slow.Vector], float]:
    """SparseVLM (https://arxiv.org/abs/2410.04417), v1.5: tokens in their new order with their states, and the margin."""
    n = len(score)
    if requested >= n or not requested:
        return list(range(n))[:requested], list(features)[:requested], math.inf
    order = slow.best_first(score)
    k = min(requested, n - 1)
    dropped, tokens = order[k:], sorted(order[:k])
    q = int(0.3 * len(dropped)) + 1
    margin = score[order[k - 1]] - score[order[k]]
    states = [list(features[i]) for i in tokens]
    if not recycle:
        return tokens, states, margin
    if q < len(dropped):
        margin = min(margin, score[dropped[q - 1]] - score[dropped[q]])
    centres, groups = cluster(sorted(dropped[:q]), features, q // 10 + 1)
    for centre, group in zip(centres, groups, strict=True):
        tokens.append(centre)
        sums = [sum(features[i][d] for i in group) for d in range(len(features[0]))]
        states.append([x / (len(group) + 1e-6) for x in sums])
    if len(tokens) == n:
        return list(range(n)), list(features), math.inf
    return tokens, states, margin


# -- what a model really does ------------------------------------------------------------------------------------------


def judge(
    tiny: Tiny, seen: Observed, attentions: list[Tensor], span: ImageSpan, layer: int, bias: list | None = None
) -> tuple[dict[int, float], float]:
    """Scores from an unpruned model, and how near its decisions were."""
    embedded = seen.states(span, 0)
    chosen_rows, margin = raters([embedded[c] for c in span.visual], [embedded[c] for c in span.text])
    columns = [span.pad + column for column in span.text]
    rows = attentions[layer - 1][span.row][:, columns, span.pad :].tolist()
    score, near = scores(rows, chosen_rows, span.visual, bias)
    return score, min(margin, near)


# -- by hand -----------------------------------------------------------------------------------------------------------


def six_tokens() -> HandView:
    """System token, six visual tokens, two text tokens of which the first rates.

    Every visual embedding is (1, 0), the text's are (log 3, 5) and (0, 9): the softmax over the text gives 3/4 and 1/4,
    whose mean is 1/2. The keys' entries are logarithms of shares; t0 reads the first, t1 the second entry:
               system  v0  v1  v2  v3  v4  v5  t0  t1
        t0       2      6   1   5   3   4   2   1  (unseen)     of 24
        t1       1      1   9   1   1   1   9   1   1
    """
    embedded = torch.tensor([[7.0, 7], *[[1.0, 0]] * 6, [math.log(3), 5], [0, 9]], dtype=torch.float64)[None]
    shares = torch.tensor([[2, 6, 1, 5, 3, 4, 2, 1, 1], [1, 1, 9, 1, 1, 1, 9, 1, 1]], dtype=torch.float64)
    queries = torch.zeros(1, 1, 9, 2, dtype=torch.float64)
    queries[0, 0, 7, 0] = queries[0, 0, 8, 1] = 1.0
    hidden = torch.arange(18, dtype=torch.float64).reshape(1, 9, 2) ** 2
    return HandView(hidden, 6, keys=shares.log().T[None], queries=queries, embedded=embedded)


def test_by_hand() -> None:
    # N = 2 keeps v0 (6/24) and v2 (5/24); D = 4 are dropped, of which q = floor(1.2) + 1 = 2, v4 and v3, are recycled
    # into C = floor(2/10) + 1 = 1 token. With C = 1 every density is exp(0) = 1: the earlier, v3, counts as the denser.
    view = six_tokens()
    torch.testing.assert_close(SparseVLM()._score(view), torch.tensor([[6, 1, 5, 3, 4, 2]], dtype=torch.float64) / 24)
    mask = SparseVLM().select(view, torch.tensor([3]))
    assert chosen(mask) == [{0, 2, 3}]
    hidden, index = SparseVLM().rewrite(view, mask)
    assert index[0][mask[0]].tolist() == [0, 2, 3]
    state = view.hidden[0]
    torch.testing.assert_close(hidden[0][mask[0]][:2], state[[0, 2]])
    torch.testing.assert_close(hidden[0][mask[0]][2], (state[3] + state[4]) / (2 + 1e-6))
    score = {i: share / 24 for i, share in enumerate((6, 1, 5, 3, 4, 2))}
    tokens, states, _ = sparsevlm(score, state.tolist(), 2)
    assert tokens == [0, 2, 3]
    torch.testing.assert_close(torch.tensor(states, dtype=torch.float64), hidden[0][mask[0]])
    assert raters([[1.0, 0]] * 6, [[math.log(3), 5], [0, 9]])[0] == [0]
    alone = SparseVLM(native_count=False)
    mask = alone.select(view, torch.tensor([3]))
    assert chosen(mask) == [{0, 2, 4}]
    assert alone.rewrite(view, mask)[0] is view.hidden


def test_merged_tokens_come_last_by_hand() -> None:
    # As above with N = 1: v0 stays; D = 5, q = 2: v2 and v4, merged at v2. Without v0 as the first the order would tell:
    # scores of v5 and v0 exchanged, v5 stays and v2 stands behind it although it was before it.
    view = six_tokens()
    keys = view._parts.keys(0, view._state.hidden, view._state.rotary)
    turned = keys[:, :, [0, 6, 2, 3, 4, 5, 1, 7, 8]]
    view._parts.keys = lambda layer, hidden, rotary: turned
    mask = SparseVLM().select(view, torch.tensor([2]))
    hidden, index = SparseVLM().rewrite(view, mask)
    assert chosen(mask) == [{2, 5}]
    assert index[0][mask[0]].tolist() == [5, 2]
    torch.testing.assert_close(hidden[0][mask[0]][1], (view.hidden[0, 2] + view.hidden[0, 4]) / (2 + 1e-6))


def test_clusters_by_hand() -> None:
    # N = 1 of 32: D = 31, q = 10, C = 2. Tokens 1 … 10 are pooled; on a line they stand at
    #   0, 1/8, 3/8, 3/4, 19/16      and      10, 10.5, 11.25, 12.25, 13.5
    # With C = 2 the density is exp(-d²/2), d the distance to the nearest neighbour: the first two tie exactly (1/8); the
    # earlier counts as the densest and gets the largest distance, 13.5, the other one 1/8. Of the right ones 10 and 10.5
    # tie (1/2); 10 has its nearest denser at 19/16 (7/16), 8.8 away, 10.5 at 10. Centres: 0, then 10.
    # Were tied densities not ordered, 0 and 1/8 would both get 13.5 and the right ones no centre.
    line = [0, 1 / 8, 3 / 8, 3 / 4, 19 / 16, 10, 10.5, 11.25, 12.25, 13.5]
    features = [50.0, *line, *[99.0 + i for i in range(21)]]
    shares = [1.0, *range(40, 8, -1), 1.0]
    hidden = torch.tensor([0.0, *features, 0.0], dtype=torch.float64)[None, :, None]
    queries = torch.ones(1, 1, 34, 1, dtype=torch.float64)
    view = HandView(hidden, 32, keys=torch.tensor(shares, dtype=torch.float64).log()[None, :, None], queries=queries)
    mask = SparseVLM().select(view, torch.tensor([3]))
    states, index = SparseVLM().rewrite(view, mask)
    assert index[0][mask[0]].tolist() == [0, 1, 6]
    expected = torch.tensor([50, 2.4375 / (5 + 1e-6), 57.5 / (5 + 1e-6)], dtype=torch.float64)
    torch.testing.assert_close(states[0, :, 0][mask[0]], expected)
    assert cluster(range(1, 11), [[x] for x in features], 2) == ([1, 6], [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def test_equal_tokens_are_one_cluster() -> None:
    """Exact density ties: copies of one token must not take all the centres."""
    features = [1.0, *[5.0] * 7, *[9.0] * 3, *[30.0] * 21]
    hidden = torch.tensor([0.0, *features, 0.0])[None, :, None]
    shares = torch.tensor([1.0, *range(40, 8, -1), 1.0]).log()
    view = HandView(hidden, 32, keys=shares[None, :, None], queries=torch.ones(1, 1, 34, 1))
    mask = SparseVLM().select(view, torch.tensor([3]))
    states, index = SparseVLM().rewrite(view, mask)
    assert index[0][mask[0]].tolist() == [0, 1, 8]
    torch.testing.assert_close(states[0, :, 0][mask[0]], torch.tensor([1.0, 5, 9]))


@pytest.mark.parametrize("seed", range(10))
def test_many_clusters_of_rows_of_different_sizes(seed: int) -> None:
    """Rows of 200 and 90 tokens side by side: 20 and 5 stay, six and three means of the best of the rest."""
    torch.manual_seed(seed)
    counts, requested, totals = [200, 90], [20, 5], [26, 8]
    hidden = torch.randn(2, 203, 2, dtype=torch.float64)
    keys = torch.randn(2, 203, 1, dtype=torch.float64)
    view = HandView(hidden, counts, keys=keys, queries=torch.ones(2, 1, 203, 1, dtype=torch.float64))
    score = SparseVLM()._score(view)
    mask = SparseVLM().select(view, torch.tensor(totals))
    states, index = SparseVLM().rewrite(view, mask)
    for row, count in enumerate(counts):
        features = view.hidden[row, :count].tolist()
        tokens, expected, _ = sparsevlm(dict(enumerate(score[row, :count].tolist())), features, requested[row])
        assert index[row][mask[row]].tolist() == tokens
        assert len(tokens) == totals[row]
        torch.testing.assert_close(states[row][mask[row]], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 7, 100])
def test_distances_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    torch.manual_seed(1)
    view = HandView(torch.randn(1, 203, 3), 200, keys=torch.randn(1, 203, 1), queries=torch.ones(1, 1, 203, 1))
    mask = SparseVLM().select(view, torch.tensor([26]))
    states, index = SparseVLM().rewrite(view, mask)
    monkeypatch.setattr("lmms_prune.methods.sparsevlm.BLOCK", block)
    assert torch.equal(SparseVLM().select(view, torch.tensor([26])), mask)
    again, same = SparseVLM().rewrite(view, mask)
    assert torch.equal(again[mask], states[mask])
    assert torch.equal(same[mask], index[mask])


def test_debiased_by_hand() -> None:
    # HandView's cosine table is the column and its sine 0, so that all-ones rotate to (c, c): between columns q and k the
    # bias is 2·q·k/√2. The one text token (column 4) sees the visual ones in columns 1, 2, 3; two query heads, of which
    # round(14·2/32) = 1 counts.      shares: head A 6 2 3 of 12, head B 1 5 9 of 16
    #   divided by the column: A 6/12, 1/12, 1/12 (sum 0.667),  B 1/16, 2.5/16, 3/16 (sum 0.406): head A, v0 first.
    #   Uncorrected the mean of both heads has v2 first: (3/12 + 9/16)/2 = 0.406 against (6/12 + 1/16)/2 = 0.281.
    shares = torch.tensor([[0.5, 6, 2, 3, 0.5], [0.5, 1, 5, 9, 0.5]], dtype=torch.float64)
    queries = torch.eye(2, dtype=torch.float64)[None, :, None].expand(-1, -1, 5, -1)
    view = HandView(torch.ones(1, 5, 3, dtype=torch.float64), 3, keys=shares.log().T[None], queries=queries)
    view._parts.rotate = lambda states, rotary: states.double() * rotary[0]
    expected = torch.tensor([[6.0, 1, 1]], dtype=torch.float64) / 12 / (2 * 4 / math.sqrt(2))
    torch.testing.assert_close(SparseVLM(version="v2.0")._score(view), expected)
    attention = [[[x / sum(row) for x in row]] for row in shares.tolist()]
    bias = [[2 * 4 * column / math.sqrt(2) for column in range(5)]]
    found, _ = scores(attention, [0], range(1, 4), bias)
    assert [found[i] for i in range(3)] == pytest.approx(expected[0].tolist())
    for version, first in (("v2.0", 0), ("v1.5", 2)):
        assert chosen(SparseVLM(version=version, native_count=False).select(view, torch.tensor([1]))) == [{first}]


@pytest.mark.parametrize(("heads", "best"), [(32, 14), (28, 12), (16, 7), (4, 2), (1, 1)])
def test_best_heads(heads: int, best: int) -> None:
    from lmms_prune.methods.sparsevlm import _best_heads

    assert _best_heads(heads) == best


# -- raters ------------------------------------------------------------------------------------------------------------


def one_row(embedded: Tensor, text: int, keys: Tensor) -> HandView:
    length = embedded.shape[1]
    queries = torch.eye(length, dtype=torch.float64)[None, None]
    return HandView(embedded, length - 1 - text, keys=keys, queries=queries, embedded=embedded)


@pytest.mark.parametrize("text", [1, 2, 5])
def test_no_word_above_the_mean_makes_all_of_them_raters(text: int) -> None:
    """One word, or words that are all the same: the reference divides by zero."""
    torch.manual_seed(0)
    embedded = torch.randn(1, 5 + text, 16, dtype=torch.float64)
    embedded[:, 5:] = embedded[:, 5:6]
    keys = torch.randn(1, 5 + text, 5 + text, dtype=torch.float64)
    view = one_row(embedded, text, keys)
    expected = view.attention(view.text)[0, 0].mean(0)
    torch.testing.assert_close(SparseVLM()._score(view)[0], expected)


def test_without_text_the_last_token_rates() -> None:
    view = one_row(torch.randn(1, 6, 3, dtype=torch.float64), 0, torch.randn(1, 6, 6, dtype=torch.float64))
    assert view.text.slots.shape == (1, 0)
    torch.testing.assert_close(SparseVLM()._score(view), view.attention(view.last)[:, 0, 0])


def test_ties_go_to_the_lower_index() -> None:
    view = HandView(torch.zeros(1, 8, 3), 5, keys=torch.zeros(1, 8, 1), queries=torch.zeros(1, 1, 8, 1))
    assert chosen(SparseVLM(native_count=False).select(view, torch.tensor([3]))) == [{0, 1, 2}]
    # N = 2: v0 and v1 stay, v2 is the one that is recycled.
    assert chosen(SparseVLM().select(view, torch.tensor([3]))) == [{0, 1, 2}]


# -- against the slow reference ----------------------------------------------------------------------------------------


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    """Sets, order and states of what goes on; LLaVA's images have up to two clusters."""
    ratios = (0.4, 0.2, 0.6, 0.1, 0.5, 0.8, 0.3, 0.05)
    got, want, clusters = [], [], set()
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        layer = 1 + number % 7
        attentions = eager_attentions(tiny, seen.inputs, torch.float64)
        trace, entered = run_to(tiny, seen.inputs, f"sparsevlm@{layer}:{ratio}", layer)
        got += kept(trace)
        for span, row in zip(seen.spans, trace.rows, strict=True):
            score, margin = judge(tiny, seen, attentions, span, layer)
            states = seen.states(span, layer)
            requested = round(ratio * len(span.visual))
            tokens, expected, near = sparsevlm(score, [states[c] for c in span.visual], requested)
            margin = min(margin, near)
            want.append((set(tokens), margin))
            clusters.add(len(tokens) - requested)
            if margin > 1e-6 and tokens:
                length = span.length - len(span.visual) + len(tokens)
                assert row.visual[layer] == len(tokens)
                now = entered[span.row, -length:][span.visual[0] :][: len(tokens)]
                torch.testing.assert_close(now, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert len(got) == image_count(batches)
    assert clusters >= ({1, 2} if tiny.family == "llava" else {1})
    assert_agree(got, want)


def rotary_bias(tiny: Tiny, seen: Observed, span: ImageSpan) -> list[list[float]]:
    """[text row][key]: the product of two all-ones vectors, rotated pair by pair with the library's own tables."""
    text = tiny.model().config.get_text_config()
    size = text.hidden_size // text.num_attention_heads
    if tiny.family == "llava":
        positions = [[float(p)] * 3 for p in range(span.length)]
        sections = [size // 2, 0, 0]
    else:
        ids = rope_ids(tiny, seen.inputs)[:, span.row, span.pad :]
        positions, sections = ids.T.tolist(), text.rope_parameters["mrope_section"]
    channel = [c for c, width in enumerate(sections) for _ in range(width)]
    frequency = [text.rope_parameters["rope_theta"] ** (-2 * f / size) for f in range(size // 2)]
    bias = []
    for t in span.text:
        row = []
        for k in range(span.length):
            turns = [(positions[t][c] - positions[k][c]) * w for c, w in zip(channel, frequency, strict=True)]
            row.append(sum(2 * math.cos(turn) for turn in turns) / math.sqrt(size))
        bias.append(row)
    return bias


def test_v2_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    ratios = (0.4, 0.2, 0.6, 0.1, 0.5, 0.8, 0.3, 0.05)
    got, want, plain = [], [], []
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        layer = 1 + number % 7
        attentions = eager_attentions(tiny, seen.inputs, torch.float64)
        trace, _ = tiny.run(seen.inputs, f"sparsevlm@{layer}:{ratio};version=v2.0")
        got += kept(trace)
        for span in seen.spans:
            requested, bias = round(ratio * len(span.visual)), rotary_bias(tiny, seen, span)
            score, margin = judge(tiny, seen, attentions, span, layer, bias)
            tokens, _, near = sparsevlm(score, [[0.0]] * len(score), requested, recycle=False)
            # A bias near 0 multiplies the float32 error of the library's tables.
            steepest = max(1 / abs(row[c]) for row in bias for c in span.visual)
            want.append((set(tokens), min(margin, near) / max(1.0, steepest)))
            score, _ = judge(tiny, seen, attentions, span, layer)
            plain.append(set(slow.best_first(score)[:requested]))
    assert len(got) == image_count(batches)
    assert_agree(got, want)
    assert sum(a != b for a, b in zip(got, plain, strict=True)) > len(got) / 2, "the correction changes what is kept"


def look(model: Any, inputs: dict[str, Tensor], schedule: str, layer: int) -> tuple[Trace, Tensor, list[Tensor]]:
    """The attention of the layer before a stage, and what enters layers 0 and `layer` before a method acts there."""
    entering: list[Tensor] = []
    layers = model.model.language_model.layers
    # These hooks come before the pruning ones: they see what the method sees.
    handles = [
        layers[n].register_forward_pre_hook(lambda module, args: entering.append(args[0][0])) for n in (0, layer)
    ]
    with torch.no_grad(), prune(model, schedule) as trace:
        attention = model(**inputs, output_attentions=True).attentions[layer - 1]
    for handle in handles:
        handle.remove()
    return trace, attention, entering


@pytest.mark.parametrize("schedule", ["sparsevlm@2:0.6,sparsevlm@5:0.3", "divprune@0:0.7,sparsevlm@4:0.4"])
def test_after_an_earlier_stage(tiny: Tiny, schedule: str) -> None:
    """Raters are those of all original tokens, scores and recycled states those of the tokens present, merged ones included."""
    rng = random.Random(4)
    layer, ratio = Schedule.parse(schedule).stages[1].layer, float(str(Schedule.parse(schedule).stages[1].keep))
    eager = tiny.model(torch.float64, "eager")
    for row in [tiny.row(rng) for _ in range(5)]:
        inputs = tiny.batch([row])
        trace, attention, entering = look(eager, inputs, schedule, layer)
        [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], eager.config.image_token_id)
        present = trace.rows[0].kept[0][0]
        gone, start = len(span.visual) - present, span.visual[0]
        visual, text = range(start, start + present), [column - gone for column in span.text]
        embedded = entering[0].tolist()
        chosen_rows, _ = raters([embedded[c] for c in span.visual], [embedded[c] for c in span.text])
        score, _ = scores(attention[0][:, text].tolist(), chosen_rows, visual)
        requested = min(round(ratio * len(span.visual)), present)
        tokens, states, margin = sparsevlm(score, entering[1][start : start + present].tolist(), requested)
        assert margin > 1e-6
        _, entered = run_to(tiny, inputs, schedule, layer)
        now = entered[0, start:][: len(tokens)]
        assert trace.rows[0].visual[layer] == len(tokens)
        torch.testing.assert_close(now, torch.tensor(states, dtype=torch.float64), atol=1e-4, rtol=0)


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "segments", "average"),
    [
        ("sparsevlm-192", [309, 204, 113], 206.5),
        ("sparsevlm-128", [312, 117, 39], 145.4),
        ("sparsevlm-96", [249, 55, 27], 114.1),
        ("sparsevlm-64", [82, 32, 18], 82.3),
        ("sparsevlm-v2-192", [300, 200, 118], 206.8),
        ("sparsevlm-v2-128", [238, 108, 60], 144.1),
        ("sparsevlm-v2-96", [246, 54, 28], 113.9),
        ("sparsevlm-v2-64", [66, 34, 20], 81.8),
    ],
)
def test_published_counts(name: str, segments: list[int], average: float) -> None:
    schedule = Schedule.parse(name)
    assert [stage.layer for stage in schedule.stages] == [3, 7, 16]
    assert schedule.plan([576]) == [[n] for n in segments]
    assert float(schedule.avg_visual_tokens(32, [576])) == pytest.approx(average, abs=0.06)


def test_the_authors_accounting() -> None:
    """The authors count a pruning layer as pruned already: 192.0, 128.6 and 64.8."""
    for name, average in (("sparsevlm-192", 192.0), ("sparsevlm-128", 128.6), ("sparsevlm-64", 64.8)):
        first, second, third = (sum(counts) for counts in Schedule.parse(PRESETS[name]).plan([576]))
        assert (2 * 576 + 4 * first + 9 * second + 17 * third) / 32 == pytest.approx(average, abs=0.06)


@pytest.mark.parametrize("present", [1, 2, 3, 30, 64, 576])
def test_clusters_follow_from_the_total(present: int) -> None:
    """The budget is a total; the method finds the clusters again, by what was asked for where two ways lead there."""
    for requested in range(1, present):
        total = sparsevlm_count(requested, present, {})
        q = int(0.3 * (present - requested)) + 1
        assert total == requested + q // 10 + 1 <= present
        if total < present:
            assert _clusters(total, present, requested) == total - requested
            if total != sparsevlm_count(requested + 1, present, {}):
                assert _clusters(total, present, None) == total - requested
    if present == 576:
        assert sparsevlm_count(12, present, {}) == sparsevlm_count(13, present, {}), "two ways to the same total"
    totals = [sparsevlm_count(requested, present, {}) for requested in range(present)]
    assert all(b - a in (0, 1) for a, b in pairwise(totals[1:]))
    assert totals[0] == 0
    for stages in PRESETS["sparsevlm-192"], PRESETS["sparsevlm-128"], PRESETS["sparsevlm-96"], PRESETS["sparsevlm-64"]:
        before = 576
        for stage in Schedule.parse(stages).stages:
            [total] = stage.kept([576], [before])
            assert isinstance(stage.keep, int)
            assert total - _clusters(total, before, None) == stage.keep
            before = total


@pytest.mark.parametrize("option", ["native_count=false", "version=v2.0"])
def test_exact_counts(tiny: Tiny, option: str) -> None:
    inputs = tiny.batch([([tiny.image(random.Random(0), (8, 8))], "is it red")])
    for requested in (1, 20, 63):
        assert list(map(len, kept(tiny.run(inputs, f"sparsevlm@2:{requested}t;{option}")[0]))) == [requested]
    # Recycling v1.5 keeps more: 20 and C = floor((floor(13.2) + 1)/10) + 1 = 2.
    assert list(map(len, kept(tiny.run(inputs, "sparsevlm@2:20t")[0]))) == [22]


def test_several_images_are_independent(tiny: Tiny) -> None:
    rng = random.Random(3)
    rows = [tiny.row(rng, images=images) for images in (2, 1, 0, 3)]
    inputs = tiny.batch(rows)
    trace, logits = tiny.run(inputs, "sparsevlm@3:0.4,sparsevlm@5:0.2")
    assert torch.isfinite(logits).all()
    assert [len(row.images) for row in trace.rows] == [2, 1, 0, 3]
    assert [row.kept for row in trace.rows] == [trace.schedule.plan(row.images) for row in trace.rows]
