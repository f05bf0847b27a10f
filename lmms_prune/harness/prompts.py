"""Prompt templates, texts that may be files, and the question of a chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

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


def text_or_file(name: str, value: str | None) -> str | None:
    """Return the text `value`, or the content of the file that it names.

    Raises:
        ArgumentError: `value` looks like a file name, but there is no such file.
    """
    # `os.path.isfile` returns False for a template's text, which is too long for a file name; Path.is_file would raise.
    if value is not None and isfile(value):
        return Path(value).read_text(encoding="utf-8").strip()
    if value is not None and re.fullmatch(r"(~|\.{0,2}/)\S*|\S+\.(txt|jinja2?|j2)", value):
        raise ArgumentError(f"{name}={value}: there is no such file.")
    return value


def question_text(chat: Sequence[Mapping[str, Any]]) -> str:
    """Return the user's text in a chat, for methods that read the question."""
    parts = [part for message in chat if message["role"] == "user" for part in message["content"]]
    return "\n".join(part["text"] for part in parts if part["type"] == "text").strip()
