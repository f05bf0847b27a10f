"""The git commit of the checkout that the plugin runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_state(package: Path = PACKAGE) -> str | None:
    """Return the commit (``git describe``), with the suffix ``-dirty`` if tracked files were changed.

    Args:
        package: the folder of the installed package.

    Returns:
        None for an installed release (even inside another project's checkout), and if git cannot tell.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    # A site-packages folder may lie inside another project's checkout.
    if top is None or Path(top).resolve() != package.resolve().parent:
        return None
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=12")


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks git only reads, so it cannot disturb other git commands in the checkout.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
