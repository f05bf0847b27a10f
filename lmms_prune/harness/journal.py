"""Finished answers on disk, batch by batch, so that an interrupted run can continue.

A journal is a folder with one folder per run, named by a digest of all that the run's answers depend on; its ``run.json``
spells that out. Each process appends to its own file there, one line per batch: a digest of the line's JSON, and the JSON.
A truncated line does not match its digest, and its batch is answered again.
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
    """A batch that could not be written; the message says why, and what is still stored."""


class Journal:
    """The stored answers of one run, to which new ones are appended.

    Args:
        folder: the folder of journals, of this and of other runs.
        run: all that the answers depend on besides their documents.
        secrets: values that no file may contain. An answer that contains one is not stored, and will be answered again.

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
        """Return a sample's answer that was stored when the journal was opened; None if there was none."""
        return self._finished.get(key)

    def add(self, answers: Mapping[str, AnsweredSample]) -> None:
        """Append one batch of answers by sample key; on return it is on the disk.

        Raises:
            JournalError: it could not be written.
        """
        clean = {key: answer for key, answer in answers.items() if redacted(answer.text, self._secrets) == answer.text}
        if not clean:
            return
        batch = [{"key": key, **answer.to_dict()} for key, answer in clean.items()]
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
                "when that is fixed, start the same run again."
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
    """Create the folder of journals.

    Raises:
        ArgumentError: it cannot be created or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"model_args: journal={folder} cannot be made: {error.strerror}; name a folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArgumentError(f"model_args: journal={folder} cannot be written to; name a folder of your own.")


def repeats(requests: Sequence[Instance]) -> list[int]:
    """Count, for each request, the equal requests before it; lmms-eval may ask the same several times."""
    seen: Counter[tuple[Any, ...]] = Counter()
    counts = []
    for request in requests:
        text, _, options, document, task, split = request.args
        asked = (text, repr(sorted(options.items())), document, task, split)
        counts.append(seen[asked])
        seen[asked] += 1
    return counts


def sample_key(sample: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], repeat: int) -> str:
    """Return a digest of all that a sample's answer depends on besides the run: its document as shown, and the options.

    Args:
        sample: the sample id (task/split/number), which seeds its random draws.
        messages: the chat, images included.
        options: the task's generation options.
        repeat: number of equal requests before this one.
    """
    identity = [sample, messages, repr(sorted(options.items(), key=lambda item: item[0])), repeat]
    return blake2b(json.dumps(identity, sort_keys=True, default=_pixels).encode(), digest_size=16).hexdigest()


def _pixels(image: Any) -> list[Any]:
    if not isinstance(image, Image):
        raise TypeError(f"{type(image).__name__} is no image")
    return [image.mode, image.size, image.getpalette(), blake2b(image.tobytes(), digest_size=16).hexdigest()]


_MARK = 33  # characters of the digest and a space


def _line(text: bytes) -> bytes:
    return blake2b(text, digest_size=16).hexdigest().encode() + b" " + text + b"\n"


def _sync(folder: Path) -> None:
    """Write a folder to the disk; only then is a new file's name in it stored, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
