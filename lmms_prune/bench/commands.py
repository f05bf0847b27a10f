"""The command ``lmms-prune bench``. It imports heavy modules only when it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lmms_prune.bench.options import (
    Arch,
    BatchSizes,
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
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Device, Include, Json
from lmms_prune.terminal.progress import Progress

if TYPE_CHECKING:
    from lmms_prune.bench.documents import DocumentRequest
    from lmms_prune.bench.models import BenchModel
    from lmms_prune.bench.schedules import ScheduleTiming
    from lmms_prune.leaderboard.cost_table import MeasuredCost

DEFAULT_NEW_TOKENS = "1,32"
HYBRID = "dart@2:0.44,random@20:0.07"


Schedules = Annotated[
    list[str] | None, typer.Argument(help=f"Schedules to compare with the unpruned model. Default: {HYBRID}.")
]
TextTokens = Annotated[str, typer.Option(help="Text tokens of a prompt; several separated by commas.")]
NewTokens = Annotated[
    str,
    typer.Option(
        help="Tokens of an answer; several separated by commas. Default with --tasks: as many as the unpruned model's own "
        "answer has."
    ),
]
Repeats = Annotated[int, typer.Option(min=2, help="Timed runs of each, after one warm-up run.")]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Compile norms and MLPs by torch.compile, for all schedules alike.")
]
Tasks = Annotated[
    str | None, typer.Option(help="Time real documents of these lmms-eval tasks, one at a time, not random inputs.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="With --tasks: only the first documents of each.")]
ModelArgs = Annotated[
    str,
    typer.Option(
        "--model-args",
        help="With --model, as after lmms-eval's --model_args: peft=ADAPTER, load_in_4bit=true; with --tasks also prompt=vicuna, …. With "
        "--arch of images in tiles: unpad=false.",
    ),
]
Results = Annotated[
    Path | None, typer.Option(help="With --tasks: results of lmms-eval, for the accuracy beside the paper's Table 3.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw the times into this .png or .svg file.")]
EverythingOnOneGpu = Annotated[
    bool, typer.Option("--suite", help="Measure everything on one GPU, as a page and a JSON; see --minutes.")
]
Minutes = Annotated[
    float, typer.Option(min=0, max=10_000, help="With --suite: stop after so long. Another call goes on.")
]
Out = Annotated[Path, typer.Option(help="With --suite: the folder of the page and the JSON.")]
Parts = Annotated[str | None, typer.Option(help="With --suite: names of parts, separated by commas.")]
Small = Annotated[
    bool, typer.Option("--small", help="With --suite: the demo's models and short runs, for a trial on a CPU.")
]


@dataclass(frozen=True)
class Timed:
    """What ``bench`` measured.

    Args:
        title: the model's name, dtype and device.
        timings: of each schedule on each workload.
        paper: rows of the paper's Table 3 among the schedules, timed on documents; None for random inputs.
    """

    title: str
    timings: Sequence[ScheduleTiming]
    paper: Sequence[MeasuredCost] | None


def bench(
    schedules: Schedules = None,
    model: Model = None,
    arch: Arch = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    grid: GridSides = "24x24",
    batch_size: BatchSizes = "1",
    text_tokens: TextTokens = "60",
    new_tokens: NewTokens = DEFAULT_NEW_TOKENS,
    repeats: Repeats = 7,
    compiled: Compiled = False,
    tasks: Tasks = None,
    limit: Limit = None,
    model_args: ModelArgs = "",
    include: Include = None,
    results: Results = None,
    plot: Plot = None,
    suite: EverythingOnOneGpu = False,
    minutes: Minutes = 10,
    out: Out = DEFAULT_OUT,
    parts: Parts = None,
    small: Small = False,
    as_json: Json = False,
) -> None:
    """Time schedules relative to the unpruned model.

    Times are split by part, and the speed-up is compared with the FLOPs' prediction. All run in turn in one process
    with the same attention kernel. Images and texts are random; every answer has its full length. On a CPU, times are
    CPU time of all threads.

    --tasks times real documents instead, with an evaluation's prompts and pixels. Schedules of the paper's Table 3 on
    LLaVA-1.5-7B are then tabulated beside the printed figures.

    --suite runs this and the other measurements, the certificate included, one after another with settings of its own.

    Example: lmms-prune bench dart@2:0.44 --arch llava-1.5-7b --batch-size 1,8
    """
    refuse_foreign_options(bench, locals())
    if suite:
        return measure_everything(device, small, minutes, out, parts, as_json)
    one_model("bench", model, arch, layers)
    _refuse_other_inputs(locals())
    if plot is not None:
        check_plot_path(plot)
    shape = sides(grid)
    workloads = (("batch-size", batch_size), ("text-tokens", text_tokens), ("new-tokens", new_tokens))
    sweep = [numbers(*option) for option in workloads]
    with plainly(*user_errors()):
        parsed = [Schedule.parse(text) for text in schedules or [HYBRID]]
        check(parsed, arch or str(model), layers, shape)  # fail before the weights are made or loaded, which takes long
        from lmms_prune.bench.documents import DocumentRequest
        from lmms_prune.bench.models import existing_device, given_model

        device = str(existing_device(device))
        if tasks is not None:
            lengths = None if new_tokens == DEFAULT_NEW_TOKENS else sweep[2]
            request = DocumentRequest(str(model), dtype, device, model_args, tasks, limit, include, results, lengths)
            timed = _time_documents(request, parsed, repeats, compiled)
        else:
            timed = _time_random(
                given_model(model, arch, layers, dtype, device, model_args), parsed, sweep, shape, repeats, compiled
            )
    _show(timed, device, compiled, repeats, as_json)
    # Last, so that a full disk does not lose the measurements.
    if plot is not None:
        from lmms_prune.bench.report import chart

        chart(timed.timings, plot, timed.title, device)


def _time_documents(request: DocumentRequest, schedules: Sequence[Schedule], repeats: int, compiled: bool) -> Timed:
    """Time schedules on real documents."""
    from lmms_prune.bench.documents import time_tasks

    with Progress("generations", live=False) as progress:
        return Timed(*time_tasks(request, schedules, repeats, compiled, progress.begin, progress.count))


def _time_random(
    ready: BenchModel,
    schedules: Sequence[Schedule],
    sweep: Sequence[Sequence[int]],
    shape: tuple[int, int],
    repeats: int,
    compiled: bool,
) -> Timed:
    """Time schedules on random inputs; `sweep` are batch sizes, text tokens and new tokens."""
    from lmms_prune.bench.models import compile_layers
    from lmms_prune.bench.schedules import Workload, time_schedules

    if compiled:
        compile_layers(ready.model)
    cases = [Workload(rows, text, new) for rows, text, new in product(*sweep)]
    image = None if ready.fixed else shape
    with Progress("generations", live=False) as progress:
        timings = time_schedules(ready.model, schedules, cases, image, repeats, progress.begin, progress.count)
    return Timed(ready.title, timings, None)


def _show(timed: Timed, device: str, compiled: bool, repeats: int, as_json: bool) -> None:
    """Print what was measured, as JSON or as tables."""
    from lmms_prune.bench.clock import clock_name
    from lmms_prune.bench.report import described, tables

    if as_json:
        context: dict[str, Any] = {
            "model": timed.title,
            "clock": clock_name(device),
            "compiled": compiled,
            "repeats": repeats,
        }
        if device.startswith("cuda"):
            import torch

            context["card"] = torch.cuda.get_device_name(device)
        paper = {} if timed.paper is None else {"paper": [asdict(row) for row in timed.paper]}
        typer.echo(json.dumps({**context, **described(timed.timings), **paper}))
        return
    for table in tables(timed.timings, timed.title, device):
        Console(markup=False).print(table)
    if timed.paper:
        from lmms_prune.leaderboard.cost_table import OUR_TIMES, TITLE, cost_table
        from lmms_prune.leaderboard.terminal import show_table

        show_table(cost_table(timed.paper, f"{TITLE}, {timed.title}", [OUR_TIMES]), Console(highlight=False))


def _refuse_other_inputs(values: Mapping[str, Any]) -> None:
    """End the command if options of random inputs are given with ``--tasks``, or options of ``--tasks`` without it."""
    random, real = (
        {"arch": None, "grid": "24x24", "batch_size": "1", "text_tokens": "60"},
        ("limit", "include", "results"),
    )
    if values["tasks"] is None:
        for name in real:
            if values[name] not in (None, ""):
                flag = {"include": "include-path"}.get(name, name)
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
