"""Images behind changed answers, read again from the benchmark's data and reduced for the page."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_prune.leaderboard.flips import Flip
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.models import MODEL_NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

ROOM = 3_000_000  # base64 characters for all images
SIDE = 448  # largest length of the longer side, in pixels
QUALITY = 55  # WebP quality
# The mean colour of CLIP's processor, with which LLaVA-1.5's own evaluation pads.
_MEAN = (0.48145466, 0.4578275, 0.40821073)


class PicturesError(Exception):
    """The benchmark's documents cannot be read or differ; the message names them and a fix."""


@dataclass(frozen=True)
class Wanted:
    """The images of one document as one model sees them.

    Args:
        wrapper: lmms-eval's name of the model, on which prompts may depend.
        view: "crop" (to the central square), "pad" (to a square), or "whole".
        task, doc_id: the document.
        target: target of the evaluated document, to detect different data.
    """

    wrapper: str
    view: str
    task: str
    doc_id: int = -1
    target: str = ""

    @classmethod
    def of(cls, run: RunRecord, task: str) -> Wanted:
        """Describe the documents of one task of a run."""
        # The name comes from a file, which may be damaged.
        family = MODEL_NAMES.get(run.wrapper) if run.ours else None
        view = "whole" if family is None else family.view_of(run.settings)
        return cls(run.wrapper, view, task)

    def at(self, flip: Flip) -> Wanted:
        """Return the same for one document."""
        return replace(self, doc_id=flip.doc_id, target=flip.target)


@dataclass(frozen=True)
class Pictured:
    """Images and reference answers of one document, from the benchmark's data.

    Args:
        images: their indices on the page; None for an image that does not fit.
        reference: the right answers, most frequent first; None if the data have no list of them.
    """

    images: tuple[int | None, ...]
    reference: str | None

    def described(self) -> dict[str, Any]:
        """Return this in JSON types."""
        reference = {} if self.reference is None else {"reference": self.reference}
        return {"images": list(self.images), **reference}


def pictures(wanted: Sequence[Wanted], include: Path | None = None) -> tuple[list[str], dict[Wanted, Pictured]]:
    """Return images as ``data:`` URLs, those of the most often shown documents first, up to `ROOM`.

    Args:
        wanted: the shown documents, repeated once per showing.
        include: a folder of further task YAMLs, beside this package's own.

    Returns:
        the URLs, and images and references by document.

    Raises:
        PicturesError: the data cannot be read, or differ from the evaluated ones.
    """
    loaded = _read(dict.fromkeys(wanted).keys(), include)
    urls: list[str] = []
    pictured: dict[Wanted, Pictured] = {}
    room = ROOM
    for document, _ in Counter(wanted).most_common():
        images, reference = loaded[document]
        numbers: list[int | None] = []
        for image in images:
            url = f"data:image/webp;base64,{b64encode(image).decode('ascii')}"
            fits = len(url) <= room
            numbers.append(len(urls) if fits else None)
            if fits:
                urls.append(url)
                room -= len(url)
        pictured[document] = Pictured(tuple(numbers), reference)
    return urls, pictured


def _read(wanted: Collection[Wanted], include: Path | None) -> Mapping[Wanted, tuple[list[bytes], str | None]]:
    """Read the encoded images and the references of some documents."""
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.harness.documents import documents
    from lmms_prune.harness.tasks import task_configs

    # Grouped by model, task and number: creating the tasks of a model takes seconds, so it is done once.
    models: dict[str, dict[str, dict[int, list[Wanted]]]] = {}
    for request in wanted:
        models.setdefault(request.wrapper, {}).setdefault(request.task, {}).setdefault(request.doc_id, []).append(
            request
        )
    loaded: dict[Wanted, tuple[list[bytes], str | None]] = {}
    folders = [folder for folder in (task_configs(), include) if folder is not None]
    for wrapper, tasks in models.items():
        try:
            for document in documents(list(tasks), wrapper, include=folders, only=tasks):
                for request in tasks[document.task][document.number]:
                    if str(document.target) == request.target:
                        images = [_encoded(seen(image, request.view)) for image in document.images]
                        loaded[request] = images, _references(document.fields)
        except (OSError, ArgumentError) as error:
            raise PicturesError(f"--images: {error} Or leave --images out.") from error
    if missing := [request for request in wanted if request not in loaded]:
        raise PicturesError(_OTHER.format(task=missing[0].task, number=missing[0].doc_id, target=missing[0].target))
    return loaded


def _references(fields: Mapping[str, Any]) -> str | None:
    answers = fields.get("answers")
    if not isinstance(answers, list):
        return None
    return ", ".join(text for text, _ in Counter(str(answer) for answer in answers).most_common())


_OTHER = (
    "--images: document {number} of '{task}' is not the one that was evaluated (its target was '{target}'): the data here "
    "are others. Start the command where the evaluation ran, or leave --images out."
)


def seen(image: Image, view: str) -> Image:
    """Return an image as a model sees it: cropped as by LLaVA-1.5's processor, padded as by its evaluation, or whole.

    Transparent parts are white, but for "opaque": there they have the colour that lies below.
    """
    from lmms_prune.models.images import on_white, pad_to_square

    if view == "pad":
        return pad_to_square(image, _MEAN)
    if view == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side)).convert("RGB")
    return image.convert("RGB") if view == "opaque" else on_white(image)


def _encoded(image: Image) -> bytes:
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    stream = BytesIO()
    small.save(stream, "WEBP", quality=QUALITY, method=5)
    return stream.getvalue()
