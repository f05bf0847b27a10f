"""Private names of libraries as data, and how each is held against the installed version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal

Kind = Literal["parameters", "leading parameters", "attributes", "fields", "locals"]


class MovedNameError(ImportError):
    """An installed library lacks a name that this package relies on; the message says which, and where it is mended."""


@dataclass(frozen=True)
class Names:
    """Names that this package relies on in one place of a library.

    Args:
        owner: where they are: "module:attribute.attribute", or the name of a model that `build` makes, then a path.
        kind: "parameters" of a function by keyword, its "leading parameters" in this order, "attributes" of an object,
            "fields" of a dataclass, or "locals" of a function.
        names: the names; "new|old" where one of two will do.
        since: the oldest version for which it is known to be so; what is younger stands in brackets.
        why: what reads them, and for what.
    """

    owner: str
    kind: Kind
    names: tuple[str, ...]
    since: str
    why: str


@dataclass(frozen=True)
class Library:
    """One library and what is relied on in it.

    Args:
        package: as pip knows it.
        file: the module of this package that has its names, to be mended when one moves.
        names: the table.
        build: makes a small object of a name that owners may start with (a random model); None if there are none.
    """

    package: str
    file: str
    names: tuple[Names, ...]
    build: Callable[[str], Any] | None = None

    def moved(self) -> Iterator[str]:
        """One line for every name that the installed version does not have, or has elsewhere."""
        for row in self.names:
            try:
                owner = self._owner(row.owner)
            except (ImportError, AttributeError, IndexError) as error:
                yield self._line(row, f"{row.owner} is not there any more ({error})")
                continue
            for number, name in enumerate(row.names):
                if not any(_has(owner, row.kind, one, number) for one in name.split("|")):
                    yield self._line(row, f"{row.owner} has no '{name}' among its {row.kind} any more")

    def _owner(self, path: str) -> Any:
        start, _, rest = path.partition(":")
        if start.split(".")[0] == _module(self.package):
            found: Any = import_module(start)
        elif self.build is not None:
            found = self.build(start)
        else:
            raise ImportError(f"no module {start}")
        for step in filter(None, rest.split(".")):
            found = found[int(step)] if step.isdigit() else getattr(found, step)
        return found

    def _line(self, row: Names, what: str) -> str:
        return (
            f"{self.package} {version(self.package)}: {what}; it was so since {row.since}, and is needed for {row.why}. "
            f"Mend {self.file}."
        )


def _module(package: str) -> str:
    return package.replace("-", "_")


def _has(owner: Any, kind: Kind, name: str, number: int) -> bool:
    if kind == "attributes":
        return hasattr(owner, name)
    if kind == "fields":
        return is_dataclass(owner) and name in {field.name for field in fields(owner)}
    if kind == "locals":
        return name in inspect.unwrap(owner).__code__.co_varnames
    parameters = [one for one in inspect.signature(owner).parameters if one != "self"]
    if kind == "parameters":
        return name in parameters
    return parameters[number : number + 1] == [name]
