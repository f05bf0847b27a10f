"""Reads and writes files that the user names.

Reading accepts only regular files, and checks that before it opens them, since opening a pipe may hang. Writing is
atomic: a file appears completely or not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import uuid
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

PARTIAL = ".partial"
"""Suffix of files that are being written; a killed process may leave them behind. Their names begin with a dot."""


class FileError(OSError):
    """A path that is not a regular file, or a file that is not a readable image; `strerror` gives the reason."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EINVAL, what, str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (Path(self.filename), self.strerror)  # OSError would call it with an error number first


class WriteError(OSError):
    """A file or folder that cannot be written; the message names it and the reason."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (Path(self.filename), OSError(self.errno, self.strerror))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}."


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically, creating its parent folders: an interruption leaves either the old content or the new.

    A link stays a link: the file that it points to is written. Anything but a regular file (``/dev/stdout``, a pipe) is
    written to directly, not atomically.

    Raises:
        WriteError: the file cannot be written; a regular file keeps its old content.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if _is_stream(path):
            with open(path, "wb") as stream:
                stream.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise WriteError(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist.

    Raises:
        WriteError: the folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error


def _is_stream(path: Path) -> bool:
    """Whether `path` names a device, a pipe, an open file or a folder, which an atomic write must not replace."""
    return os.path.lexists(path) and (
        path.absolute().is_relative_to("/dev") or path.absolute().is_relative_to("/proc") or _exists_as_other(path)
    )


def _exists_as_other(path: Path) -> bool:
    """Whether `path` exists, but is not a regular file."""
    return path.exists() and not path.is_file()


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            # Without it, a crash could leave the new name on the disk without the content.
            os.fsync(stream.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def regular(path: Path) -> Path:
    """Return `path` if it names a regular file or a link to one.

    Raises:
        FileError: it names a folder, a named pipe, a socket or a device.
        OSError: it does not exist, its status cannot be read, or it is a loop of links.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise FileError(path, f"{_KINDS.get(kind, 'something else')}, not a file")
    return path


def read_text(path: Path) -> str:
    """Read a regular file as UTF-8 text.

    Raises:
        OSError: see `regular`; or the file cannot be read.
        UnicodeDecodeError: the file is not UTF-8 text.
    """
    return regular(path).read_text(encoding="utf-8")


def find(folder: Path, pattern: str, unreadable: Callable[[OSError], None]) -> list[Path]:
    """Find all paths below a folder whose name matches a pattern. Links are followed, but no folder is read twice.

    Args:
        folder: where to search. Hidden folders (names that begin with a dot) are skipped.
        pattern: shell pattern of the names.
        unreadable: called for each folder that cannot be read.
    """
    return sorted(path for path in _walk(folder, unreadable) if fnmatch(path.name, pattern))


def _walk(folder: Path, unreadable: Callable[[OSError], None]) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for folder_path, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        status = os.stat(folder_path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(folder_path, name) for name in (*folders, *names))
        # Visit real folders before links, whatever their names, so that a folder is found under its own path, not a link's.
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=Path(folder_path).joinpath)
        folders.sort(key=lambda name: os.path.islink(os.path.join(folder_path, name)))


# Errors that Pillow's readers raise for broken files, besides its own.
_BROKEN = (ArithmeticError, EOFError, LookupError, MemoryError, SyntaxError, TypeError, ValueError, struct.error)


def read_image(path: Path) -> Image:
    """Read an image file as the `datasets` package decodes it, so as evaluations see it.

    The result is the first frame, turned upright by its EXIF orientation, in the file's own colour mode. Unlike in an
    evaluation, a truncated file is an error.

    Raises:
        FileError: not a regular file, not an image, truncated, or larger than Pillow decodes.
        OSError: the file does not exist or cannot be read.
    """
    from PIL import Image, ImageFile, ImageOps

    # lmms-eval, once imported, sets LOAD_TRUNCATED_IMAGES: Pillow then fills the missing part of a truncated file.
    load_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(regular(path)) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileError:
        raise
    except _BROKEN as error:
        raise FileError(path, str(error)) from error
    except (Image.DecompressionBombError, Image.UnidentifiedImageError) as error:
        raise FileError(path, str(error).rstrip(".")) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = load_truncated
