"""MustDrop against hand-computed cases and slow references: the encoder's windows, the key set, and the text's attention."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

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
    image_spans,
    kept,
    run_to,
)
from torch import Tensor

from lmms_prune import Schedule, Trace, prune
from lmms_prune.methods import mustdrop
from lmms_prune.methods.mustdrop import MustDrop
from lmms_prune.methods.view import TokenView
from lmms_prune.schedule.presets import PRESETS

# Windows of random images are less uniform than those of real ones.
SIMILARITY = {"llava": 0.1, "qwen2_5_vl": 0.28}

# -- the slow references -----------------------------------------------------------------------------------------------


def windows(rows: int, columns: int) -> list[list[int]]:
    """The nine tokens of every complete window, row by row."""
    result = []
    for top in range(0, rows - 2, 3):
        for left in range(0, columns - 2, 3):
            result.append([(top + down) * columns + left + right for down in range(3) for right in range(3)])
    return result


def pairwise_cosine(tokens: Sequence[slow.Vector]) -> float:
    units = [slow.unit(x) for x in tokens]
    return 2 * sum(slow.dot(a, b) for a, b in combinations(units, 2)) / 72


def merge(
    patches: Sequence[slow.Vector], grid: tuple[int, int], threshold: float, requested: int | None
) -> tuple[list[list[int]], float]:
    """The entries of the shorter sequence, in order: merged windows, most uniform first, then the other tokens one by one."""
    all_windows = windows(*grid)
    cosine = {w: pairwise_cosine([patches[i] for i in window]) for w, window in enumerate(all_windows)}
    order = slow.best_first(cosine)
    if requested is None:
        count = sum(value >= threshold for value in cosine.values())
        margin = min((abs(value - threshold) for value in cosine.values()), default=math.inf)
    else:
        count = min(len(all_windows), (len(patches) - requested) // 8)
        margin = cosine[order[count - 1]] - cosine[order[count]] if 0 < count < len(order) else math.inf
    merged = [all_windows[w] for w in order[:count]]
    in_windows = {i for window in merged for i in window}
    return merged + [[i] for i in range(len(patches)) if i not in in_windows], margin


def mean(vectors: Sequence[slow.Vector]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def middle(group: Sequence[int]) -> int:
    return group[len(group) // 2]


def key_set(attention: dict[int, float]) -> set[int]:
    return set(slow.best_first(attention)[: math.ceil(0.08 * len(attention))])


def stored_keys(view: TokenView) -> Tensor:
    """The key set that a stage at the view's layer, or the nearest one before, has stored."""
    stored = view.memory.before(view.layer + 1, mustdrop._KeySet)
    assert stored is not None
    return stored.tokens


def clip_blocks(tiny: Tiny) -> torch.nn.ModuleList:
    encoder = tiny.model().model.vision_tower
    return getattr(encoder, "vision_model", encoder).encoder.layers


def after_block_0(tiny: Tiny, pixels: Tensor) -> Tensor:
    """What CLIP's first block makes of images, the class token first."""
    first: list[Tensor] = []
    handle = clip_blocks(tiny)[0].register_forward_hook(
        lambda module, args, out: first.append(out if isinstance(out, Tensor) else out[0])
    )
    with torch.no_grad():
        tiny.model().model.vision_tower(pixels)
    handle.remove()
    return first[0]


def rerun_clip(tiny: Tiny, first: Tensor, threshold: float, requested: int | None) -> tuple[list, Tensor, dict, float]:
    """One image through the library's other blocks, really shortened: groups, projected states, attention, margin."""
    model, blocks = tiny.model().model, clip_blocks(tiny)
    with torch.no_grad():
        patches = first[1:].tolist()
        side = math.isqrt(len(patches))
        groups, margin = merge(patches, (side, side), threshold, requested)
        x = torch.tensor([first[0].tolist(), *[mean([patches[i] for i in group]) for group in groups]])
        x = x.to(first)[None]
        features = x
        for number, block in enumerate(blocks):
            if number == len(blocks) - 1:
                q, k = (
                    project(block.layer_norm1(x))[0].unflatten(-1, (-1, block.self_attn.head_dim)).transpose(0, 1)
                    for project in (block.self_attn.q_proj, block.self_attn.k_proj)
                )
                weights = (q[:, :1] @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:].mean(0)
            if number:
                out = block(x, None)
                x = out if isinstance(out, Tensor) else out[0]
            # Three blocks, of which the last but one is projected.
            features = x if number == len(blocks) - 2 else features
        states = model.multi_modal_projector(features[:, 1:])[0]
    attention = {middle(group): weight for group, weight in zip(groups, weights.tolist(), strict=True)}
    return groups, states, attention, margin


def average_merger(
    view: TokenView, image: int, threshold: float, requested: int | None
) -> tuple[list, Tensor, dict, float]:
    """What Qwen2.5-VL's images are given instead: groups by block 0, means of the merger's outputs."""
    size, depth = view.sizes[image], view.encoder.shape.depth
    groups, margin = merge(view.encoder.output(0)[image, :size].tolist(), view.grids[image], threshold, requested)
    outputs = view.visual_embeddings[image, :size].tolist()
    received = view.encoder.received(depth - 1)[image, :size].tolist()
    states = torch.tensor([mean([outputs[i] for i in group]) for group in groups], dtype=torch.float64)
    attention = {middle(group): sum(received[i] for i in group) / len(group) for group in groups}
    return groups, states, attention, margin


def looked_at(
    attention: Sequence[Sequence[slow.Vector]], visual: Sequence[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """Sum and maximum over the text rows of the head mean, from [head][text row][key]."""
    total, most = {}, {}
    for i, column in enumerate(visual):
        rows = [sum(head[r][column] for head in attention) / len(attention) for r in range(len(attention[0]))]
        total[i], most[i] = sum(rows), max(rows)
    return total, most


def prefill(
    attention: Sequence[Sequence[slow.Vector]],
    visual: Sequence[int],
    keys: set[int],
    g: float,
    i: float,
    requested: int | None,
) -> tuple[set[int], float]:
    """The tokens (as numbers among `visual`) that a stage inside the decoder keeps."""
    total, most = looked_at(attention, visual)
    every = sum(total.values())
    if requested is None:
        stays = {v for v in total if v in keys or not (total[v] < g * every and most[v] < i)}
        return stays, min(min(abs(total[v] - g * every), abs(most[v] - i)) for v in total)
    score = {v: min(total[v] / (g * every), most[v] / i) for v in total}
    order = [v for v in slow.best_first(score) if v in keys] + [v for v in slow.best_first(score) if v not in keys]
    margin = math.inf
    if 0 < requested < len(order) and (order[requested - 1] in keys) == (order[requested] in keys):
        margin = (score[order[requested - 1]] - score[order[requested]]) * min(g * every, i)
    return set(order[:requested]), margin


# -- by hand -----------------------------------------------------------------------------------------------------------


def stub(patches: Tensor, received: Sequence[float]) -> SimpleNamespace:
    """A encoder without class token and with one block."""
    return SimpleNamespace(
        shape=SimpleNamespace(depth=1),
        output=lambda block: patches,
        saliency=lambda block: torch.tensor([received], dtype=torch.float64),
        received=lambda block: torch.tensor([received], dtype=torch.float64),
    )


@pytest.mark.parametrize(("odd", "merges"), [(60, True), (90, False)])
def test_windows_by_hand(odd: float, merges: bool) -> None:
    """3 rows of 4 tokens: one window (columns 0 to 2); the last column belongs to none.

    Eight of the window's patches point alike, one at 60° or 90° to them: of the 72 ordered pairs 56 have cosine 1 and 16
    have 1/2 or 0: (56 + 8)/72 = 0.889 is enough, 56/72 = 0.778 is not. (Counting the nine pairs of a patch with itself,
    (56 + 9)/81 = 0.802 would be.)
    """
    directions = angles(0, 0, 0, 200, 0, 0, odd, 10, 0, 0, 0, 100, length=list(range(1, 13)))
    received = [0.1] * 12
    received[11] = 0.2
    hidden = torch.arange(28, dtype=torch.float64).reshape(1, 14, 2) ** 2
    view = HandView(hidden, 12, encoder=stub(directions, received), grids=[(3, 4)], layer=0)
    mask = MustDrop().select(view, torch.tensor([12]))
    states, index = MustDrop().rewrite(view, mask)
    if not merges:
        assert chosen(mask) == [set(range(12))]
        assert torch.equal(index[0][mask[0]], torch.arange(12))
        assert torch.equal(states, view.hidden)
        return
    assert chosen(mask) == [{5, 3, 7, 11}]
    assert index[0][mask[0]].tolist() == [5, 3, 7, 11], "the window first, at its middle token"
    state = view.hidden[0]
    window = state[[0, 1, 2, 4, 5, 6, 8, 9, 10]].mean(0)
    torch.testing.assert_close(states[0][mask[0]], torch.stack([window, state[3], state[7], state[11]]))
    # Of n' = 4 tokens the best one (0.32, rounded up) is the key set: token 11, as the window's mean is 0.1.
    assert chosen(stored_keys(view)) == [{11}]
    assert merge(directions[0].tolist(), (3, 4), 0.8, None)[0] == [[0, 1, 2, 4, 5, 6, 8, 9, 10], [3], [7], [11]]


def test_exact_count_by_hand() -> None:
    # Two windows side by side and a column more: 21 tokens. N = 12 leaves room for one merge (of 9, 8 go), the most alike
    # one (the right), whatever the threshold; of the 13 left the one with the least attention goes, token 7.
    left, right = angles(*[0] * 8, 50)[0], angles(*[30] * 9)[0]
    patches = torch.zeros(1, 21, 2, dtype=torch.float64)
    patches[0, [0, 1, 2, 7, 8, 9, 14, 15, 16]], patches[0, [3, 4, 5, 10, 11, 12, 17, 18, 19]] = left, right
    received = [0.5] * 21
    received[7] = 0.1
    view = HandView(
        torch.randn(1, 23, 3, dtype=torch.float64), 21, encoder=stub(patches, received), grids=[(3, 7)], layer=0
    )
    for similarity in (0.99, 0.0):
        method = MustDrop(similarity=similarity)
        mask = method.select(view, torch.tensor([12]))
        assert chosen(mask) == [{0, 1, 2, 6, 8, 9, 11, 13, 14, 15, 16, 20}]
        assert method.rewrite(view, mask)[1][0][mask[0]].tolist() == [11, 0, 1, 2, 6, 8, 9, 13, 14, 15, 16, 20]
    # Both merged, five are left: 6, 13, 20, the right window at 0.5, the left one (8 · 0.5 + 0.1)/9. N = 2: ties go to the
    # lower index.
    assert chosen(MustDrop().select(view, torch.tensor([2]))) == [{6, 11}]


def four_tokens() -> HandView:
    """System, four visual and two text tokens; both text tokens see shares 4 | 1 2 ½ ½ | 2, the second one 10 for itself.

    Of 10 and of 20:   t0 0.1  0.2 0.05  0.05      sum 0.15  0.3 0.075 0.075  (0.6 in all)
                       t1 0.05 0.1 0.025 0.025     max 0.1   0.2 0.05  0.05
    The encoder's attention makes v3 the key set (0.32 of a token, rounded up).
    """
    shares = torch.tensor([4, 1, 2, 0.5, 0.5, 2, 10], dtype=torch.float64)
    queries = torch.ones(1, 1, 7, 1, dtype=torch.float64)
    encoder = stub(torch.zeros(1, 4, 2), [0.1, 0.2, 0.1, 0.3])
    return HandView(torch.randn(1, 7, 3, dtype=torch.float64), 4, shares.log()[None, :, None], queries, encoder=encoder)


@pytest.mark.parametrize(
    ("theta_g", "theta_i", "stays"),
    [
        (0.2, 0.08, {0, 1, 3}),  # 0.2 of 0.6 is 0.12: v2 and v3 are below both, v3 is a key
        (0.2, 0.04, {0, 1, 2, 3}),  # one look of 0.05 is enough for v2
        (0.3, 0.08, {0, 1, 3}),  # v0's sum is below 0.18, but not its largest look
        (0.3, 0.15, {1, 3}),
        (0.1, 0.9, {0, 1, 2, 3}),  # no sum is below 0.06
        (0.9, 0.9, {3}),
        (0.0, 0.0, {0, 1, 2, 3}),
    ],
)
def test_thresholds_by_hand(theta_g: float, theta_i: float, stays: set[int]) -> None:
    view = four_tokens()
    assert chosen(MustDrop(theta_g=theta_g, theta_i=theta_i).select(view, torch.tensor([4]))) == [stays]
    rows = [[x / 10 for x in (4, 1, 2, 0.5, 0.5, 2, 0)], [x / 20 for x in (4, 1, 2, 0.5, 0.5, 2, 10)]]
    assert prefill([rows], range(1, 5), {3}, theta_g, theta_i, None)[0] == stays


def test_ranking_by_hand() -> None:
    # The key first; then min(g/(0.2·0.6), max/0.08): v0 min(1.25, 1.25), v1 2.5, v2 0.625.
    for count, expected in enumerate((set(), {3}, {1, 3}, {0, 1, 3})):
        method = MustDrop(theta_g=0.2, theta_i=0.08)
        assert chosen(method.select(four_tokens(), torch.tensor([count]))) == [expected]


def test_a_stored_key_set_is_used() -> None:
    view = four_tokens()
    view.memory.store(0, mustdrop._KeySet(torch.tensor([[False, False, True, False]])))
    assert chosen(MustDrop(theta_g=0.9, theta_i=0.9).select(view, torch.tensor([4]))) == [{2}]


def test_no_text_drops_nothing() -> None:
    view = HandView(
        torch.randn(1, 5, 3),
        4,
        keys=torch.randn(1, 5, 1),
        queries=torch.ones(1, 1, 5, 1),
        encoder=stub(torch.zeros(1, 4, 2), [0.1] * 4),
    )
    assert chosen(MustDrop().select(view, torch.tensor([4]))) == [{0, 1, 2, 3}]
    assert chosen(MustDrop().select(view, torch.tensor([2]))) == [{0, 1}]


# -- against the slow references ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", [None, 0.6, 0.3])
def test_layer_0_equals_slow_reference(
    tiny: Tiny, batches: list[Observed], capture_view: Callable[..., TokenView], requested: float | None
) -> None:
    """Images of one batch merge different numbers of windows, each as it would alone."""
    threshold = SIMILARITY[tiny.family]
    text = f"mustdrop@0{'' if requested is None else f':{requested}'};similarity={threshold}"
    got, want, counts = [], [], set()
    batches = batches if requested is None else batches[:2]
    for seen in batches:
        trace, entered = run_to(tiny, seen.inputs, text, 0)
        view = capture_view(tiny, seen.inputs, 3, text + ",")
        got += kept(trace)
        first = after_block_0(tiny, seen.inputs["pixel_values"]) if tiny.family == "llava" else None
        for image, span in enumerate(seen.spans):
            size = len(span.visual)
            most = None if requested is None else round(requested * size)
            if first is not None:
                found = rerun_clip(tiny, first[image], threshold, most)
            else:
                found = average_merger(view, image, threshold, most)
            groups, states, attention, margin = found
            order = [middle(group) for group in groups]
            if most is not None and most < len(order):
                best = slow.best_first(attention)
                margin = min(margin, attention[best[most - 1]] - attention[best[most]])
                attention = {i: attention[i] for i in best[:most]}
                states = states[[j for j, i in enumerate(order) if i in attention]]
                order = [i for i in order if i in attention]
            want.append((set(order), margin))
            counts.add(len(order))
            if margin < 1e-6:
                continue
            length = span.length - size + len(order)
            now = entered[span.row, -length:][span.visual[0] :][: len(order)]
            torch.testing.assert_close(now, states.to(now), atol=1e-5, rtol=0)
            ranked = slow.best_first(attention)
            edge = math.ceil(0.08 * len(ranked))
            if edge == len(ranked) or attention[ranked[edge - 1]] - attention[ranked[edge]] > 1e-7:
                assert chosen(stored_keys(view))[image] == key_set(attention)
    assert len(got) == image_count(batches)
    assert len(counts) > 1 or requested
    assert_agree(got, want)


def text_rows(seen: Observed, attentions: list[Tensor], layer: int) -> list[list]:
    rows = []
    for span in seen.spans:
        columns = [span.pad + column for column in span.text]
        rows.append(attentions[layer][span.row][:, columns, span.pad :].tolist())
    return rows


@pytest.mark.parametrize("requested", [None, 0.3])
def test_prefill_equals_slow_reference(
    tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView], requested: float | None
) -> None:
    """Without a stage at layer 0, the keys are those of the encoder as it is."""
    g, i = {"llava": (0.012, 0.03), "qwen2_5_vl": (0.07, 0.12)}[tiny.family]
    got, want = [], []
    batches = batches if requested is None else batches[:3]
    for number, seen in enumerate(batches):
        layer = 1 + number % 7
        attentions = eager_attentions(tiny, seen.inputs, torch.float64)
        encoder = encoder_view(tiny, seen).encoder
        last = encoder.shape.depth - 1
        saliency = encoder.class_attention(last).mean(1) if tiny.family == "llava" else encoder.received(last)
        keep = "" if requested is None else f":{requested}"
        trace, _ = tiny.run(seen.inputs, f"mustdrop@{layer}{keep};theta_g={g};theta_i={i}")
        got += kept(trace)
        for image, (rows, span) in enumerate(zip(text_rows(seen, attentions, layer - 1), seen.spans, strict=True)):
            size = len(span.visual)
            keys = key_set(dict(enumerate(saliency[image, :size].tolist())))
            most = None if requested is None else round(requested * size)
            want.append(prefill(rows, span.visual, keys, g, i, most))
    assert len(got) == image_count(batches)
    if requested is None:
        # Where a token is within the softmax's float32 error of a threshold, the numbers may differ, too.
        pairs = [(tokens, reference) for tokens, (reference, margin) in zip(got, want, strict=True) if margin > 1e-6]
        assert len(pairs) > 0.75 * len(got)
        assert all(tokens == reference for tokens, reference in pairs)
        share = sum(len(tokens) for tokens in got) / sum(len(p.visual) for seen in batches for p in seen.spans)
        assert 0.2 < share < 0.9, "the thresholds are among the values"
    else:
        assert_agree(got, want)


def look(model: Any, inputs: dict[str, Tensor], schedule: str, layer: int) -> tuple[Trace, Tensor]:
    with torch.no_grad(), prune(model, schedule) as trace:
        attention = model(**inputs, output_attentions=True).attentions[layer - 1]
    return trace, attention


def test_stages_together(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """The key set of layer 0, on merged tokens, is what the later stages protect."""
    rng = random.Random(4)
    g, i = {"llava": (0.015, 0.03), "qwen2_5_vl": (0.12, 0.2)}[tiny.family]
    threshold, saved = SIMILARITY[tiny.family], 0
    first = f"mustdrop@0;similarity={threshold}"
    for row in [tiny.row(rng) for _ in range(8)]:
        inputs = tiny.batch([row])
        schedule = f"{first},mustdrop@3;theta_g={g};theta_i={i}"
        trace, attention = look(tiny.model(torch.float64, "eager"), inputs, schedule, 3)
        view = capture_view(tiny, inputs, 3, first + ",")
        [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], tiny.model().config.image_token_id)
        if tiny.family == "llava":
            groups, _, weights, _ = rerun_clip(tiny, after_block_0(tiny, inputs["pixel_values"])[0], threshold, None)
        else:
            groups, _, weights, _ = average_merger(view, 0, threshold, None)
        order, keys = [middle(group) for group in groups], key_set(weights)
        gone, start = len(span.visual) - len(order), span.visual[0]
        rows = attention[0][:, [column - gone for column in span.text]].tolist()
        numbers = {number for number, token in enumerate(order) if token in keys}
        found, margin = prefill(rows, range(start, start + len(order)), numbers, g, i, None)
        assert margin > 1e-7
        assert kept(trace, 1) == [{order[number] for number in found}]
        saved += len(found) - len(prefill(rows, range(start, start + len(order)), set(), g, i, None)[0])
    assert saved > 0, "some key would have been dropped"


def test_rows_of_a_batch_equal_single_rows(tiny: Tiny) -> None:
    """The reference merges in every image of a batch as many windows as the image with the fewest has."""
    rng = random.Random(6)
    rows = [tiny.row(rng) for _ in range(5)]
    schedule = f"mustdrop@0;similarity={SIMILARITY[tiny.family]},mustdrop@3;theta_g=0.02;theta_i=0.03"
    trace, logits = tiny.run(tiny.batch(rows), schedule)
    for number, row in enumerate(rows):
        alone, single = tiny.run(tiny.batch([row]), schedule)
        assert alone.rows[0].kept == trace.rows[number].kept
        assert [alone.rows[0].indices(s) for s in (0, 1)] == [trace.rows[number].indices(s) for s in (0, 1)]
        torch.testing.assert_close(single[0], logits[number], atol=1e-4, rtol=0)
    if tiny.family == "llava":
        assert len({row.kept[0][0] for row in trace.rows}) > 1


def test_without_uniform_windows_the_image_is_unchanged(tiny: Tiny) -> None:
    inputs = tiny.batch([tiny.row(random.Random(2), images=n) for n in (1, 2, 0)])
    trace, logits = tiny.run(inputs, "mustdrop@0;similarity=1")
    with torch.no_grad():
        plain = tiny.model()(**inputs, logits_to_keep=1).logits[:, -1]
    assert [row.visual for row in trace.rows] == [[sum(row.images)] * 8 for row in trace.rows]
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (3, 3), (4, 7)])
def test_small_and_narrow_grids(all_tiny: dict[str, Tiny], size: tuple[int, int]) -> None:
    tiny = all_tiny["qwen2_5_vl"]
    columns, rows = size
    inputs = tiny.batch([([tiny.image(random.Random(3), size)], "is it red"), tiny.row(random.Random(1))])
    trace, _ = tiny.run(inputs, "mustdrop@0;similarity=-1,mustdrop@2:1t")
    merged = (columns // 3) * (rows // 3)
    assert trace.rows[0].kept == [[columns * rows - 8 * merged], [1]]


def test_presets() -> None:
    """The thresholds of the reference's TextVQA settings, at the five layers at which it acts."""
    for name, thetas in (
        ("mustdrop-192", (0.001, 0.001)),
        ("mustdrop-128", (0.0012, 0.001)),
        ("mustdrop-64", (0.011, 0.01)),
    ):
        stages = Schedule.parse(PRESETS[name]).stages
        assert [stage.layer for stage in stages] == [0, 3, 7, 11, 15]
        for stage in stages[1:]:
            method = stage.spec.build(dict(stage.options))
            assert isinstance(method, MustDrop)
            assert (method.theta_g, method.theta_i, method.similarity) == (*thetas, 0.8)
        assert Schedule.parse(name).at_most


@pytest.mark.parametrize("selected", [0, 1, 2])
def test_unmerged_patches_leave_the_encoder_as_it_is(
    all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView], selected: int
) -> None:
    """All patches in order, whichever block the decoder reads: the states are the library's, and so is the attention."""
    tiny, rng = all_tiny["llava"], random.Random(5)
    encoder = capture_view(tiny, tiny.batch([tiny.row(rng) for _ in range(3)]), 2).encoder
    encoder.shape = replace(encoder.shape, selected=selected)
    x = after_block_0(tiny, encoder.run.pixels)
    patches = x[:, 1:]
    encoder.run.outputs[0] = x
    images, count = patches.shape[:2]
    order, length = torch.arange(count).expand(images, -1), torch.full((images,), count)
    with torch.no_grad():
        states, attention = mustdrop._run_on(encoder, patches, order, length)
        by_block = [x]
        for block in list(clip_blocks(tiny))[1:]:
            encoder.run.inputs[len(by_block)] = (by_block[-1], {})
            out = block(by_block[-1], None)
            by_block.append(out if isinstance(out, Tensor) else out[0])
        assert len(by_block) == encoder.shape.depth == 3
        expected = encoder.project(by_block[selected][:, 1:])
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(attention, encoder.saliency(2))
