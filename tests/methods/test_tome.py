"""ToMe against hand-computed merges and slow references, at a stage and inside CLIP."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from observed import HandView, ImageSpan, Observed, Tiny, angles, chosen, image_count, kept, observe
from slow_merging import Token, assert_same_tokens, attended, fed, outcome, step
from torch import Tensor

from lmms_prune import Schedule, ScheduleError, prune
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.shared.merging import matched
from lmms_prune.methods.tome import ToMe, _Sizes, rates
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder


def tome(tokens: list[Token], count: int) -> tuple[list[Token], float]:
    """Passes of min(n // 2, n - N) until N are left."""
    margin = math.inf
    while len(tokens) > count:
        tokens, close = step(tokens, min(len(tokens) // 2, len(tokens) - count))
        margin = min(margin, close)
    return tokens, margin


def reference(
    seen: Observed, span: ImageSpan, layer: int, count: int, metric: str = "hidden"
) -> tuple[list[Token], float]:
    states = seen.states(span, layer)
    compared = states
    if metric == "keys":
        keys = seen.keys[layer - 1][span.row].mean(0)
        compared = keys[span.pad :].tolist()
    return tome([Token(i, states[c], compared[c]) for i, c in enumerate(span.visual)], count)


def stage(hidden: Tensor, visual: int, budget: int, method: ToMe | None = None) -> tuple[set[int], Tensor]:
    view = HandView(hidden, visual)
    method = method or ToMe()
    mask = method.select(view, torch.tensor([budget]))
    states, index = method.rewrite(view, mask)
    assert torch.equal(index[mask], view.index[mask])
    return chosen(mask)[0], states[0, :visual][mask[0, :visual]]


def test_by_hand() -> None:
    # Six tokens; even places 0, 2, 4 are A, odd places 1, 3, 5 are B. Angles (the system token's is first, text last):
    #   A: 0° (0), 90° (2), 185° (4)      B: 10° (1), 100° (3), 180° (5)
    # Best partners: 0 -> 1 (10° apart), 2 -> 3 (10° apart), 4 -> 5 (5° apart).
    # N = 5: 4, the most alike, goes into 5. N = 4: then 0 into 1, as of two equal ones the lower goes.
    hidden = angles(33, 0, 10, 90, 100, 185, 180, 77, length=[1, 2, 4, 1, 1, 3, 1, 1])
    assert stage(hidden, 6, 5)[0] == {0, 1, 2, 3, 5}
    marked, states = stage(hidden, 6, 4)
    assert marked == {1, 2, 3, 5}
    expected = torch.stack(
        [(hidden[0, 1] + hidden[0, 2]) / 2, hidden[0, 3], hidden[0, 4], (hidden[0, 5] + hidden[0, 6]) / 2]
    )
    torch.testing.assert_close(states, expected)


def test_second_pass_weighs_by_hand() -> None:
    # Four tokens, N = 1. First pass (r = 2): 0 -> 1 and 2 -> 3, means m1 = (x0+x1)/2, m3 = (x2+x3)/2, sizes 2, 2.
    # Second pass (r = 1): place 0 is m1, place 1 is m3; m1 goes into m3: (2·m1 + 2·m3)/4, the mean of all four.
    # Five tokens take three passes, with sizes 1 to 4 on the way; what is left is again the mean of all.
    hidden = angles(0, 0, 5, 90, 95, 0, length=[1, 1, 2, 3, 4, 1])
    marked, states = stage(hidden, 4, 1)
    assert marked == {3}
    torch.testing.assert_close(states[0], hidden[0, 1:5].mean(0))
    hidden = angles(0, 0, 5, 90, 95, 40, 0, length=[1, 1, 2, 3, 4, 5, 1])
    _, states = stage(hidden, 5, 1)
    torch.testing.assert_close(states[0], hidden[0, 1:6].mean(0))


def test_two_go_into_one_by_hand() -> None:
    # A = {0 at 0°, 2 at 20°}, B = {1 at 10°, 3 at 180°}: both go into 1.
    hidden = angles(0, 0, 10, 20, 180, 0)
    marked, states = stage(hidden, 4, 2)
    assert marked == {1, 3}
    torch.testing.assert_close(states[0], hidden[0, 1:4].mean(0))


def test_equally_similar_tokens_are_merged_in_order() -> None:
    assert stage(torch.ones(1, 9, 2, dtype=torch.float64), 7, 5)[0] == {1, 3, 4, 5, 6}
    assert stage(torch.ones(1, 9, 2, dtype=torch.float64), 7, 4)[0] == {1, 3, 5, 6}


@pytest.mark.parametrize(("visual", "budget"), [(1, 1), (1, 0), (2, 1), (3, 1), (3, 2), (3, 0)])
def test_few_tokens(visual: int, budget: int) -> None:
    marked, _ = stage(torch.randn(1, visual + 2, 4, dtype=torch.float64), visual, budget)
    assert len(marked) == budget


@pytest.mark.parametrize("metric", ["hidden", "keys"])
def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], metric: str) -> None:
    # The first needs one pass, the last five or six.
    ratios = (0.6, 0.5, 0.33, 0.2, 0.75, 0.1, 0.26, 0.03)
    # All prompts for the default metric, half as many for the other.
    batches = batches if metric == "hidden" else batches[::2]
    for number, (seen, ratio) in enumerate(zip(batches, ratios, strict=False)):
        layer = number % 8 if metric == "hidden" else 1 + number % 7
        trace, states = outcome(tiny, seen, f"tome@{layer}:{ratio};metric={metric}")
        counts = [round(ratio * len(span.visual)) for span in seen.spans]
        pairs = list(zip(seen.spans, counts, strict=True))
        want = [reference(seen, span, layer, count, metric) if count else ([], 1.0) for span, count in pairs]
        assert [len(tokens) for tokens, _ in want] == [len(image) for image in kept(trace)]
        some = [i for i, count in enumerate(counts) if count]
        trace.rows = [trace.rows[i] for i in some]
        assert_same_tokens(trace, [states[i] for i in some], [want[i] for i in some])


def test_metrics_differ(batches: list[Observed]) -> None:
    seen = batches[0]
    by_hidden, by_keys = (
        [[token.index for token in reference(seen, span, 2, 7, metric)[0]] for span in seen.spans[:5]]
        for metric in ("hidden", "keys")
    )
    assert by_hidden != by_keys


def test_sizes_are_remembered(tiny: Tiny) -> None:
    """Nothing runs between the layers of an identity decoder, so two stages must merge as two passes do."""
    inputs = tiny.batch([tiny.row(random.Random(i)) for i in range(4)])
    model = tiny.model()
    layers = model.model.language_model.layers
    projections = [p for layer in layers[:2] for p in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    before = [p.weight.clone() for p in projections]
    try:
        with torch.no_grad():
            for p in projections:
                p.weight.zero_()
        seen = observe(tiny, inputs)
        trace, states = outcome(tiny, seen, "tome@0:0.6,tome@2:0.25")
    finally:
        for p, weight in zip(projections, before, strict=True):
            p.weight.data.copy_(weight)
    want = []
    for span in seen.spans:
        n, vectors = len(span.visual), seen.states(span, 0)
        tokens, margin = tome([Token(i, vectors[c], vectors[c]) for i, c in enumerate(span.visual)], round(0.6 * n))
        assert max(token.size for token in tokens) > 1
        tokens, second = tome(tokens, round(0.25 * n))
        want.append((tokens, min(margin, second)))
    assert_same_tokens(trace, states, want)


def test_one_column_is_enough_for_the_mean(tiny: Tiny) -> None:
    """However it is merged, one token is the mean of all; what is 1 on every token stays 1."""
    seen = observe(tiny, tiny.batch([tiny.row(random.Random(i)) for i in range(3)]))
    _, states = outcome(tiny, seen, "tome@2:1t")
    for span, found in zip(seen.spans, states, strict=True):
        everything = torch.tensor(seen.states(span, 2), dtype=torch.float64)[span.visual]
        torch.testing.assert_close(found[0], everything.mean(0))


# -- inside the encoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "keep", "blocks", "plan"),
    [
        (576, 576, 23, [0] * 23),
        # 384 = 16·23 + 16: the first 16 blocks take 17, the other seven 16.
        (576, 192, 23, [17] * 16 + [16] * 7),
        (576, 64, 23, [23] * 6 + [22] * 17),
        (10, 6, 3, [2, 1, 1]),
        # Of 8 tokens the first pass can take 4, the second 2 of the 4 that are left.
        (8, 2, 2, [4, 2]),
        # Three tokens for two blocks: 2, 1; but the second may only take half of the remaining tokens.
        (4, 1, 2, [2, 1]),
    ],
)
def test_rates(tokens: int, keep: int, blocks: int, plan: list[int]) -> None:
    assert rates(tokens, keep, blocks) == [[rate] for rate in plan]


def test_rates_always_meet_the_count() -> None:
    for tokens in (1, 2, 5, 16, 64):
        for keep in range(1, tokens + 1):
            for blocks in (1, 2, 3, 23):
                left = tokens
                plan = rates(tokens, keep, blocks)
                assert len(plan) == blocks
                for rate in (rate for passes in plan for rate in passes):
                    assert 0 <= rate <= left // 2
                    left -= rate
                assert left == keep
                assert all(len(passes) == 1 for passes in plan[:-1])
    # The 23 blocks of CLIP never need a second pass.
    assert all(len(passes) == 1 for keep in range(1, 577) for passes in rates(576, keep, 23))


def test_step_in_the_encoder_by_hand() -> None:
    # Class token at place 0, patches at 1 … 5. A = {0, 2, 4}, B = {1, 3, 5}. The class token is like 1, yet stays.
    # 2 (80°) is like 3 (90°), 4 (200°) is like 5 (180°). One goes: 2 -> 3. Order: 0, 4 (even), then 1, 3, 5.
    metric = angles(0, 0, 80, 90, 200, 180)
    first = matched(metric, [6], [1], evens_first=True, protected=1)
    assert first.into.tolist() == [[0, 1, 3, 3, 4, 5]]
    assert first.order.tolist() == [[0, 4, 1, 3, 5]]
    assert matched(metric, [6], [1], protected=1).order.tolist() == [[0, 1, 3, 4, 5]]
    assert matched(metric, [6], [2], protected=1).into.tolist() == [[0, 1, 3, 3, 5, 5]]
    # A penalty of 1 on token 2 makes 4 the first to go.
    penalty = torch.tensor([[0.0, 0, 1, 0, 0, 0]], dtype=torch.float64)
    assert matched(metric, [6], [1], penalty=penalty, protected=1).into.tolist() == [[0, 1, 2, 3, 5, 5]]


def encoder_reference(encoder: ClipEncoder, entering: Tensor, plan: list[list[int]]) -> tuple[list[Token], float]:
    """The published form for one image, from what enters block 0 (class token first)."""
    tokens = [Token(i - 1, state, []) for i, state in enumerate(entering.tolist())]
    margin, heads = math.inf, encoder.parts.config.vision_config.num_attention_heads
    for block, passes in enumerate(plan):
        module = encoder.parts.encoder_blocks[block]
        tokens, _ = attended(module, tokens, heads, proportional=True)
        for rate in passes:
            tokens, close = step(tokens, rate, order="evens first")
            margin = min(margin, close)
        tokens = fed(module, tokens)
    tokens = sorted((token for token in tokens if token.index >= 0), key=lambda token: token.index)
    states = encoder.parts.multimodal.multi_modal_projector(
        torch.tensor([t.state for t in tokens], dtype=torch.float64)
    )
    return [Token(t.index, s, [], t.size) for t, s in zip(tokens, states.tolist(), strict=True)], margin


def first_input(tiny: Tiny, inputs: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    encoder = tiny.model().model.vision_tower
    block = getattr(encoder, "vision_model", encoder).encoder.layers[0]
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            encoder(inputs["pixel_values"])
    finally:
        handle.remove()
    return seen[0]


def test_merging_inside_the_encoder_equals_slow_reference(
    all_tiny: dict[str, Tiny],
    observed_batches: Callable[[str], list[Observed]],
    encoder_view: Callable[..., TokenView],
) -> None:
    tiny, number, batches = all_tiny["llava"], 0, observed_batches("llava")
    for seen, ratio in zip(batches, (0.6, 0.5, 0.33, 0.27, 0.75, 0.1, 0.9, 0.02), strict=True):
        trace, states = outcome(tiny, seen, f"tome@0:{ratio};place=encoder")
        encoder = encoder_view(tiny, seen).encoder
        assert isinstance(encoder, ClipEncoder)
        plan = rates(64, round(ratio * 64), 2)
        with torch.no_grad():
            want = [encoder_reference(encoder, x, plan) for x in first_input(tiny, seen.inputs)]
        assert_same_tokens(trace, states, want)
        number += len(want)
    assert number == image_count(batches)


def test_the_encoder_by_itself_gives_the_model_s_tokens(
    all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView]
) -> None:
    """A rate of zero merges nothing: the encoder in steps is the encoder."""
    tiny = all_tiny["llava"]
    seen = observe(tiny, tiny.batch([tiny.row(random.Random(0))]))
    view = capture_view(tiny, seen.inputs, 0)
    assert isinstance(view.encoder, ClipEncoder)
    with torch.no_grad():
        tokens, _ = encoder_reference(view.encoder, first_input(tiny, seen.inputs)[0], [[0], [0]])
    torch.testing.assert_close(torch.tensor([t.state for t in tokens], dtype=torch.float64), view.visual_embeddings[0])


def test_sizes_of_the_encoder_continue(all_tiny: dict[str, Tiny]) -> None:
    """All 64 patches are counted, and a later stage weighs by them."""
    tiny = all_tiny["llava"]
    views: list[TokenView] = []
    original = ToMe.rewrite

    def rewrite(self: ToMe, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
        result = original(self, view, keep)
        views.append(view)
        return result

    inputs = tiny.batch([tiny.row(random.Random(i), images=n) for i, n in enumerate((1, 2))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToMe, "rewrite", rewrite)
        trace, logits = tiny.run(inputs, "tome@0:21t;place=encoder,tome@3:9t")
    assert [row.kept for row in trace.rows] == [[[21], [9]], [[11, 10], [5, 4]]]
    assert torch.isfinite(logits).all()
    for stage_number, layer in enumerate((0, 3)):
        indices = [image for row in trace.rows for image in row.indices(stage_number)]
        sizes = views[-1].memory.before(layer + 1, _Sizes)
        assert [round(float(sizes.tokens[i, image].sum())) for i, image in enumerate(indices)] == [64, 64, 64]


def test_options_that_cannot_be_had(all_tiny: dict[str, Tiny]) -> None:
    llava, qwen = all_tiny["llava"], all_tiny["qwen2_5_vl"]
    rng = random.Random(0)
    with (
        pytest.raises(UnsupportedModelError, match=r"place=encoder .* which this model does not have"),
        prune(qwen.model(), "tome@0:0.5;place=encoder"),
    ):
        pass
    with pytest.raises(ScheduleError, match=r"place=encoder .* must act at layer 0"):
        llava.run(llava.batch([llava.row(rng)]), "tome@2:0.5;place=encoder")
    with pytest.raises(ScheduleError, match=r"metric=keys .* must act at layer 1 or deeper"):
        llava.run(llava.batch([llava.row(rng)]), "tome@0:0.5;metric=keys")


def test_count_is_exact(tiny: Tiny) -> None:
    assert Schedule.parse("tome@0:192t").avg_visual_tokens(32, [576]) == 192
    inputs = tiny.batch([tiny.row(random.Random(i)) for i in range(3)])
    for count in (1, 3, 5, 8):
        assert [len(image) for image in kept(tiny.run(inputs, f"tome@1:{count}t")[0])] == [count] * 3
