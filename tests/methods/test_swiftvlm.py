"""SwiftVLM against hand-computed cases and a plain-Python run of several stages; its look-ahead attention row."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import slow
import torch
from observed import HandView, ImageSpan, Observed, Tiny, assert_agree, image_count, kept, observe
from torch import Tensor

from lmms_prune import Schedule, prune
from lmms_prune.methods import swiftvlm
from lmms_prune.methods.swiftvlm import SwiftVLM, _grouped
from lmms_prune.methods.view import TokenView

CaptureView = Callable[..., TokenView]


def fold(states: dict[int, list[float]], groups: int) -> tuple[list[list[int]], float]:
    """Groups of tokens by merging even with odd groups, in plain loops; and the margin of the decisions."""
    clusters, margin = [[token] for token in sorted(states)], math.inf
    while len(clusters) > groups:
        means = [slow.unit(mean([states[token] for token in cluster])) for cluster in clusters]
        best: dict[int, tuple[float, int]] = {}
        for even in range(0, len(clusters), 2):
            likeness = {odd: slow.dot(means[even], means[odd]) for odd in range(1, len(clusters), 2)}
            order = slow.best_first(likeness)
            best[even] = (likeness[order[0]], order[0])
            if len(order) > 1:
                margin = min(margin, likeness[order[0]] - likeness[order[1]])
        fewer = min(len(clusters) // 2, len(clusters) - groups)
        order = slow.best_first({even: value for even, (value, _) in best.items()})
        if fewer < len(order):
            margin = min(margin, best[order[fewer - 1]][0] - best[order[fewer]][0])
        for even in order[:fewer]:
            clusters[best[even][1]] += clusters[even]
            clusters[even] = []
        clusters = [cluster for cluster in clusters if cluster]
    return [sorted(cluster) for cluster in clusters], margin


def mean(vectors: list[list[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


@dataclass
class Slow:
    """SwiftVLM for one image, stage by stage; `rank` gives each candidate's score."""

    size: int
    stored: dict[int, list[float]] = field(default_factory=dict)
    carrier: dict[int, int] = field(default_factory=dict)
    merged: set[int] = field(default_factory=set)
    then: dict[int, list[float]] = field(default_factory=dict)

    def candidates(self, now: dict[int, list[float]]) -> dict[int, list[float]]:
        """All candidates, by raster index, given the states present in the sequence."""
        if not self.stored:
            return now
        found = {}
        for token, carrier in self.carrier.items():
            if carrier in now:
                own = token == carrier and token not in self.merged
                moved = zip(self.stored[token], now[carrier], self.then[carrier], strict=True)
                found[token] = now[token] if own else [old + a - b for old, a, b in moved]
        return found

    def stage(self, states: dict[int, list[float]], scores: dict[int, float], count: int) -> tuple[dict, float]:
        """The tokens that continue, by raster index, and the margin."""
        groups = min(int(self.size / 20 + 0.5), count // 2)
        if groups == 0 and count > 1:
            groups = 1
        order = slow.best_first(scores)
        best, rest = order[: count - groups], order[count - groups :]
        margin = scores[best[-1]] - scores[rest[0]] if best else math.inf
        goes_on, carrier, merged = {token: states[token] for token in best}, {token: token for token in best}, set()
        if groups:
            clusters, hesitation = fold({token: states[token] for token in rest}, groups)
            margin = min(margin, hesitation)
            for cluster in clusters:
                middle = cluster[(len(cluster) - 1) // 2]
                goes_on[middle] = mean([states[token] for token in cluster])
                merged.add(middle)
                carrier |= dict.fromkeys(cluster, middle)
        self.stored, self.carrier, self.merged, self.then = states, carrier, merged, goes_on
        assert len(goes_on) == count
        return goes_on, margin


# -- by hand -----------------------------------------------------------------------------------------------------------


def first_view() -> HandView:
    """One system token, six visual tokens, two text tokens; the keys' logarithms say how the last token attends."""
    shares = torch.tensor([4.0, 6, 1, 5, 2, 3, 1, 1, 1])
    hidden = torch.zeros(1, 9, 2, dtype=torch.float64)
    hidden[0, 1:7] = torch.tensor([[1.0, 0], [0, 2], [3, 3], [0, 4], [-2, 0], [2, -6]])
    return HandView(hidden, 6, keys=shares.log()[None, :, None], queries=torch.ones(1, 1, 1, 1), layer=3)


def test_first_stage_by_hand() -> None:
    # Attention falls in the order 0, 2, 4, 3, 1, 5. Of six tokens 5 % are none, but one group is the least: of three
    # places two are for tokens 0 and 2, the third for the mean of 1, 3, 4, 5: (0 + 0 - 2 + 2, 2 + 4 + 0 - 6) / 4 = 0,
    # which stands at the lower median, token 3.
    view, method = first_view(), SwiftVLM()
    keep = method.select(view, torch.tensor([3]))
    hidden, index = method.rewrite(view, keep)
    assert index[keep].tolist() == [0, 2, 3]
    assert hidden[keep].tolist() == [[1, 0], [3, 3], [0, 0]]
    # A single place is for the best token, and nothing is merged.
    keep = method.select(view, torch.tensor([1]))
    hidden, index = method.rewrite(view, keep)
    assert index[keep].tolist() == [0]
    assert hidden[keep].tolist() == [[1, 0]]


def test_second_stage_by_hand() -> None:
    # Tokens 0, 2 and the merged one went on as (1, 0), (3, 3), (0, 0), and are now (1, 1), (4, 3), (10, 20). So the
    # stored ones are now 1: (10, 22), 3: (10, 24), 4: (8, 20), 5: (12, 14); 0 and 2 are what they are.
    view, method = first_view(), SwiftVLM()
    method.rewrite(view, method.select(view, torch.tensor([3])))
    later = HandView(torch.zeros(1, 6, 2, dtype=torch.float64), 3, queries=torch.eye(2)[None, None, 1:], layer=10)
    later._state.hidden[0, 1:4] = torch.tensor([[1.0, 1], [4, 3], [10, 20]])
    later.index, later.sizes, later.memory = torch.tensor([[0, 2, 3]]), [6], view.memory
    later._origin, later._columns = torch.tensor([[0, 1, 3, 4, 7, 8]]), torch.arange(1, 7)[None]
    later._parts.keys = lambda layer, hidden, rotary: hidden[:, None].float()
    later._unpruned_rotary = (torch.zeros(1, 9, 2), torch.zeros(1, 9, 2))
    keep = method.select(later, torch.tensor([2]))
    hidden, index = method.rewrite(later, keep)
    # The query reads the second entry: 24, 22, 20, 14, 3, 1 for tokens 3, 1, 4, 5, 2, 0. Token 3 comes back; the mean
    # of 0, 1, 2, 4, 5 is (1 + 10 + 4 + 8 + 12, 1 + 22 + 3 + 20 + 14) / 5 = (7, 12), at the median token 2.
    assert index[keep].tolist() == [2, 3]
    assert hidden[keep].tolist() == [[7, 12], [10, 24]]


def test_grouping_by_hand() -> None:
    # Tokens 1 … 6 (0 is kept) at 0, 90, 5, 80, 91, 300 degrees stand at places 0 … 5, to leave two groups.
    # Pass 1, of 6 at most 3 join: 0° (place 0) looks at 90°, 80°, 300°: 300° is 60° away; 5° (place 2): 300° is 65°
    # away; 91° (place 4): 90° is 1° away. All three join: {90, 91}, {80}, {300, 0, 5}. Pass 2, of 3 one joins: {90, 91}
    # at place 0 and {300, 0, 5} at place 2 both look at {80}: the first is nearer. Left: {80, 90, 91}, {300, 0, 5}.
    turned = torch.tensor([[45.0, 0, 90, 5, 80, 91, 300]], dtype=torch.float64).deg2rad()
    states = torch.stack([turned.cos(), turned.sin()], dim=-1)
    rest = torch.tensor([[False, True, True, True, True, True, True]])
    assert _grouped(states, rest, torch.tensor([2]), 2).tolist() == [[-1, 1, 0, 1, 0, 0, 1]]
    assert _grouped(states, rest, torch.tensor([1]), 1).tolist() == [[-1, 0, 0, 0, 0, 0, 0]]
    assert _grouped(states, rest, torch.tensor([3]), 5).tolist() == [[-1, 2, 0, 2, 1, 0, 2]]
    vectors = {token: states[0, token].tolist() for token in range(1, 7)}
    assert fold(vectors, 2)[0] == [[2, 4, 5], [1, 3, 6]]
    assert fold(vectors, 3)[0] == [[2, 5], [4], [1, 3, 6]]


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_grouping_equals_plain_loops(tokens: int) -> None:
    """A batch whose rows want different numbers of groups and hold different numbers of tokens."""
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(5, 40, 4, generator=generator, dtype=torch.float64)
    rest = torch.rand(5, 40, generator=generator).argsort(dim=1) < tokens
    groups = torch.tensor([1, 2, 3, 5, 7]).clamp(max=tokens)
    found = _grouped(states, rest, groups, 7)
    for row, number in enumerate(groups.tolist()):
        vectors = {token: states[row, token].tolist() for token in rest[row].nonzero().flatten().tolist()}
        clusters, _ = fold(vectors, number)
        assert len(clusters) == number
        got = [[t for t in range(40) if found[row, t] == group] for group in range(number)]
        assert got == clusters
        assert ((found[row] >= 0) == rest[row]).all()


def test_ties_go_to_the_lower_index() -> None:
    view = HandView(torch.ones(1, 8, 3), 5, keys=torch.zeros(1, 8, 1), queries=torch.zeros(1, 1, 1, 1))
    keep = SwiftVLM().select(view, torch.tensor([3]))
    _, index = SwiftVLM().rewrite(view, keep)
    assert index[keep].tolist() == [0, 1, 3], "tokens 0 and 1, and the median of 2, 3 and 4"


# -- several stages of a real model ------------------------------------------------------------------------------------


def hypothetical(
    tiny: Tiny, layer: int, states: dict[int, list[float]], span: ImageSpan, text: Tensor, rotary: tuple[Tensor, Tensor]
) -> dict[int, float]:
    """The last token's attention, by the library's eager layer, in a sequence with all the candidates."""
    module = tiny.model(torch.float64, "eager").model.language_model.layers[layer]
    before, tokens = span.visual[0], sorted(states)
    columns = [*range(before), *(before + t for t in tokens), *range(span.visual[-1] + 1, span.length)]
    visual = torch.tensor([states[token] for token in tokens], dtype=text.dtype)
    sequence = torch.cat([text[:before], visual, text[before:]])[None]
    at = tuple(table[..., columns, :] for table in rotary)
    with torch.no_grad():
        _, weights = module.self_attn(
            hidden_states=module.input_layernorm(sequence), position_embeddings=at, attention_mask=None
        )
    row = weights[0, :, -1].mean(0).tolist()
    return {token: row[before + i] for i, token in enumerate(tokens)}


def follow(tiny: Tiny, row: tuple, schedule: str) -> tuple[list[set[int]], list[tuple[set[int], float]], bool]:
    """One image through all stages: what was kept, what should be, and whether something dropped came back."""
    inputs, stages = tiny.batch([row]), Schedule.parse(schedule).stages
    layers = tiny.model().model.language_model.layers
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    tables: list[tuple[Tensor, Tensor]] = []

    def note(seen: dict[int, Tensor], layer: int) -> Callable:
        def hook(module: object, args: tuple, kwargs: dict) -> None:
            seen[layer] = args[0][0]
            if layer == 0:
                tables.append(kwargs["position_embeddings"])

        return hook

    # Hooks put on before the pruning ones see what the stage is given, those put on after them what it leaves.
    handles = [layers[s.layer].register_forward_pre_hook(note(before, s.layer), with_kwargs=True) for s in stages]
    handles.append(layers[0].register_forward_pre_hook(note({}, 0), with_kwargs=True))
    with torch.no_grad(), prune(tiny.model(), schedule) as trace:
        handles += [layers[s.layer].register_forward_pre_hook(note(after, s.layer), with_kwargs=True) for s in stages]
        tiny.model()(**inputs)
    for handle in handles:
        handle.remove()
    seen = observe(tiny, inputs)
    [span] = seen.spans
    start, reference, standing = span.visual[0], Slow(len(span.visual)), list(range(len(span.visual)))
    got, want, returned, text_length = [], [], False, span.length - len(span.visual)
    for number, stage in enumerate(stages):
        entering, [tokens] = before[stage.layer], trace.rows[0].indices(number)
        got.append(set(tokens))
        count = min(stage.requested([len(span.visual)])[0], len(standing))
        # A stage that keeps all that is there does nothing.
        if stage.method == "swiftvlm" and count < len(standing):
            now = dict(zip(standing, entering[start : start + len(standing)].tolist(), strict=True))
            states, text = reference.candidates(now), torch.cat([entering[:start], entering[start + len(standing) :]])
            if reference.stored:
                scores = hypothetical(tiny, stage.layer, states, span, text, tables[0])
            else:
                heads = seen.attention(span, stage.layer - 1)
                scores = {t: sum(h[0][c] for h in heads) / len(heads) for t, c in enumerate(span.visual)}
            goes_on, margin = reference.stage(states, scores, count)
            want.append((set(goes_on), margin))
            returned |= bool(set(goes_on) - reference.merged - set(standing))
            if set(goes_on) == got[-1]:
                left = after[stage.layer][start : len(after[stage.layer]) - text_length + start]
                expected = torch.tensor([goes_on[token] for token in sorted(goes_on)], dtype=left.dtype)
                torch.testing.assert_close(left, expected, atol=1e-9, rtol=1e-9)
        else:
            want.append((set(tokens if stage.method == "random" else standing), 1.0))
        standing = tokens
    return got, want, returned


@pytest.mark.parametrize("part", range(4))
def test_a_stage_equals_slow_reference(tiny: Tiny, batches: list[Observed], part: int) -> None:
    """The tokens of the first stage, and their states in raster order."""
    got, want = [], []
    numbers = (part, part + 4)
    for number in numbers:
        seen, layer, ratio = batches[number], 1 + number % 7, (0.26, 0.5, 0.1, 0.75)[part]
        left: list[Tensor] = []
        model = tiny.model()
        with torch.no_grad(), prune(model, f"swiftvlm@{layer}:{ratio}") as trace:
            module = model.model.language_model.layers[layer]
            handle = module.register_forward_pre_hook(lambda module, args, left=left: left.append(args[0]))
            model(**seen.inputs, logits_to_keep=1)
            handle.remove()
        got += kept(trace)
        for span, tokens in zip(seen.spans, kept(trace), strict=True):
            heads, size = seen.attention(span, layer - 1), len(span.visual)
            scores = {t: sum(h[0][c] for h in heads) / len(heads) for t, c in enumerate(span.visual)}
            states = dict(enumerate(seen.states(span, layer)[span.visual[0] : span.visual[-1] + 1]))
            count = round(ratio * size)
            goes_on, margin = Slow(size).stage(states, scores, count)
            want.append((set(goes_on), margin))
            if set(goes_on) == tokens:
                length = span.length - size + count
                found = left[0][span.row, left[0].shape[1] - length + span.visual[0] :][:count]
                expected = torch.tensor([goes_on[token] for token in sorted(goes_on)], dtype=found.dtype)
                torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert len(got) == image_count([batches[number] for number in numbers])
    assert_agree(got, want)


@pytest.mark.parametrize(
    "schedule",
    [
        "swiftvlm@1:0.7,swiftvlm@4:0.4",
        "swiftvlm@2:0.3,swiftvlm@3:0.25,swiftvlm@6:0.2",
        "swiftvlm@1:0.6,random@2:0.4,swiftvlm@5:0.3",
    ],
)
def test_stages_equal_slow_reference(tiny: Tiny, schedule: str) -> None:
    rng = random.Random(6)
    got, want, returns = [], [], 0
    for _ in range(12):
        kept_now, expected, returned = follow(tiny, tiny.row(rng), schedule)
        got, want, returns = got + kept_now, want + expected, returns + returned
    assert_agree(got, want)
    assert returns > 3, "tokens do come back"


def test_a_stage_that_keeps_all_restores_nothing(tiny: Tiny) -> None:
    inputs = tiny.batch([tiny.row(random.Random(1)) for _ in range(3)])
    once, logits = tiny.run(inputs, "swiftvlm@1:0.5")
    twice, same = tiny.run(inputs, "swiftvlm@1:0.5,swiftvlm@4:0.5")
    assert kept(once) == kept(twice) == kept(twice, stage=1)
    assert torch.equal(logits, same)


def test_a_small_image_among_large_ones(all_tiny: dict[str, Tiny]) -> None:
    """It keeps all at the second stage, and what it has stored still counts at the third."""
    tiny, rng = all_tiny["qwen2_5_vl"], random.Random(2)
    small, large = ([tiny.image(rng, (3, 4))], "is it red"), ([tiny.image(rng, (6, 6))], "is it blue")
    schedule = "swiftvlm@1:0.42,swiftvlm@3:0.38,swiftvlm@5:0.2"
    alone, logits = tiny.run(tiny.batch([small]), schedule)
    both, together = tiny.run(tiny.batch([small, large]), schedule)
    assert [row.kept for row in both.rows] == [[[5], [5], [2]], [[15], [14], [7]]]
    assert [both.rows[0].indices(i) for i in range(3)] == [alone.rows[0].indices(i) for i in range(3)]
    torch.testing.assert_close(together[:1], logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", ["swiftvlm@1:0.6,swiftvlm@3:0.4,swiftvlm@5:0.2", "swiftvlm@2:2t,swiftvlm@5:1t"])
def test_batch_does_not_matter_to_later_stages(tiny: Tiny, schedule: str) -> None:
    rng = random.Random(8)
    rows = [tiny.row(rng, images=n, words=words) for n, words in ((1, 3), (2, 8), (0, 5), (1, 25), (1, 1))]
    inputs = tiny.batch(rows)
    stages = len(Schedule.parse(schedule).stages)
    trace, logits = tiny.run(inputs, schedule)
    for number, row in enumerate(rows):
        alone, single = tiny.run(tiny.batch([row]), schedule)
        for stage in range(stages):
            assert alone.rows[0].indices(stage) == trace.rows[number].indices(stage)
        # A LLaVA without position ids counts the padding, which turns nothing but rounding.
        torch.testing.assert_close(single[0], logits[number], atol=1e-4, rtol=0)


def test_a_single_slot_merges_nothing(tiny: Tiny) -> None:
    inputs = tiny.batch([tiny.row(random.Random(4)) for _ in range(4)])
    assert kept(tiny.run(inputs, "swiftvlm@3:1t")[0]) == kept(tiny.run(inputs, "fastv@3:1t")[0])


def test_renumbered_positions(all_tiny: dict[str, Tiny]) -> None:
    tiny = all_tiny["llava"]
    inputs = tiny.batch([tiny.row(random.Random(4)) for _ in range(4)])
    trace, logits = tiny.run(inputs, "swiftvlm@1:0.6,swiftvlm@3:0.4", positions="compact")
    assert torch.isfinite(logits).all()
    assert [len(tokens) for tokens in kept(trace, stage=1)] == [26] * 4


# -- the look-ahead attention row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "random@1:0.6,"])
def test_attention_to_candidates_that_are_present(tiny: Tiny, capture_view: CaptureView, before: str) -> None:
    """Candidates that are the visual tokens themselves: the ordinary look ahead, whatever else is in the batch."""
    rng = random.Random(9)
    rows = [tiny.row(rng, images=n, words=words) for n, words in ((1, 3), (2, 8), (0, 5), (1, 25))]
    view = capture_view(tiny, tiny.batch(rows), 3, before)
    want = view.attention(view.last, ahead=True)[:, :, 0]
    got = view.attention_to(view.hidden, torch.where(view.valid, view.index, 0), view.valid)
    visible = view.valid[:, None].expand_as(want)
    torch.testing.assert_close(got[visible], want[visible])
    # Their order does not matter, and those that do not exist count for nothing, wherever their index points.
    back = torch.arange(view.valid.shape[1]).flip(0)
    index = torch.where(view.valid, view.index, 10_000)
    turned = view.attention_to(view.hidden[:, back], index[:, back], view.valid[:, back])[:, :, back]
    torch.testing.assert_close(turned[visible], want[visible])


@pytest.mark.parametrize("budget", [192, 128])
def test_budgets(budget: int) -> None:
    schedule = Schedule.parse(f"swiftvlm-{budget}")
    assert schedule.avg_visual_tokens(32, [576]) == budget
    assert [stage.layer for stage in schedule.stages] == [3, 10, 14]


@pytest.mark.parametrize("between", ["pool@3:0.3", "tome@3:0.3", "random@3:0.3"])
def test_tokens_that_other_methods_merge_in_between_are_candidates(tiny: Tiny, between: str) -> None:
    """Every token that the second stage keeps is one that stood there or one that was stored; none is invented."""
    rng = random.Random(12)
    rows = [tiny.row(rng) for _ in range(6)]
    inputs = tiny.batch(rows)
    schedule = f"swiftvlm@1:0.5,{between},swiftvlm@5:0.2"
    found: list[tuple[Tensor, Tensor]] = []
    original = swiftvlm._restored

    def spy(view: TokenView, earlier: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states, exists, score, added = original(view, earlier)
        for image, count in enumerate(view.counts):
            standing = set(view.index[image, :count].tolist())
            assert standing <= set(exists[image].nonzero().flatten().tolist()) | merged_indices(view, image)
            assert int(exists[image].sum()) >= min(count, round(0.2 * view.sizes[image]))
        found.append((states, exists))
        return states, exists, score, added

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swiftvlm, "_restored", spy)
        trace, logits = tiny.run(inputs, schedule)
    assert found
    assert torch.isfinite(logits).all()
    for image, row in enumerate(trace.rows):
        candidates = set(found[-1][1][image].nonzero().flatten().tolist())
        assert set(row.indices(2)[0]) <= candidates


def merged_indices(view: TokenView, image: int) -> set[int]:
    """Raster indices of the merged tokens of the first stage."""
    earlier = view.remembered(swiftvlm._Bypass)
    assert earlier is not None
    return set(earlier.merged[image].nonzero().flatten().tolist())
