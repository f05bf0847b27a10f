"""``lmms-prune sweep``: evaluates many configurations, one after the other or on a cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lmms_prune.errors import ConfigError
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.harness.installation import DOCTOR, InstallationError, refuse_broken
from lmms_prune.record.files import WriteError
from lmms_prune.sweep.draws import Sample, SampleSeed, draw_jobs, draw_of
from lmms_prune.sweep.jobs import Job, SweepError, plan
from lmms_prune.sweep.results import damage, seconds_if_complete
from lmms_prune.sweep.run import JobOutcome, run_sweep, time_left
from lmms_prune.terminal.console import SECRETS, fail, plainly, redacted_traces
from lmms_prune.terminal.options import Cluster, ClusterOption, Json, Launch, Limit
from lmms_prune.terminal.progress import Progress

Paths = Annotated[
    list[Path], typer.Argument(metavar="CONFIGS", help="--config files of lmms-eval, or folders of them.")
]


def sweep(
    paths: Paths,
    out: Annotated[Path, typer.Option(help="Where results go: CONFIG/TASK/… below this folder.")] = Path("results"),
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated task names, instead of those in the files.")
    ] = None,
    limit: Limit = None,
    sample: Sample = None,
    sample_seed: SampleSeed = 0,
    shard: Annotated[
        str | None, typer.Option(help="Only one part of the configurations: 3/8 is the third of eight.")
    ] = None,
    launch: Launch = "",
    cluster: Cluster = None,
    cluster_option: ClusterOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what is complete and what would run.")] = False,
    as_json: Json = False,
) -> None:
    """Evaluate many --config files with lmms-eval.

    They run task by task, each into a folder of its own. Results that are complete for the same settings, versions and
    code are skipped; other results in their folders are replaced. Failures are reported at the end. A failure stops
    only the jobs that would fail for the same reason (a missing checkpoint, a library that cannot be imported). You can
    interrupt a sweep at any time: the same command resumes it. Weights are loaded once for all configurations that
    share them. Several sweeps of one folder share the work.

    Example: lmms-prune sweep model_configs --tasks pope --limit 8 --out results
    """
    draw = draw_of(sample, sample_seed, limit)
    errors = (ArgumentError, ConfigError, SweepError, InstallationError, WriteError)
    with redacted_traces(SECRETS.get()), plainly(*errors):
        jobs = plan(paths, out, tasks, limit, shard)
        if draw is not None:
            jobs = draw_jobs(jobs, draw)
        if dry_run:
            return _preview(jobs, as_json)
        refuse_broken()
        for job in jobs:
            if (reason := damage(job)) is not None:
                typer.echo(f"{job}: {reason} It is evaluated again.", err=True)
        if cluster is not None:
            from lmms_prune.sweep.cluster import run_on_cluster

            if shard is not None:
                fail(f"--shard {shard} and --cluster {cluster} both divide the work; use one of them.")
            options = {"--out": out, "--tasks": tasks, "--limit": limit, "--launch": launch or None}
            options |= {} if draw is None else {"--sample": draw.size, "--sample-seed": draw.seed}
            outcomes = _with_progress(
                jobs, run_on_cluster(jobs, paths, options, cluster, cluster_option or [], SECRETS.get()), as_json
            )
        else:
            outcomes = _with_progress(jobs, run_sweep(jobs, launch, SECRETS.get()), as_json)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        typer.echo(f"{outcome.job}: {outcome.reason}", err=True)
    if any(outcome.scope == "environment" for outcome in failed):
        typer.echo(DOCTOR, err=True)
    counts = Counter(str(outcome.state) for outcome in outcomes)
    if as_json:
        typer.echo(json.dumps({**counts, "results": str(out), "jobs": [_as_dict(outcome) for outcome in outcomes]}))
    else:
        typer.echo(f"{_counted(counts)}; results in {out}")
    if failed:
        raise typer.Exit(1)


def _with_progress(jobs: Sequence[Job], outcomes: Generator[JobOutcome], as_json: bool) -> list[JobOutcome]:
    """Collect the outcomes, and print each with the estimated remaining time."""
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    finished: list[JobOutcome] = []
    # Closing the generator ends the running evaluation on an interrupt.
    try:
        with closing(outcomes), Progress("evaluations", len(jobs), log=False) as progress:
            for outcome in outcomes:
                finished.append(outcome)
                left = time_left(jobs, finished)
                progress.update(len(finished), left)
                if outcome.state not in ("skipped", "untried"):
                    _print(console, outcome, f"{len(finished)} of {len(jobs)}", left)
    except KeyboardInterrupt:
        typer.echo(f"interrupted after {len(finished)} of {len(jobs)}; the same command resumes from here.", err=True)
        raise
    return finished


def _print(console: Console, outcome: JobOutcome, progress: str, left: float | None) -> None:
    """Print an outcome on one line, and the first line of a failure's reason: the full report may be hours away."""
    duration = f", {_clock(outcome.seconds)}" if outcome.seconds else ""
    remaining = f" ({progress}" + (f", about {_clock(left)} left)" if left else ")")
    console.print(f"{outcome.state}: {outcome.job}{duration}{remaining}", markup=False)
    if outcome.reason:
        console.print(f"  {outcome.reason.splitlines()[0]}", markup=False)


def _preview(jobs: Sequence[Job], as_json: bool) -> None:
    """Report what a sweep would do with each job."""
    previews = []
    for job in jobs:
        state = "would be replaced" if job.folder.exists() else "would run"
        previews.append({"config": job.name, "task": job.task, "state": state})
        if seconds_if_complete(job) is not None:
            previews[-1]["state"] = "complete"
        elif (reason := damage(job)) is not None:
            previews[-1] |= {"state": "damaged", "reason": reason}
            typer.echo(f"{job}: {reason} It would be evaluated again.", err=True)
        if not as_json:
            typer.echo(f"{previews[-1]['state']}: {job}")
    if as_json:
        typer.echo(json.dumps({"jobs": previews}))
    if any(preview["state"] == "damaged" for preview in previews):
        raise typer.Exit(1)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def _counted(counts: Counter[str]) -> str:
    words = {"done": "evaluated", "skipped": "complete before", "busy": "with another sweep", "failed": "failed"}
    words["untried"] = "not tried (they would fail for the same reason)"
    return ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state]) or "nothing to do"


def _as_dict(outcome: JobOutcome) -> dict[str, Any]:
    """One outcome as the JSON output lists it."""
    job = outcome.job
    fields = {"config": job.name, "task": job.task, "state": outcome.state, "seconds": outcome.seconds}
    return {**fields, "folder": str(job.folder), **({"reason": outcome.reason} if outcome.reason else {})}
