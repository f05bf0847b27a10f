"""The command ``lmms-prune bench``. It imports heavy modules only when it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lmms_prune.bench.options import (
    Arch,
    Dtype,
    GridSides,
    Layers,
    Model,
    check,
    check_plot_path,
    numbers,
    one_model,
    sides,
    user_errors,
)
from lmms_prune.bench.suite_command import DEFAULT_OUT, measure_everything, refuse_foreign_options
from lmms_prune.information.options import Include
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Json

if TYPE_CHECKING:
    from lmms_prune.leaderboard.cost_table import MeasuredCost

DEFAULT_NEW_TOKENS = "1,32"
HYBRID = "dart@2:0.44,random@20:0.07"


def bench(
    schedules: Annotated[
        list[str] | None, typer.Argument(help=f"Schedules to compare with the unpruned model. Default: {HYBRID}.")
    ] = None,
    model: Model = None,
    arch: Arch = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cpu; with --suite, cuda.", show_default=False)
    ] = None,
    grid: GridSides = "24x24",
    batch: Annotated[str, typer.Option(help="Batch size; several separated by commas.")] = "1",
    text_tokens: Annotated[str, typer.Option(help="Text tokens of a prompt; several separated by commas.")] = "60",
    new_tokens: Annotated[
        str,
        typer.Option(
            help="Tokens of an answer; several separated by commas. Default with --tasks: as many as the unpruned model's "
            "own answer has."
        ),
    ] = DEFAULT_NEW_TOKENS,
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each, after one warm-up run.")] = 7,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile norms and MLPs by torch.compile, for all schedules alike.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Time real documents of these lmms-eval tasks, one at a time, not random inputs.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: only the first documents of each.")] = None,
    model_args: Annotated[
        str,
        typer.Option(
            "--model_args",
            help="With --model, lmms-eval's arguments: peft=ADAPTER, load_in_4bit=true; with --tasks also prompt=vicuna, ….",
        ),
    ] = "",
    include: Include = None,
    results: Annotated[
        Path | None,
        typer.Option(help="With --tasks: results of lmms-eval, for the accuracy beside the paper's Table 3."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this .png or .svg file.")] = None,
    suite: Annotated[
        bool, typer.Option("--suite", help="Measure everything on one GPU, as a page and a JSON; see --minutes.")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0, help="With --suite: stop after so long. Another call goes on.")] = 10,
    out: Annotated[Path, typer.Option(help="With --suite: the folder of the page and the JSON.")] = DEFAULT_OUT,
    parts: Annotated[str | None, typer.Option(help="With --suite: names of parts, separated by commas.")] = None,
    small: Annotated[
        bool, typer.Option("--small", help="With --suite: the demo's models and short runs, for a trial on a CPU.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time schedules relative to the unpruned model, split by part, and compare the speed-up with the FLOPs' prediction.

    All run in turn in one process with the same attention kernel. Images and texts are random; every answer has its
    full length. On a CPU, times are CPU time of all threads.

    --tasks times real documents instead, with an evaluation's prompts and pixels. Schedules of the paper's Table 3 on
    LLaVA-1.5-7B are then tabulated beside the printed figures.

    --suite runs this and the other measurements, the certificate included, one after another with settings of its own.
    """
    refuse_foreign_options(bench, locals())
    if suite:
        return measure_everything(device or "cuda", small, minutes, out, parts, as_json)
    device = device or "cpu"
    one_model("bench", model, arch, layers)
    _refuse_other_inputs(locals())
    if plot is not None:
        check_plot_path(plot)
    shape = sides(grid)
    sweep = [
        numbers(*option) for option in (("batch", batch), ("text-tokens", text_tokens), ("new-tokens", new_tokens))
    ]
    paper: list[MeasuredCost] = []
    with plainly(*user_errors()):
        parsed = [Schedule.parse(text) for text in schedules or [HYBRID]]
        check(parsed, arch or str(model), layers, shape)  # fail before the weights are made or loaded, which takes long
        from lmms_prune.bench.clock import clock_name
        from lmms_prune.bench.models import compile_layers, given_model
        from lmms_prune.bench.report import chart, described, tables
        from lmms_prune.bench.schedules import Workload, time_schedules

        progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
        if tasks is not None:
            from lmms_prune.bench.documents import DocumentRequest, time_tasks

            lengths = None if new_tokens == DEFAULT_NEW_TOKENS else sweep[2]
            request = DocumentRequest(str(model), dtype, device, model_args, tasks, limit, include, results, lengths)
            title, measured, paper = time_tasks(request, parsed, repeats, compiled, progress)
        else:
            ready = given_model(model, arch, layers, dtype, device, model_args)
            if compiled:
                compile_layers(ready.model)
            cases = [Workload(rows, text, new) for rows, text, new in product(*sweep)]
            image = None if ready.fixed else shape
            title, measured = ready.title, time_schedules(ready.model, parsed, cases, image, repeats, progress)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": title,
                    "clock": clock_name(device),
                    "compiled": compiled,
                    "repeats": repeats,
                    **described(measured),
                    **({"paper": [asdict(row) for row in paper]} if tasks is not None else {}),
                }
            )
        )
    else:
        for table in tables(measured, title, device):
            Console(markup=False).print(table)
        if paper:
            from lmms_prune.leaderboard.cost_table import OUR_TIMES, TITLE, cost_table
            from lmms_prune.leaderboard.terminal import show_table

            show_table(cost_table(paper, f"{TITLE}, {title}", [OUR_TIMES]), Console(highlight=False))
    # Last, so that a full disk does not lose the measurements.
    if plot is not None:
        chart(measured, plot, title, device)


def _refuse_other_inputs(values: Mapping[str, Any]) -> None:
    """End the command if options of random inputs are given with ``--tasks``, or options of ``--tasks`` without it."""
    random, real = (
        {"arch": None, "grid": "24x24", "batch": "1", "text_tokens": "60"},
        ("limit", "include", "results"),
    )
    if values["arch"] is not None and values["model_args"]:
        fail(f"bench --model_args {values['model_args']}: it is about a checkpoint; give --model, or leave it out.")
    if values["tasks"] is None:
        for name in real:
            if values[name] not in (None, ""):
                flag = {"include": "include_path"}.get(name, name)
                fail(f"bench --{flag}: it is about the documents of --tasks; give --tasks too, or leave it out.")
        return
    for name, default in random.items():
        if values[name] != default:
            reason = (
                "a document needs a checkpoint with a processor: --model"
                if name == "arch"
                else "documents have their own"
            )
            fail(f"bench --{name.replace('_', '-')} {values[name]}: with --tasks, {reason}; leave it out.")
