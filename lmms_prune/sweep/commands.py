"""``lmms-prune sweep``: many configurations, one after the other or as jobs of a cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmms_prune.configs.runs import ConfigError
from lmms_prune.harness.installation import DOCTOR, InstallationError, refuse_broken
from lmms_prune.record.files import WriteError
from lmms_prune.sweep.results import damage, seconds_if_complete
from lmms_prune.sweep.run import Outcome, run_sweep, time_left
from lmms_prune.sweep.units import SweepError, Unit, plan
from lmms_prune.terminal.console import SECRETS, fail, plainly, redacted_traces
from lmms_prune.terminal.options import Json

Paths = Annotated[
    list[Path], typer.Argument(metavar="CONFIGS", help="--config files of lmms-eval, or folders of them.")
]


def sweep(
    paths: Paths,
    out: Annotated[Path, typer.Option(help="Where results go: CONFIG/TASK/… below this folder.")] = Path("results"),
    tasks: Annotated[str | None, typer.Option(help="Task names with commas, instead of the files' own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of each task, for a trial.")] = None,
    shard: Annotated[str | None, typer.Option(help="3/8: only the third of eight parts of the configurations.")] = None,
    launch: Annotated[
        str,
        typer.Option(help="Several GPUs for each evaluation: 'torchrun --nproc_per_node 4', 'accelerate launch …'."),
    ] = "",
    cluster: Annotated[
        str | None,
        typer.Option(help="slurm: one job for each configuration (needs the extra 'slurm'); local: processes."),
    ] = None,
    cluster_option: Annotated[
        list[str] | None, typer.Option(help="name=value for submitit, such as slurm_partition=gpu; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is complete and what would run.")] = False,
    as_json: Json = False,
) -> None:
    """Evaluate many --config files with lmms-eval, task by task, each into a folder of its own.

    What is complete for the same settings, versions and code is skipped; what is there of others is replaced. A failure
    is told at the end, and ends nothing else but what would fail for the same reason (a checkpoint that is not there, a
    library that cannot be imported). Interrupt it whenever you like: started again, it goes on. Weights are
    loaded once for all configurations that share them. Several sweeps of one folder share the work.
    """
    with redacted_traces(SECRETS.get()), plainly(ConfigError, SweepError, InstallationError, WriteError):
        units = plan(paths, out, tasks, limit, shard)
        if dry_run:
            return _foresee(units, as_json)
        refuse_broken()
        for unit in units:
            if (reason := damage(unit)) is not None:
                typer.echo(f"{unit}: {reason} It is evaluated again.", err=True)
        if cluster is not None:
            from lmms_prune.sweep.cluster import run_jobs

            if shard is not None:
                fail(f"--shard {shard} and --cluster {cluster} both divide the work; use one of them.")
            own = {"--out": out, "--tasks": tasks, "--limit": limit, "--launch": launch or None}
            outcomes = _followed(
                units, run_jobs(units, paths, own, cluster, cluster_option or [], SECRETS.get()), as_json
            )
        else:
            outcomes = _followed(units, run_sweep(units, launch, SECRETS.get()), as_json)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        typer.echo(f"{outcome.unit}: {outcome.reason}", err=True)
    if any(outcome.scope == "environment" for outcome in failed):
        typer.echo(DOCTOR, err=True)
    counts = Counter(str(outcome.state) for outcome in outcomes)
    if as_json:
        typer.echo(json.dumps({**counts, "results": str(out), "units": [_described(one) for one in outcomes]}))
    else:
        typer.echo(f"{_counted(counts)}; results in {out}")
    if failed:
        raise typer.Exit(1)


def _followed(units: Sequence[Unit], outcomes: Generator[Outcome], as_json: bool) -> list[Outcome]:
    """Tell of the outcomes as they come, with the time that is left."""
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    known: list[Outcome] = []
    # Closing ends what is at work if this is interrupted.
    try:
        with closing(outcomes), Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=len(units), left="")
            for outcome in outcomes:
                known.append(outcome)
                left = time_left(units, known)
                progress.update(bar, advance=1, left="" if not left else f"about {_clock(left)} left")
                if outcome.state not in ("skipped", "untried"):
                    _tell(console, outcome, f"{len(known)} of {len(units)}", left)
    except KeyboardInterrupt:
        typer.echo(f"interrupted after {len(known)} of {len(units)}; the same command goes on from here.", err=True)
        raise
    return known


def _tell(console: Console, outcome: Outcome, place: str, left: float | None) -> None:
    """One line of an outcome; below it the beginning of the reason, so that nobody waits hours for a failure's."""
    lasted = f", {_clock(outcome.seconds)}" if outcome.seconds else ""
    ahead = f" ({place}" + (f", about {_clock(left)} left)" if left else ")")
    console.print(f"{outcome.state}: {outcome.unit}{lasted}{ahead}", markup=False)
    if outcome.reason:
        console.print(f"  {outcome.reason.splitlines()[0]}", markup=False)


def _foresee(units: Sequence[Unit], as_json: bool) -> None:
    """Say what a sweep would make of the units."""
    told = []
    for unit in units:
        state = "would be replaced" if unit.folder.exists() else "would run"
        told.append({"config": unit.name, "task": unit.task, "state": state})
        if seconds_if_complete(unit) is not None:
            told[-1]["state"] = "complete"
        elif (reason := damage(unit)) is not None:
            told[-1] |= {"state": "damaged", "reason": reason}
            typer.echo(f"{unit}: {reason} It would be evaluated again.", err=True)
        if not as_json:
            typer.echo(f"{told[-1]['state']}: {unit}")
    if as_json:
        typer.echo(json.dumps({"units": told}))
    if any(unit["state"] == "damaged" for unit in told):
        raise typer.Exit(1)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _counted(counts: Counter[str]) -> str:
    words = {"done": "evaluated", "skipped": "complete before", "busy": "with another sweep", "failed": "failed"}
    words["untried"] = "not tried, which would fail alike"
    return ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state]) or "nothing to do"


def _described(outcome: Outcome) -> dict[str, Any]:
    unit = outcome.unit
    said = {"config": unit.name, "task": unit.task, "state": outcome.state, "seconds": outcome.seconds}
    return {**said, "folder": str(unit.folder), **({"reason": outcome.reason} if outcome.reason else {})}
