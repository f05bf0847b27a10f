"""Replacing paths in a leaderboard by names, so that it can be shared without exposing a machine's folders."""

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
# An absolute path in a text; not part of a word, a relative path or a URL.
_PATH = re.compile(r"(?<![\w.~/])(?:/[^\s/,;:'\"`()\[\]{}|=]+)+/?")

# A path that only its own machine has, though it does not begin with "/": of a home, above a folder, or as a URL.
_LOCAL = re.compile(r"(?:~[^/]*|\.{1,2}|file://[^/]*)/")


def unique_names(paths: Sequence[str]) -> dict[str, str]:
    """Name each path by its last parts, as few as distinguish it from the others."""
    kept_parts = {path: 1 for path in paths}
    while True:
        names = {path: "/".join(path.strip("/").split("/")[-parts:]) for path, parts in kept_parts.items()}
        counts = Counter(names.values())
        ambiguous = [
            path for path in names if counts[names[path]] > 1 and path.strip("/").count("/") >= kept_parts[path]
        ]
        if not ambiguous:
            return names
        kept_parts |= {path: kept_parts[path] + 1 for path in ambiguous}


class PathNames:
    """Names for the paths of one leaderboard: relative to a results folder if below one, else the last part.

    Args:
        folders: folders from which the results were read.
        checkpoints: the models' checkpoints; folders among them get short names.
        keep: leave paths as they are.
    """

    def __init__(self, folders: Sequence[Path], checkpoints: Sequence[str], keep: bool = False) -> None:
        self._keep = keep
        roots = [folder.parent if folder.is_file() else folder for folder in folders]
        names = unique_names(list(dict.fromkeys(abspath(root) for root in roots)))
        # With several folders the name distinguishes them; a single folder's name would add nothing.
        prefixes = {root: f"{name}/" if len(names) > 1 else "" for root, name in names.items()}
        spellings: dict[str, tuple[str, str]] = {}  # spelling of a folder: its name, and the prefix of paths below it
        for root in roots:
            full = abspath(root)
            spellings |= dict.fromkeys((str(root), full, realpath(root)), (names[full], prefixes[full]))
        self._roots = dict(sorted(spellings.items(), key=lambda item: -len(item[0])))
        self._checkpoints = unique_names([name for name in dict.fromkeys(checkpoints) if name.startswith("/")])

    def shared(self, value: Value) -> Value:
        """Return any part of a leaderboard with paths replaced in all of its texts; the type is unchanged."""
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
        """Name a text that is one path."""
        for root, (name, before) in self._roots.items():
            if text == root:
                return name
            if text.startswith(f"{root.rstrip('/')}/"):
                return before + text[len(root.rstrip("/")) + 1 :]
        if text in self._checkpoints:
            return self._checkpoints[text]
        return text.rstrip("/").rsplit("/", 1)[-1] if text.startswith("/") else self._text(text)

    def _text(self, text: str) -> str:
        """Replace the paths inside a text; known paths may contain any characters."""
        for path in [*self._checkpoints, *(root for root in self._roots if root.startswith("/") and root != "/")]:
            pattern = re.compile(rf"(?<![\w.~/]){re.escape(path.rstrip('/'))}(/[^\s,;:'\"`()]*)?(?![\w.-])")
            text = pattern.sub(lambda match: self._path(match[0]), text)
        return _PATH.sub(lambda match: self._path(match[0]), text)

    def _word(self, word: str) -> str:
        """Replace paths in one word of a command: a path, or ``name=value`` pairs; paths may contain spaces."""
        if word.startswith("/"):
            return self._path(word)
        if _LOCAL.match(word):
            return _last(word)
        pieces = (piece.partition("=") for piece in word.split(","))
        return ",".join(
            name + equals + self._value(value) if equals else self._text(name) for name, equals, value in pieces
        )

    def _value(self, value: str) -> str:
        if _LOCAL.match(value):
            return _last(value)
        return (self._path if value.startswith("/") else self._text)(value)


def _last(path: str) -> str:
    """Return a path's last part."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def names(board: Leaderboard) -> PathNames:
    """Return the path names of a leaderboard."""
    return PathNames(board.folders, [model.model for model in board.models], board.keep_paths)


def shared(board: Leaderboard) -> Leaderboard:
    """Return the leaderboard with names instead of paths; unchanged if it keeps its paths."""
    return names(board).shared(board)
