"""Samples for a search: an image and a question each, from a JSON or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


class CalibrationError(ValueError):
    """A search that cannot be made; the message says of what, and what is allowed."""


@dataclass(frozen=True)
class Sample:
    """One image with its question.

    Args:
        place: where it stands in which file, for messages.
        image: the image's file, which exists.
        question: without the placeholder of the image.
    """

    place: str
    image: Path
    question: str

    def picture(self) -> Image.Image:
        """The image, upright and in its own mode.

        Raises:
            CalibrationError: the file is no image, or a broken one.
        """
        try:
            return read_image(self.image)
        except OSError as error:
            raise CalibrationError(
                f"{self.place}: 'image' {self.image} cannot be read as an image: {error.strerror or error}."
            ) from error


def read_samples(file: Path, images: Path | None = None, limit: int | None = None) -> list[Sample]:
    """The samples of a file, in its order.

    Args:
        file: one JSON object a line, or one JSON list of objects.
        images: the folder to which the paths of images are relative; by default the file's own.
        limit: only so many, the first ones; what comes after them is not looked at.

    Raises:
        CalibrationError: what is wrong, in which file, at which line (or entry of a list) and key.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--data {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    folder = file.parent if images is None else images
    if not folder.is_dir():
        raise CalibrationError(f"--images {folder} is no folder.")
    entries = islice(_entries(file, text), limit)
    samples = [_sample(f"{file}, {place}", entry, folder) for place, entry in entries]
    if not samples:
        raise CalibrationError(f"--data {file} holds no sample; {_FORMS}.")
    return samples


def _entries(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Where each entry stands, and what it says."""
    if text.lstrip().startswith("["):
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{file}, line {error.lineno}: no JSON: {error.msg}; {_FORMS}.") from error
        for number, entry in enumerate(whole, 1):
            yield f"entry {number}", entry
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{file}, line {number}: no JSON: {error.msg}; {_FORMS}.") from error


def _sample(place: str, entry: Any, folder: Path) -> Sample:
    if not isinstance(entry, dict):
        raise CalibrationError(f"{place}: {json.dumps(entry)[:60]} is no JSON object; {_FORMS}.")
    asked = [key for key in ("question", "conversations") if key in entry]
    for key, there in (("image", "image" in entry), ("question' or 'conversations", bool(asked))):
        if not there:
            has = ", ".join(f"'{name}'" for name in entry) or "nothing"
            raise CalibrationError(f"{place}: '{key}' is missing, there is {has}; {_FORMS}.")
    if len(asked) > 1:
        raise CalibrationError(f"{place}: 'question' and 'conversations' both ask; give one of them.")
    name, question = entry["image"], entry.get("question")
    if not isinstance(name, str) or not name:
        raise CalibrationError(f"{place}: 'image' is {json.dumps(name)[:60]}; it must be a file's name.")
    if asked == ["conversations"]:
        question = _first_turn(place, entry["conversations"])
    elif not isinstance(question, str):
        raise CalibrationError(f"{place}: 'question' is {json.dumps(question)[:60]}; it must be a text.")
    assert isinstance(question, str)
    path = folder / name
    try:
        regular(path)
    except FileNotFoundError:
        message = f"{place}: 'image' {path} does not exist; --images FOLDER says where the images are."
        raise CalibrationError(message) from None
    except OSError as error:
        raise CalibrationError(f"{place}: 'image' {path} cannot be read as an image: {error.strerror}.") from error
    return Sample(place, path, question.strip())


def _first_turn(place: str, turns: Any) -> str:
    """The first thing that the human says, without the image's placeholder."""
    said = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    human = next((turn.get("value") for turn in said if turn.get("from") == "human"), None)
    if not isinstance(human, str):
        message = f'{place}: \'conversations\' has no turn {{"from": "human", "value": "…"}}; {_FORMS}.'
        raise CalibrationError(message)
    if human.count("<image>") > 1:
        raise CalibrationError(f"{place}: 'conversations' shows {human.count('<image>')} images; a sample has one.")
    return human.replace("<image>", "").strip()
