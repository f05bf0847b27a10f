"""Finished answers on disk, batch by batch, so that an interrupted run goes on where it was.

A journal is a folder with one folder for each run, named by a digest of all that the run's answers depend on, which its
``run.json`` spells out. There, each process has a file of its own, to which it appends a line for each batch: a digest of the
line's JSON, and the JSON. Whatever was cut short does not match its digest, and is answered again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

from lmms_eval.api.instance import Instance
from loguru import logger
from PIL.Image import Image

from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.harness.fingerprint import digest
from lmms_prune.harness.records import AnsweredSample
from lmms_prune.record.files import regular, write
from lmms_prune.record.redaction import redacted, redacted_values


class JournalError(RuntimeError):
    """A batch that could not be written down; the message says why, and what stands."""


class Journal:
    """The finished answers of one run, and where new ones are added.

    Args:
        folder: of journals, of this and of other runs.
        run: all that the answers depend on beside their documents.
        secrets: values that no file may hold. An answer that holds one is not kept, and is answered again.

    Raises:
        ArgumentError: the folder cannot be used.
    """

    def __init__(self, folder: str, run: Mapping[str, str], secrets: Collection[str]) -> None:
        self._secrets = secrets
        self._folder = Path(folder) / digest(run)
        self._file = self._folder / f"{uuid4().hex}.jsonl"
        self._finished: dict[str, AnsweredSample] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            clean = json.dumps(redacted_values(run, secrets), indent=1)
            write(self._folder / "run.json", clean)
        except OSError as error:
            raise ArgumentError(f"model_args: journal={folder} cannot be written to: {error.strerror}.") from error
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                self._read(regular(path))
            except OSError as error:
                raise ArgumentError(f"model_args: journal={folder}: {path}: {error.strerror}.") from error
        if self._finished:
            logger.info("journal={}: {} samples of this run are answered already.", folder, len(self._finished))

    def finished(self, key: str) -> AnsweredSample | None:
        """What was there for a sample when the journal was opened."""
        return self._finished.get(key)

    def add(self, answers: Mapping[str, AnsweredSample]) -> None:
        """Append one batch, by the samples' keys; when this returns, it is on the disk.

        Raises:
            JournalError: it could not be written.
        """
        kept = {key: one for key, one in answers.items() if redacted(one.text, self._secrets) == one.text}
        if not kept:
            return
        batch = [{"key": key, **answer.to_dict()} for key, answer in kept.items()]
        text = json.dumps(batch).encode()
        try:
            new = not self._file.exists()
            with open(self._file, "ab") as stream:
                stream.write(_line(text))
                stream.flush()
                os.fsync(stream.fileno())
            if new:
                _sync(self._folder)
        except OSError as error:
            raise JournalError(
                f"journal: {self._file} cannot be written: {error.strerror}. The batches before this one are kept there: "
                "when that is mended, start the same run again."
            ) from error

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines(keepends=True):
            text = line[_MARK:].rstrip(b"\n")
            if line != _line(text):
                logger.warning("journal: a batch in {} was cut short; it is answered again.", path)
                continue
            for entry in json.loads(text):
                self._finished[entry["key"]] = AnsweredSample.read(entry)


def check_folder(folder: str) -> None:
    """Make the folder of journals.

    Raises:
        ArgumentError: it can be no such folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"model_args: journal={folder} cannot be made: {error.strerror}; name a folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArgumentError(f"model_args: journal={folder} cannot be written to; name a folder of your own.")


def repeats(requests: Sequence[Instance]) -> list[int]:
    """For each request, how many before it ask the same: the harness may ask several times."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = []
    for request in requests:
        text, _, given, document, task, split = request.args
        asked = (text, repr(sorted(given.items())), document, task, split)
        found.append(seen[asked])
        seen[asked] += 1
    return found


def sample_key(sample: str, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any], repeat: int) -> str:
    """What a sample's answer depends on beside the run, as a digest: its document as it is shown, and the options.

    Args:
        sample: task/split/number, which seeds its random draws.
        messages: the chat with its images.
        given: the task's generation options.
        repeat: how often the same was asked before.
    """
    said = [sample, messages, repr(sorted(given.items(), key=lambda item: item[0])), repeat]
    return blake2b(json.dumps(said, sort_keys=True, default=_pixels).encode(), digest_size=16).hexdigest()


def _pixels(image: Any) -> list[Any]:
    if not isinstance(image, Image):
        raise TypeError(f"{type(image).__name__} is no image")
    return [image.mode, image.size, image.getpalette(), blake2b(image.tobytes(), digest_size=16).hexdigest()]


_MARK = 33  # digest and a space


def _line(text: bytes) -> bytes:
    return blake2b(text, digest_size=16).hexdigest().encode() + b" " + text + b"\n"


def _sync(folder: Path) -> None:
    """A new file's name is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
