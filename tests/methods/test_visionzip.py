"""VisionZip against hand-computed cases, its published splits and a slow reference in plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import slow
import torch
from encoders import CLIP, QWEN, half_even, hand_view, is_llava, tensor, top
from observed import Observed, Tiny, assert_agree, image_count, kept
from torch import Tensor

from lmms_prune import Schedule, ScheduleError, Trace, prune
from lmms_prune.methods import visionzip
from lmms_prune.methods.view import TokenView
from lmms_prune.methods.visionzip import VisionZip
from lmms_prune.models.encoder import Signals

Vectors = list[list[float]]


@dataclass
class Zipped:
    """The tokens of one image after VisionZip, in the order in which they stand, and the raster index of each."""

    tokens: Vectors
    index: list[int]
    margin: float


def reference(
    saliency: Sequence[float],
    keys: Vectors,
    features: Vectors,
    class_token: Sequence[float] | None,
    dominant: int,
    contextual: int,
    merge: str = "sum",
) -> Zipped:
    """VisionZip of one image (https://arxiv.org/abs/2412.04467), token by token; `dominant` counts the class token."""
    has_class = class_token is not None and dominant > 0
    patches, margin = top(dict(enumerate(saliency)), dominant - has_class)
    patches = sorted(patches)
    rest = [i for i in range(len(saliency)) if i not in patches]
    targets = rest[:: len(rest) // contextual][:contextual] if contextual else []
    groups: dict[int, list[int]] = {target: [] for target in targets}
    units = [slow.unit(key) for key in keys]
    for i in rest:
        if targets and i not in groups:
            [goal], gap = top({target: slow.dot(units[i], units[target]) for target in targets}, 1)
            groups[goal].append(i)
            margin = min(margin, gap)
    tokens, index = [], []
    if has_class:
        tokens.append(list(class_token))
        index.append(min(set(range(len(saliency))) - set(patches) - set(targets)))
    for i in patches:
        tokens.append(list(features[i]))
        index.append(i)
    for target, members in groups.items():
        token = []
        for channel in range(len(features[0])):
            own, others = features[target][channel], [features[i][channel] for i in members]
            if merge == "mean":
                token.append((own + sum(others)) / (1 + len(others)))
            else:
                token.append(own + (sum(others) / len(others) if others else 0.0))
        tokens.append(token)
        index.append(target)
    if class_token is None:
        # Qwen2.5-VL's port leaves all tokens where they stood.
        order = sorted(range(len(index)), key=index.__getitem__)
        tokens, index = [tokens[i] for i in order], [index[i] for i in order]
    return Zipped(tokens, index, margin)


def zipped(method: VisionZip, view: TokenView, count: int) -> Zipped:
    """What the method makes of a view's only image."""
    keep = method.select(view, torch.tensor([count]))
    assert int(keep.sum()) == count
    hidden, index = method.rewrite(view, keep)
    return Zipped(hidden[keep].tolist(), index[keep].tolist(), 0.0)


# Eight patches. By attention 5, then 2, then 0; keys on the axes and between them; features are powers of two.
SALIENCY = [0.3, 0.1, 0.5, 0.1, 0.2, 0.9, 0.1, 0.1]
KEYS = [[1, 0], [0, 3], [5, 5], [2, 1], [1, 2], [9, 9], [1, 0.1], [4, 1]]
FEATURES = [[2.0**i] for i in range(8)]


def by_hand(shape=CLIP) -> TokenView:
    signals = {"saliency": tensor([SALIENCY]), "keys": tensor([KEYS]), "features": tensor([FEATURES])}
    return hand_view(
        shape, grids=[(2, 4)], class_output=tensor([[0.5]]), hidden=torch.zeros(1, 8, 1).double(), **signals
    )


def test_by_hand() -> None:
    """N = 5, 26 of each 64 contextual: C = round(2.03) = 2, D = 3: the class token and patches 5 and 2.

    The rest is 0 1 3 4 6 7, of which each third is a target: 0 and 4, with keys at 0 and 63 degrees. 1 (90°) goes to 4,
    3 (27°), 6 (6°) and 7 (14°) to 0. Target 0: 1 + (8 + 64 + 128)/3, target 4: 16 + 2/1. The class token stands at the
    lowest index that is neither dominant nor a target: 1. The projector doubles all.
    """
    found = zipped(VisionZip(contextual=26), by_hand(), 5)
    assert found.index == [1, 2, 5, 0, 4]
    expected = [0.5, 4, 32, 1 + 200 / 3, 16 + 2]
    assert [x for [x] in found.tokens] == pytest.approx([2 * x for x in expected])
    # As means: 201/4 and 18/2.
    found = zipped(VisionZip(contextual=26, merge="mean"), by_hand(), 5)
    assert found.index == [1, 2, 5, 0, 4]
    assert [x for [x] in found.tokens] == pytest.approx([2 * x for x in (0.5, 4, 32, 201 / 4, 9)])


def test_by_hand_without_a_class_token() -> None:
    """N = 5: C = max(1, ⌊5/14⌋) = 1, D = 4: 5, 2, 0, 4. The rest, 3, 6 and 7, goes to 1: 2 + (8 + 64 + 128)/3."""
    found = zipped(VisionZip(), by_hand(QWEN), 5)
    assert found.index == [0, 1, 2, 4, 5], "all stay where they stood"
    assert [x for [x] in found.tokens] == pytest.approx([2 * x for x in (1, 2 + 200 / 3, 4, 16, 32)])
    # One token: the first one, and all others into it.
    found = zipped(VisionZip(merge="mean"), by_hand(QWEN), 1)
    assert found.index == [0]
    assert found.tokens == [[2 * 255 / 8]]


def test_no_contextual_tokens() -> None:
    found = zipped(VisionZip(contextual=0), by_hand(), 3)
    assert found.index == [0, 2, 5]
    assert found.tokens == [[1.0], [8.0], [64.0]]
    assert zipped(VisionZip(contextual=0), by_hand(QWEN), 3).tokens == [[2.0], [8.0], [64.0]]


def test_only_contextual_tokens() -> None:
    """No class token then: it is one of the dominant. Targets 0, 2, 4, 6 of eight."""
    found = zipped(VisionZip(contextual=64), by_hand(), 4)
    assert found.index == [0, 2, 4, 6]
    # Angles 0 90 45 27 63 45 6 14: 1 and 4 to 4; 3 to 2 (18 degrees; 6 is 21 away), 5 to 2, 7 to 6 (8 degrees).
    assert [x for [x] in found.tokens] == pytest.approx([2 * x for x in (1, 4 + 20, 16 + 2, 64 + 128)])


def test_ties_go_to_the_lower_index() -> None:
    signals = {"saliency": torch.full((1, 8), 0.5), "keys": torch.ones(1, 8, 2), "features": tensor([FEATURES])}
    view = hand_view(
        CLIP, grids=[(2, 4)], class_output=tensor([[0.5]]), hidden=torch.zeros(1, 8, 1).double(), **signals
    )
    # D = 3: class, 0, 1. The rest 2 … 7: targets 2 and 5; all others are as near to 2 as to 5.
    found = zipped(VisionZip(contextual=26), view, 5)
    assert found.index == [3, 0, 1, 2, 5]
    assert [x for [x] in found.tokens] == pytest.approx([2 * x for x in (0.5, 1, 2, 4 + (8 + 16 + 64 + 128) / 4, 32)])


@pytest.mark.parametrize(
    ("count", "llava", "qwen"),
    [
        (192, 30, 13),
        (128, 20, 9),
        (64, 10, 4),
        # 700 of 1000 tokens: 0.65 and 0.05.
        (700, 109, 50),
        (3, 0, 1),
        (4, 1, 1),
        (1, 0, 1),
        (0, 0, 0),
    ],
)
def test_published_splits(count: int, llava: int, qwen: int) -> None:
    """162+30, 108+20, 54+10 of LLaVA's 576; counted on the tokens that are the sum of several."""
    n = 1000
    generator = torch.Generator().manual_seed(0)
    signals = {
        "saliency": torch.rand(1, n, generator=generator, dtype=torch.float64),
        "keys": torch.randn(1, n, 4, generator=generator, dtype=torch.float64),
        "features": torch.ones(1, n, 1, dtype=torch.float64),
    }
    for shape, contextual in ((CLIP, llava), (QWEN, qwen)):
        hidden = torch.zeros(1, n, 1).double()
        view = hand_view(shape, grids=[(1, n)], class_output=tensor([[1.0]]), hidden=hidden, **signals)
        found = zipped(VisionZip(), view, count)
        assert len(set(found.index)) == count
        # A target that something goes to is 1 + 1, doubled.
        merged = [span for span, [x] in enumerate(found.tokens) if x == 4.0]
        assert bool(merged) == (contextual > 0)
        first = int(shape is CLIP and count > 0)
        dominant = top(dict(enumerate(signals["saliency"][0].tolist())), count - contextual - first)[0]
        if shape is CLIP:
            assert all(span >= count - contextual for span in merged)
            assert found.index[first : count - contextual] == sorted(dominant)
        else:
            assert found.index == sorted(found.index)
            assert set(dominant) <= set(found.index)
            assert not set(dominant) & {found.index[span] for span in merged}


@pytest.mark.parametrize(("name", "average"), [("visionzip-192", 192), ("visionzip-128", 128), ("visionzip-64", 64)])
def test_presets(name: str, average: int) -> None:
    assert float(Schedule.parse(name).avg_visual_tokens(32, [576])) == average


def test_only_before_the_decoder() -> None:
    with pytest.raises(ScheduleError, match="cannot act at layer 1"):
        Schedule.parse("visionzip@1:0.3")


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [CLIP, QWEN])
def test_smallest_images(n: int, shape) -> None:
    generator = torch.Generator().manual_seed(n)
    saliency = torch.rand(1, n, generator=generator, dtype=torch.float64)
    keys, features = torch.randn(2, 1, n, 4, generator=generator, dtype=torch.float64)
    hidden = torch.zeros_like(features)
    view = hand_view(
        shape,
        grids=[(1, n)],
        saliency=saliency,
        keys=keys,
        features=features,
        class_output=features[:, 0] + 1,
        hidden=hidden,
    )
    for count in range(n + 1):
        for contextual in (-1, 0, 13, 32, 64):
            found = zipped(VisionZip(contextual=contextual), view, count)
            merged = half_even(count * (contextual if contextual >= 0 else 10) / 64)
            if shape is QWEN and contextual < 0:
                merged = min(count, 1)
            class_token = (features[0, 0] + 1).tolist() if shape is CLIP else None
            want = reference(
                saliency[0].tolist(), keys[0].tolist(), features[0].tolist(), class_token, count - merged, merged
            )
            assert found.index == want.index
            assert [[x / 2 for x in token] for token in found.tokens] == [pytest.approx(x) for x in want.tokens]


def test_what_is_recorded() -> None:
    assert VisionZip().signals(CLIP) == Signals(attention=frozenset({22}), features=True)
    assert VisionZip().signals(QWEN) == Signals(attention=frozenset({31}), features=True)


def split(tiny: Tiny, count: int, contextual: int) -> tuple[int, int]:
    if contextual >= 0 or is_llava(tiny):
        merged = half_even(count * (contextual if contextual >= 0 else 10) / 64)
    else:
        merged = min(count, max(1, count // 14))
    return count - merged, merged


def wanted(tiny: Tiny, view: TokenView, ratio: float, contextual: int, merge: str) -> list[Zipped]:
    encoder, made = view.encoder, []
    block = encoder.shape.selected
    saliency, keys, features = encoder.saliency(), encoder.keys(block), encoder.features()
    for i, size in enumerate(view.sizes):
        class_token = encoder.class_output(block)[i].tolist() if is_llava(tiny) else None
        numbers = split(tiny, half_even(ratio * size), contextual)
        vectors = [x[i, :size].tolist() for x in (saliency, keys, features)]
        made.append(reference(*vectors, class_token, *numbers, merge))
    return made


def entering(tiny: Tiny, inputs: dict[str, Tensor], schedule: str) -> tuple[Trace, Tensor, Tensor]:
    """Through `prune`: the trace, and the states and rotary sines that enter layer 0."""
    seen: list[tuple[Tensor, Tensor]] = []
    model = tiny.model()
    with torch.no_grad(), prune(model, schedule) as trace:
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0], kwargs["position_embeddings"][1])), with_kwargs=True
        )
        try:
            model(**inputs)
        finally:
            handle.remove()
    [(hidden, sines)] = seen
    return trace, hidden, sines


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    ratios = (0.33, 0.22, 0.11, 0.5, 0.75, 0.4, 0.6, 0.2)
    splits = (-1, -1, -1, 32, 10, 0, 20, 64)
    got, want = [], []
    for number, (seen, ratio, contextual) in enumerate(zip(batches, ratios, splits, strict=True)):
        merge = ("sum", "mean")[number % 2]
        text = f"visionzip@0:{ratio};contextual={contextual};merge={merge}"
        made = wanted(tiny, encoder_view(tiny, seen), ratio, contextual, merge)
        trace, hidden, sines = entering(tiny, seen.inputs, text)
        sets = kept(trace)
        got += sets
        want += [(set(image.index), image.margin) for image in made]
        _, _, plain = entering(tiny, seen.inputs, "none")
        for image, span in enumerate(seen.spans):
            if sets[image] != set(made[image].index):
                continue
            # Left padding and one image a row: its tokens stand before the text after it.
            last = hidden.shape[1] - len(span.text)
            tokens = hidden[span.row, last - len(made[image].index) : last]
            torch.testing.assert_close(tokens, projected(tiny, made[image].tokens), atol=1e-9, rtol=1e-9)
            first = span.pad + span.visual[0]
            row = span.row if len(plain) > 1 else 0
            expected = plain[row, [first + i for i in made[image].index]]
            torch.testing.assert_close(sines[span.row if len(sines) > 1 else 0, last - len(tokens) : last], expected)
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def projected(tiny: Tiny, tokens: Vectors) -> Tensor:
    if not is_llava(tiny):
        return tensor(tokens)
    with torch.no_grad():
        return tiny.model().model.multi_modal_projector(tensor(tokens))


def test_several_images_are_independent(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 1, 0, 3)])
    trace, _ = tiny.run(inputs, "visionzip@0:0.4")
    made = wanted(tiny, capture_view(tiny, inputs, 2), 0.4, -1, "sum")
    assert len(made) == 6
    assert_agree(kept(trace), [(set(image.index), image.margin) for image in made])


def test_merging_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = zipped(VisionZip(contextual=26), by_hand(), 5)
    monkeypatch.setattr(visionzip, "BLOCK", 3)
    pieces = zipped(VisionZip(contextual=26), by_hand(), 5)
    assert pieces.index == whole.index
    assert pieces.tokens == [pytest.approx(x) for x in whole.tokens]


def test_deeper_stages_follow_it(tiny: Tiny) -> None:
    """A token's raster index is what later stages know it by."""
    inputs = tiny.batch([tiny.row(random.Random(6)) for _ in range(4)])
    trace, _ = tiny.run(inputs, "visionzip@0:0.4,fastervlm@3:0.2")
    for before, after in zip(kept(trace, 0), kept(trace, 1), strict=True):
        assert after < before
