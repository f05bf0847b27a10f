"""Creates folders that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it is renamed to `folder` when the block ends without an error.

    An interrupted or failing block leaves no `folder` behind, so an existing `folder` is always complete.

    Raises:
        FileExistsError: `folder` exists, before the block or by the time it ends.
    """
    target = Path(folder).absolute()
    if target.exists():
        raise FileExistsError(f"folder {target} already exists: remove it first to have it built anew")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        _rename(partial, target)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _rename(partial: Path, target: Path) -> None:
    """Rename a folder, and name the cause if `target` exists by now."""
    try:
        os.rename(partial, target)
    except OSError as error:
        if target.exists():
            raise FileExistsError(f"folder {target} was made by someone else in the meantime") from error
        raise
