"""What lmms-eval's own Qwen2-VL does to images, prompts and answers, and this package's therefore does too.

That all of it together is the stock model's is tests/harness/test_parity.py's; the benchmarks there lack what is here.
"""

from __future__ import annotations

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.media_encoder import encode_image_to_data_url
from PIL import Image
from tiny import noise

from lmms_prune import Schedule
from lmms_prune.harness.generation import clean, stop_texts
from lmms_prune.information.show import compare
from lmms_prune.models.images import ImageTooLongError, as_jpeg

SMALL, FADED = noise(3, 84, 140), noise(4, 112, 84).convert("RGBA")
FADED.putalpha(100)


def _pixels(model, image, question="What is it?") -> tuple[torch.Tensor, str]:
    inputs = model.inputs(image, question)
    return inputs["pixel_values"], model.processor.tokenizer.decode(inputs["input_ids"][0])


@pytest.mark.parametrize("image", [SMALL, FADED, SMALL.convert("L"), SMALL.convert("P")], ids=lambda image: image.mode)
def test_images_are_the_jpegs_of_the_stock_model(image, harness) -> None:
    from qwen_vl_utils import fetch_image

    url = encode_image_to_data_url(image, image_format="JPEG", mime_type="image/jpeg", convert_rgb=True, quality=85)
    model = harness.create("qwen2_vl")
    stock = fetch_image({"image": url, "min_pixels": 3136, "max_pixels": 602112})
    plain = fetch_image({"image": image, "min_pixels": 3136, "max_pixels": 602112})
    pixels, prompt = _pixels(model, image)
    expected, other = (
        model.processor(text=[prompt_of(model)], images=[picture], return_tensors="pt")["pixel_values"]
        for picture in (stock, plain)
    )
    assert torch.equal(pixels, expected)
    assert not torch.equal(pixels, other)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")


def prompt_of(model) -> str:
    return model._prompts(
        [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]]
    )[0]


def test_an_image_that_no_jpeg_can_be_is_refused() -> None:
    with pytest.raises(ImageTooLongError, match="70000 x 1 pixels cannot be a JPEG"):
        as_jpeg(Image.new("RGB", (70_000, 1)), 85)


def test_pixel_bounds_hold_for_both_resizes(harness) -> None:
    image = noise(5, 560, 560)
    for bounds, tokens in (({}, 400), ({"max_pixels": 49 * 784}, 49), ({"min_pixels": 625 * 784}, 625)):
        pixels, _ = _pixels(harness.create("qwen2_vl", **bounds), image)
        assert len(pixels) == 4 * tokens


def test_placeholders_in_the_question_are_left_out(harness) -> None:
    model = harness.create("qwen2_vl")
    assert _pixels(model, SMALL, "<image>What<image> is it?")[1] == _pixels(model, SMALL)[1]


def test_the_system_prompt_may_be_another(harness) -> None:
    prompt = _pixels(harness.create("qwen2_vl", system_prompt="Be brief."), SMALL)[1]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_a_blank_line_ends_an_answer_where_the_harness_says_so() -> None:
    filled_in = {"until": ["\n\n"]}
    assert (stop_texts(filled_in), stop_texts(filled_in, blank_line=True)) == ([], ["\n\n"])
    assert stop_texts({"until": "END"}, blank_line=True) == ["END"]
    text = " \n yes\n\nno END"
    assert clean(text, ["\n\n"], strip=True) == "yes"
    assert clean(text, ["END", "\n\n"], strip=True) == "yes"
    assert clean("\n\nno", ["\n\n"], strip=True) == ""
    assert clean(text, []) == text


@pytest.mark.parametrize(("family", "answer"), [("qwen2_5_vl", " yes\n\nno"), ("qwen2_vl", "yes")])
def test_answers_end_as_the_stock_models(family, answer, harness, monkeypatch) -> None:
    model = harness.create(family)
    model.task_dict["made"] = {"test": [None]}
    monkeypatch.setattr(type(model), "decode", lambda self, ids: " yes\n\nno")
    chat = [{"role": "user", "content": [{"type": "image", "url": SMALL}, {"type": "text", "text": "?"}]}]
    arguments = ("?", lambda _: chat, {"until": ["\n\n"], "max_new_tokens": 2}, 0, "made", "test")
    metadata = {"task": "made", "doc_id": 0, "repeats": 1}
    request = Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)
    assert [result.text for result in model.generate_until([request])] == [answer]
    shown = compare(model, [SMALL], "?", Schedule.parse("stride@2:0.5"), 2)
    assert (shown.answer, shown.unpruned) == (answer, answer)
