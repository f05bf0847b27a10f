"""A folder of results that are slow to compute again: what was read of samples files, and resampled scores.

The cache is never needed and never an error. What is not there, is damaged or cannot be written is computed again, which
is only slower. Entries are written whole or not at all, hold no program code, and are checked when they are read.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

from lmms_prune.record.files import PARTIAL, WriteError, write

LIMIT = 2**30
"""Most bytes of all entries; those that were not used for longest are removed first."""
SUFFIX = ".digest"
# What decides the entries' content, relative to the package. A test compares the list with what these files import.
CODE = (
    "leaderboard/benchmarks.py",
    "leaderboard/cache.py",
    "leaderboard/encoding.py",
    "leaderboard/interval.py",
    "leaderboard/mmbench.py",
    "leaderboard/reader.py",
    "leaderboard/samples.py",
    "leaderboard/scorers.py",
    "leaderboard/statistics.py",
    "record/accounting.py",
    "record/files.py",
    "record/packs.py",
    "record/results.py",
    "record/skeletons.py",
    "record/stored.py",
)
_CHECKSUM = 16  # bytes
_OLD = 24 * 3600  # seconds after which a file that was never finished is removed


def cache_folder() -> Path | None:
    """Return the folder of this package below the user's cache folder; None for a user without a home.

    With the package platformdirs, which lmms-eval's dependencies bring, this is the platform's own place; else
    ``~/.cache/lmms-prune``, which is the same on Linux.
    """
    try:
        from platformdirs import user_cache_path
    except ImportError:
        try:
            return Path.home() / ".cache" / "lmms-prune"
        except RuntimeError:
            return None
    folder = user_cache_path("lmms-prune", appauthor=False)
    return folder if folder.is_absolute() else None


class Cache:
    """Entries by name in one folder.

    Args:
        folder: where they lie; it is made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, name: str) -> memoryview | None:
        """Return the content of an entry; None if there is none, or if it is damaged."""
        path = self._path(name)
        try:
            data = path.read_bytes() if path.is_file() else b""
        except OSError:
            return None
        content = memoryview(data)[_CHECKSUM:]
        if len(data) < _CHECKSUM or data[:_CHECKSUM] != _checksum(content):
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return content

    def store(self, name: str, content: bytes) -> None:
        """Write an entry; without effect where that is impossible, or for one that would fill the cache."""
        if len(content) > LIMIT // 4:
            return
        with suppress(WriteError):
            write(self._path(name), _checksum(memoryview(content)) + content)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def prune(self) -> None:
        """Remove the entries that were not used for longest until the others fit, and files that were never finished."""
        with suppress(OSError):
            entries = sorted(self._entries())
            total = sum(size for _, size, _ in entries)
            for used, size, path in entries:
                unfinished = path.suffix == PARTIAL and time.time() - used > _OLD
                if unfinished or (total > LIMIT and path.suffix == SUFFIX):
                    path.unlink(missing_ok=True)
                    total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each file of the cache was last used, its size and its path."""
        for path in self.folder.iterdir():
            if path.suffix in (SUFFIX, PARTIAL):
                try:
                    status = path.lstat()
                except OSError:
                    continue  # another process has removed it
                yield status.st_mtime, status.st_size, path


def _checksum(content: memoryview) -> bytes:
    return blake2b(content, digest_size=_CHECKSUM).digest()


def name_of(*parts: object) -> str:
    """Return the name of an entry that is decided by some values, of any type with a complete `repr`."""
    return blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()


@cache
def code_version() -> str | None:
    """Return a digest of all that decides the entries' content except the samples; None if the code cannot be read.

    An entry of another version of this package, of Python or of numpy is not used.
    """
    package = Path(__file__).parents[1]
    digest = blake2b(f"{sys.version}\0{np.__version__}\0".encode(), digest_size=16)
    try:
        for name in CODE:
            digest.update((package / name).read_bytes())
    except OSError:
        return None
    return digest.hexdigest()
