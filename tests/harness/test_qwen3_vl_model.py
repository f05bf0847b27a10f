"""What lmms-eval's own Qwen3-VL does to images and prompts, and this package's therefore does too.

That all of it together is the stock model's is tests/harness/test_parity.py's; the benchmarks there lack what is here.
"""

from __future__ import annotations

from typing import Any

import pytest
import qwen_vl_utils
import torch
from tiny import noise

from lmms_prune.harness.arguments import ArgumentError

IMAGE = noise(3, 300, 210)
SIDE = 32  # pixels of a visual token


def _pixels(model: Any) -> tuple[torch.Tensor, list[int]]:
    inputs = model.inputs(IMAGE, "What is it?")
    return inputs["pixel_values"], inputs["image_grid_thw"][0].tolist()


def test_images_are_resized_once_to_whole_tokens_of_32_pixels(harness: Any) -> None:
    model = harness.create("qwen3_vl")
    resized = qwen_vl_utils.fetch_image({"image": IMAGE}, image_patch_size=16)
    assert resized.size == (288, 224)
    pixels, grid = _pixels(model)
    expected = model.processor.image_processor([resized], do_resize=False, return_tensors="pt")
    assert torch.equal(pixels, expected["pixel_values"])
    assert grid == expected["image_grid_thw"][0].tolist() == [1, 14, 18]


def test_the_patch_size_of_older_models_is_noticed(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """qwen-vl-utils takes patches of 14 pixels where it is told nothing; then no image has whole tokens."""
    original = qwen_vl_utils.process_vision_info
    monkeypatch.setattr(qwen_vl_utils, "process_vision_info", lambda chats, image_patch_size: original(chats))
    with pytest.raises((ArgumentError, RuntimeError, ValueError)):
        _pixels(harness.create("qwen3_vl"))


@pytest.mark.parametrize(
    ("bounds", "tokens"),
    [({}, 63), ({"max_pixels": 20 * SIDE**2}, 15), ({"min_pixels": 130 * SIDE**2}, 140)],
    ids=["default", "max_pixels", "min_pixels"],
)
def test_images_are_held_to_the_bounds(bounds: dict[str, int], tokens: int, harness: Any) -> None:
    pixels, (_, rows, columns) = _pixels(harness.create("qwen3_vl", **bounds))
    assert len(pixels) == rows * columns
    assert rows * columns == 4 * tokens


def test_the_default_bounds_are_those_that_the_stock_models_images_have(harness: Any) -> None:
    from qwen_vl_utils import vision_process

    arguments = harness.create("qwen3_vl").arguments
    bounds = (vision_process.IMAGE_MIN_TOKEN_NUM, vision_process.IMAGE_MAX_TOKEN_NUM)
    assert (arguments.min_pixels, arguments.max_pixels) == tuple(SIDE**2 * tokens for tokens in bounds)


@pytest.mark.parametrize(
    ("arguments", "start"),
    [({}, "You are a helpful assistant."), ({"system_prompt": "Be brief."}, "Be brief.")],
    ids=["default", "given"],
)
def test_the_system_prompt_is_the_stock_models_or_the_given_one(
    arguments: dict[str, str], start: str, harness: Any
) -> None:
    model = harness.create("qwen3_vl", **arguments)
    prompt = model.processor.tokenizer.decode(model.inputs(IMAGE, "What is it?")["input_ids"][0])
    assert prompt.startswith(f"<|im_start|>system\n{start}<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert prompt.endswith("<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("argument", ["prompt=vicuna", "image_aspect=pad"])
def test_arguments_of_llava_are_refused(argument: str, harness: Any) -> None:
    with pytest.raises(ArgumentError, match="for another model family"):
        harness.create("qwen3_vl", f"pretrained={harness.checkpoints['qwen3_vl']},{argument}")
