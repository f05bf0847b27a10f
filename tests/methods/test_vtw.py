"""VTW: no visual token goes on; what is left is a text prompt with the image's holes in its positions."""

from __future__ import annotations

import random

import pytest
import torch
from observed import HandView, Tiny, chosen, kept, rope_ids
from torch import Tensor

from lmms_prune import Schedule
from lmms_prune.methods.vtw import VTW

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")


def test_by_hand() -> None:
    # Two images of 5 and 3 tokens: none of the 8 is kept.
    view = HandView(torch.zeros(2, 9, 2), [5, 3])
    assert chosen(VTW().select(view, torch.tensor([0, 0]))) == [set(), set()]


@pytest.mark.parametrize(("layer", "average"), [(11, 198), (7, 126), (4, 72), (3, 54)])
def test_average(layer: int, average: int) -> None:
    """n K / L of 576 tokens in 32 layers."""
    assert Schedule.parse(f"vtw@{layer}").avg_visual_tokens(32, [576]) == average


@pytest.mark.parametrize("layer", [0, 1, 4, 7])
def test_equals_random_that_keeps_nothing(tiny: Tiny, layer: int) -> None:
    rng = random.Random(layer)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (1, 2, 1, 0)], torch.float32)
    trace, logits = tiny.run(inputs, f"vtw@{layer}", dtype=torch.float32)
    for other in (f"random@{layer}:0", f"random@{layer}:0t", f"divprune@{layer}:0"):
        assert torch.equal(logits, tiny.run(inputs, other, dtype=torch.float32)[1])
    assert kept(trace) == [set()] * 4
    assert [row.visual for row in trace.rows] == [[sum(row.images)] * layer + [0] * (8 - layer) for row in trace.rows]
    with torch.no_grad():
        unpruned = tiny.model(torch.float32)(**inputs, logits_to_keep=1).logits[:, -1]
    assert not torch.allclose(logits[:3], unpruned[:3], atol=1e-2), "dropping the images matters"
    torch.testing.assert_close(logits[3], unpruned[3], atol=1e-4, rtol=0)


def without_image(inputs: dict[str, Tensor], image_token: int) -> tuple[dict[str, Tensor], Tensor]:
    """The text-only prompt of a batch of one, and where its tokens stood."""
    stays = (inputs["input_ids"][0] != image_token).nonzero().flatten()
    text = {name: x for name, x in inputs.items() if name not in IMAGE_INPUTS}
    for name, x in text.items():
        text[name] = x[:, stays]
    return text, stays


def text_only_logits(tiny: Tiny, text: dict[str, Tensor], **options: Tensor) -> Tensor:
    with torch.no_grad():
        return tiny.model()(**text, **options, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("images", [1, 2])
def test_layer_0_is_a_text_prompt(all_tiny: dict[str, Tiny], images: int) -> None:
    """LLaVA: compact positions are those of the text alone; original ones are offset by the image's n tokens."""
    tiny, rng = all_tiny["llava"], random.Random(1)
    inputs = tiny.batch([tiny.row(rng, images=images)])
    text, stays = without_image(inputs, tiny.model().config.image_token_id)
    compact = tiny.run(inputs, "vtw@0", positions="compact")[1]
    original = tiny.run(inputs, "vtw@0", positions="original")[1]
    torch.testing.assert_close(compact, text_only_logits(tiny, text), atol=1e-9, rtol=0)
    torch.testing.assert_close(original, text_only_logits(tiny, text, position_ids=stays[None]), atol=1e-9, rtol=0)
    assert not torch.allclose(original, compact, atol=1e-3), "the policies differ"
    first = int((stays == torch.arange(len(stays))).sum())
    if images == 1:
        assert (stays[first:] == torch.arange(first, len(stays)) + 64).all()


@pytest.mark.parametrize("images", [1, 2])
def test_layer_0_is_a_text_prompt_with_gaps(all_tiny: dict[str, Tiny], images: int) -> None:
    """Qwen: the text keeps its columns of the three-channel ids; a plain text prompt's ids answer otherwise."""
    tiny, rng = all_tiny["qwen2_5_vl"], random.Random(1)
    inputs = tiny.batch([tiny.row(rng, images=images)])
    text, stays = without_image(inputs, tiny.model().config.image_token_id)
    ids = rope_ids(tiny, inputs)
    logits = tiny.run(inputs, "vtw@0")[1]
    torch.testing.assert_close(logits, text_only_logits(tiny, text, position_ids=ids[..., stays]), atol=1e-9, rtol=0)
    assert not torch.allclose(logits, text_only_logits(tiny, text), atol=1e-3)
