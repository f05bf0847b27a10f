"""IVC-Prune against hand-computed cases, published sets and counts, and a slow reference in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace

import pytest
import slow
import torch
from encoders import half_even, is_llava, top
from observed import HandView, Observed, Tiny, assert_agree, image_count, kept, rope_ids
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lmms_prune import Schedule, ScheduleError
from lmms_prune.methods import ivcprune
from lmms_prune.methods.base import highest
from lmms_prune.methods.ivcprune import IVCPrune
from lmms_prune.methods.view import Tokens, TokenView
from lmms_prune.models.parts import ModelParts
from lmms_prune.schedule.presets import PRESETS

Vectors = Sequence[Sequence[float]]

# -- the slow reference ------------------------------------------------------------------------------------------------


def rounded(number: Fraction) -> int:
    return round(number)


def mean_of(positions: Sequence[float], frequencies: Sequence[float], function: Callable[[float], float]) -> float:
    """Mean over channels and frequencies; of three channels, height and width are added first."""
    by_channel = [sum(function(p * f) for f in frequencies) / len(frequencies) for p in positions]
    return sum(reversed(by_channel)) / len(by_channel)


def anchors(positions: Vectors, frequencies: Sequence[float], count: int) -> tuple[set[int], float]:
    """Tokens with the highest mean cosine, and with the highest mean sine; tokens of equal means tie."""
    found, margin = set(), math.inf
    for function in (math.cos, math.sin):
        # Rounded, so that tokens whose positions differ only in order tie.
        means = {i: round(mean_of(p, frequencies, function), 9) for i, p in enumerate(positions)}
        best, gap = top(means, count)
        found |= set(best)
        margin = min(margin, gap if gap else math.inf)
    return found, margin


def similarity(query: Vectors, keys: Sequence[Vectors]) -> list[float]:
    """Head mean of the softmax of one token's values with those of `keys`; [head][channel] each."""
    total = [0.0] * len(keys)
    for head, vector in enumerate(query):
        logits = [slow.dot(vector, key[head]) / math.sqrt(len(vector)) for key in keys]
        largest = max(logits)
        weights = [math.exp(x - largest) for x in logits]
        for i, weight in enumerate(weights):
            total[i] += weight / sum(weights) / len(query)
    return total


def reference(
    values: Sequence[Vectors],
    visual: Sequence[int],
    text: Sequence[int],
    positions: Vectors,
    frequencies: Sequence[float],
    count: int | None,
    rule: str,
) -> tuple[set[int], float]:
    """IVC-Prune of one image (https://arxiv.org/abs/2602.03060).

    Args:
        values: the value heads of every token of the row.
        visual: the image's columns.
        text: the text columns after it.
        positions: of each of the image's tokens, all channels.
        frequencies: of the rotary tables.
        count: how many are kept; None is the rule of the published code.
        rule: "fill" (Qwen2.5-VL) or "union" (LLaVA).
    """
    size = len(visual)
    union = count is None and rule == "union"
    target = Fraction(size, 2) if count is None else Fraction(count)
    by_table = rounded(target / (10 if union else 5))
    seed_count = max(1, rounded(target / 50))
    first, margin = anchors(positions, frequencies, by_table)
    columns = list(range(len(values))) if rule == "union" else list(visual)
    shift = visual[0] if rule == "union" else 0

    def total(queries: Sequence[int]) -> list[float]:
        sums = [0.0] * size
        for query in queries:
            row = similarity(values[query], [values[c] for c in columns])
            for i in range(size):
                sums[i] += row[shift + i]
        return sums

    queries = list(text[2:]) or list(text)
    asked = total(queries)
    seeds, gap = top(dict(enumerate(asked)), seed_count)
    margin = min(margin, gap)
    more = total([visual[i] for i in seeds])
    score = {i: (asked[i] + more[i]) / (len(queries) + len(seeds)) for i in range(size)}
    first |= set(seeds)
    if union:
        best, gap = top(score, rounded(Fraction(size, 5)))
        return first | set(best), min(margin, gap)
    rest = {i: s for i, s in score.items() if i not in first}
    best, gap = top(rest, max(0, rounded(target) - len(first)))
    return first | set(best), min(margin, gap)


# -- positions ---------------------------------------------------------------------------------------------------------


def means_at(positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """From the library's rotary module with heads of 128, as the published checkpoints have."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    decoder = SimpleNamespace(rotary_emb=LlamaRotaryEmbedding(config))
    parts = SimpleNamespace(decoder=decoder, family=SimpleNamespace(rotary_table=lambda decoder, table: table))
    parts.rotary = lambda hidden, ids: ModelParts.rotary(parts, hidden, ids)  # type: ignore[arg-type]
    return ModelParts.rotary_means(parts, positions)  # type: ignore[arg-type]


def spans(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(", "):
        low, _, high = part.partition("–")
        found |= set(range(int(low), int(high or low) + 1))
    return found


PUBLISHED = {
    35: (
        "0–10, 13–17, 21–24, 30–33, 40–42, 53, 66",
        "149, 192, 211, 212, 249, 250, 293, 294, 343–345, 368, 401–404, 430–432, 469–471, 502, 503, 546–550",
    ),
    5: (
        "0–27, 32",
        "141, 179, 191, 222, 241, 242, 279, 280, 298, 323, 324, 343, 373–375, 398, 431–434, 460–462, 498–501, 532, 533",
    ),
}


@pytest.mark.parametrize("start", PUBLISHED)
def test_published_coordinates_of_llava(start: int) -> None:
    """Of 576 tokens the 29 highest by each table, for an image that begins at position 35, or 5."""
    valid = torch.ones(1, 576, dtype=torch.bool)
    for mean, text in zip(means_at(torch.arange(start, start + 576)[None]), PUBLISHED[start], strict=True):
        assert set(highest(mean, valid, torch.tensor([29]))[0].nonzero().flatten().tolist()) == spans(text)


@pytest.mark.parametrize(("grid", "count", "union"), [((24, 24), 58, 116), ((15, 20), 30, 60), ((20, 30), 60, 120)])
def test_published_coordinates_of_qwen(grid: tuple[int, int], count: int, union: int) -> None:
    """θ = 10⁶, an image that begins at 15; tokens (r, c) and (c, r) tie exactly."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.full_like(rows, 0), rows, columns]).flatten(1)[:, None] + 15
    config_means = [means_at(channel, 1_000_000.0) for channel in ids]
    both = []
    for table in (0, 1):
        time, height, width = (means[table] for means in config_means)
        mean = ((height + width) + time) / 3
        if grid[0] == grid[1]:
            square = mean.view(grid)
            assert torch.equal(square, square.T)
        both.append(highest(mean, torch.ones_like(mean, dtype=torch.bool), torch.tensor([count])))
    assert int((both[0] | both[1]).sum()) == union


def test_means_are_those_of_the_models_positions(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """Several images and left padding; in bfloat16 the model's own tables would be too coarse."""
    rng = random.Random(1)
    rows = [tiny.row(rng, images=images, words=words) for images, words in ((2, 3), (1, 12))]
    for dtype in (torch.float64, torch.bfloat16):
        inputs = tiny.batch(rows, dtype)
        ids = inputs["attention_mask"].cumsum(1) - 1
        if is_llava(tiny):
            inputs["position_ids"] = ids.clamp(min=0)
            channels = ids[None]
        else:
            channels = rope_ids(tiny, inputs)[-3:]
        view = capture_view(tiny, inputs, 3, "divprune@0:0.5,", dtype=dtype)
        frequencies = tiny.model().model.language_model.rotary_emb.inv_freq.tolist()
        for mean, function in zip(view.rotary_means(), (math.cos, math.sin), strict=True):
            for image, row in enumerate(view.rows.tolist()):
                for column in range(view.counts[image]):
                    place = int(view._columns[image, int(view.index[image, column])])
                    expected = mean_of(channels[:, row, place].tolist(), frequencies, function)
                    assert float(mean[image, column]) == pytest.approx(expected, abs=1e-6)


# -- counts ------------------------------------------------------------------------------------------------------------

COUNTS = {
    # tokens: foreground, seeds, by each table (union); by each table, seeds, kept (fill)
    576: ((115, 6, 29), (58, 6, 288)),
    300: ((60, 3, 15), (30, 3, 150)),
    301: ((60, 3, 15), (30, 3, 150)),
    77: ((15, 1, 4), (8, 1, 38)),
    25: ((5, 1, 1), (2, 1, 12)),
    20: ((4, 1, 1), (2, 1, 10)),
}


@pytest.mark.parametrize("size", COUNTS)
def test_published_counts(size: int) -> None:
    union, fill = COUNTS[size]
    counts = IVCPrune(rule="union")._counts([size], [size])
    assert (counts.final, counts.seeds, counts.by_table) == ([union[0]], [union[1]], [union[2]])
    counts = IVCPrune()._counts([size], [size])
    assert (counts.by_table, counts.seeds, counts.final) == ([fill[0]], [fill[1]], [fill[2]])


def test_a_keep_is_exact_and_never_too_small_for_its_anchors() -> None:
    for n in range(600):
        counts = IVCPrune()._counts([n], [1000])
        assert 2 * counts.by_table[0] + counts.seeds[0] <= n == counts.final[0]
    # At half of the tokens it has the published shares.
    assert (
        IVCPrune()._counts([288], [576])
        == IVCPrune()._counts([288], [577])
        == ivcprune._Counts([58], [6], [288], [False])
    )


def test_presets() -> None:
    assert PRESETS["ivcprune-50pct"] == "ivcprune@16"
    assert PRESETS["ivcprune-llava"] == "ivcprune@16;rule=union"
    with pytest.raises(ScheduleError, match="its lowest layer is 1"):
        Schedule.parse("ivcprune@0:0.5")


# -- by hand -----------------------------------------------------------------------------------------------------------


def hand(values: Tensor, visual: int, positions: Tensor, width_1: bool = True) -> HandView:
    """One head; the values (L, d) of all columns; one system token, the image, then the text."""
    view = HandView(torch.zeros(1, len(values), 2).double(), visual)
    view._parts.values = lambda layer, hidden: values[None, None]
    view._parts.rotary_means = lambda ids: (ids.double().cos(), ids.double().sin())
    view._position_ids = positions
    return view


def test_the_worked_example() -> None:
    """The values make φ¹ highest at v7, and φ² fall as v7 v3 v1 v0 v2 and then equally."""
    lengths = {7: 6.0, 3: 5.0, 1: 4.0, 0: 3.0, 2: 2.0}
    values = torch.zeros(16, 1).double()
    for token, length in lengths.items():
        values[1 + token] = length
    values[13:] = 1.0
    view = hand(values, 12, torch.arange(2, 18)[None])
    # The image begins in column 1, at position 3.
    cos, sin = view.rotary_means()
    text = ivcprune.__doc__ or ""
    for mean, name in ((cos, "cos"), (sin, "sin")):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{name} "))
        assert [float(x) for x in line.split()[1:]] == pytest.approx(mean[0].tolist(), abs=6e-3)
    keep = IVCPrune().select(view, torch.tensor([5]))
    found = keep[0].nonzero().flatten().tolist()
    assert f"Kept: {' '.join(f'v{i}' for i in found)}." in text


def test_a_short_question_asks_with_all_its_tokens_and_none_leaves_the_anchors() -> None:
    column = torch.arange(3)
    for length, expected in ((1, [True, False, False]), (2, [True, True, False]), (3, [False, False, True])):
        tokens = Tokens(column[None], (column < length)[None])
        assert ivcprune._queries(tokens).valid.tolist() == [expected]
    view = hand(torch.zeros(7, 1).double(), 6, torch.arange(7)[None])
    keep = IVCPrune().select(view, torch.tensor([4]))
    # No text: φ is 0 everywhere, so the lowest indices are kept with the token at position 1 (cosine .54 and …).
    assert int(keep.sum()) == 4


def test_the_image_decides_no_coordinate_and_ties_go_to_the_lower_index() -> None:
    torch.manual_seed(0)
    picks = []
    for _ in range(2):
        view = hand(torch.randn(40, 2).double(), 30, torch.arange(40)[None])
        picks.append(torch.cat(view.rotary_means()))
    assert torch.equal(*picks)
    view = hand(torch.ones(40, 2).double(), 30, torch.zeros(1, 40).long())
    assert IVCPrune().select(view, torch.tensor([7]))[0].nonzero().flatten().tolist() == list(range(7))


# -- whole runs --------------------------------------------------------------------------------------------------------


def value_rows(tiny: Tiny, seen: Observed, span, layer: int) -> list[Vectors]:
    """From the model's projection: [token][head][channel], padding left out."""
    module = tiny.model().model.language_model.layers[layer]
    states = torch.tensor(seen.states(span, layer))
    with torch.no_grad():
        projected = module.self_attn.v_proj(module.input_layernorm(states))
    return projected.unflatten(-1, (-1, module.self_attn.head_dim)).tolist()


@pytest.mark.parametrize("rule", ["fill", "union"])
def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], rule: str) -> None:
    keeps = ("0.33", "", "0.5", "0.11", "", "0.4", "0.75", "0.2")
    got, want = [], []
    frequencies = tiny.model().model.language_model.rotary_emb.inv_freq.tolist()
    for number, (seen, keep) in enumerate(zip(batches, keeps, strict=True)):
        layer = 1 + number % 4
        trace, _ = tiny.run(seen.inputs, f"ivcprune@{layer}{keep and ':' + keep};rule={rule}")
        got += kept(trace)
        # Without position ids LLaVA counts padding too.
        ids = None if is_llava(tiny) else rope_ids(tiny, seen.inputs)[-3:]
        for span in seen.spans:
            columns = [span.pad + c for c in span.visual]
            positions = [[c] if ids is None else ids[:, span.row, c].tolist() for c in columns]
            count = half_even(float(keep) * len(columns)) if keep else None
            values = value_rows(tiny, seen, span, layer - 1)
            want.append(reference(values, span.visual, span.text, positions, frequencies, count, rule))
    assert len(got) == image_count(batches)
    for tokens, (expected, _) in zip(got, want, strict=True):
        assert len(tokens) == len(expected)
    assert_agree(got, want)
