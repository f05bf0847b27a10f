"""Writes packs, and the documents of a board."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from binascii import Error
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lmms_prune.record.files import write
from lmms_prune.record.packs import (
    BITMAPS,
    CHECKSUM,
    DOCUMENTS,
    FIELDS,
    GRIDS,
    MANIFEST,
    REAL,
    Manifest,
    PackedFile,
    PackError,
    counts_of,
    documents,
)
from lmms_prune.record.skeletons import COUNTS, SplitError, digest, split

LEVEL = 19
"""Compression level of zstd: packs are written once and kept in a repository."""


def write_pack(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> dict[bytes, str]:
    """Write a pack.

    Args:
        path: the file.
        manifest: what it says about itself, without its files.
        files: bytes by name; those named ``.jsonl`` are samples files.

    Returns:
        the skeletons of the documents in it, by their names, which belong into the file of documents beside it.
    """
    from pyarrow import parquet

    schema, skeletons = _schema(), dict[bytes, str]()
    entries, tables = [], []
    for number, (name, data) in enumerate(files.items()):
        rows = list(_rows(data, skeletons)) if name.endswith(".jsonl") else [_raw(data)]
        tables.append(_table(rows, schema))
        entries.append(PackedFile(name, sha256(data).hexdigest(), len(data), (number, number + 1)))
    content = replace(manifest, files=tuple(entries)).to_json()
    stored = {MANIFEST: content, CHECKSUM: sha256(content).hexdigest().encode()}
    buffer = io.BytesIO()
    options = {"compression": "zstd", "compression_level": LEVEL, "write_page_checksum": True}
    with parquet.ParquetWriter(buffer, schema.with_metadata(stored), **options) as writer:
        for table in tables:
            # One row group a file, so that one file is read without the others.
            writer.write_table(table.replace_schema_metadata(stored), row_group_size=max(1, len(table)))
    write(path, buffer.getvalue())
    return skeletons


def _schema() -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {
        "raw": pa.binary(),
        "document": pa.binary(16),
        "answer": pa.string(),
        "values": pa.string(),
        COUNTS: pa.string(),
    }
    for name in FIELDS:
        columns[name] = pa.int64()
    columns[REAL] = pa.float64()
    for name in FIELDS:
        if name in ("kept_visual_tokens", "recycled_visual_tokens", "layer_visual_tokens", "layer_kv_bytes", GRIDS):
            columns[name] = pa.list_(pa.int64())
    columns[BITMAPS] = pa.list_(pa.list_(pa.binary()))
    return pa.schema(list(columns.items()))


def _table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.table({name: [row.get(name) for row in rows] for name in schema.names}, schema=schema)


def _raw(data: bytes) -> dict[str, Any]:
    return {"raw": data}


def _rows(data: bytes, skeletons: dict[bytes, str]) -> Iterable[dict[str, Any]]:
    """Yield the columns of each line; a line that would not become the same bytes again is kept as it is."""
    for line in data.splitlines(keepends=True):
        try:
            text = line.decode(errors="surrogatepass")
            if not text.endswith("\n"):
                raise SplitError("a line without an end")
            skeleton, answer, counts, values = split(text[:-1])
            more = json.dumps(values, ensure_ascii=False)
            for column in (skeleton, answer, more):
                column.encode()  # Arrow's text is UTF-8
        except (SplitError, UnicodeError):
            yield _raw(line)
            continue
        skeletons[name := digest(skeleton)] = skeleton
        yield {"document": name, "answer": answer, "values": more, **_counts(counts)}


def _counts(counts: Any) -> dict[str, Any]:
    """Return token counts as columns; as JSON in one column if they are not this version's."""
    try:
        (entry,) = counts
        if list(entry) != list(FIELDS):
            raise ValueError("other fields")
        columns = dict(entry)
        columns[GRIDS] = [side for rows, columns_ in entry[GRIDS] for side in (rows, columns_)]
        columns[BITMAPS] = [[b64decode(text, validate=True) for text in images] for images in entry[BITMAPS]]
        again = json.dumps(counts_of({**columns, COUNTS: None}))
    except (Error, LookupError, OverflowError, TypeError, ValueError):
        again = ""
    if again != json.dumps(counts) or any(not _fits(columns[name]) for name in FIELDS):
        return {COUNTS: json.dumps(counts, ensure_ascii=False)}
    return columns


def _fits(value: Any) -> bool:
    """Tell whether a column of 64-bit numbers holds a value unchanged."""
    if isinstance(value, list):
        return all(map(_fits, value))
    if isinstance(value, bytes):
        return True
    return not isinstance(value, bool) and abs(value) < 2**63


def write_documents(folder: Path, skeletons: Mapping[bytes, str]) -> None:
    """Write the documents of a board, those that are already there included.

    Raises:
        PackError: the file that is there was cut or altered.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        known = dict(documents(folder))
    except PackError:
        if (folder / DOCUMENTS).exists():
            raise
        known = {}
    merged = {**known, **skeletons}
    if merged == known and known:
        return
    ordered = sorted(merged.items(), key=lambda item: (item[1], item[0]))
    table = pa.table(
        {"document": [name for name, _ in ordered], "skeleton": [text for _, text in ordered]},
        schema=pa.schema([("document", pa.binary(16)), ("skeleton", pa.string())]),
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd", compression_level=LEVEL, write_page_checksum=True)
    write(folder / DOCUMENTS, buffer.getvalue())
