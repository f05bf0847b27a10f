"""``lmms-prune doctor --installation``: all that an evaluation needs, each examined by itself, and what mends it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, replace
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lmms_prune import __version__
from lmms_prune.certificate.libraries import libraries
from lmms_prune.certificate.trial import not_tried, two_documents
from lmms_prune.harness.installation import InstallationCheck, models_found, versions

_COLOURS = {"ok": "green", "failed": "bold red", "not there": "dim"}


def examine() -> Iterator[InstallationCheck]:
    """Every check, in the order of the table.

    Importing the libraries takes most of the time, so they are looked at in the process that evaluates, and in another one
    only where it did not come so far. Beside a version that is not supported every model is refused: none is tried.
    """
    checks = list(versions())
    yield from checks
    unsupported = [check for check in checks if check.state == "failed"]
    with ThreadPoolExecutor(1) as pool:
        # Beside it, for it is what takes long.
        trial = None if unsupported else pool.submit(copy_context().run, two_documents)
        checks.append(found := models_found())
        yield found
        *examined, evaluation = trial.result() if trial else [not_tried(unsupported)]
    checks += (looked_at := examined or libraries())
    yield from looked_at
    # What else fails is the likely cause, and mended first.
    yield replace(evaluation, mend="") if any(check.state == "failed" for check in checks) else evaluation


def table(checks: Sequence[InstallationCheck]) -> Table:
    """One line a check."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"lmms-prune {__version__}, Python {platform.python_version()}")
    shown.add_column("what", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    shown.add_column("detail", overflow="fold")
    for check in checks:
        colour = _COLOURS[check.state]
        shown.add_row(check.what, f"[{colour}]{check.state}[/]", escape(check.detail))
    return shown


def commands(checks: Sequence[InstallationCheck]) -> list[str]:
    """What mends the failures, each command once."""
    return list(dict.fromkeys(check.mend for check in checks if check.state == "failed" and check.mend))


def described(checks: Sequence[InstallationCheck], seconds: float) -> dict[str, Any]:
    """All of it, for ``--json``."""
    return {
        "lmms_prune": __version__,
        "python": platform.python_version(),
        "checks": [asdict(check) for check in checks],
        "failed": sum(check.state == "failed" for check in checks),
        "commands": commands(checks),
        "seconds": round(seconds, 1),
    }
