"""``lmms-prune doctor --installation``: separate checks of all that an evaluation needs, and the commands that fix failures."""

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
    """Yield every check, in the order of the table.

    Importing the libraries takes most of the time, so they are checked in the evaluating process, and in another process
    only if that one ended before. With an unsupported version every model is refused, so no evaluation is tried.
    """
    checks = list(versions())
    yield from checks
    unsupported = [check for check in checks if check.state == "failed"]
    with ThreadPoolExecutor(1) as pool:
        # In parallel with the other checks, because it takes longest.
        trial = None if unsupported else pool.submit(copy_context().run, two_documents)
        checks.append(models_check := models_found())
        yield models_check
        *examined, evaluation = trial.result() if trial else [not_tried(unsupported)]
    checks += (library_checks := examined or libraries())
    yield from library_checks
    # If another check fails, it is the likely cause and must be fixed first.
    yield replace(evaluation, fix="") if any(check.state == "failed" for check in checks) else evaluation


def table(checks: Sequence[InstallationCheck]) -> Table:
    """Return a table with one line per check."""
    shown = Table(box=box.SIMPLE_HEAD, title=f"lmms-prune {__version__}, Python {platform.python_version()}")
    shown.add_column("what", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    shown.add_column("detail", overflow="fold")
    for check in checks:
        colour = _COLOURS[check.state]
        shown.add_row(check.what, f"[{colour}]{check.state}[/]", escape(check.detail))
    return shown


def commands(checks: Sequence[InstallationCheck]) -> list[str]:
    """Return the commands that fix the failures, each once."""
    return list(dict.fromkeys(check.fix for check in checks if check.state == "failed" and check.fix))


def described(checks: Sequence[InstallationCheck], seconds: float) -> dict[str, Any]:
    """Return the content for ``--json``."""
    return {
        "lmms_prune": __version__,
        "python": platform.python_version(),
        "checks": [asdict(check) for check in checks],
        "failed": sum(check.state == "failed" for check in checks),
        "commands": commands(checks),
        "seconds": round(seconds, 1),
    }
