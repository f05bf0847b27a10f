"""All libraries whose private parts this package touches, held against what is installed."""

from __future__ import annotations

from lmms_prune.compat import lmms_eval, torch, transformers
from lmms_prune.compat.names import Library, MovedNameError

LIBRARIES: tuple[Library, ...] = (transformers.LIBRARY, torch.LIBRARY, lmms_eval.LIBRARY)


def moved_names() -> list[str]:
    """One line for every name that the installed versions have no longer, with the file that is to be mended."""
    return [line for library in LIBRARIES for line in library.moved()]


def refuse_moved_names() -> None:
    """Look for every name.

    Raises:
        MovedNameError: names all that are not there, a line each.
    """
    if moved := moved_names():
        raise MovedNameError("\n".join(moved))
