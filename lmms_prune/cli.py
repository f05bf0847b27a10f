"""The command line ``lmms-prune …``. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import json
import os
import shlex
from collections import UserDict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from lmms_prune import __version__
from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.spec import print_option
from lmms_prune.record.files import WriteError
from lmms_prune.record.redaction import secret_values
from lmms_prune.terminal.console import ENVIRONMENT, SECRETS, ended_by_sigterm, fail, plainly
from lmms_prune.terminal.help import Command, Group
from lmms_prune.terminal.options import DEFAULT_WRAPPER, Json

# The commands in the order of the help, under the heading of each group.
PANELS = {
    "Run": ("demo", "sweep", "reproduce"),
    "Plan": ("methods", "schedule", "calibrate", "check", "configs", "tasks", "export"),
    "Compare": ("leaderboard", "gate", "verify"),
    "Understand": ("show", "information", "horizon"),
    "Time": ("bench", "bench-methods", "bench-information", "bench-throughput", "bench-waits"),
    "Publish": ("pack", "merge"),
    "Develop": ("new-method", "test-method", "doctor"),
}
# Module and name of each command outside this file: a function, or a group of commands.
COMMANDS = {
    "schedule": "lmms_prune.configs.schedule_command:schedule",
    "export": "lmms_prune.configs.export_command:export",
    "check": "lmms_prune.configs.commands:check_files",
    "configs": "lmms_prune.configs.commands:write_configs",
    "tasks": "lmms_prune.configs.commands:list_tasks",
    "sweep": "lmms_prune.sweep.commands:sweep",
    "leaderboard": "lmms_prune.leaderboard.commands:leaderboard",
    "gate": "lmms_prune.leaderboard.commands:gate",
    "verify": "lmms_prune.leaderboard.verify.commands:verify",
    "pack": "lmms_prune.leaderboard.board.commands:pack",
    "merge": "lmms_prune.leaderboard.board.commands:merge",
    "show": "lmms_prune.information.commands:show",
    "information": "lmms_prune.information.commands:information",
    "horizon": "lmms_prune.information.commands:horizon",
    "calibrate": "lmms_prune.calibration.commands:app",
    "bench": "lmms_prune.bench.commands:bench",
    "bench-methods": "lmms_prune.bench.other_commands:bench_methods",
    "bench-information": "lmms_prune.bench.other_commands:bench_information",
    "bench-throughput": "lmms_prune.bench.other_commands:bench_throughput",
    "bench-waits": "lmms_prune.bench.other_commands:bench_waits",
    "reproduce": "lmms_prune.reproduce.commands:reproduce",
    "doctor": "lmms_prune.certificate.commands:doctor",
    "new-method": "lmms_prune.certificate.own_commands:new_method",
    "test-method": "lmms_prune.certificate.own_commands:try_method",
}
# The kinds of methods, in the order of the README's table.
KINDS = ("importance", "diversity", "hybrid", "merging", "control", "oracle")
# Subcommands that a group takes from another module.
SUBCOMMANDS = {"calibrate": {"hybrid": "lmms_prune.calibration.hybrid:hybrid"}}


class _Commands(UserDict[str, Any]):
    """Commands by name, each imported on first use, so that no command waits for the imports of others."""

    def __getitem__(self, name: str) -> Any:
        command = self.data[name]
        if isinstance(command, str):
            command = self.data[name] = _command(name, command)
        command.rich_help_panel = next(panel for panel, names in PANELS.items() if name in names)
        return command


def _command(name: str, location: str) -> Any:
    """Import the command at `location`, a function or a group."""
    target = _imported(location)
    group = target if isinstance(target, typer.Typer) else typer.Typer(rich_markup_mode="rich", add_completion=False)
    if group is not target:
        group.command(name, cls=Command)(target)
    for subcommand, sublocation in SUBCOMMANDS.get(name, {}).items():
        group.command(subcommand, cls=Command)(_imported(sublocation))
    command = typer.main.get_command(group)
    command.name = name
    return command


def _imported(location: str) -> Any:
    module, _, attribute = location.partition(":")
    return getattr(import_module(module), attribute)


class _Lazy(Group):
    """A group with the commands of this file and those of COMMANDS."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands({**self.commands, **COMMANDS})

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names in the order of the help."""
        return [name for names in PANELS.values() for name in names]

    def invoke(self, ctx: Any) -> Any:
        """Run a command; report a full or read-only disk, which any command may meet, without a traceback."""
        with plainly(WriteError):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Lazy, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False
)


def _version(requested: bool) -> bool:
    if requested:
        typer.echo(f"lmms-prune {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Schedules of visual-token pruning methods for LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL and Qwen3-VL, inside lmms-eval."""
    # Secrets are read from the environment only here; commands that write files redact them.
    SECRETS.set(secret_values(os.environ))
    ENVIRONMENT.set(os.environ)


@app.command(cls=Command)
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
    as_json: Json = False,
) -> None:
    """List every method, or describe one with its options.

    The list has each method's class, possible layers, how many tokens it keeps, and what it reads.

    Example: lmms-prune methods sparsevlm
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if name is not None and name not in METHODS:
        fail(f"methods {name}: unknown method.{did_you_mean(name, list(METHODS))}")
    if markdown and (as_json or name is not None):
        fail(f"methods --markdown prints the table of all methods; leave out {'--json' if as_json else name}.")
    if as_json:
        shown = METHODS.values() if name is None else [METHODS[name]]
        typer.echo(json.dumps({"methods": [_described(spec) for spec in shown]}))
        return
    if markdown:
        typer.echo(markdown_table())
        return
    if name is not None:
        _show_one(METHODS[name])
        return
    table = Table(box=box.SIMPLE_HEAD)
    # Columns that do not fit a narrow terminal are in each method's own view and in the JSON.
    wide_columns = ("training-free", "arXiv") if Console().width >= 140 else ()
    for column in ("method", "class", "layers", "keeps", "reads", *wide_columns):
        table.add_column(column, no_wrap=column in ("method", "layers", "arXiv"), overflow="fold")
    for spec in METHODS.values():
        row = (spec.name, _class(spec), _layers(spec), spec.count_text, ", ".join(spec.reads) or "nothing")
        wide_cells = ("no" if spec.trained else "yes", _arxiv(spec))
        table.add_row(*row, *(wide_cells if wide_columns else ()))
    Console().print(table)
    Console().print("lmms-prune methods NAME shows one with its options, its example and its paper.")


def markdown_table() -> str:
    """Return the README's table of methods in Markdown: a row for each kind, with the layers and the paper of each method."""
    rows = []
    for kind in KINDS:
        specs = [spec for spec in METHODS.values() if spec.kind == kind]
        described = (f"`{spec.name}` ({_layers(spec)}, [{_arxiv(spec)}]({spec.paper}))" for spec in specs)
        rows.append(f"| {kind} | {', '.join(described)} |")
    return "\n".join(["| kind | method (acts at layers, paper) |", "|---|---|", *rows])


def _layers(spec: MethodSpec) -> str:
    return spec.layers_text.replace("1 and deeper", "≥ 1")


def _arxiv(spec: MethodSpec) -> str:
    return spec.paper.rsplit("/", 1)[1]


def _class(spec: MethodSpec) -> str:
    return spec.kind + (", rewrites" if spec.rewrites and spec.kind != "merging" else "")


def _show_one(spec: MethodSpec) -> None:
    """Print all facts about one method, one per line."""
    lines = {
        "class": _class(spec) + (", needs trained weights" if spec.trained else ", training-free"),
        "reads": spec.reads_text,
        "layers": spec.layers_text,
        "keeps": spec.count_text,
        "example": spec.example,
        "paper": spec.paper,
    }
    for option in spec.options:
        lines[f";{option.name}="] = (
            f"{option.help} (default {print_option(option.default) or 'none'}; {option.allowed})"
        )
    typer.echo("\n".join([spec.name, *(f"  {name:<14} {text}" for name, text in lines.items())]))


def _described(spec: MethodSpec) -> dict[str, Any]:
    """Return one method's facts for ``--json``."""
    return {
        "name": spec.name,
        "paper": spec.paper,
        "class": spec.kind,
        "training_free": not spec.trained,
        "reads": list(spec.reads),
        "lowest_layer": spec.lowest_layer,
        "highest_layer": spec.highest_layer,
        "keep": spec.keep,
        "count": spec.count_text,
        "rewrites": spec.rewrites,
        "example": spec.example,
        "options": [{"name": o.name, "default": o.default, "allowed": o.allowed, "help": o.help} for o in spec.options],
    }


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder of data and results.")] = Path("lmms-prune-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer schedules and questions: about two minutes.")] = False,
    schedules: Annotated[
        list[str] | None,
        typer.Option(
            "--schedule",
            help="A schedule, optionally with a budget: 'dart@1:?,budget=0.5', 'my_idea.py@1:0.4'; repeatable. It is run with "
            "the unpruned model and random at the same tokens, and compared with the best row that the folder holds. "
            "Default: hybrids, single methods, controls.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Task names, separated by commas; default: all ten benchmarks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run two small trained models on ten small benchmarks.

    They run through lmms-eval, without a network or a GPU. They have 12 decoder layers, so a schedule's layers go up to
    11. The full form takes about twelve minutes on two cores.

    Example: lmms-prune demo --schedule 'dart@1:?,budget=0.5' --tasks gqa,pope
    """
    from rich.console import Console

    from lmms_prune.harness.installation import InstallationError, refuse_broken

    with plainly(InstallationError):
        refuse_broken()
    from lmms_prune.demo.models import DemoError
    from lmms_prune.demo.processes import RunError
    from lmms_prune.demo.run import (
        FULL,
        QUICK,
        QUICK_ROWS,
        ROWS,
        DemoRow,
        judged,
        run_demo,
        tables,
        task_names,
        verdicts,
    )

    console = Console(stderr=as_json)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out.absolute() / "huggingface")}
    try:
        compared = tuple(map(DemoRow.checked, schedules or ()))
        rows = judged(compared) if compared else QUICK if quick else FULL
        names = task_names(tasks)
        with ended_by_sigterm():
            record = run_demo(out.absolute(), rows, QUICK_ROWS if quick else ROWS, names, offline, console, compared)
    except (ScheduleError, DemoError, RunError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"--out {out}: {error.strerror or error}")
    if as_json:
        comparisons = [
            {**c, "differences": [difference.to_dict() for difference in c["differences"]]}
            for c in record["comparisons"]
        ]
        typer.echo(json.dumps({**record, "comparisons": comparisons}))
    else:
        for table in tables(record, names):
            console.print(table)
        for line in verdicts(record):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if record["runs"]:
            console.print(_AFTERWARDS, highlight=False)
            console.print(
                f"  cd {shlex.quote(record['mirror'])}\n  {record['command']}\n",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            console.print(f"On a real checkpoint:\n\n  {_FRONT_DOOR}\n", soft_wrap=True, highlight=False)
    for failure in record["failures"]:
        typer.echo(f"lmms-prune: {failure['model']}, schedule {failure['schedule']}: {failure['error']}", err=True)
    if record["failures"]:
        raise typer.Exit(1)


_AFTERWARDS = """tokens: visual tokens, average over the decoder's layers (avg_visual_tokens). MME: total of 1600; POPE: F1 score; all but MME in percent.
kept: the mean share of the unpruned scores that is left, in percent. random@1:1 keeps every token: it must equal none.

One of these runs, as you would type it (lmms-eval's own table has shares of 1, and OCRBench's points of 1000):
"""
_FRONT_DOOR = (
    f"lmms-eval --model {DEFAULT_WRAPPER} --model_args schedule=dart@2:0.44,random@20:0.07 --tasks textvqa_val"
)
