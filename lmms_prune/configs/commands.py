"""``lmms-prune check``, ``configs`` and ``tasks``: configuration and task files. None of them needs torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lmms_prune.configs.check import Checked, check
from lmms_prune.configs.command_line import is_command, run_of
from lmms_prune.configs.render import write
from lmms_prune.configs.runs import Run, files, is_ours, read
from lmms_prune.errors import ConfigError
from lmms_prune.harness.tasks import own_groups, own_tasks, task_configs
from lmms_prune.terminal.console import plainly
from lmms_prune.terminal.options import Json


def check_files(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES", help="--config files of lmms-eval, or folders of them; or -- and a command line."
        ),
    ],
    skip_others: Annotated[
        bool,
        typer.Option(
            "--skip-others", help="Leave out files whose model is not one of this package's, as the commit hook does."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check an evaluation before it runs, without a model.

    Checked are --config files of lmms-eval, or the command line after --: lmms-prune check -- lmms-eval --model ….
    Their keys, arguments, schedule, layers, budget and tasks are checked. A file may claim a budget in a comment: '#
    budget: 192t' (visual tokens per layer) or '# budget: 50%'. If the schedule misses it by more than 5 %, the comment
    must state the actual value: '# budget: 192t, really 206.53t'.

    Example: lmms-prune check model_configs
    """
    sources: dict[Path, Callable[[], list[Run]]]
    with plainly(ConfigError):
        if is_command(paths):
            sources = {Path("lmms-eval"): lambda: [run_of(paths)]}
        else:
            named = files(map(Path, paths))
            sources = {path: partial(read, path) for path in named if not skip_others or is_ours(path)}
    wrong, reports = 0, []
    for path, runs in sources.items():
        try:
            results = [check(run) for run in runs()]
        except ConfigError as error:
            wrong += 1
            reports.append({"file": str(path), "problems": [str(error)]})
            typer.echo(f"{path}: {error}", err=True)
            continue
        for checked in results:
            wrong += bool(checked.problems)
            reports.append(_as_dict(checked))
            for problem in checked.problems:
                typer.echo(f"{checked.run}: {problem}", err=True)
            if not checked.problems and not as_json:
                typer.echo(f"{checked.run}: {_summary(checked)}")
    if as_json:
        typer.echo(json.dumps({"files": len(sources), "wrong": wrong, "runs": reports}))
    if wrong:
        raise typer.Exit(2)


def write_configs(
    out: Annotated[Path, typer.Option(help="Folder of the files.")] = Path("model_configs"),
) -> None:
    """Write --config files of the paper's rows and controls.

    The rows are those of the paper's Tables 1 and 2.

    Example: lmms-prune configs --out model_configs
    """
    # In a checkout, name the task folder relatively, so that the files do not depend on the checkout's path.
    include = task_configs().name if task_configs().resolve() == Path("task_configs").resolve() else str(task_configs())
    written = write(out, include)
    typer.echo(f"{len(written)} files in {out}, with include_path: {include}")


def list_tasks(
    path: Annotated[
        bool, typer.Option("--path", help="Print only the folder, for lmms-eval's --include_path.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List this package's lmms-eval tasks and their folder.

    lmms-eval finds them by --include_path "$(lmms-prune tasks --path)".

    Example: lmms-prune tasks --path
    """
    if path:
        typer.echo(str(task_configs()))
        return
    tasks, groups = own_tasks(), own_groups()
    if as_json:
        typer.echo(json.dumps({"path": str(task_configs()), "tasks": sorted(tasks), "groups": groups}))
        return
    table = Table("group or task", "tasks, or what it is", box=box.SIMPLE_HEAD)
    for name, members in groups.items():
        table.add_row(name, ", ".join(members))
    for name, file in tasks.items():
        # Each file starts with a comment, and its first sentence describes the task.
        text = " ".join(file.read_text(encoding="utf-8").replace("#", "").split())
        table.add_row(name, re.split(r"[.:] ", text, maxsplit=1)[0])
    Console().print(table)
    Console().print(f"They are in {task_configs()}", soft_wrap=True, highlight=False)


def _summary(checked: Checked) -> str:
    """One line on a run without problems."""
    parts = [str(checked.schedule)]
    if checked.percent is not None and checked.schedule is not None:
        bound = "at most " if checked.schedule.at_most else ""
        parts.append(
            f"{bound}{checked.percent:.1f}% of the visual tokens a layer, {bound}{checked.flops:.1f}% of the FLOPs"
        )
    if checked.run.claim:
        parts.append(f"budget {checked.run.claim}")
    return "; ".join([*parts, *checked.notes])


def _as_dict(checked: Checked) -> dict[str, Any]:
    """One run as the JSON output lists it."""
    run = checked.run
    findings = {"file": str(run.path), "run": run.number, "problems": checked.problems, "notes": checked.notes}
    schedule = None if checked.schedule is None else str(checked.schedule)
    budget = None if run.claim is None else str(run.claim)
    numbers = {"percent_visual_tokens": checked.percent, "percent_flops": checked.flops}
    return {**findings, "schedule": schedule, "budget": budget, **numbers}
