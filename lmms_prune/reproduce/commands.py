"""``lmms-prune reproduce``: the paper's tables and figures, from one command."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lmms_prune.reproduce.items import paper_models
from lmms_prune.terminal.console import ENVIRONMENT, SECRETS, ended_by_sigterm, fail, plainly
from lmms_prune.terminal.options import Cluster, ClusterOption, Include, Json, Launch
from lmms_prune.terminal.progress import Progress

if TYPE_CHECKING:
    from lmms_prune.reproduce.chain import ChainOptions, ModelPlan, Step
    from lmms_prune.reproduce.items import Item
    from lmms_prune.reproduce.models import StudiedModel
    from lmms_prune.reproduce.runner import StepRecord, Surroundings

DEMO_LIMIT, QUICK_LIMIT = 12, 4
REPORT, SCRIPT = "report.html", "reproduce.sh"


def reproduce(
    items: Annotated[list[str], typer.Argument(help="table1 to table3, fig1, fig2, fig5 to fig12, or all.")],
    out: Annotated[Path, typer.Option(help="Folder of everything; the same command resumes from it.")],
    models: Annotated[
        str,
        typer.Option(
            help=f"The paper's models ({', '.join(paper_models())}), demo, or checkpoints' folders; with commas."
        ),
    ] = ",".join(paper_models()),
    model_args: Annotated[
        str,
        typer.Option(
            "--model-args", help="Further arguments of every model, as after lmms-eval's --model_args: dtype=float32."
        ),
    ] = "",
    limit: Annotated[
        int | None,
        typer.Option(min=2, help="Only the first documents of each task, an even number. Default with demo: 12."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods of the figures: random,fastv,dart;order=reference,sgl;guide=FOLDER.")
    ] = None,
    keeps: Annotated[
        str | None, typer.Option(help="What they keep, instead of the paper's: 0.1,0.25 or 60t,148t.")
    ] = None,
    block: Annotated[
        int | None, typer.Option(min=1, help="Side of a unit of information, as for `information`. Default: 2.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the figures, instead of the paper's benchmarks; with commas.")
    ] = None,
    include: Include = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=3, help="Runs of a row that draws at random. Default: 3, with demo 1.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A trial of every part: fewer rows, benchmarks, methods and keeps.")
    ] = False,
    launch: Launch = "",
    shard: Annotated[
        str | None, typer.Option(help="Only one part of the work: 3/8. Without it, all parts are collected.")
    ] = None,
    cluster: Cluster = None,
    cluster_option: ClusterOption = None,
    parts: Annotated[int, typer.Option(min=1, help="With --cluster: the number of jobs.")] = 8,
    rate: Annotated[float, typer.Option(min=0.001, help="TFLOP/s that a GPU sustains, for the estimate.")] = 50.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help=f"Only write the chain ({SCRIPT}), and print its runs and GPU hours.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help=f"Only make the page ({REPORT}) of what is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Reproduce the paper's tables and figures on one page.

    The paper is arXiv 2512.07580. It is a chain of this package's commands, ending in one report page. Items share
    steps: information is measured once. Finished steps are skipped, half-finished ones go on. A failing step is named
    with its log, and the others run. The page marks each claim reproduced, not reproduced or not run, with the interval
    that decides it.

    Example: lmms-prune reproduce all --models demo --out paper
    """
    values = locals()
    _refuse_contradictions(values)
    with _user_errors():
        chosen, plans, steps = _planned(values)
        around, words = _surroundings(plans, values), [*items, *_repeated(values)]
        _write_chain(plans, steps, around, words)
        _show_estimate(steps, rate, as_json or report_only)
        if dry_run:
            return _say(_estimated(steps, rate, out), as_json, f"the chain is in {out / SCRIPT}")
        if cluster is not None:
            _on_cluster(around, cluster, cluster_option or [], parts, words)
        records = {} if report_only else _run(steps, around, len(plans) if plans[0].model.demo else 1, as_json)
        failed = {name: record.reason for name, record in records.items() if record.state == "failed"}
        if shard is None:
            _report(chosen, plans, steps, around, out / REPORT, list(failed), as_json)
        else:
            part = {"shard": shard, "failed": list(failed)}
            _say(part, as_json, f"part {shard} is done; without --shard, all is collected.")
    for name, reason in failed.items():
        typer.echo(f"lmms-prune: {name} failed: {reason}\n  log: {around.out / 'steps' / name}/log.txt", err=True)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one message and exit code 2."""
    from lmms_prune.demo.models import DemoError
    from lmms_prune.errors import ScheduleError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.models.sizes import ArchitectureError
    from lmms_prune.record.information import InformationError
    from lmms_prune.reproduce.items import ReproduceError
    from lmms_prune.sweep.jobs import SweepError

    fixable = (ArgumentError, ArchitectureError, DemoError, InformationError, ReproduceError, ScheduleError, SweepError)
    with plainly(*fixable):
        yield


def _planned(values: Mapping[str, Any]) -> tuple[list[Item], list[ModelPlan], list[Step]]:
    """The items, each model's plan, and all steps.

    Args:
        values: this command's options by name.

    Raises:
        ReproduceError and others: see the message.
    """
    from lmms_prune.harness.tasks import split_pairs
    from lmms_prune.information.options import keeps_of, method_names, refuse_unscored, task_names
    from lmms_prune.reproduce.chain import ChainOptions, arithmetic_steps, plan_model
    from lmms_prune.reproduce.items import ReproduceError, chosen_items
    from lmms_prune.reproduce.models import studied_models

    out, limit, include = (values[name] for name in ("out", "limit", "include"))
    if "," in str(out):
        raise ReproduceError(f"--out {out}: lmms-eval splits paths at commas; use another folder.")
    chosen = chosen_items(values["items"])
    studied = studied_models(values["models"], values["model_args"])
    demo = studied[0].demo
    limit = (QUICK_LIMIT if values["quick"] else DEMO_LIMIT) if demo and limit is None else limit
    if reason := split_pairs(limit, None, ["mme"]):
        raise ReproduceError(f"--limit: {reason}")
    if values["methods"] is not None:
        method_names(values["methods"], options=True)
    if values["keeps"] is not None:
        keeps_of(values["keeps"])
    named = tuple(task_names(values["tasks"])) if values["tasks"] else ()
    for model in studied if named else []:
        refuse_unscored(named, model.wrapper, include)
    options = ChainOptions(
        items=tuple(chosen),
        limit=limit,
        methods=values["methods"],
        keeps=values["keeps"],
        block=values["block"],
        tasks=named,
        seeds=values["seeds"] or (1 if demo else 3),
        quick=values["quick"],
        include=include,
    )
    usable = _usable(chosen, studied, values["models"], "all" in values["items"])
    plans = [plan_model(model, out.absolute(), options) for model in usable]
    return chosen, plans, [*arithmetic_steps(chosen), *(step for plan in plans for step in plan.steps)]


def _usable(
    chosen: Sequence[Item], studied: Sequence[StudiedModel], models: str, everything: bool
) -> list[StudiedModel]:
    """The models that some item is about.

    Args:
        chosen: the items.
        studied: the models of ``--models``.
        models: its text, for messages.
        everything: whether all items are asked for; those about other models are then left out.

    Raises:
        ReproduceError: an item is about none of the models, or a model is too shallow for one.
    """
    from lmms_prune.configs.table import TABLES
    from lmms_prune.reproduce.items import ReproduceError, refuse_shallow

    usable = [model for model in studied if any(model.makes(item) for item in chosen)]
    for model in usable:
        refuse_shallow([item for item in chosen if model.makes(item)], model.name, model.sizes.layers)
    lacking = [item for item in chosen if not any(model.makes(item) for model in studied)]
    if lacking and (not usable or not everything):
        numbers = {number for item in lacking for number in item.tables}
        tables = {model: TABLES[name] for model, name in paper_models().items() if TABLES[name].number in numbers}
        likes = " or ".join(f"{model} (or a folder of {table.family.title})" for model, table in tables.items())
        names = ", ".join(item.name for item in lacking)
        raise ReproduceError(f"{names}: not about --models {models}; give {likes}, or demo.")
    return usable


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    """End the command if its options, by name, contradict each other or say nothing."""
    from lmms_prune.sweep.cluster import CLUSTERS

    shard, cluster, report_only = (values[name] for name in ("shard", "cluster", "report_only"))
    for name in ("methods", "keeps", "tasks"):
        if values[name] is not None and not values[name].strip(" ,"):
            fail(f"--{name} {values[name]!r} names nothing; leave it out for the paper's.")
    if values["cluster_option"] and cluster is None:
        fail(f"--cluster-option {values['cluster_option'][0]}: it belongs to --cluster.")
    if cluster is not None and cluster not in CLUSTERS:
        fail(f"--cluster {cluster}: write {' or '.join(CLUSTERS)}.")
    if shard is not None and cluster is not None:
        fail(f"--shard {shard} and --cluster {cluster} both divide the work; use one of them.")
    if values["dry_run"] and report_only:
        fail("--dry-run and --report-only: the first only shows what would run, the second only what is there.")
    if shard is not None and report_only:
        fail(f"--shard {shard} and --report-only: the page is made of all parts; leave --shard out.")
    if report_only and not (values["out"] / "steps").is_dir():
        fail(f"--report-only: {values['out']} holds no steps, so nothing has run there yet; name the folder of a run.")


def _surroundings(plans: Sequence[ModelPlan], values: Mapping[str, Any]) -> Surroundings:
    """Where the steps run; makes the folder.

    Args:
        plans: the models' plans.
        values: this command's options by name.
    """
    from lmms_prune.record.files import make_folder
    from lmms_prune.reproduce.runner import Surroundings
    from lmms_prune.sweep.jobs import shard_of

    out, shard = values["out"], values["shard"]
    shard_of(shard)
    make_folder(out)
    around = Surroundings(out.absolute(), launch=values["launch"], shard=shard, secrets=SECRETS.get())
    return _in_mirror(around, plans[0].options) if plans[0].model.demo else around


def _in_mirror(around: Surroundings, options: ChainOptions) -> Surroundings:
    """The demo's surroundings: its mini benchmarks, drawn if they are not there, and no network."""
    from dataclasses import replace

    from lmms_prune.demo.benchmarks import mirror_in
    from lmms_prune.record.files import WriteError

    try:
        mirror = mirror_in(around.out, max(4, options.limit or 4))
    except OSError as error:
        raise WriteError(around.out, error) from error
    own = {"HF_HOME": str(around.out / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return replace(around, folder=mirror, environment={**ENVIRONMENT.get(), **own})


def _repeated(values: Mapping[str, Any]) -> list[str]:
    """The options of this command as words, for the same work in another process."""
    words = ["--out", str(Path(values["out"]).absolute()), "--models", values["models"]]
    for name in ("model_args", "limit", "methods", "keeps", "block", "tasks", "include", "seeds", "launch"):
        option = {"model_args": "--model-args", "include": "--include-path"}.get(name, f"--{name}")
        words += [option, str(values[name])] if values[name] else []
    return [*words, *(["--quick"] if values["quick"] else [])]


def _write_chain(plans: Sequence[ModelPlan], steps: Sequence[Step], around: Surroundings, words: list[str]) -> None:
    """Write the sweeps' files, and the chain as a shell script."""
    from lmms_prune.record.files import write
    from lmms_prune.record.redaction import redacted

    for plan in plans:
        for path, text in plan.configs.items():
            write(path, redacted(text, around.secrets))
    lines = ["#!/usr/bin/env bash", "# The steps of `lmms-prune reproduce`, one after the other.", "set -euo pipefail"]
    if around.folder is not None:
        lines += [f"cd {shlex.quote(str(around.folder))}", "export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1"]
        lines.append(f"export HF_HOME={shlex.quote(str(around.out / 'huggingface'))}")
    for step in steps:
        lines += ["", f"# {step.name}: {', '.join(step.items)}", shlex.join(["lmms-prune", *around.words(step)])]
    lines += ["", "# The page, from what is there:", shlex.join(["lmms-prune", "reproduce", *words, "--report-only"])]
    write(around.out / SCRIPT, redacted("\n".join(lines) + "\n", around.secrets))


def _show_estimate(steps: Sequence[Step], rate: float, quiet: bool) -> None:
    """Print runs and GPU hours of every step, and what the estimate assumes."""
    from rich import box
    from rich.table import Table

    from lmms_prune.reproduce.estimate import assumptions, gpu_hours

    if quiet:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("step", "for"):
        table.add_column(column, overflow="fold")
    for column in ("runs, documents", "GPU hours"):
        table.add_column(column, justify="right")
    for step in steps:
        hours = gpu_hours(step.flops, rate) if step.flops else 0.0
        table.add_row(step.name, ", ".join(step.items), str(step.pieces), f"{hours:.2f}" if hours else "")
    total = gpu_hours(sum(step.flops for step in steps), rate)
    table.add_row("all", "", str(sum(step.pieces for step in steps)), f"{total:.2f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(assumptions(rate), soft_wrap=True)


def _estimated(steps: Sequence[Step], rate: float, out: Path) -> dict[str, Any]:
    from lmms_prune.reproduce.estimate import assumptions, gpu_hours

    described = [
        {
            "step": step.name,
            "items": list(step.items),
            "command": step.command,
            "runs": step.pieces,
            "gpu_hours": gpu_hours(step.flops, rate),
        }
        for step in steps
    ]
    total = gpu_hours(sum(step.flops for step in steps), rate)
    return {"script": str(out / SCRIPT), "steps": described, "gpu_hours": total, "assumptions": assumptions(rate)}


def _say(record: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(record) if as_json else text)


def _run(steps: Sequence[Step], around: Surroundings, lanes: int, as_json: bool) -> dict[str, StepRecord]:
    """Run the chain with one progress display."""
    from lmms_prune.harness.installation import InstallationError, refuse_broken
    from lmms_prune.reproduce.runner import ChainProgress, run_chain

    with plainly(InstallationError):
        refuse_broken()
    with Progress("runs", len(steps)) as progress, ended_by_sigterm():

        def moved(done: int, total: int, running: str) -> None:
            progress.begin(running)
            progress.count(done, total)

        try:
            return run_chain(steps, around, ChainProgress(steps, progress.say, moved), lanes)
        except (KeyboardInterrupt, SystemExit):
            typer.echo("interrupted; the same command goes on from here.", err=True)
            raise


def _on_cluster(around: Surroundings, cluster: str, options: Sequence[str], parts: int, words: list[str]) -> None:
    """Run all parts as cluster jobs, and return when they have ended.

    Raises:
        SweepError: submitit cannot be used, or a part failed.
    """
    from lmms_prune.sweep.cluster import refuse_secrets, submitter
    from lmms_prune.sweep.jobs import SweepError

    program = [str(Path(sys.executable).with_name("lmms-prune")), "reproduce", *words]
    refuse_secrets([*program, *options], cluster, around.secrets)
    submit = submitter(around.out / ".jobs", cluster, options)
    jobs = {f"{part}/{parts}": submit([*program, "--shard", f"{part}/{parts}"]) for part in range(1, parts + 1)}
    typer.echo(f"{parts} jobs are submitted; their files are in {around.out / '.jobs'}.", err=True)
    while not all(job.done() for job in jobs.values()):
        time.sleep(2)
    if failed := [part for part, job in jobs.items() if job.exception() is not None]:
        log = jobs[failed[0]].paths.stderr
        raise SweepError(f"--cluster {cluster}: part {', '.join(failed)} failed; log: {log}. The same command goes on.")


def _report(
    chosen: Sequence[Item],
    plans: Sequence[ModelPlan],
    steps: Sequence[Step],
    around: Surroundings,
    path: Path,
    failed: Sequence[str],
    as_json: bool,
) -> None:
    """Make the page, and say what it says."""
    from lmms_prune.reproduce.report import make_report

    counts, missing = make_report(chosen, plans, steps, around, path)
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    text = f"{words}; the page is {path}" + (f"; not finished: {', '.join(missing)}" if missing else "")
    _say({"report": str(path), "claims": counts, "missing": list(missing), "failed": list(failed)}, as_json, text)
