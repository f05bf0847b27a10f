"""Prompt and picture options: what the model is given, token for token."""

from __future__ import annotations

import pytest
from PIL import Image

from lmms_prune.models.images import ImageTooLongError, pad_to_square

QUESTION = "What is written\non the sign?"
TEMPLATE = "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}[{{ part['text'] }}]{% endif %}{% endfor %}{% endfor %}Answer, please:"


def _chat(image: Image.Image | None = None, text: str = QUESTION) -> list[dict]:
    picture = [{"type": "image", "image": image}] if image else []
    return [{"role": "user", "content": [*picture, {"type": "text", "text": text}]}]


def _image(size: tuple[int, int] = (112, 112)) -> Image.Image:
    return Image.new("RGB", size, "green")


def _prompt(model, chat: list[dict]) -> str:
    """The prompt as the tokens say it, with one <image> for each image's tokens."""
    # _messages takes the harness's form, in which an image's content is called "url".
    given = [
        {**m, "content": [{"url" if k == "image" else k: v for k, v in p.items()} for p in m["content"]]} for m in chat
    ]
    ids = model._inputs([model.chat(given)])["input_ids"][0].tolist()
    text = model.processor.tokenizer.decode(ids)
    return text.replace("<image>" * 64, "<image>").removeprefix("<s>")


def test_vicuna_is_llavas_own_evaluation_prompt(harness):
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. "
    )
    model = harness.create("llava", prompt="vicuna")
    assert _prompt(model, _chat(_image())) == f"{system}USER: <image>\n{QUESTION} ASSISTANT:"
    assert _prompt(model, _chat()) == f"{system}USER: {QUESTION} ASSISTANT:"
    assert _prompt(harness.create("llava"), _chat(_image())) == f"USER: <image>\n{QUESTION} ASSISTANT:"


def test_a_system_prompt_replaces_llavas_sentence(harness):
    model = harness.create("llava", prompt="vicuna", system_prompt="Be brief.")
    assert _prompt(model, _chat(_image())) == f"Be brief. USER: <image>\n{QUESTION} ASSISTANT:"


def test_vicuna_runs_and_changes_the_prompt_only(harness):
    plain, vicuna = (harness.pruned("llava", ["pope"], prompt=prompt) for prompt in ("hf", "vicuna"))
    pairs = zip(plain.accounting["pope"], vicuna.accounting["pope"], strict=True)
    longer = [other["input_tokens"] - one["input_tokens"] for one, other in pairs]
    assert len(set(longer)) == 1
    assert longer[0] > 10
    for one, two in zip(plain.calls, vicuna.calls, strict=True):
        assert one["pixel_values"].equal(two["pixel_values"])
    assert vicuna.recorded["settings"]["prompt"] == "vicuna"


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (150, 149)])
def test_padding_keeps_the_edges_that_a_crop_loses(size, harness):
    image = Image.new("RGB", size, "white")
    edge = (0, 0, size[0] // 10, size[1]) if size[0] > size[1] else (0, 0, size[0], size[1] // 10)
    marked = image.copy()
    marked.paste("black", edge)

    def differs(aspect: str) -> bool:
        model = harness.create("llava", image_aspect=aspect)
        one, two = (model._inputs([_chat(picture)])["pixel_values"] for picture in (image, marked))
        assert one.shape == (1, 3, 112, 112)
        return not one.equal(two)

    assert differs("pad")
    # A tenth of the long side lies outside the square in the middle only if the picture is long enough.
    assert differs("crop") == (max(size) < 1.2 * min(size))


def test_a_line_that_no_memory_holds_as_a_square_is_refused() -> None:
    message = (
        r"image_aspect=pad: an image of 1 x 60000 pixels would be padded to 60000 x 60000, .* use image_aspect=crop"
    )
    with pytest.raises(ImageTooLongError, match=message):
        pad_to_square(Image.new("RGB", (1, 60000)), [0.0, 0.0, 0.0])


def test_padding_is_centred_and_of_the_mean_colour(harness):
    model = harness.create("llava", image_aspect="pad")
    pixels = model._inputs([_chat(Image.new("RGB", (112, 56), "white"))])["pixel_values"][0]
    # Normalised, the mean colour is zero; white is the largest value.
    assert pixels[:, :27].abs().max() < 0.02
    assert pixels[:, -27:].abs().max() < 0.02
    assert pixels[:, 29:83].min() > 1.5
    square = _image()
    crop = harness.create("llava")
    assert model._inputs([_chat(square)])["pixel_values"].equal(crop._inputs([_chat(square)])["pixel_values"])


@pytest.mark.parametrize("as_file", [False, True], ids=["text", "file"])
def test_system_prompt(as_file, harness, tmp_path):
    text = "Be brief, please."
    value = text
    if as_file:
        value = str(tmp_path / "system.txt")
        (tmp_path / "system.txt").write_text(text + "\n", "utf-8")
    prompt = _prompt(harness.create("qwen2_5_vl", system_prompt=value), _chat())
    assert prompt == (
        f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text in _prompt(harness.create("llava", system_prompt=value), _chat(_image()))


@pytest.mark.parametrize("as_file", [False, True], ids=["text", "file"])
def test_chat_template(as_file, harness, tmp_path):
    value = TEMPLATE
    if as_file:
        value = str(tmp_path / "template.jinja")
        (tmp_path / "template.jinja").write_text(TEMPLATE + "\n", "utf-8")
    model = harness.create("llava", chat_template=value)
    assert _prompt(model, _chat(_image())) == f"<image>[{QUESTION}]Answer, please:"
    assert _prompt(model, _chat()) == f"[{QUESTION}]Answer, please:"


def test_texts_with_commas_come_through_the_argument_text(harness):
    path = harness.checkpoints["qwen2_5_vl"]
    model = harness.create(
        "qwen2_5_vl", f'pretrained={path},system_prompt="Be brief, please; answer=yes, or no.",schedule=vtw@3,seed=2'
    )
    assert model.arguments.system_prompt == "Be brief, please; answer=yes, or no."
    assert (str(model.arguments.schedule), model.arguments.seed) == ("vtw@3", 2)


def test_pixel_bounds_decide_the_tokens(harness):
    def tokens(**bounds) -> int:
        model = harness.create("qwen2_5_vl", **bounds)
        return int((model._inputs([_chat(_image((280, 280)))])["input_ids"] == model.model.config.image_token_id).sum())

    assert tokens() == 256
    assert tokens(min_pixels=28 * 28) == 100
    assert tokens(min_pixels=28 * 28, max_pixels=49 * 28 * 28) == 49
