"""Merges the packs of several boards into one; boards with other documents are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.samples import UNREADABLE
from lmms_prune.record.files import write
from lmms_prune.record.packing import write_documents
from lmms_prune.record.packs import DOCUMENTS, Manifest, content, documents, manifest, members, packs_below
from lmms_prune.record.skeletons import document_fields

INDEX = "board.json"
"""The list of a merged board's rows: who packed which, and when."""


class MergeError(ValueError):
    """Boards that cannot be merged; the message names them."""


@dataclass(frozen=True)
class _Board:
    """One folder of packs."""

    folder: Path
    packs: tuple[tuple[Path, Manifest], ...]
    documents: Mapping[bytes, str]


def merged(folders: Sequence[Path], out: Path) -> list[Manifest]:
    """Copy the packs of boards into one folder, with their documents and a list of the rows; return the manifests.

    Every file of every pack is read, and checked against its SHA-256.

    Raises:
        MergeError: no pack in a folder, or boards with other documents.
        PackError: a pack, or a file of documents, that was cut or altered.
        OSError: a file cannot be read or written.
    """
    boards = [_board(folder) for path in folders for folder in _folders(path)]
    _refuse_other_documents(boards)
    rows: dict[str, tuple[Manifest, bytes]] = {}
    for board in boards:
        for path, stated in board.packs:
            data = path.read_bytes()
            if path.name in rows and rows[path.name][1] != data:
                raise MergeError(
                    f"{path}: another pack of this name is in one of the other boards; pack the row again."
                )
            rows[path.name] = (stated, data)
    for name, (_, data) in rows.items():
        write(out / name, data)
    write_documents(out, {name: text for board in boards for name, text in board.documents.items()})
    entries = [_entry(name, stated) for name, (stated, _) in sorted(rows.items())]
    write(out / INDEX, json.dumps({"rows": entries}, indent=1, ensure_ascii=False) + "\n")
    return [stated for stated, _ in rows.values()]


def _folders(path: Path) -> list[Path]:
    """Return the folders with packs below a path; raises MergeError if there is none."""
    if not path.exists():
        raise MergeError(f"{path}: no such file or folder.")
    packs = packs_below([path])
    if not packs:
        raise MergeError(f"{path}: no packs here or below; `lmms-prune pack RESULTS --out {path}` writes them.")
    return list(dict.fromkeys(pack.parent for pack in packs)) if path.is_dir() else [path]


def _board(path: Path) -> _Board:
    packs = packs_below([path])
    folder = path if path.is_dir() else path.parent
    for pack in packs:
        for member in members(pack):
            content(member)
    if problems := read_results([path]).problems:
        raise MergeError(str(problems[0]))
    known = documents(folder) if (folder / DOCUMENTS).exists() else {}
    return _Board(folder, tuple((pack, manifest(pack)) for pack in packs if pack.parent == folder), known)


def _refuse_other_documents(boards: Sequence[_Board]) -> None:
    """Refuse boards in which a document has another target, or other fields, or another question to the same prompt."""
    first: dict[tuple[str, int, str], tuple[Any, Path]] = {}
    for board in boards:
        for task, number, name, value in _documents(board):
            known, other = first.setdefault((task, number, name), (value, board.folder))
            if known != value:
                raise MergeError(
                    f"{board.folder} and {other} have other documents: document {number} of {task} has the "
                    f"{name.split()[0]} {_short(value)} in one and {_short(known)} in the other. Merge boards of the same "
                    "data only."
                )


def _documents(board: _Board) -> Iterator[tuple[str, int, str, Any]]:
    """Yield task, number, name and value of each field of the documents that the packs of a board hold."""
    for pack, stated in board.packs:
        for member in members(pack):
            task = next((name for name in stated.tasks if member.name.endswith(f"_samples_{name}.jsonl")), None)
            if task is None:
                continue
            for line in content(member).decode(errors="replace").splitlines():
                try:
                    logged = json.loads(line)
                    number, fields = int(logged["doc_id"]), document_fields(logged)
                except UNREADABLE as error:
                    raise MergeError(
                        f"{member}: no samples file of lmms-eval ({type(error).__name__}: {error})."
                    ) from error
                for name, value in fields.items():
                    # Questions are worded by model and settings.
                    shown = f"{name} ({stated.tasks[task]})" if name == "input" else name
                    yield task, number, shown, value


def _entry(name: str, stated: Manifest) -> dict[str, Any]:
    return {
        "pack": name,
        "submitter": stated.submitter,
        "packed": stated.packed,
        "model": stated.model,
        "schedule": stated.schedule,
        "seeds": list(stated.seeds),
        "tasks": list(stated.tasks),
        "files": {file.name: file.sha256 for file in stated.files},
    }


def _short(value: Any) -> str:
    text = str(value)
    return repr(text if len(text) <= 60 else f"{text[:59]}…")
