"""Reads the samples of a search, each an image with a question, from a JSON or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from lmms_prune.record.files import read_image, read_text, regular

_FORMS = (
    'an entry is {"image": "a.jpg", "question": "…"} or {"image": "a.jpg", "conversations": '
    '[{"from": "human", "value": "<image>\\n…"}, …]}'
)


class SearchError(ValueError):
    """A search cannot run; the message says why, and what is allowed."""


@dataclass(frozen=True)
class Sample:
    """One image with its question.

    Args:
        origin: file and line (or entry) of the sample, for messages.
        image: the image's file, which exists.
        question: the question without the image's placeholder.
        answers: the right answers; empty if the file has none.
    """

    origin: str
    image: Path
    question: str
    answers: tuple[str, ...] = ()

    def picture(self) -> Image.Image:
        """The image, rotated upright and in the file's mode.

        Raises:
            SearchError: the file is not an image, or a damaged one.
        """
        try:
            return read_image(self.image)
        except OSError as error:
            raise SearchError(
                f"{self.origin}: 'image' {self.image} cannot be read as an image: {error.strerror or error}."
            ) from error


def read_samples(file: Path, images: Path | None = None, limit: int | None = None) -> list[Sample]:
    """The samples of a file, in its order.

    Args:
        file: one JSON object per line, or one JSON list of objects.
        images: the folder that image paths are relative to; by default the file's folder.
        limit: only the first samples; later ones are not checked.

    Raises:
        SearchError: a mistake; the message names the file, the line (or the entry of a list) and the key.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SearchError(f"--data {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    folder = file.parent if images is None else images
    if not folder.is_dir():
        raise SearchError(f"--images {folder} is not a folder.")
    entries = islice(_entries(file, text), limit)
    samples = [_sample(f"{file}, {line}", entry, folder) for line, entry in entries]
    if not samples:
        raise SearchError(f"--data {file} holds no sample; {_FORMS}.")
    return samples


def _entries(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The line or number of each entry, and its content."""
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except json.JSONDecodeError as error:
            raise SearchError(f"{file}, line {error.lineno}: not JSON: {error.msg}; {_FORMS}.") from error
        for number, entry in enumerate(listed, 1):
            yield f"entry {number}", entry
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise SearchError(f"{file}, line {number}: not JSON: {error.msg}; {_FORMS}.") from error


def _sample(origin: str, entry: Any, folder: Path) -> Sample:
    """One entry as a sample, checked."""
    if not isinstance(entry, dict):
        raise SearchError(f"{origin}: {json.dumps(entry)[:60]} is not a JSON object; {_FORMS}.")
    asking = [key for key in ("question", "conversations") if key in entry]
    for key, present in (("image", "image" in entry), ("question' or 'conversations", bool(asking))):
        if not present:
            has = ", ".join(f"'{name}'" for name in entry) or "nothing"
            raise SearchError(f"{origin}: '{key}' is missing, there is {has}; {_FORMS}.")
    if len(asking) > 1:
        raise SearchError(f"{origin}: 'question' and 'conversations' are both given; give one of them.")
    name, question = entry["image"], entry.get("question")
    if not isinstance(name, str) or not name:
        raise SearchError(f"{origin}: 'image' is {json.dumps(name)[:60]}; it must be a file's name.")
    if asking == ["conversations"]:
        question = _first_turn(origin, entry["conversations"])
    elif not isinstance(question, str):
        raise SearchError(f"{origin}: 'question' is {json.dumps(question)[:60]}; it must be a text.")
    assert isinstance(question, str)
    path = folder / name
    try:
        regular(path)
    except FileNotFoundError:
        message = f"{origin}: 'image' {path} does not exist; --images FOLDER says where the images are."
        raise SearchError(message) from None
    except OSError as error:
        raise SearchError(f"{origin}: 'image' {path} cannot be read as an image: {error.strerror}.") from error
    return Sample(origin, path, question.strip(), _answers(origin, entry))


def _answers(origin: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The right answers of an entry: a text or several, as 'answers' or 'answer'; none without."""
    keys = [key for key in ("answers", "answer") if key in entry]
    if len(keys) > 1:
        raise SearchError(f"{origin}: 'answers' and 'answer' are both given; give one of them.")
    if not keys:
        return ()
    value = entry[keys[0]]
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        text = json.dumps(value, ensure_ascii=False)[:60]
        raise SearchError(
            f"{origin}: '{keys[0]}' is {text}; it must be a text, or a list of texts, none of them empty."
        )
    return tuple(answer.strip() for answer in answers)


def _first_turn(origin: str, turns: Any) -> str:
    """The first message of the human, without the image's placeholder."""
    messages = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    human = next((turn.get("value") for turn in messages if turn.get("from") == "human"), None)
    if not isinstance(human, str):
        message = f'{origin}: \'conversations\' has no turn {{"from": "human", "value": "…"}}; {_FORMS}.'
        raise SearchError(message)
    if human.count("<image>") > 1:
        raise SearchError(f"{origin}: 'conversations' shows {human.count('<image>')} images; a sample has one.")
    return human.replace("<image>", "").strip()
