"""What an installation must have before anything is evaluated: versions that were tested, and an lmms-eval that finds us.

It takes less than a second and imports no library, so that it can speak where they cannot be imported. `lmms-prune doctor
--installation` looks further.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    packages_distributions,
    requires,
    version,
)
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lmms_prune.compat.versions import VERSIONS, install_command, other_version
from lmms_prune.models import MODEL_NAMES

LMMS_EVAL = Path(sys.executable).with_name("lmms-eval")
"""lmms-eval's command, which is installed beside this Python."""
DOCTOR = "`lmms-prune doctor --installation` examines all of it."
_SECONDS = 120.0  # for lmms-eval's list of models, which takes less than one
_MODULE = re.compile(r"No module named '(\w+)|cannot import name '\w+' from (?:partially initialized module )?'(\w+)")
_LIST = "import json; from lmms_eval.models import list_available_models as models; print(json.dumps(models()))"


class InstallationError(RuntimeError):
    """An installation in which no run can go well; names all that is wrong, with the commands that mend it."""


@dataclass(frozen=True)
class InstallationCheck:
    """What was examined, and what came out.

    Args:
        what: a package, or what it is to do.
        state: "not there" is no failure: the machine or the installation has no such thing, and need not.
        detail: what is installed, or why it fails.
        mend: the command that mends a failure, "" if none is known.
    """

    what: str
    state: Literal["ok", "failed", "not there"]
    detail: str
    mend: str = ""


def versions(supported: Mapping[str, str] = VERSIONS) -> Iterator[InstallationCheck]:
    """What is installed of the packages in `supported`, a name and a range each."""
    for name, allowed in supported.items():
        mend = install_command(name, allowed)
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield InstallationCheck(name, "failed", f"is not installed; use one of {allowed}", mend)
            continue
        if other_version(name, allowed) is None:
            yield InstallationCheck(name, "ok", f"{installed} (tested: {allowed})")
        else:
            yield InstallationCheck(
                name, "failed", f"{installed} is installed, which is not supported; use one of {allowed}", mend
            )


def models_found(command: Sequence[str] = (sys.executable, "-c", _LIST)) -> InstallationCheck:
    """Whether lmms-eval finds this package's models.

    Args:
        command: prints the names of all models as a JSON list, on its last line.
    """
    what = "models in lmms-eval"
    if not LMMS_EVAL.is_file():
        return InstallationCheck(
            what, "failed", f"there is no {LMMS_EVAL}, lmms-eval's command", reinstall("lmms-eval")
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return InstallationCheck(
            what, "failed", f"lmms-eval itself does not list its models within {_SECONDS:.0f} seconds"
        )
    last_words = " ".join(done.stderr.strip().splitlines()[-1:])
    if done.returncode:
        detail = f"lmms-eval itself fails: {last_words or f'exit code {done.returncode}'}"
        return InstallationCheck(what, "failed", detail, mending(last_words, "lmms-eval"))
    known = json.loads(done.stdout.splitlines()[-1])
    names = list(MODEL_NAMES)
    if missing := [name for name in names if name not in known]:
        detail = f"lmms-eval does not find {' and '.join(missing)}"
        return InstallationCheck(
            what, "failed", f"{detail}: {last_words}" if last_words else detail, reinstall("lmms-prune")
        )
    return InstallationCheck(what, "ok", " and ".join(names))


def mending(error: str, package: str) -> str:
    """The command for an error of `package`: of another one, if the error names a module of one that is installed."""
    named = _MODULE.search(error)
    owners = packages_distributions().get(named[named.lastindex or 0], []) if named else []
    return reinstall(owners[0] if owners else package)


def reinstall(package: str) -> str:
    """The command for a package that fails: a tested version, what it requires and is not there, or the package anew."""
    package = canonicalize_name(package)
    allowed = VERSIONS.get(package, "")
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        return install_command(package, allowed)
    if allowed and other_version(package, allowed):
        return install_command(package, allowed)
    if unmet := list(_unmet(package)):
        return f"pip install {' '.join(repr(requirement) for requirement in unmet)}"
    return f"pip install --force-reinstall --no-deps {_source(installed)}"


def refuse_broken() -> None:
    """Make sure that runs can go well, as far as this is known in a second.

    Raises:
        InstallationError: they cannot.
    """
    failed = [check for check in (*versions(), models_found()) if check.state == "failed"]
    if failed:
        lines = [f"{check.what}: {check.detail}" + (f": {check.mend}" if check.mend else "") for check in failed]
        raise InstallationError("\n".join(["no run can go well in this environment.", *lines, DOCTOR]))


def _unmet(package: str) -> Iterator[str]:
    """The requirements of an installed package that are not met by what is installed, as pip takes them."""
    for requirement in map(Requirement, requires(package) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            met = requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            met = False
        if not met:
            yield f"{requirement.name}{requirement.specifier}"


def _source(installed: Distribution) -> str:
    """What pip is to install again: the folder or file that a package came from, else its name and version."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if "url" not in origin:
        return f"{canonicalize_name(installed.metadata['Name'])}=={installed.version}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    system = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return f"{editable}'{system}{origin['url']}'"
