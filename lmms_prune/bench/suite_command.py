"""``lmms-prune bench --suite``: its options, and what it prints. It imports heavy modules only when it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import typer

from lmms_prune.errors import did_you_mean
from lmms_prune.terminal.console import SECRETS, ended_by_sigterm, fail, plainly
from lmms_prune.terminal.progress import Progress

DEFAULT_OUT = Path("docs/speed")
_OWN = ("minutes", "out", "parts", "small")
_SHARED = ("suite", "device", "as_json")
_FLAGS = {
    "schedules": "SCHEDULES",
    "compiled": "--compile",
    "include": "--include-path",
}  # options whose names differ from their parameters'


def refuse_foreign_options(command: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """End the command if an option was given that ``--suite`` does not have, or one of its own without it.

    Args:
        command: the command's function; what differs from its defaults was given.
        values: its arguments.
    """
    defaults = {name: parameter.default for name, parameter in signature(command).parameters.items()}
    changed = [name for name, default in defaults.items() if values[name] not in (default, None, [])]
    wrong = [name for name in changed if (name not in (*_OWN, *_SHARED) if values["suite"] else name in _OWN)]
    if wrong:
        flag = _FLAGS.get(wrong[0], f"--{wrong[0].replace('_', '-')}")
        has_own = "--suite has schedules, models and sizes of its own; leave it out."
        fail(f"bench {flag}: {has_own if values['suite'] else 'it is an option of --suite; give both, or neither.'}")


def measure_everything(device: str, small: bool, minutes: float, out: Path, names: str | None, as_json: bool) -> None:
    """Run the suite and say what was not measured; exits with 1 if a part failed."""
    from lmms_prune.bench.parts import suite_parts
    from lmms_prune.bench.suite import Suite, SuiteError, run_suite

    if device == "auto":
        from lmms_prune.bench.models import existing_device

        device = str(existing_device(device))
    if device == "cpu" and not small:
        fail(
            "bench --suite --device cpu: the suite's models of 7B are for a GPU; add --small, which takes the demo's models."
        )
    parts = suite_parts(device, small)
    known = [part.name for part in parts]
    chosen = known if names is None else list(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in known:
            fail(f"bench --parts {name}: unknown.{did_you_mean(name, known)}")
    with plainly(SuiteError):
        suite = Suite.of(out, _facts(device), small, SECRETS.get())
        # No thread of this process may take time from what a part measures.
        with ended_by_sigterm(), Progress("parts", len(chosen), log=False, live=False) as progress:
            wanted = [part for part in parts if part.name in chosen]
            run_suite(suite, wanted, minutes, progress.say, ended=progress.update)
    outcomes = {name: suite.outcomes[name] for name in chosen}
    if as_json:
        states = {name: {"state": outcome.state, "error": outcome.error} for name, outcome in outcomes.items()}
        typer.echo(json.dumps({"json": str(suite.json_path), "page": str(suite.page_path), "parts": states}))
    else:
        for state in dict.fromkeys(outcome.state for outcome in outcomes.values()):
            typer.echo(f"{state}: {', '.join(name for name in chosen if outcomes[name].state == state)}")
        typer.echo(f"{suite.page_path}\n{suite.json_path}")
    if any(outcome.state == "failed" for outcome in outcomes.values()):
        raise typer.Exit(1)


def _facts(device: str) -> dict[str, str]:
    """Return what the measurements depend on, from a process that then frees the card."""
    command = [sys.executable, "-m", "lmms_prune.bench.machine", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        fail(
            f"{done.stderr.strip().splitlines()[-1]} Without a GPU, --device cpu --small tries everything at reduced size."
        )
    if done.returncode:
        fail(f"bench --device {device}: it cannot be examined. {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
