"""A table for others: names in the place of paths, which tell of nobody's machine."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from os.path import abspath, realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lmms_prune.leaderboard.records import Problem, Source

if TYPE_CHECKING:
    from lmms_prune.leaderboard.rows import Leaderboard

Value = TypeVar("Value")
# An absolute path in a text: no part of a word, of a relative path or of an address.
_PATH = re.compile(r"(?<![\w.~/])(?:/[^\s/,;:'\"`()\[\]{}|=]+)+/?")


def unique_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path's last part, with as many parts before it as tell it from the others."""
    many = {path: 1 for path in paths}
    while True:
        names = {path: "/".join(path.strip("/").split("/")[-parts:]) for path, parts in many.items()}
        counts = Counter(names.values())
        again = [path for path in names if counts[names[path]] > 1 and path.strip("/").count("/") >= many[path]]
        if not again:
            return names
        many |= {path: many[path] + 1 for path in again}


class PathNames:
    """What stands for the paths of one table: below a results folder the rest, else the path's own name.

    Args:
        folders: from which the results were read.
        checkpoints: of the table's models; those that are folders are called by their names.
        keep: leave paths as they are.
    """

    def __init__(self, folders: Sequence[Path], checkpoints: Sequence[str], keep: bool = False) -> None:
        self._keep = keep
        roots = [folder.parent if folder.is_file() else folder for folder in folders]
        names = unique_names(list(dict.fromkeys(abspath(root) for root in roots)))
        # Several folders are told apart; in one alone its name says nothing.
        inside = {root: f"{name}/" if len(names) > 1 else "" for root, name in names.items()}
        known: dict[str, tuple[str, str]] = {}  # spelling: the folder's own name, and what stands before what is in it
        for root in roots:
            full = abspath(root)
            known |= dict.fromkeys((str(root), full, realpath(root)), (names[full], inside[full]))
        self._roots = dict(sorted(known.items(), key=lambda item: -len(item[0])))
        self._checkpoints = unique_names([name for name in dict.fromkeys(checkpoints) if name.startswith("/")])

    def shared(self, value: Value) -> Value:
        """Anything of a table, of the same type, with names in all of its texts."""
        if self._keep:
            return value
        shown: Any = value
        if isinstance(value, str):
            shown = self._text(value)
        elif isinstance(value, Path):
            shown = Path(self._path(str(value)))
        elif is_dataclass(value) and not isinstance(value, type):
            parts = {part.name: self.shared(getattr(value, part.name)) for part in fields(value)}
            if isinstance(value, Source):
                parts["command"] = shlex.join(map(self._word, shlex.split(value.command)))
            if isinstance(value, Problem):
                parts["path"] = self._path(value.path)
            shown = replace(value, **parts)
        elif isinstance(value, Mapping):
            shown = {name: self.shared(part) for name, part in value.items()}
        elif isinstance(value, (list, tuple)):
            shown = type(value)(map(self.shared, value))
        return shown

    def _path(self, text: str) -> str:
        """A path that is a text of its own."""
        for root, (name, before) in self._roots.items():
            if text == root:
                return name
            if text.startswith(f"{root.rstrip('/')}/"):
                return before + text[len(root.rstrip("/")) + 1 :]
        if text in self._checkpoints:
            return self._checkpoints[text]
        return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith("/") else self._text(text)

    def _text(self, text: str) -> str:
        """A text in which paths may stand; those that are known may have any letters."""
        for path in [*self._checkpoints, *(root for root in self._roots if root.startswith("/") and root != "/")]:
            whole = re.compile(rf"(?<![\w.~/]){re.escape(path.rstrip('/'))}(/[^\s,;:'\"`()]*)?(?![\w.-])")
            text = whole.sub(lambda match: self._path(match[0]), text)
        return _PATH.sub(lambda match: self._path(match[0]), text)

    def _word(self, word: str) -> str:
        """A word of a command: a path, or ``name=value`` with commas between; paths may have spaces."""
        if word.startswith("/"):
            return self._path(word)
        pieces = (piece.partition("=") for piece in word.split(","))
        return ",".join(
            name + equals + (self._path if value.startswith("/") else self._text)(value) if equals else self._text(name)
            for name, equals, value in pieces
        )


def names(board: Leaderboard) -> PathNames:
    """Of all that a table tells."""
    return PathNames(board.folders, [model.model for model in board.models], board.keep_paths)


def shared(board: Leaderboard) -> Leaderboard:
    """The table as others may have it; unchanged if it keeps its paths."""
    return names(board).shared(board)
