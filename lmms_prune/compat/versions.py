"""The versions of other libraries with which this package was tested; other versions are refused."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

VERSIONS = {
    # The hooks read the keyword arguments of decoder layers, which were last renamed in 5.24.
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
    """A library's version with which results could be wrong; the message names the supported versions."""


def install_command(name: str, allowed: str) -> str:
    """The command that installs a supported version, dependencies included."""
    return f"pip install '{name}{allowed}'"


def other_version(name: str, allowed: str) -> str | None:
    """The message that the installed version of `name` is not supported, with the command to fix it; None if it is.

    A package that is not installed is ignored here: the code that imports it raises its own error.
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
    """Refuse installed packages of `supported` whose version is not supported.

    Raises:
        UnsupportedVersionError: names every such package, its version, the range and the command that fixes it.
    """
    if messages := [message for name, allowed in supported.items() if (message := other_version(name, allowed))]:
        raise UnsupportedVersionError("; ".join(messages))
