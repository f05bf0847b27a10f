"""Prompts and pixels: templates, texts that may be files, and LLaVA-1.5's own way with images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

from PIL import Image

from lmms_prune.harness.arguments import ArgumentError

# LLaVA-1.5's own evaluation prompt, for messages whose content is a list of parts; a system message replaces its
# first sentence.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: "
    "{% elif message['role'] == 'user' %}USER: {% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


_MOST_PADDED = 2**29  # pixels: 1.6 GB as they are, and several times that while the processor is at work


def text_or_file(name: str, value: str | None) -> str | None:
    """The text `value`, or what stands in the file that it names.

    Raises:
        ArgumentError: it looks like a file's name, and there is no such file.
    """
    # A template is longer than a file name may be; asking for such a file is an error of its own.
    if value is not None and isfile(value):  # unlike Path's own, it answers for what is too long for a name
        return Path(value).read_text(encoding="utf-8").strip()
    if value is not None and re.fullmatch(r"(~|\.{0,2}/)\S*|\S+\.(txt|jinja2?|j2)", value):
        raise ArgumentError(f"{name}={value}: there is no such file.")
    return value


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """`image` in the middle of a square of the mean colour (0 to 1), as LLaVA-1.5's own evaluation pads.

    Raises:
        ArgumentError: the square would not fit any memory: a line of 60,000 pixels makes one of 11 GB.
    """
    side = max(image.size)
    if side**2 > _MOST_PADDED:
        raise ArgumentError(
            f"image_aspect=pad: an image of {image.width} x {image.height} pixels would be padded to {side} x {side}, more "
            f"than {_MOST_PADDED:,} pixels; make it smaller, or use image_aspect=crop."
        )
    image = image.convert("RGB")
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def question_text(chat: Sequence[Mapping[str, Any]]) -> str:
    """What the user says in a chat, as text: what a method that reads the question is given."""
    parts = [part for message in chat if message["role"] == "user" for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text").strip()
