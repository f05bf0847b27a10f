"""FOLDER against hand-computed folds and slow references of both variants."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from observed import HandView, ImageSpan, Observed, Tiny, angles, chosen, image_count, kept, observe
from slow_merging import Token, assert_same_tokens, attended, fed, outcome, step
from torch import Tensor

from lmms_prune import Schedule, ScheduleError, prune
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.folder import Folder, _fold
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder


def simplified(tokens: list[Token], count: int) -> tuple[list[Token], float]:
    margin, passes, n = math.inf, 0, len(tokens)
    while len(tokens) > count:
        capacity = (len(tokens) - 1) // 2 if len(tokens) > 2 else 1
        tokens, close = step(tokens, min(capacity, len(tokens) - count))
        margin, passes = min(margin, close), passes + 1
    removed = n - count
    if passes > 1 or removed < count / 2:
        tokens = [replace(t, state=[x * (1 + math.log(t.size)) for x in t.state]) for t in tokens]
    return tokens, margin


def full(encoder: ClipEncoder, entering: Tensor, count: int) -> tuple[list[Token], float]:
    """For one image, from what enters the selected block (class token first)."""
    block = encoder.shape.selected
    module, heads = encoder.parts.encoder_blocks[block], encoder.parts.config.vision_config.num_attention_heads
    tokens, looks = attended(module, [Token(i - 1, x, []) for i, x in enumerate(entering.tolist())], heads, False)
    tokens = [replace(token, salience=look) for token, look in zip(tokens, looks.tolist(), strict=True)]
    margin, removed = math.inf, len(tokens) - 1 - count
    while removed:
        rate = min((len(tokens) - 1) // 2, removed)
        tokens, close = step(tokens, rate, order="evens first", penalty=500.0)
        margin, removed = min(margin, close), removed - rate
    tokens = [token for token in fed(module, tokens) if token.index >= 0]
    states = encoder.parts.multimodal.multi_modal_projector(
        torch.tensor([t.state for t in tokens], dtype=torch.float64)
    )
    return [Token(t.index, s, [], t.size) for t, s in zip(tokens, states.tolist(), strict=True)], margin


def stage(hidden: Tensor, visual: int, budget: int) -> tuple[set[int], Tensor]:
    view = HandView(hidden, visual)
    method = Folder()
    mask = method.select(view, torch.tensor([budget]))
    states, _ = method.rewrite(view, mask)
    return chosen(mask)[0], states[0, :visual][mask[0, :visual]]


# Eight tokens, A = {0, 2, 4, 6} at 0°, 90°, 185°, 275°, B = {1, 3, 5, 7} at 10°, 100°, 180°, 272°: best partners are the
# right-hand neighbours, 10°, 10°, 5° and 3° apart, so they go in the order 6, 4, 0, 2.
EIGHT = angles(33, 0, 10, 90, 100, 185, 180, 275, 272, 77)


def mean(*image_spans: int) -> Tensor:
    return torch.stack([EIGHT[0, 1 + span] for span in image_spans]).mean(0)


def test_one_fold_by_hand() -> None:
    # One fold can remove ⌊7/2⌋ = 3. N = 6, r = 2 < 6/2: the merged tokens stand for two, so times 1 + ln 2.
    marked, states = stage(EIGHT, 8, 6)
    assert marked == {0, 1, 2, 3, 5, 7}
    factor = 1 + math.log(2)
    expected = torch.stack([*EIGHT[0, 1:5], factor * mean(4, 5), factor * mean(6, 7)])
    torch.testing.assert_close(states, expected)
    # N = 5, r = 3, not below 5/2: nothing is scaled.
    marked, states = stage(EIGHT, 8, 5)
    assert marked == {1, 2, 3, 5, 7}
    torch.testing.assert_close(states, torch.stack([mean(0, 1), EIGHT[0, 3], EIGHT[0, 4], mean(4, 5), mean(6, 7)]))


def test_two_folds_by_hand() -> None:
    # N = 4: the first fold removes 3 and leaves m01 (5°), 2 (90°), 3 (100°), m45 (182.5°), m67 (273.5°). The second
    # removes one: A = {m01, 3, m67}, B = {2, m45}. Best: m01 -> 2 (85° apart), 3 -> 2 (10°), m67 -> m45 (91°): 3 into 2,
    # at 2's place. After two folds all are scaled: times 1 + ln 2.
    marked, states = stage(EIGHT, 8, 4)
    assert marked == {1, 2, 5, 7}
    factor = 1 + math.log(2)
    torch.testing.assert_close(states, factor * torch.stack([mean(0, 1), mean(2, 3), mean(4, 5), mean(6, 7)]))


def test_folds() -> None:
    # 576 tokens lose at most 287 in one fold; two become one, or N = 1 could not be met.
    assert [_fold(n) for n in (1, 2, 3, 4, 5, 64, 576)] == [0, 1, 1, 1, 2, 31, 287]
    for visual in range(1, 12):
        for budget in range(visual + 1):
            assert len(stage(torch.randn(1, visual + 2, 3, dtype=torch.float64), visual, budget)[0]) == budget


def test_every_token_is_counted() -> None:
    """Equal tokens stay equal, so only the scales differ: 1 + ln of sizes that sum to the number of tokens."""
    _, states = stage(torch.ones(1, 14, 2, dtype=torch.float64), 12, 3)
    assert round(float((states[:, 0] - 1).exp().sum()), 9) == 12


def reference(seen: Observed, span: ImageSpan, layer: int, count: int) -> tuple[list[Token], float]:
    states = seen.states(span, layer)
    return simplified([Token(i, states[c], states[c]) for i, c in enumerate(span.visual)], count)


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed]) -> None:
    ratios = (0.6, 0.5, 0.33, 0.2, 0.8, 0.1, 0.7, 0.9)
    for layer, (seen, ratio) in enumerate(zip(batches, ratios, strict=True)):
        trace, states = outcome(tiny, seen, f"folder@{layer}:{ratio}")
        counts = [round(ratio * len(span.visual)) for span in seen.spans]
        assert [len(image) for image in kept(trace)] == counts
        want = [reference(seen, span, layer, count) for span, count in zip(seen.spans, counts, strict=True)]
        assert_same_tokens(trace, states, want)


def test_full_equals_slow_reference(
    all_tiny: dict[str, Tiny],
    observed_batches: Callable[[str], list[Observed]],
    encoder_view: Callable[..., TokenView],
) -> None:
    tiny, number, batches = all_tiny["llava"], 0, observed_batches("llava")
    ratios = (0.6, 0.55, 0.33, 0.2, 0.75, 0.1, 0.9, 0.02)
    for seen, ratio in zip(batches, ratios, strict=True):
        trace, states = outcome(tiny, seen, f"folder@0:{ratio};variant=full")
        encoder = encoder_view(tiny, seen).encoder
        assert isinstance(encoder, ClipEncoder)
        before = encoder.shape.selected - 1
        entering = torch.cat([encoder.class_output(before)[:, None], encoder.output(before)], dim=1)
        with torch.no_grad():
            want = [full(encoder, x, round(ratio * 64)) for x in entering]
        # What stands first was unmerged at an even place: the order is not the raster's.
        assert any([t.index for t in tokens] != sorted(t.index for t in tokens) for tokens, _ in want) or ratio < 0.1
        assert_same_tokens(trace, states, want, order="published")
        number += len(want)
    assert number == image_count(batches)


def test_full_keeps_positions(all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView]) -> None:
    """Each merged token carries its raster index, in the published order, without any twice."""
    tiny = all_tiny["llava"]
    view = capture_view(tiny, tiny.batch([tiny.row(random.Random(1), images=2)]), 0)
    method = Folder(variant="full")
    for budget in ([40, 10], [1, 64], [64, 0]):
        mask = method.select(view, torch.tensor(budget))
        states, index = method.rewrite(view, mask)
        assert mask.sum(1).tolist() == budget
        for image, count in enumerate(budget):
            raster = index[image][mask[image]].tolist()
            assert len(set(raster)) == count
            assert torch.isfinite(states[image]).all()
            encoder = view.encoder
            entering = torch.cat([encoder.class_output(0)[:, None], encoder.output(0)], dim=1)[image]
            if 0 < count < 64:
                assert raster == [token.index for token in full(encoder, entering, count)[0]]


def test_attention_protects(all_tiny: dict[str, Tiny], capture_view: Callable[..., TokenView]) -> None:
    """Cosines differ by 2 at most, so a token to which 2/500 more attention is paid never goes first."""
    tiny = all_tiny["llava"]
    view = capture_view(tiny, tiny.batch([tiny.row(random.Random(2))]), 0)
    look = view.encoder.saliency()[0].tolist()
    method = Folder(variant="full")
    mask = method.select(view, torch.tensor([48]))
    _, index = method.rewrite(view, mask)
    left = set(index[0][mask[0]].tolist())
    # With the class token in front, raster indices 1, 3, 5, … stand at even places.
    stay, gone = [i for i in range(1, 64, 2) if i in left], [i for i in range(64) if i not in left]
    assert len(gone) == 16
    assert all(i % 2 for i in gone)
    assert all(look[a] - look[b] < 2 / 500 for a in gone for b in stay)
    assert max(look[b] for b in stay) - min(look[a] for a in gone) > 2 / 500


def test_unsupported_variants_are_refused(all_tiny: dict[str, Tiny]) -> None:
    llava, qwen = all_tiny["llava"], all_tiny["qwen2_5_vl"]
    needs = pytest.raises(UnsupportedModelError, match=r"variant=full .* which this model does not have")
    with needs, prune(qwen.model(), "folder@0:0.5;variant=full"):
        pass
    with pytest.raises(ScheduleError, match=r"variant=full .* must act at layer 0"):
        llava.run(llava.batch([llava.row(random.Random(0))]), "folder@2:0.5;variant=full")


@pytest.mark.parametrize(("rate", "left"), [(16, 192), (18, 144)])
def test_published_counts(rate: int, left: int) -> None:
    """r = 16 and 18 remove 24·r of 576."""
    assert Schedule.parse(f"folder@0:{576 - 24 * rate}t;variant=full").avg_visual_tokens(32, [576]) == left


def test_several_images_and_stages(tiny: Tiny) -> None:
    inputs = tiny.batch([tiny.row(random.Random(i), images=n) for i, n in enumerate((2, 1, 0))])
    trace, logits = tiny.run(inputs, "folder@0:0.5,folder@4:0.25")
    assert torch.isfinite(logits).all()
    for row in trace.rows:
        assert [len(image) for image in row.indices(1)] == [round(0.25 * size) for size in row.images]
        assert all(set(b) <= set(a) for a, b in zip(row.indices(0), row.indices(1), strict=True))


def test_observed_prompts_have_one_image(batches: list[Observed], tiny: Tiny) -> None:
    """`outcome` counts on it."""
    assert all(len(seen.spans) == len(seen.inputs["input_ids"]) for seen in batches)
    assert observe(tiny, tiny.batch([tiny.row(random.Random(0))])).spans[0].row == 0
