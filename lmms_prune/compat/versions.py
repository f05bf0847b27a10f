"""The versions of other libraries with which this package was tested; others are refused where they would be used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

VERSIONS = {
    # The hooks read the keyword arguments of decoder layers, which were renamed last in 5.24.
    "transformers": ">=5.17,<5.25",
    # The models implement its interface; the wheels before 0.7.3 lack the files that most tasks include.
    "lmms-eval": ">=0.7.3,<0.8",
    # lmms-eval 0.7.3 imports filelock._api, which filelock 4 no longer has: without it no model can be evaluated.
    "filelock": ">=3.12,<4",
    # FLOPs are counted by the rules of its operations.
    "torch": ">=2.10,<2.16",
}
"""By the package's name, as in pyproject.toml."""


class UnsupportedVersionError(ImportError):
    """A library of a version with which a wrong number could follow; the message says which versions will do."""


def install_command(name: str, allowed: str) -> str:
    """What installs a version that will do, dependencies included."""
    return f"pip install '{name}{allowed}'"


def other_version(name: str, allowed: str) -> str | None:
    """What is wrong with the installed version of `name`, with the command that installs another; None if nothing is.

    A package that is not installed is missed by whoever needs it.
    """
    try:
        installed = version(name)
    except PackageNotFoundError:
        return None
    if SpecifierSet(allowed).contains(installed, prereleases=True):
        return None
    command = install_command(name, allowed)
    return f"{name} {installed} is installed, which is not supported; use one of {allowed}: {command}"


def refuse_other_versions(supported: Mapping[str, str] = VERSIONS) -> None:
    """Refuse what is installed of the packages in `supported` if its version is another.

    Raises:
        UnsupportedVersionError: names every such package, its version, the range and the command that mends it.
    """
    if wrong := [message for name, allowed in supported.items() if (message := other_version(name, allowed))]:
        raise UnsupportedVersionError("; ".join(wrong))
