"""Checks of an installation before any evaluation: tested versions, and an lmms-eval that finds this package's models.

They take less than a second and import no library, so that they work even if libraries cannot be imported. `lmms-prune doctor
--installation` checks more.
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
"""lmms-eval's command, installed next to this Python."""
DOCTOR = "`lmms-prune doctor --installation` examines all of it."
_SECONDS = 120.0  # timeout for lmms-eval's list of models, which normally takes less than one
_MODULE = re.compile(r"No module named '(\w+)|cannot import name '\w+' from (?:partially initialized module )?'(\w+)")
_LIST = "import json; from lmms_eval.models import list_available_models as models; print(json.dumps(models()))"


class InstallationError(RuntimeError):
    """An installation in which no run can succeed; the message names every fault, with the commands that fix it."""


@dataclass(frozen=True)
class InstallationCheck:
    """The outcome of one check of the installation.

    Args:
        what: a package, or what it must be able to do.
        state: "not there" is not a failure: the machine or installation has no such part, and does not need it.
        detail: the installed version, or the reason of the failure.
        fix: the command that fixes a failure; "" if none is known.
    """

    what: str
    state: Literal["ok", "failed", "not there"]
    detail: str
    fix: str = ""


def versions(supported: Mapping[str, str] = VERSIONS) -> Iterator[InstallationCheck]:
    """Check the installed versions of packages against the ranges in `supported`."""
    for name, allowed in supported.items():
        fix = install_command(name, allowed)
        try:
            installed = version(name)
        except PackageNotFoundError:
            yield InstallationCheck(name, "failed", f"is not installed; use one of {allowed}", fix)
            continue
        if other_version(name, allowed) is None:
            yield InstallationCheck(name, "ok", f"{installed} (tested: {allowed})")
        else:
            yield InstallationCheck(
                name, "failed", f"{installed} is installed, which is not supported; use one of {allowed}", fix
            )


def models_found(command: Sequence[str] = (sys.executable, "-c", _LIST)) -> InstallationCheck:
    """Check whether lmms-eval finds this package's models.

    Args:
        command: a command whose last output line is a JSON list of all model names.
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
        return InstallationCheck(what, "failed", detail, fixing_command(last_words, "lmms-eval"))
    known = json.loads(done.stdout.splitlines()[-1])
    names = list(MODEL_NAMES)
    if missing := [name for name in names if name not in known]:
        detail = f"lmms-eval does not find {' and '.join(missing)}"
        return InstallationCheck(
            what, "failed", f"{detail}: {last_words}" if last_words else detail, reinstall("lmms-prune")
        )
    return InstallationCheck(what, "ok", " and ".join(names))


def fixing_command(error: str, package: str) -> str:
    """Return the command that fixes an error of `package`; if the error names a module of another package, of that one."""
    match = _MODULE.search(error)
    owners = packages_distributions().get(match[match.lastindex or 0], []) if match else []
    return reinstall(owners[0] if owners else package)


def reinstall(package: str) -> str:
    """Return the command that fixes a package: installs a tested version, its missing requirements, or the package again."""
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
    """Check that runs can succeed, as far as a second of checks can tell.

    Raises:
        InstallationError: they cannot succeed.
    """
    failed = [check for check in (*versions(), models_found()) if check.state == "failed"]
    if failed:
        lines = [f"{check.what}: {check.detail}" + (f": {check.fix}" if check.fix else "") for check in failed]
        raise InstallationError("\n".join(["no run can go well in this environment.", *lines, DOCTOR]))


def _unmet(package: str) -> Iterator[str]:
    """Yield an installed package's unmet requirements, in pip's format."""
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
    """Return what pip must reinstall: the folder or file that a package came from, else its name and version."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if "url" not in origin:
        return f"{canonicalize_name(installed.metadata['Name'])}=={installed.version}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    system = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return f"{editable}'{system}{origin['url']}'"
