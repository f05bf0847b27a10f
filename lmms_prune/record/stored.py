"""Reads result files wherever they are stored: on the disk, or in a pack."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmms_prune.record.files import regular
from lmms_prune.record.packs import content, exists, pack_of


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedIOBase, os.stat_result]]:
    """Open a file for reading, and return its status: of a file in a pack, that of the pack.

    Raises:
        OSError: no regular file, or it cannot be read; also a pack that was cut or altered.
    """
    pack = pack_of(path)
    if pack is not None:
        status = regular(pack).stat()
        yield io.BytesIO(content(path)), status
        return
    with regular(path).open("rb") as stream:
        yield stream, os.fstat(stream.fileno())


def status_of(path: Path) -> os.stat_result:
    """Return the status of a file, or of the pack that it is in; raises OSError if there is none."""
    return (pack_of(path) or path).stat()


def is_stored(path: Path) -> bool:
    """Tell whether there is such a file, even one that cannot be read."""
    pack = pack_of(path)
    return os.path.lexists(path) if pack is None else exists(path, pack)


def stored_text(path: Path) -> str:
    """Return a file as UTF-8 text; raises OSError or UnicodeDecodeError."""
    with opened(path) as (stream, _):
        return stream.read().decode()
