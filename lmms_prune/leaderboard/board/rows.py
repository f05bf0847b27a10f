"""Packs the rows of result folders, one file a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from lmms_prune import __version__
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.record.packing import write_documents, write_pack
from lmms_prune.record.packs import SUFFIX, Manifest
from lmms_prune.record.redaction import redacted
from lmms_prune.record.stored import opened


def packed_rows(
    records: Sequence[RunRecord],
    folder: Path,
    submitter: str,
    day: str,
    secrets: Sequence[str] = (),
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Path]:
    """Write each row as a pack into a board's folder, and their documents beside them; yields the packs.

    Args:
        records: the runs; those that differ only in seed are one row.
        folder: of the board.
        submitter, day: who packs, and when (YYYY-MM-DD).
        secrets: values that no pack may contain.
        counted: called with the number of rows that were packed, and of all.

    Raises:
        PackError: the board's file of documents was cut or altered.
        OSError: a file cannot be read or written.
    """
    rows: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        if record.tasks:
            rows.setdefault(record.key(("seed",)), []).append(record)
    skeletons: dict[bytes, str] = {}
    packs: list[Path] = []
    for runs in rows.values():
        files = dict(_files(runs, secrets))
        manifest = Manifest(
            submitter=submitter,
            packed=day,
            version=__version__,
            model=runs[0].model,
            schedule=runs[0].schedule or runs[0].wrapper,
            seeds=tuple(sorted({run.seed for run in runs})),
            tasks={name: f"{run.wrapper} {task.asked}" for run in runs for name, task in run.tasks.items()},
        )
        path = folder / _name(manifest, files)
        skeletons |= write_pack(path, manifest, files)
        packs.append(path)
        counted(len(packs), len(rows))
    write_documents(folder, skeletons)
    yield from packs


def _files(runs: Sequence[RunRecord], secrets: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the results and samples files of a row; each results file has a folder of its own, as names may repeat."""
    sources = {source.path: source for run in runs for source in run.sources}
    for number, path in enumerate(sources):
        with opened(path) as (stream, _):
            yield f"{number}/{path.name}", redacted(stream.read().decode(errors="replace"), secrets).encode()
        for run in runs:
            for task in run.tasks.values():
                if task.source.path == path and task.samples is not None:
                    with opened(task.samples) as (stream, _):
                        yield f"{number}/{task.samples.name}", stream.read()


def _name(manifest: Manifest, files: dict[str, bytes]) -> str:
    """Return a name that tells what the row is; equal rows of two groups have two names."""
    digest = sha256(f"{manifest.submitter}\0{manifest.packed}\0{manifest.model}".encode())
    for name, data in files.items():
        digest.update(name.encode() + sha256(data).digest())
    words = f"{manifest.model.rstrip('/').rsplit('/', 1)[-1]}-{manifest.schedule}"
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:80].strip('-')}-{digest.hexdigest()[:8]}{SUFFIX}"
