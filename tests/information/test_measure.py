"""The information of all tokens, measured in one batch, against one full run per unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked_reference import masked_logits
from tiny import LAYERS, Family, noise
from torch.overrides import TorchFunctionMode

from lmms_prune import prune
from lmms_prune.errors import ScheduleError
from lmms_prune.information.measure import Unit, measure, units
from lmms_prune.methods import MethodSpec
from lmms_prune.methods.base import Method
from lmms_prune.models.parts import ModelParts
from lmms_prune.record.information import InformationError

QUESTION = "What colour is it?"


@pytest.mark.parametrize(
    ("images", "block", "expected"),
    [
        ([[(1, 3)]], 1, [(0, 0, 0, (0,)), (0, 0, 1, (1,)), (0, 0, 2, (2,))]),
        ([[(2, 3)]], 2, [(0, 0, 0, (0, 1, 3, 4)), (0, 0, 2, (2, 5))]),
        ([[(3, 2)], [(1, 1)]], 2, [(0, 0, 0, (0, 1, 2, 3)), (0, 2, 0, (4, 5)), (1, 0, 0, (0,))]),
        ([[(2, 2), (1, 3)]], 2, [(0, 0, 0, (0, 1, 2, 3)), (0, 0, 0, (4, 5)), (0, 0, 2, (6,))]),
    ],
)
def test_units_cover_every_token_once(images: list[list[tuple[int, int]]], block: int, expected: list[tuple]) -> None:
    assert units(images, block) == [Unit(*fields) for fields in expected]


def naive(family: Family, inputs: dict, answer: int, layer: int, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> float:
    """One full run in which `prune` keeps only the unit's tokens from `layer` on."""

    class Only(Method):
        def select(self, view, budget):
            return view.valid & torch.isin(view.index, torch.tensor(unit.tokens))

    monkeypatch.setattr(MethodSpec, "build", lambda self, options: Only())
    with torch.no_grad(), prune(family.model, f"stride@{layer}:{len(unit.tokens)}t"):
        logits = family.model(**inputs, logits_to_keep=1).logits[0, -1]
    monkeypatch.undo()
    return logits.double().softmax(-1)[answer].item()


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen", "qwen3"])
def test_information_equals_one_full_run_per_unit(
    name: str, attention: str, block: int, loaded: Callable[..., Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, at the first, a middle and the last layer; the image of odd sides has clipped blocks.

    Qwen3-VL's decoder adds to the visual tokens after its first layers, so a unit needs its own features.
    """
    family = loaded(name, torch.float32, attention)
    inputs = family.inputs([QUESTION], [[noise(1, 140, 84)]])
    with torch.no_grad():
        full = family.model(**inputs, logits_to_keep=1).logits[0, -1].double().log_softmax(-1)
    # The likeliest token: the tolerance would hide what happens to an unlikely one.
    answer = int(full.argmax())
    measured = measure(family.model, inputs, answer, [0, 4, LAYERS - 1], block, chunk=7)
    blocks = measured.units
    assert measured.p_full == pytest.approx(full[answer].exp().item())
    for found in measured.layers:
        with torch.no_grad(), prune(family.model, f"vtw@{found.layer}"):
            logits = family.model(**inputs, logits_to_keep=1).logits[0, -1]
        without = logits.double().log_softmax(-1)
        assert found.p_text == pytest.approx(without[answer].exp().item(), abs=1e-5, rel=1e-4)
        assert found.divergence == pytest.approx((without.exp() * (without - full)).sum().item(), rel=1e-3, abs=1e-9)
        for number in range(0, len(blocks), 5):
            expected = naive(family, inputs, answer, found.layer, blocks[number], monkeypatch)
            assert found.p[number].item() == pytest.approx(expected, abs=1e-5, rel=1e-4), (found.layer, blocks[number])
        assert found.information.tolist() == (found.p - found.p_text).tolist()
        assert found.p.std() > 0


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_units_of_several_images(name: str, loaded: Callable[..., Family]) -> None:
    """Text between two images sees only the first; compared with a reference that masks instead of deleting."""
    family = loaded(name)
    inputs = family.inputs([QUESTION], [[noise(2, 140, 84), noise(3)]])
    ids = inputs["input_ids"][0].tolist()
    answer = family.processor.tokenizer.encode("yes", add_special_tokens=False)[0]
    measured = measure(family.model, inputs, answer, [2, 5])
    blocks = measured.units
    visual = [column for column, token in enumerate(ids) if token == family.model.config.image_token_id]
    assert {unit.image for unit in blocks} == {0, 1}
    assert len(blocks) == len(visual)
    for found in measured.layers:
        for number in (0, len(blocks) // 2, len(blocks) - 1):
            gone = set(visual) - {visual[number]}
            generated = torch.tensor([answer])
            logits = masked_logits(family.model, inputs, generated, {found.layer: gone}, compact=False)
            assert found.p[number].item() == pytest.approx(logits[0].double().softmax(-1)[answer].item(), rel=1e-8)


@pytest.mark.parametrize("block", [1, 2])
def test_units_of_images_in_tiles(block: int, loaded: Callable[..., Family]) -> None:
    """No unit is over the edge between base and canvas, and none stands with the newline tokens of its image."""
    family = loaded("next")
    inputs = family.inputs([QUESTION], [[noise(2, 140, 84), noise(3, 60, 130)]])
    visual = (inputs["input_ids"][0] == family.model.config.image_token_id).nonzero()[:, 0].tolist()
    mosaics, patches, start = ModelParts.of(family.model).mosaics(inputs), [], 0
    for mosaic in mosaics:
        patches.append([visual[start + column] for column in mosaic.columns_of_patches])
        start += mosaic.tokens
    assert [mosaic.newline_count for mosaic in mosaics] == [4, 8]
    with torch.no_grad():
        answer = int(family.model(**inputs, logits_to_keep=1).logits[0, -1].argmax())
    measured = measure(family.model, inputs, answer, [0, 4], block, chunk=7)
    blocks = measured.units
    covered = [[token for unit in blocks if unit.image == image for token in unit.tokens] for image in (0, 1)]
    assert [sorted(tokens) for tokens in covered] == [list(range(mosaic.patches)) for mosaic in mosaics]
    for layer in measured.layers:
        for number in range(0, len(blocks), 9):
            unit = blocks[number]
            assert len({token < mosaics[unit.image].base for token in unit.tokens}) == 1
            dropped = set(visual) - {patches[unit.image][token] for token in unit.tokens}
            logits = masked_logits(family.model, inputs, torch.tensor([answer]), {layer.layer: dropped}, compact=False)
            assert layer.p[number].item() == pytest.approx(logits[0].double().softmax(-1)[answer].item(), rel=1e-8)
        logits = masked_logits(family.model, inputs, torch.tensor([answer]), {layer.layer: set(visual)}, compact=False)
        assert layer.p_text == pytest.approx(logits[0].double().softmax(-1)[answer].item(), rel=1e-8)
        assert layer.p.std() > 0


class _Masks(TorchFunctionMode):
    """Records the kind of mask, and the number of queries, of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[tuple[str, bool]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            mask = (kwargs or {}).get("attn_mask")
            self.kinds[type(mask).__name__, args[0].shape[2] == 1] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_no_mask_is_made_where_all_text_follows_the_units(name: str, loaded: Callable[..., Family]) -> None:
    """The layers call the causal kernel, and the last one, for the last token, a kernel without a mask."""
    family = loaded(name, torch.float32, "sdpa")
    one_image = family.inputs([QUESTION], [[noise(1, 140, 84)]])
    measured = measure(family.model, one_image, 3, [LAYERS - 3])
    with _Masks() as masks:
        [layer] = measured.layers
    assert layer.p.std() > 0
    # The units, and the text alone.
    assert masks.kinds == {("CausalBias", False): 2 * 2, ("NoneType", True): 2}
    # Text stands before the second image, so a row with one of its tokens is not in the order of its columns.
    measured = measure(family.model, family.inputs([QUESTION], [[noise(2, 140, 84), noise(3)]]), 3, [LAYERS - 2])
    with _Masks() as masks:
        list(measured.layers)
    assert masks.kinds == {("CausalBias", False): 1, ("Tensor", False): 1, ("NoneType", True): 2}


def test_prompts_that_cannot_be_measured_are_named(loaded: Callable[..., Family]) -> None:
    family = loaded("llava")
    prompt = family.inputs([QUESTION], [[noise(1)]])
    with pytest.raises(ScheduleError, match="layers are 0 to 7"):
        measure(family.model, prompt, 3, [8])
    with pytest.raises(InformationError, match="token 100000 is not one of"):
        measure(family.model, prompt, 100_000, [0])
    with pytest.raises(InformationError, match="8 x 8 visual tokens has no block of 9 x 9; use block 8"):
        measure(family.model, prompt, 3, [0], block=9)
    with pytest.raises(InformationError, match="no image"):
        measure(family.model, family.inputs([QUESTION], [[]]), 3, [0])
    with pytest.raises(InformationError, match="2 were given at once"):
        measure(family.model, family.inputs([QUESTION] * 2, [[noise(1)]] * 2), 3, [0])
