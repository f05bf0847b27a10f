"""Reading and writing files with user-given names.

Reading refuses anything but a regular file before opening it, since opening a pipe may hang. Writing is atomic: a file
appears completely or not at all.
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
from typing import TYPE_CHECKING

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
"""Suffix of files that a killed process left half-written; their names begin with a dot."""


class FileError(OSError):
    """A name of something else than a regular file, or a file that is no image; `strerror` says what it is."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EINVAL, what, str(path))


class WriteError(OSError):
    """A file or folder that cannot be written; the message names it and says why."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}."


def write(path: Path, content: str | bytes) -> None:
    """Write a file, and the folders above it, atomically: an interruption leaves either the old content or the new.

    A link stays a link to the file that is written; what is no regular file (``/dev/stdout``, a pipe) is written into.

    Raises:
        WriteError: it cannot be written; what was there stays.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if _stream(path):
            with open(path, "wb") as stream:
                stream.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise WriteError(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        WriteError: that is not possible.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error


def _stream(path: Path) -> bool:
    """Whether a name stands for something that is open or has no content of its own, and so cannot be replaced."""
    return os.path.lexists(path) and (
        path.absolute().is_relative_to("/dev") or path.absolute().is_relative_to("/proc") or _no_file(path)
    )


def _no_file(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            # Else the name may be on the disk before the content is.
            os.fsync(stream.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def regular(path: Path) -> Path:
    """`path`, if it names a regular file or a link to one.

    Raises:
        FileError: it names a folder, a named pipe, a socket or a device.
        OSError: it does not exist, cannot be looked at, or is a loop of links.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise FileError(path, f"{_KINDS.get(kind, 'something else')}, not a file")
    return path


def read_text(path: Path) -> str:
    """The text of a regular file, in UTF-8.

    Raises:
        OSError: see `regular`; or it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    return regular(path).read_text(encoding="utf-8")


def find(folder: Path, pattern: str, unreadable: Callable[[OSError], None]) -> list[Path]:
    """Find all paths below a folder whose name matches a pattern; links are followed, and no folder is read twice.

    Args:
        folder: whose hidden folders (names that begin with a dot) are left out.
        pattern: of names, as a shell has them.
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
        # A link's own folder comes before the link, whatever their names: paths stay as short as they can be.
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=Path(folder_path).joinpath)
        folders.sort(key=lambda name: os.path.islink(os.path.join(folder_path, name)))


_BROKEN = (ArithmeticError, EOFError, LookupError, MemoryError, SyntaxError, TypeError, ValueError, struct.error)


def read_image(path: Path) -> Image:
    """An image file as `datasets` decodes it, and evaluations so see it: whole, its first frame, upright, in its own mode.

    Raises:
        FileError: no regular file, no image, cut short, or larger than Pillow decodes.
        OSError: it does not exist or cannot be read.
    """
    from PIL import Image, ImageFile, ImageOps

    # The harness, once imported, lets Pillow fill what a truncated file lacks with grey.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(regular(path)) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileError:
        raise
    # All that Pillow's readers say of broken files, and of images that would fill the memory.
    except _BROKEN as error:
        raise FileError(path, str(error)) from error
    except (Image.DecompressionBombError, Image.UnidentifiedImageError) as error:
        raise FileError(path, str(error).rstrip(".")) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
