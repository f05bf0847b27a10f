"""PruMerge and PruMerge+ against hand-computed cases, published counts and a slow reference in plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import slow
import torch
from encoders import CLIP, QWEN, hand_view, is_llava, tensor, top
from observed import HandView, Observed, Tiny, assert_agree, image_count, kept, run_to
from torch import Tensor, nn

from lmms_prune import Schedule, prune
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods import prumerge
from lmms_prune.methods.prumerge import PruMerge
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals

Vectors = Sequence[Sequence[float]]


@dataclass
class Result:
    """Raster indices in the order of the kept tokens, without the summary token; the tokens, the summary last; a margin."""

    order: list[int]
    tokens: list[list[float]]
    margin: float


def outliers(attention: Sequence[float]) -> tuple[list[int], float]:
    """Tokens above Q3 + 1.5·IQR by falling attention (quartiles interpolated by numpy)."""
    first, third = np.percentile(np.array(attention), [25, 75])
    bound = third + 1.5 * (third - first)
    found = [i for i in slow.best_first(dict(enumerate(attention))) if attention[i] > bound]
    return found, min(abs(value - bound) for value in attention)


def grid(count: int, size: int) -> list[int]:
    """PruMerge+'s grid for `count` outliers of `size` tokens, as in the published code."""
    stride = int(1 / (count / size)) // 3
    return list(range(0, size - 1, stride))


def chosen(attention: Sequence[float], count: int | None, plus: bool) -> tuple[list[int], float]:
    size = len(attention)
    if count is None:
        best, margin = outliers(attention)
        others = grid(len(best), size) if plus and best else []
        return best + [i for i in others if i not in best], margin
    by_attention = max(1, (count - 1) // 4) if plus and count > 1 else count - 1
    best, margin = top(dict(enumerate(attention)), by_attention)
    rest = [i for i in range(size) if i not in best]
    spread = count - 1 - by_attention
    return best + [rest[(2 * m + 1) * len(rest) // (2 * spread)] for m in range(spread)], margin


def reference(
    attention: Sequence[float],
    keys: Vectors,
    features: Vectors,
    count: int | None,
    plus: bool,
    nearest: int = 32,
) -> Result:
    """PruMerge of one image (https://arxiv.org/abs/2403.15388), token by token; `count` includes the summary token."""
    order, margin = chosen(attention, count, plus)
    dropped = [i for i in range(len(attention)) if i not in order]
    units = [slow.unit(key) for key in keys]

    def total(members: Sequence[int]) -> list[float]:
        return [sum(attention[j] * features[j][c] for j in members) for c in range(len(features[0]))]

    tokens = []
    for i in order:
        candidates = [j for j in order if j != i] + dropped
        cosine = {place: slow.dot(units[i], units[j]) for place, j in enumerate(candidates)}
        similar, gap = top(cosine, min(nearest, len(candidates)))
        margin = min(margin, gap)
        added = total([candidates[place] for place in similar])
        tokens.append([own + more for own, more in zip(features[i], added, strict=True)])
    if dropped:
        tokens.append(total(dropped))
    return Result(order, tokens, margin)


def merged(method: PruMerge, view: HandView, count: int) -> tuple[list[int], list[list[float]]]:
    """Raster indices and tokens that the method makes of a view's only image."""
    keep = method.select(view, torch.tensor([count]))
    hidden, index = method.rewrite(view, keep)
    return index[keep].tolist(), hidden[keep].tolist()


def view_of(attention: Sequence[float], keys: Vectors, features: Vectors) -> HandView:
    return hand_view(
        CLIP,
        grids=[(1, len(attention))],
        hidden=torch.zeros(1, len(attention), len(features[0])).double(),
        class_attention=tensor([attention])[:, None],
        keys=tensor([keys]),
        features=tensor([features]),
    )


def at_angles(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prumerge, "_NEAREST", 2)
    attention, features = [0.10, 0.50, 0.02, 0.20, 0.04, 0.10], [[2.0**i] for i in range(6)]
    view = view_of(attention, at_angles(0, 40, 50, 90, 85, 10), features)
    index, tokens = merged(PruMerge(variant="plain"), view, 3)
    # The hand-made projector doubles.
    assert [round(x / 2, 9) for [x] in tokens] == [5.28, 8.72, 4.02]
    text = prumerge.__doc__ or ""
    assert f"Raster indices: {' '.join(map(str, index))}." in text
    assert "Features before the projector: 5.28, 8.72, 4.02." in text
    raster, same = merged(PruMerge(variant="plain", order="raster"), view, 3)
    assert (raster, same) == (index, tokens), "here both orders are the same"


def test_plus_by_hand() -> None:
    """N = 5 of 8: ⌊4/4⌋ = 1 by attention, token 6; of the other seven the numbers ⌊7/6⌋, ⌊21/6⌋ and ⌊35/6⌋: 1, 3, 5.

    Fewer than 32 others: all are added. Total attention-weighted feature: Σ a·x = 1.0 with x = 1 everywhere and a = 1/8;
    each token becomes 1 + 7/8, the summary 4/8 (a of token 6 is 2/8).
    """
    attention = [0.125] * 6 + [0.25, 0.125]
    view = view_of(attention, at_angles(*range(0, 80, 10)), [[1.0]] * 8)
    index, tokens = merged(PruMerge(), view, 5)
    assert index == [6, 1, 3, 5, 7]
    others = sum(attention)
    expected = [1 + others - 0.25, *[1 + others - 0.125] * 3, 0.125 * 4]
    assert [x / 2 for [x] in tokens] == pytest.approx(expected)
    # In raster order: 1, 3, 5, 6, and the summary token at 7.
    index, tokens = merged(PruMerge(order="raster"), view, 5)
    assert index == [1, 3, 5, 6, 7]
    assert [x / 2 for [x] in tokens] == pytest.approx([expected[1], expected[2], expected[3], expected[0], expected[4]])


def test_the_outliers_decide_where_there_is_no_keep() -> None:
    """Of 0…8 and 100 the quartiles are 2.25 and 6.75: above 13.5 is the last alone. Step 10, stride 3: 0, 3, 6."""
    attention = [i / 100 for i in range(9)] + [1.0]
    view = view_of(attention, at_angles(*range(10)), [[0.0]] * 10)
    keep = PruMerge().select(view, torch.tensor([10]))
    assert keep[0].nonzero().flatten().tolist() == [0, 3, 6, 8, 9], "8 is the summary's"
    keep = PruMerge(variant="plain").select(view, torch.tensor([10]))
    assert keep[0].nonzero().flatten().tolist() == [8, 9]
    index, _ = merged(PruMerge(), view, 10)
    assert index == [9, 0, 3, 6, 8]


@pytest.mark.parametrize("variant", ["plus", "plain"])
def test_without_an_outlier_the_summary_remains(variant: str) -> None:
    view = view_of([0.1] * 6, at_angles(*range(6)), [[float(i)] for i in range(6)])
    index, tokens = merged(PruMerge(variant=variant), view, 6)
    assert index == [5]
    assert tokens[0][0] == pytest.approx(2 * 0.1 * 15)


GRIDS = {1: 3, 10: 31, 20: 64, 24: 72, 32: 96, 33: 115, 38: 115, 39: 144, 48: 144, 49: 192, 64: 192, 65: 288, 96: 288}
"""Published sizes of the grid by the number of outliers of 576 tokens; from 97 on it has all but the last token."""


@pytest.mark.parametrize("count", range(1, 145))
def test_published_counts(count: int) -> None:
    """The grid has the published size, the total is K + grid - overlap + 1; here the outliers are the last K tokens."""
    attention = torch.zeros(1, 576).double()
    attention[0, 576 - count :] = 1
    attention[0, :431] = torch.arange(431) * 1e-9
    found = prumerge._outliers(attention, torch.ones(1, 576).bool(), torch.tensor([[576]]))
    assert int(found.sum()) == count
    spatial = prumerge._regular(found, torch.ones(1, 576).bool(), torch.tensor([[576]]))
    wanted = [i for i in grid(count, 576) if i < 576 - count]
    assert spatial[0].nonzero().flatten().tolist() == wanted
    size = GRIDS.get(count, 575 if count > 96 else None)
    assert size in (None, len(grid(count, 576)))


def test_multiplying_the_attention_changes_no_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = (4 * torch.randn(3, 576, generator=generator).double()).softmax(1)
    valid, size = torch.ones(3, 576).bool(), torch.full((3, 1), 576)
    found = prumerge._outliers(attention, valid, size)
    assert torch.equal(found, prumerge._outliers(attention * 1000, valid, size))
    assert (found.sum(1) < 144).all()
    assert not prumerge._outliers(torch.full((1, 5), 0.2), torch.ones(1, 5).bool(), torch.tensor([[5]])).any()


def test_equal_similarities_go_to_the_first_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are equal; two are merged: for the first kept one the other kept and the lowest that is dropped."""
    monkeypatch.setattr(prumerge, "_NEAREST", 2)
    attention = [0.0625, 0.125, 0.0625, 0.25, 0.0625]
    features = [[1.0], [10.0], [100.0], [1000.0], [10000.0]]
    index, tokens = merged(PruMerge(variant="plain"), view_of(attention, [[1.0, 0.0]] * 5, features), 3)
    assert index == [3, 1, 4]
    assert [x / 2 for [x] in tokens] == pytest.approx([1000 + 1.25 + 0.0625, 10 + 250 + 0.0625, 0.0625 * 10101])


def test_all_mass_on_the_class_token_changes_nothing() -> None:
    view = view_of([0.0] * 6, at_angles(*range(6)), [[float(i + 1)] for i in range(6)])
    index, tokens = merged(PruMerge(variant="plain"), view, 4)
    assert index == [0, 1, 2, 5]
    assert tokens == [[2.0], [4.0], [6.0], [0.0]]


@pytest.mark.parametrize("variant", ["plus", "plain"])
def test_every_keep_of_small_images(variant: str) -> None:
    rng = random.Random(0)
    for size in (1, 2, 3, 7):
        attention, keys = [rng.random() for _ in range(size)], at_angles(*range(size))
        features = [[rng.random()] for _ in range(size)]
        for count in range(1, size):
            index, tokens = merged(PruMerge(variant=variant), view_of(attention, keys, features), count)
            want = reference(attention, keys, features, count, variant == "plus")
            assert index == [*want.order, max(set(range(size)) - set(want.order))]
            assert tokens == [pytest.approx([2 * x for x in token]) for token in want.tokens]


def test_blocks_that_are_recorded() -> None:
    assert PruMerge().signals(CLIP) == Signals(attention=frozenset({23}), features=True)
    assert PruMerge().signals(QWEN) == Signals(attention=frozenset({31}), features=True)


def test_an_encoder_without_a_class_token_is_refused(all_tiny: dict[str, Tiny]) -> None:
    message = (
        "prumerge reads the attention of a class token, which Qwen2.5-VL's vision encoder has not.*no_class=received"
    )
    with (
        pytest.raises(UnsupportedModelError, match=message),
        prune(all_tiny["qwen2_5_vl"].model(), "prumerge@0:0.3"),
    ):
        pass
    llava = all_tiny["llava"]
    trace, _ = llava.run(llava.batch([llava.row(random.Random(0))]), "prumerge@0:0.3")
    assert trace.rows[0].kept == [[19]]


def test_keys_of_one_head_are_those_of_all_side_by_side(
    tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]
) -> None:
    encoder = encoder_view(tiny, batches[0]).encoder
    keys, mean = encoder.keys(1, one_head=True), encoder.keys(1)
    torch.testing.assert_close(keys.unflatten(-1, (-1, mean.shape[-1])).mean(2), mean)
    assert keys.shape[-1] > mean.shape[-1]


# -- whole runs --------------------------------------------------------------------------------------------------------


def clip_signals(tiny: Tiny, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From hooks of the test: attention of one head of full width, keys and features; the class token left out."""
    model = tiny.model().model
    encoder = getattr(model.vision_tower, "vision_model", model.vision_tower)
    blocks = encoder.encoder.layers
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    hooks: dict[str, nn.Module] = {"q": blocks[-1].self_attn.q_proj, "k": blocks[-1].self_attn.k_proj, "x": blocks[-2]}
    handles = [module.register_forward_hook(note(name)) for name, module in hooks.items()]
    with torch.no_grad():
        model.vision_tower(pixels)
    for handle in handles:
        handle.remove()
    logits = torch.stack([k @ q[0] for q, k in zip(seen["q"], seen["k"], strict=True)]) / seen["q"].shape[-1] ** 0.5
    return logits.softmax(-1)[:, 1:], seen["k"][:, 1:], seen["x"][:, 1:]


def wanted(tiny: Tiny, seen: Observed, view: TokenView, keep: str, plus: bool) -> list[Result]:
    encoder, sizes = view.encoder, view.sizes
    if is_llava(tiny):
        attention, keys, features = clip_signals(tiny, seen.inputs["pixel_values"])
    else:
        last = encoder.shape.depth - 1
        attention, keys = 4 * encoder.received(last), encoder.keys(last, one_head=True)
        features = encoder.features()
    schedule = Schedule.parse(f"prumerge@0:{keep}") if keep else None
    results = []
    for i, size in enumerate(sizes):
        count = schedule.plan([size])[0][0] if schedule else None
        results.append(
            reference(attention[i, :size].tolist(), keys[i, :size].tolist(), features[i, :size].tolist(), count, plus)
        )
    return results


@pytest.mark.parametrize("order", ["reference", "raster"])
def test_equals_slow_reference(
    tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView], order: str
) -> None:
    """Tokens and their order: in the sequence that enters layer 0."""
    keeps = ("0.33", "", "0.11", "0.5", "", "0.4", "0.75", "0.2")
    got, want = [], []
    for number, (seen, keep) in enumerate(zip(batches, keeps, strict=True)):
        plus = number % 4 < 2
        text = f"prumerge@0{keep and ':' + keep};no_class=received;order={order}" + ("" if plus else ";variant=plain")
        trace, entering = run_to(tiny, seen.inputs, text, 0)
        results = wanted(tiny, seen, encoder_view(tiny, seen), keep, plus)
        sets = kept(trace)
        for i, (span, result) in enumerate(zip(seen.spans, results, strict=True)):
            size = len(span.visual)
            rest = [j for j in range(size) if j not in result.order]
            index = [*result.order, *rest[-1:]]
            got.append(sets[i])
            want.append((set(index), result.margin))
            if sets[i] != set(index) or result.margin < 1e-6:
                continue
            tokens = torch.tensor(result.tokens, dtype=torch.float64)
            if is_llava(tiny):
                with torch.no_grad():
                    tokens = tiny.model().model.multi_modal_projector(tokens)
            if order == "raster":
                tokens = tokens[torch.tensor(index).argsort()]
            row = entering[span.row]
            # Rows are packed to the right: the text after the image follows its tokens.
            end = row.shape[0] - (span.length - 1 - span.visual[-1])
            torch.testing.assert_close(row[end - len(index) : end], tokens, atol=1e-5, rtol=1e-5)
    assert len(got) == image_count(batches)
    assert_agree(got, want)
