"""What the task two_documents draws and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmms_prune.certificate.libraries import print_checks


def examined(documents: Any) -> Any:
    """The documents, after a look at the libraries of this very process of lmms-eval."""
    print_checks()
    return documents


def picture(doc: Mapping[str, Any]) -> list[Image.Image]:
    """A square of the document's colour on white."""
    image = Image.new("RGB", (168, 168), "white")
    image.paste(doc["colour"], (42, 42, 126, 126))
    return [image]


def answered(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer has a letter; the right one is not asked for."""
    return {"answered": float(any(letter.isalpha() for letter in results[0]))}
