"""``lmms-prune …``: the command line. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmms_prune import __version__
from lmms_prune.schedule import Schedule, ScheduleError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"lmms-prune {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Schedules of visual-token pruning methods for LLaVA-1.5 and Qwen2.5-VL, inside lmms-eval."""


@app.command()
def schedule(
    text: Annotated[str, typer.Argument(help="A schedule such as 'dart@2:0.44,random@20:0.07', or a preset's name.")],
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of the model.")] = 32,
    visual_tokens: Annotated[int, typer.Option(min=1, help="Visual tokens of one image.")] = 576,
    budget: Annotated[str | None, typer.Option(help="Solves the one '?': '192t' or a ratio such as '0.5'.")] = None,
    as_json: Json = False,
) -> None:
    """Check a schedule, solve its '?', and show what each stage keeps and the average over the layers."""
    try:
        read = Schedule.parse(text)
        if budget is not None:
            read = read.solve(budget, layers, visual_tokens)
        read.check(layers, [visual_tokens])
    except ScheduleError as error:
        _fail(str(error))
    kept = [sum(images) for images in read.plan([visual_tokens])]
    average = float(read.average(layers, [visual_tokens]))
    if as_json:
        stages = [
            {"method": s.method, "layer": s.layer, "kept_tokens": n, "options": dict(s.options)}
            for s, n in zip(read.stages, kept, strict=True)
        ]
        typer.echo(json.dumps({"schedule": str(read), "stages": stages, "avg_visual_tokens": average}))
        return
    table = Table("stage", "method", "at the input of layer", "kept tokens", "of the original", title=str(read))
    for number, (stage, tokens) in enumerate(zip(read.stages, kept, strict=True), 1):
        table.add_row(str(number), stage.method, str(stage.layer), str(tokens), f"{tokens / visual_tokens:.1%}")
    console = Console()
    console.print(table if read.stages else "The empty schedule prunes nothing.")
    share = average / visual_tokens
    console.print(f"Average over {layers} layers: {average:.2f} of {visual_tokens} visual tokens ({share:.1%}).")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where checkpoints, data and results go.")] = Path("lmms-prune-demo"),
    schedules: Annotated[
        list[str] | None, typer.Option("--schedule", help="A schedule to run; repeatable. Default: none and a hybrid.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Task names with commas; default: all ten benchmarks.")] = None,
    as_json: Json = False,
) -> None:
    """Run both model families through lmms-eval on ten small local benchmarks: no network, no GPU, about two minutes.

    The checkpoints have random weights and 8 decoder layers, so the scores mean nothing and a schedule's layers go up
    to 7; everything else is the real thing.
    """
    from lmms_prune.demo.run import LAYERS, DemoError, run_demo

    console = Console(stderr=as_json)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.absolute() / "huggingface")}
    try:
        for text in schedules or []:
            Schedule.parse(text).check(LAYERS)
        table, record = run_demo(folder.absolute(), schedules, tasks, offline, console)
    except (ScheduleError, DemoError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"--folder {folder}: {error.strerror or error}")
    if as_json:
        typer.echo(json.dumps(record))
        return
    console.print(table)
    console.print("One of these runs, as you would type it:\n")
    console.print(f"  cd {record['mirror']}\n  {record['command']}\n", soft_wrap=True, highlight=False, markup=False)


def _fail(message: str) -> None:
    typer.echo(message if message.startswith("schedule:") else f"lmms-prune: {message}", err=True)
    raise typer.Exit(2)
