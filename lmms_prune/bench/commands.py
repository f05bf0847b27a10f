"""The command ``lmms-prune bench``. It imports heavy modules only when it runs."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated

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
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import plainly
from lmms_prune.terminal.options import Json

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
    new_tokens: Annotated[str, typer.Option(help="Tokens of an answer; several separated by commas.")] = "1,32",
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each, after one warm-up run.")] = 7,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile norms and MLPs by torch.compile, for all schedules alike.")
    ] = False,
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

    --suite runs this and the other measurements, the certificate included, one after another with settings of its own.
    """
    refuse_foreign_options(bench, locals())
    if suite:
        return measure_everything(device or "cuda", small, minutes, out, parts, as_json)
    device = device or "cpu"
    one_model("bench", model, arch, layers)
    if plot is not None:
        check_plot_path(plot)
    shape = sides(grid)
    sweep = [
        numbers(*option) for option in (("batch", batch), ("text-tokens", text_tokens), ("new-tokens", new_tokens))
    ]
    with plainly(*user_errors()):
        parsed = [Schedule.parse(text) for text in schedules or [HYBRID]]
        check(parsed, arch or str(model), layers, shape)  # fail before the weights are made or loaded, which takes long
        from lmms_prune.bench.clock import clock_name
        from lmms_prune.bench.models import compile_layers, given_model
        from lmms_prune.bench.report import chart, described, tables
        from lmms_prune.bench.schedules import Workload, time_schedules

        ready = given_model(model, arch, layers, dtype, device)
        if compiled:
            compile_layers(ready.model)
        cases = [Workload(*numbers) for numbers in product(*sweep)]
        rows = None if ready.fixed else shape
        progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
        measured = time_schedules(ready.model, parsed, cases, rows, repeats, progress)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "model": ready.title,
                    "clock": clock_name(device),
                    "compiled": compiled,
                    "repeats": repeats,
                    **described(measured),
                }
            )
        )
    else:
        for table in tables(measured, ready.title, device):
            Console(markup=False).print(table)
    # Last, so that a full disk does not lose the measurements.
    if plot is not None:
        chart(measured, plot, ready.title, device)
