"""Private names of libraries as data, and their check against the installed version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

Lookup = Literal["parameters", "leading parameters", "attributes", "fields", "locals"]


class MovedNameError(ImportError):
    """An installed library lacks a name that this package relies on; the message names it, and the file to fix."""


@dataclass(frozen=True)
class PrivateNames:
    """Names that this package relies on in one object of a library.

    Args:
        owner: where they are: "module:attribute.attribute", or the name of a model that `build` makes, then a path.
        kind: "parameters" of a function by keyword, its "leading parameters" in this order, "attributes" of an object,
            "fields" of a dataclass, or "locals" of a function.
        names: the names; "new|old" where either name is sufficient.
        since: the oldest version known to have the names; versions of newer names are in brackets.
        why: the purpose for which they are read.
    """

    owner: str
    kind: Lookup
    names: tuple[str, ...]
    since: str
    why: str


@dataclass(frozen=True)
class Library:
    """One library and the private names that this package relies on.

    Args:
        package: the name for pip.
        file: the module of this package with its names, to be fixed when one moves.
        names: the table.
        build: builds a small object (a random model) from the first part of an owner; None if no owner needs it.
    """

    package: str
    file: str
    names: tuple[PrivateNames, ...]
    build: Callable[[str], Any] | None = None

    def moved(self) -> Iterator[str]:
        """One line for every name that the installed version lacks or has elsewhere."""
        for row in self.names:
            try:
                owner = self._owner(row.owner)
            except (ImportError, AttributeError, IndexError) as error:
                yield self._line(row, f"{row.owner} is not there any more ({error})")
                continue
            for number, name in enumerate(row.names):
                if not any(_has(owner, row.kind, alternative, number) for alternative in name.split("|")):
                    yield self._line(row, f"{row.owner} has no '{name}' among its {row.kind} any more")

    def _owner(self, path: str) -> Any:
        start, _, rest = path.partition(":")
        if start.split(".")[0] == _module(self.package):
            owner: Any = import_module(start)
        elif self.build is not None:
            owner = self.build(start)
        else:
            raise ImportError(f"no module {start}")
        for step in filter(None, rest.split(".")):
            owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
        return owner

    def _line(self, row: PrivateNames, problem: str) -> str:
        return (
            f"{self.package} {version(self.package)}: {problem}; it was there since {row.since}, and is needed for {row.why}. "
            f"Fix {self.file}."
        )


def _module(package: str) -> str:
    return package.replace("-", "_")


def _has(owner: Any, kind: Lookup, name: str, number: int) -> bool:
    if kind == "attributes":
        return hasattr(owner, name)
    if kind == "fields":
        return is_dataclass(owner) and name in {field.name for field in fields(owner)}
    if kind == "locals":
        return name in inspect.unwrap(owner).__code__.co_varnames
    parameters = [parameter for parameter in inspect.signature(owner).parameters if parameter != "self"]
    if kind == "parameters":
        return name in parameters
    return parameters[number : number + 1] == [name]
