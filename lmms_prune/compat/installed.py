"""The check of all private names that this package uses against the installed libraries."""

from __future__ import annotations

from lmms_prune.compat import lmms_eval, torch, transformers
from lmms_prune.compat.names import Library, MovedNameError

LIBRARIES: tuple[Library, ...] = (transformers.LIBRARY, torch.LIBRARY, lmms_eval.LIBRARY)


def moved_names() -> list[str]:
    """One line for every name that the installed versions lack, with the file to fix."""
    return [line for library in LIBRARIES for line in library.moved()]


def refuse_moved_names() -> None:
    """Look up every name.

    Raises:
        MovedNameError: lists the missing names, one line each.
    """
    if moved := moved_names():
        raise MovedNameError("\n".join(moved))
