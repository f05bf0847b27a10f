"""The commands ``lmms-prune bench`` and ``bench-…``. They import heavy modules only when they run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES, MODEL_NAMES
from lmms_prune.models.architectures import PUBLISHED, of_checkpoint
from lmms_prune.models.sizes import ArchitectureError
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Json

HYBRID = "dart@2:0.44,random@20:0.07"
Model = Annotated[str | None, typer.Option(help="A checkpoint's folder or hub name.")]
Arch = Annotated[str | None, typer.Option(help=f"Or random weights in the sizes of {', '.join(PUBLISHED)}.")]
Layers = Annotated[int | None, typer.Option(min=2, help="With --arch: fewer decoder layers than it has.")]
Dtype = Annotated[
    str, typer.Option(help="float32, float16, bfloat16 (or fp32, fp16, bf16), or auto: the checkpoint's.")
]
GridSides = Annotated[
    str,
    typer.Option("--grid", help="Rows x columns of an image's visual tokens, for models whose images differ in size."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def bench(
    schedules: Annotated[
        list[str] | None, typer.Argument(help=f"Schedules to compare with the unpruned model. Default: {HYBRID}.")
    ] = None,
    model: Model = None,
    arch: Arch = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    grid: GridSides = "24x24",
    batch: Annotated[str, typer.Option(help="Batch size; several separated by commas.")] = "1",
    text_tokens: Annotated[str, typer.Option(help="Text tokens of a prompt; several separated by commas.")] = "60",
    new_tokens: Annotated[str, typer.Option(help="Tokens of an answer; several separated by commas.")] = "1,32",
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each, after one warm-up run.")] = 7,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this .png or .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Time schedules relative to the unpruned model, split by part, and compare the speed-up with the FLOPs' prediction.

    All run in turn in one process with the same attention kernel. Images and texts are random; every answer has its
    full length.
    """
    _one_model("bench", model, arch, layers)
    if plot is not None:
        _check_plot_path(plot)
    sides = _sides(grid)
    sweep = [
        _numbers(*option) for option in (("batch", batch), ("text-tokens", text_tokens), ("new-tokens", new_tokens))
    ]
    with plainly(*_user_errors()):
        parsed = [Schedule.parse(text) for text in schedules or [HYBRID]]
        _check(
            parsed, arch or str(model), layers, sides
        )  # fail before the weights are made or loaded, which takes long
        from lmms_prune.bench.models import given_model
        from lmms_prune.bench.report import chart, described, tables
        from lmms_prune.bench.schedules import Workload, time_schedules

        ready = given_model(model, arch, layers, dtype, device)
        cases = [Workload(*numbers) for numbers in product(*sweep)]
        rows = None if ready.fixed else sides
        progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
        measured = time_schedules(ready.model, parsed, cases, rows, repeats, progress)
    if as_json:
        typer.echo(json.dumps({"model": ready.title, "repeats": repeats, **described(measured)}))
    else:
        for table in tables(measured, ready.title):
            Console(markup=False).print(table)
    # Last, so that a full disk does not lose the measurements.
    if plot is not None:
        chart(measured, plot, ready.title)


def bench_methods(
    names: Annotated[str | None, typer.Option("--methods", help="Methods, separated by commas; default: all.")] = None,
    family: Annotated[str, typer.Option(help=f"{' or '.join(FAMILIES)}.")] = next(iter(FAMILIES)),
    batch: Annotated[int, typer.Option(min=1, help="Batch size: images at once.")] = 1,
    keep: Annotated[float, typer.Option(min=0, max=1, help="The ratio of tokens to keep.")] = 0.33,
    repeats: Annotated[int, typer.Option(min=1, help="Number of runs; the median is reported.")] = 5,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time each method's selection relative to one decoder layer of the 7B shape, in the same run, with random weights.

    Needs about 5 GB of memory for LLaVA and 9 GB for Qwen2.5-VL; float32 on a CPU, bfloat16 on a GPU.
    """
    if family not in FAMILIES:
        fail(f"--family {family}: use {' or '.join(FAMILIES)}.")
    chosen = names.split(",") if names else list(METHODS)
    for name in chosen:
        if name not in METHODS:
            fail(f"--methods {name}: unknown method.{did_you_mean(name, list(METHODS))}")
    with plainly(*_user_errors()):
        import torch

        from lmms_prune.bench.models import existing_device, fits
        from lmms_prune.bench.selection import time_selection

        torch_device = existing_device(device)
        dtype = torch.float32 if torch_device.type == "cpu" else torch.bfloat16
        with fits(f"at batch {batch}", "a smaller --batch"):
            layer, timings = time_selection(family, chosen, batch, keep, repeats, torch_device, dtype)
    if as_json:
        context = {"family": family, "batch": batch, "layer_seconds": layer}
        typer.echo(json.dumps({**context, "methods": [asdict(timing) for timing in timings]}))
        return
    table = Table(
        "method", "at layer", "ms", "of one layer", "of the prefill", title=f"{family}, batch {batch}, {device}"
    )
    for timing in sorted(timings, key=lambda t: t.seconds):
        parts = (f"{timing.seconds * 1e3:.2f}", f"{timing.of_layer:.2%}", f"{timing.of_prefill:.3%}")
        table.add_row(timing.method, str(timing.layer), *parts)
    Console(markup=False).print(table)
    Console().print(f"One unpruned decoder layer: {layer * 1e3:.1f} ms.")


def bench_throughput(
    model_args: Annotated[str, typer.Option("--model_args", help="As for lmms-eval: pretrained=FOLDER,….")],
    task: Annotated[str, typer.Option(help="A task of lmms-eval whose answers are short.")] = "pope",
    model: Annotated[str, typer.Option(help=f"{' or '.join(MODEL_NAMES)}.")] = next(iter(MODEL_NAMES)),
    schedules: Annotated[
        list[str] | None,
        typer.Option("--schedule", help="Schedule to time; repeatable. Default: none, and divprune@0:0.11."),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Batch size of this package's model: a number, or auto.")] = "16",
    samples: Annotated[
        int, typer.Option(min=1, help="Samples of the short run; the time of twice as many is measured.")
    ] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each run; medians are reported.")] = 1,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time samples through lmms-eval, compared with its own wrapper of the same checkpoint at batch size 1.

    The time is from reading a document to its score; the runs alternate on this machine. The stock wrappers need
    `decord`.
    """
    with plainly(*_user_errors()):
        from lmms_prune.bench.throughput import STOCK, measure_throughput
        from lmms_prune.harness.tasks import task_configs

        if model not in STOCK:
            fail(f"--model {model}: use {' or '.join(STOCK)}.")
        chosen = schedules or ["none", "divprune@0:0.11"]
        for text in chosen:
            Schedule.parse(text)
        measured = measure_throughput(
            model,
            model_args,
            chosen,
            batch_size,
            task,
            samples,
            repeats,
            device,
            task_configs(),
            Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print,
        )
    if as_json:
        typer.echo(
            json.dumps({"task": task, "device": device, "runs": [asdict(throughput) for throughput in measured]})
        )
        return
    table = Table("model", "batch", "samples a second", "of the stock wrapper's", title=f"{task}, {device}")
    for throughput in measured:
        table.add_row(
            throughput.name,
            throughput.batch_size,
            f"{throughput.per_second:.2f}",
            f"{throughput.per_second / measured[0].per_second:.2f}x",
        )
    Console(markup=False).print(table)


def bench_information(
    model: Model = None,
    arch: Arch = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    grid: GridSides = "24x24",
    block: Annotated[int, typer.Option(min=1, help="Side of a unit: 1 a visual token, 2 the paper's squares.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens of the prompt.")] = 60,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of measurements, and of full runs at each layer; medians are reported.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Time measuring the information of all visual tokens at all layers, compared with one full run for each of them.

    The full runs prune at their layer, too. Runs of one layer cost the same, so only a few of them are timed.
    """
    _one_model("bench-information", model, arch, layers)
    sides = _sides(grid)
    with plainly(*_user_errors()):
        from lmms_prune.bench.information import time_information
        from lmms_prune.bench.models import given_model

        ready = given_model(model, arch, layers, dtype, device)
        depth = ready.model.config.get_text_config().num_hidden_layers
        rows = None if ready.fixed else sides
        timing = time_information(ready.model, range(depth), block, rows, text_tokens, repeats)
    numbers = {**asdict(timing), "runs_seconds": timing.runs_seconds, "ratio": timing.ratio}
    if as_json:
        typer.echo(json.dumps({"model": ready.title, "block": block, "repeats": repeats, **numbers}))
        return
    Console(highlight=False, markup=False, soft_wrap=True).print(
        f"{ready.title}\n{timing.units} units at {timing.layers} layers: {timing.seconds:.2f} s together; one full run for "
        f"each, {timing.units * timing.layers} in all: {timing.runs_seconds:.1f} s. {timing.ratio:.1f}x."
    )


def _one_model(command: str, model: str | None, arch: str | None, layers: int | None) -> None:
    if (model is None) == (arch is None):
        fail(f"{command}: give --model FOLDER or --arch NAME, one of {', '.join(PUBLISHED)}.")
    if arch is not None and arch not in PUBLISHED:
        fail(f"--arch {arch}: unknown.{did_you_mean(arch, list(PUBLISHED))} Use one of {', '.join(PUBLISHED)}.")
    if layers is not None and arch is None:
        fail(f"--layers {layers}: a checkpoint has the layers that it has; leave --layers out, or use --arch.")


def _check(schedules: Sequence[Schedule], model: str, layers: int | None, sides: tuple[int, int]) -> None:
    """Check schedules against a model's layers and image tokens, as far as known before it is loaded.

    Raises:
        ArchitectureError, ScheduleError: a schedule cannot run on the model.
    """
    sizes = of_checkpoint(model)
    if sizes is None:
        return
    for schedule in schedules:
        schedule.check(layers or sizes.layers, [sizes.tokens_per_image or sides[0] * sides[1]])


def _check_plot_path(plot: Path) -> None:
    if plot.suffix not in (".png", ".svg"):
        fail(f"--plot {plot}: the name must end with .png or .svg.")
    if not plot.absolute().parent.is_dir():
        fail(f"--plot {plot}: there is no folder {plot.parent}; make it first.")


def _sides(text: str) -> tuple[int, int]:
    """Parse rows x columns."""
    sides = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if sides is None:
        fail(f"--grid {text}: write rows x columns, such as 24x24.")
    return int(sides[1]), int(sides[2])


def _numbers(option: str, text: str) -> list[int]:
    """Parse whole numbers of at least 1, separated by commas."""
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        fail(f"--{option} {text}: write whole numbers of at least 1 with commas, such as 1,8.")
    return sorted({int(number) for number in text.split(",")})


def _user_errors() -> tuple[type[Exception], ...]:
    from lmms_prune.bench.models import BenchError
    from lmms_prune.errors import UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.record.information import InformationError

    return ArchitectureError, ArgumentError, BenchError, InformationError, ScheduleError, UnsupportedModelError
