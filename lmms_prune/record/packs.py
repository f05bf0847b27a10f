"""Packs: one row of a leaderboard as one Parquet file, read as the results and samples files that it was made of.

A pack holds each file byte for byte, in columns: answers, metrics, token accounting and token bitmaps. What the rows of a
board have in common, the documents, is one file beside the packs. The manifest has the SHA-256 of every file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from lmms_prune.record.files import FileError, regular
from lmms_prune.record.skeletons import COUNTS, digest, dumped, joined

SUFFIX = ".pack.parquet"
DOCUMENTS = "documents.parquet"
"""The documents of all packs in its folder."""
FORMAT = 1
MANIFEST, CHECKSUM = b"lmms-prune", b"lmms-prune sha256"
"""Keys of the file's metadata: the manifest as JSON, and its SHA-256."""
INTEGERS = ("input_tokens", "output_tokens", "visual_tokens")
REAL = "avg_visual_tokens"
MORE_INTEGERS = ("text_tokens",)
LISTS = ("kept_visual_tokens", "recycled_visual_tokens", "layer_visual_tokens")
GRIDS, BITMAPS = "visual_grids", "token_bitmaps"
LAST = ("kv_bytes", "layer_kv_bytes", "encoder_flops", "selection_flops", "prefill_flops", "decode_flops")
FIELDS = (*INTEGERS, REAL, *MORE_INTEGERS, *LISTS, GRIDS, BITMAPS, *LAST)
"""Fields of a sample's token accounting, in the order in which a samples file has them: each is a column."""


class PackError(FileError):
    """A pack, or a file of documents, that cannot be used; the message names it."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}."


@dataclass(frozen=True)
class PackedFile:
    """One file in a pack.

    Args:
        name: its name; unique in the pack.
        sha256: of its bytes.
        size: in bytes.
        groups: number of the first row group that holds it, and of the first that does not.
    """

    name: str
    sha256: str
    size: int
    groups: tuple[int, int]


@dataclass(frozen=True)
class Manifest:
    """What a pack says about itself.

    Args:
        submitter: who packed it.
        packed: the day on which, as YYYY-MM-DD.
        version: of this package.
        model, schedule, seeds: of the row.
        tasks: of each task, a digest of how it asks: documents of equal digests have equal questions.
        files: the files in it.
        format: version of the format.
    """

    submitter: str
    packed: str
    version: str
    model: str
    schedule: str
    seeds: tuple[int, ...]
    tasks: Mapping[str, str]
    files: tuple[PackedFile, ...] = field(default=())
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the manifest as stored in a pack."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @classmethod
    def of_json(cls, content: bytes) -> Manifest:
        """Read what `to_json` wrote; raises LookupError, TypeError or ValueError for other content."""
        read = json.loads(content)
        files = tuple(PackedFile(**{**entry, "groups": tuple(entry["groups"])}) for entry in read.pop("files"))
        return cls(**{**read, "seeds": tuple(read["seeds"])}, files=files)


def pack_of(path: Path) -> Path | None:
    """Return the pack that a path leads into; None for a path of the file system."""
    return next((parent for parent in path.parents if parent.name.endswith(SUFFIX) and parent.is_file()), None)


def manifest(pack: Path) -> Manifest:
    """Return the manifest of a pack.

    Raises:
        PackError: no pack, or one that was cut, altered, or written by a later version.
        OSError: it cannot be read.
    """
    status = regular(pack).stat()
    return _opened(pack, status.st_mtime_ns, status.st_size)[1]


@lru_cache(maxsize=64)
def _opened(pack: Path, changed: int, size: int) -> tuple[Any, Manifest]:
    """Return the metadata of a pack, and its manifest; the file's state is the cache's key."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(pack)
        stored = metadata.metadata or {}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PackError(pack, f"no whole pack, it was cut or altered ({_short(error)})") from error
    if MANIFEST not in stored:
        raise PackError(pack, "a Parquet file without the manifest of a pack")
    if stored.get(CHECKSUM) != sha256(stored[MANIFEST]).hexdigest().encode():
        raise PackError(pack, "altered: its manifest has another SHA-256 than is stored with it")
    try:
        read = Manifest.of_json(stored[MANIFEST])
    except (LookupError, TypeError, ValueError) as error:
        raise PackError(pack, f"its manifest cannot be read ({_short(error)})") from error
    if read.format > FORMAT:
        raise PackError(pack, f"of format {read.format}; this version reads up to {FORMAT}. Update lmms-prune")
    return metadata, read


def members(pack: Path) -> list[Path]:
    """Return paths of the files in a pack, which `content` reads; raises as `manifest`."""
    return [pack / file.name for file in manifest(pack).files]


@lru_cache(maxsize=8)
def _content(member: Path, pack: Path, changed: int, size: int) -> bytes:
    entry = _entry(member, pack)
    data = b"".join(_parts(pack, entry))
    if sha256(data).hexdigest() != entry.sha256:
        raise PackError(pack, f"altered: {entry.name} has another SHA-256 than its manifest states")
    return data


def content(member: Path) -> bytes:
    """Return the bytes of a file in a pack, checked against its SHA-256.

    Raises:
        PackError: the pack was cut or altered, or the documents beside it are not its own.
        OSError: there is no such file.
    """
    pack = pack_of(member)
    if pack is None:
        raise FileNotFoundError(2, "no such file in a pack", str(member))
    status = regular(pack).stat()
    return _content(member, pack, status.st_mtime_ns, status.st_size)


def exists(member: Path, pack: Path) -> bool:
    """Tell whether a pack holds a file."""
    return member.relative_to(pack).as_posix() in {file.name for file in manifest(pack).files}


def _entry(member: Path, pack: Path) -> PackedFile:
    name = member.relative_to(pack).as_posix()
    for file in manifest(pack).files:
        if file.name == name:
            return file
    raise FileNotFoundError(2, "no such file in the pack", str(member))


def _parts(pack: Path, entry: PackedFile) -> Iterator[bytes]:
    """Yield the bytes of a file, line by line."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(pack, page_checksum_verification=True) as file:
            rows = file.read_row_groups(list(range(*entry.groups))).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PackError(pack, f"altered: {entry.name} cannot be read ({_short(error)})") from error
    skeletons = documents(pack.parent) if any(row["raw"] is None for row in rows) else {}
    for row in rows:
        if row["raw"] is not None:
            yield row["raw"]
            continue
        skeleton = skeletons.get(row["document"])
        if skeleton is None:
            raise PackError(pack, f"the {DOCUMENTS} beside it lacks a document of {entry.name}; keep both together")
        try:
            values = json.loads(row["values"])
            yield f"{dumped(joined(skeleton, row['answer'], counts_of(row), values))}\n".encode(errors="surrogatepass")
        except (TypeError, ValueError) as error:
            raise PackError(pack, f"altered: {entry.name} cannot be put together ({_short(error)})") from error


def counts_of(row: Mapping[str, Any]) -> Any:
    """Return the token counts of a sample from its columns."""
    from base64 import b64encode

    if row[COUNTS] is not None:
        return json.loads(row[COUNTS])
    counts = {name: row[name] for name in FIELDS}
    flat = counts[GRIDS]
    counts[GRIDS] = [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
    counts[BITMAPS] = [[b64encode(bits).decode("ascii") for bits in images] for images in counts[BITMAPS]]
    return [counts]


def documents(folder: Path) -> Mapping[bytes, str]:
    """Return the skeletons of a board's documents by their names.

    Raises:
        PackError: there is no file of documents, or it was cut or altered.
    """
    path = folder / DOCUMENTS
    try:
        status = regular(path).stat()
    except FileNotFoundError as error:
        raise PackError(path, f"{DOCUMENTS} is missing: packs need the documents of their board beside them") from error
    return _documents(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8)
def _documents(path: Path, changed: int, size: int) -> Mapping[bytes, str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["document", "skeleton"], page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PackError(path, f"{DOCUMENTS} is not whole, it was cut or altered ({_short(error)})") from error
    skeletons = dict(zip(*(table.column(name).to_pylist() for name in ("document", "skeleton")), strict=True))
    for name, skeleton in skeletons.items():
        if digest(skeleton) != name:
            raise PackError(
                path, f"{DOCUMENTS} was altered: {_short(skeleton)} has another hash than is stored with it"
            )
    return skeletons


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:119]}…"


def packs_below(paths: Sequence[Path]) -> list[Path]:
    """Return the packs among paths and in folders below them."""
    packs: list[Path] = []
    for path in paths:
        packs += sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
    return list(dict.fromkeys(packs))
