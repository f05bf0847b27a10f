"""Names of methods that are not in the table: a file, a module or an entry point of their author's. Free of torch.

reference := path/to/file.py [":" Class] | package.module ":" Class

Reading a name imports nothing: `lmms_prune.methods.own` runs the author's code, where a model is pruned.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path, PurePath

from lmms_prune.errors import OptionError

GROUP = "lmms_prune.methods"
"""The group of entry points by which an installed package names its methods."""
FORMS = "'path/to/file.py:Class@2:0.3' or 'package.module:Class@2:0.3'"
_REFUSED = ",;@:=\"'[]{}"
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


def is_reference(name: str) -> bool:
    """Whether a method's name in a schedule text refers to a file or a module, not to the table."""
    return ":" in name or name.endswith(".py")


@dataclass(frozen=True)
class Reference:
    """Where a method is defined.

    Args:
        source: the file's path as written, or the module's dotted name.
        class_name: the class in it; "" stands for the only method of a file.
    """

    source: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.source}:{self.class_name}" if self.class_name else self.source

    @property
    def is_file(self) -> bool:
        return self.source.endswith(".py")

    @property
    def short(self) -> Reference:
        """The same without the file's folder, as runs record it: the file's hash says which file it was."""
        return Reference(PurePath(self.source).name, self.class_name) if self.is_file else self

    @property
    def absolute(self) -> Reference:
        """The same by the file's absolute path."""
        if not self.is_file:
            return self
        return Reference.read(str(Reference(str(Path(self.source).expanduser().absolute()), self.class_name)))

    @property
    def file(self) -> Path | None:
        """The file that holds the code, found without importing anything; None for a module that is not on Python's path."""
        if self.is_file:
            return Path(self.source).expanduser()
        folders = None  # Python's path
        origin: str | None = None
        for name in self.source.split("."):
            spec = PathFinder.find_spec(name, folders)
            if spec is None:
                return None
            folders, origin = spec.submodule_search_locations, spec.origin
        return None if origin is None else Path(origin)

    @classmethod
    def read(cls, text: str) -> Reference:
        """Read a reference.

        Raises:
            OptionError: it is none; the message says what is allowed.
        """
        source, colon, class_name = text.rpartition(":") if not text.endswith(".py") else (text, "", "")
        if colon and not _CLASS.fullmatch(class_name):
            raise OptionError(f"'{class_name}' is no name of a class; a method of your own is written {FORMS}.")
        if source.endswith(".py"):
            if refused := [letter for letter in source if letter in _REFUSED or not letter.isprintable()]:
                raise OptionError(
                    f"the path '{source}' of a method's file has {refused[0]!r}, which a schedule text cannot hold; "
                    f"allowed is every printable character but {' '.join(_REFUSED)}. Rename or move the file."
                )
            if source != source.strip():
                raise OptionError(f"the path '{source}' of a method's file begins or ends with a space; rename it.")
        elif not _MODULE.fullmatch(source):
            raise OptionError(
                f"'{source}' is neither a file that ends in .py nor a module; a method of your own is written {FORMS}."
            )
        return cls(source, class_name)


@cache
def entry_points() -> dict[str, str]:
    """The methods that installed packages name: from the entry point's name to ``package.module:Class``."""
    from importlib import metadata  # takes a tenth of a second, which no built-in method needs

    return {entry.name: entry.value.replace(" ", "") for entry in metadata.entry_points(group=GROUP)}
