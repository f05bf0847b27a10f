"""Which code runs: the commit of the checkout that the plugin runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_state(package: Path = PACKAGE) -> str | None:
    """The commit (``git describe``), with ``-dirty`` after it if tracked files were changed.

    Args:
        package: the folder of the installed package.

    Returns:
        None for an installed release, also inside another project's checkout, and where git cannot tell.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    # A site-packages folder may well lie inside a checkout, of something else.
    if top is None or Path(top).resolve() != package.resolve().parent:
        return None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=12")


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks it only reads, whatever else is done in the checkout.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
