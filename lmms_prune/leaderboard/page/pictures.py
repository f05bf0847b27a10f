"""The images behind changed answers: read again from the benchmark's data, small enough for a page."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

from lmms_prune.leaderboard.flips import Flip
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.models import MODEL_NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

ROOM = 3_000_000  # letters of base64 for all images
SIDE = 448  # pixels of the longer side
QUALITY = 55  # of WebP
# The mean colour of CLIP's processor, with which the padded evaluation fills.
_MEAN = (0.48145466, 0.4578275, 0.40821073)


class PicturesError(Exception):
    """The benchmark's documents cannot be read, or are others; the message says which and what helps."""


@dataclass(frozen=True)
class Wanted:
    """The images of one document as one model sees them.

    Args:
        wrapper: lmms-eval's name of the model, on which prompts may depend.
        view: "crop" to a square in the middle, "pad" to a square, or "whole".
        task, doc_id: where they stand.
        target: that of the evaluated document, to tell other data from it.
    """

    wrapper: str
    view: str
    task: str
    doc_id: int = -1
    target: str = ""

    @classmethod
    def of(cls, run: RunRecord, task: str) -> Wanted:
        """For the documents of one task of a run."""
        view = MODEL_NAMES[run.wrapper].view_of(run.settings) if run.ours else "whole"
        return cls(run.wrapper, view, task)

    def at(self, flip: Flip) -> Wanted:
        """For one document."""
        return replace(self, doc_id=flip.doc_id, target=flip.target)


@dataclass(frozen=True)
class Pictured:
    """What the data say of one document.

    Args:
        images: their numbers on the page; None for one that there is no room for.
        reference: the right answers, where the data have a list of them; the most frequent first.
    """

    images: tuple[int | None, ...]
    reference: str | None

    def described(self) -> dict[str, Any]:
        """In JSON's types."""
        more = {} if self.reference is None else {"reference": self.reference}
        return {"images": list(self.images), **more}


def pictures(wanted: Sequence[Wanted]) -> tuple[list[str], dict[Wanted, Pictured]]:
    """Images as ``data:`` URLs, those of the documents that are wanted most often first, until the room is used up.

    Args:
        wanted: once for every time that a document is shown.

    Returns:
        the images, and what else is known of each document.

    Raises:
        PicturesError: the data cannot be read, or are not those that were evaluated.
    """
    read = _read(dict.fromkeys(wanted).keys())
    urls: list[str] = []
    found: dict[Wanted, Pictured] = {}
    room = ROOM
    for one, _ in Counter(wanted).most_common():
        images, reference = read[one]
        numbers: list[int | None] = []
        for image in images:
            url = f"data:image/webp;base64,{b64encode(image).decode('ascii')}"
            fits = len(url) <= room
            numbers.append(len(urls) if fits else None)
            if fits:
                urls.append(url)
                room -= len(url)
        found[one] = Pictured(tuple(numbers), reference)
    return urls, found


def _read(wanted: Collection[Wanted]) -> Mapping[Wanted, tuple[list[bytes], str | None]]:
    """The encoded images and the references of some documents."""
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.harness.documents import documents
    from lmms_prune.harness.tasks import task_configs

    # By model, task and number; making the tasks of a model takes seconds, and is done once.
    models: dict[str, dict[str, dict[int, list[Wanted]]]] = {}
    for one in wanted:
        models.setdefault(one.wrapper, {}).setdefault(one.task, {}).setdefault(one.doc_id, []).append(one)
    found: dict[Wanted, tuple[list[bytes], str | None]] = {}
    for wrapper, tasks in models.items():
        try:
            for document in documents(list(tasks), wrapper, include=task_configs(), only=tasks):
                for one in tasks[document.task][document.number]:
                    if str(document.target) == one.target:
                        images = [_encoded(seen(image, one.view)) for image in document.images]
                        found[one] = images, _references(document.fields)
        except (OSError, ArgumentError) as error:
            raise PicturesError(f"--images: {error} Or leave --images out.") from error
    if absent := [one for one in wanted if one not in found]:
        raise PicturesError(_OTHER.format(task=absent[0].task, number=absent[0].doc_id, target=absent[0].target))
    return found


def _references(fields: Mapping[str, Any]) -> str | None:
    answers = fields.get("answers")
    if not isinstance(answers, list):
        return None
    return ", ".join(text for text, _ in Counter(str(one) for one in answers).most_common())


_OTHER = (
    "--images: document {number} of '{task}' is not the one that was evaluated (its target was '{target}'): the data here "
    "are others. Start the command where the evaluation ran, or leave --images out."
)


def seen(image: Image, view: str) -> Image:
    """What a model sees of an image, as LLaVA-1.5's processor cuts it, its own evaluation pads it, or whole."""
    from lmms_prune.models.images import on_white, pad_to_square

    if view == "pad":
        return pad_to_square(image, _MEAN)
    if view == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side)).convert("RGB")
    return on_white(image)


def _encoded(image: Image) -> bytes:
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    stream = BytesIO()
    small.save(stream, "WEBP", quality=QUALITY, method=5)
    return stream.getvalue()
