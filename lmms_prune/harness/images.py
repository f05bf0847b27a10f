"""Detection of truncated images, which lmms-eval lets Pillow fill with grey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import ImageFile
from PIL.Image import Image


def read_whole(read: Callable[[], list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], bool]:
    """Return a chat, and whether one of its images was truncated and filled up.

    Args:
        read: builds the chat, and decodes its images if the dataset does.
    """
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        return _loaded(read()), False
    except OSError:
        if not tolerant:
            raise
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    # Tolerantly this time, as for every other model of lmms-eval.
    return _loaded(read()), True


def _loaded(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for message in chat:
        for part in message["content"]:
            if isinstance(part.get("image"), Image):
                part["image"].load()
    return chat
