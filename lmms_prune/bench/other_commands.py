"""The commands ``lmms-prune bench-…``. They import heavy modules only when they run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lmms_prune.bench.options import (
    Arch,
    BatchSizes,
    Dtype,
    GridSides,
    Layers,
    Model,
    check,
    numbers,
    one_model,
    sides,
    timeable,
    user_errors,
)
from lmms_prune.errors import did_you_mean
from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Device, Json, ModelArgs, Wrapper
from lmms_prune.terminal.progress import Progress


def bench_methods(
    names: Annotated[str | None, typer.Option("--methods", help="Methods, separated by commas; default: all.")] = None,
    family: Annotated[str, typer.Option(help=f"{' or '.join(FAMILIES)}.")] = next(iter(FAMILIES)),
    model: Annotated[
        str | None, typer.Option(help="A checkpoint's folder or hub name, in place of random weights of the 7B shape.")
    ] = None,
    grid: GridSides = "64x32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    keep: Annotated[float, typer.Option(min=0, max=1, help="The ratio of tokens to keep.")] = 0.33,
    repeats: Annotated[int, typer.Option(min=1, help="Number of runs; the median is reported.")] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time each method's selection relative to one layer.

    The layer is one of the 7B shape with random weights, in the same run. Without --model, it needs about 5 GB of
    memory for LLaVA and 9 GB for Qwen2.5-VL; float32 on a CPU, bfloat16 on a GPU.

    Example: lmms-prune bench-methods --methods dart,divprune --batch-size 8
    """
    if family not in FAMILIES:
        fail(f"--family {family}: use {' or '.join(FAMILIES)}.")
    shape = sides(grid)
    chosen = list(METHODS) if names is None else names.split(",")
    for name in chosen:
        if name not in METHODS:
            fail(f"--methods {name}: unknown method.{did_you_mean(name, list(METHODS))}")
        if names is not None and not timeable(METHODS[name]):
            fail(
                f"--methods {name}: it needs trained weights or another run's answers, so it cannot be timed; leave it out."
            )
    with plainly(*user_errors()):
        from lmms_prune.bench.clock import clock_name
        from lmms_prune.bench.models import existing_device, fits
        from lmms_prune.bench.ratios import legend, signs
        from lmms_prune.bench.selection import selection_model, time_selection

        device = str(existing_device(device))
        with fits(f"at batch {batch_size}", "a smaller --batch-size"):
            subject = selection_model(family, model, shape, device)
            with Progress("methods", live=False) as progress:
                layer, timings = time_selection(subject, chosen, batch_size, keep, repeats, progress.count)
    if as_json:
        context = {"family": subject.family, "batch": batch_size, "clock": clock_name(device), "layer_seconds": layer}
        typer.echo(json.dumps({**context, "methods": [asdict(timing) for timing in timings]}))
        return
    table = Table(
        "method",
        "at layer",
        "ms",
        "of one layer",
        "of the prefill",
        title=f"{subject.family}, batch {batch_size}, {device}, {clock_name(device)}",
    )
    for timing in sorted(timings, key=lambda t: t.seconds):
        shown = signs(timing.marks)
        parts = (f"{timing.seconds * 1e3:.2f}", f"{timing.of_layer:.2%}{shown}", f"{timing.of_prefill:.3%}{shown}")
        table.add_row(timing.method, str(timing.layer), *parts)
    Console(markup=False).print(table)
    lines = [f"One unpruned decoder layer: {layer * 1e3:.1f} ms.", *legend(timing.marks for timing in timings)]
    Console(markup=False, highlight=False, soft_wrap=True).print("\n".join(lines))


def bench_throughput(
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder or hub name; or give --demo.")] = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    demo: Annotated[
        bool, typer.Option("--demo", help="The demo's small model and benchmarks, in place of --model.")
    ] = False,
    tasks: Annotated[str, typer.Option(help="One task of lmms-eval, whose answers are short.")] = "pope",
    schedules: Annotated[
        list[str] | None,
        typer.Option("--schedule", help="Schedule to time; repeatable. Default: none, and divprune@0:0.11."),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Batch size of this package's model: a number, or auto.")] = "16",
    limit: Annotated[
        int, typer.Option(min=1, help="Documents of the short run; the time of twice as many is measured.")
    ] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each run; medians are reported.")] = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time samples through lmms-eval relative to its own model.

    That is its own (stock) wrapper of the same checkpoint, at batch size 1. The time is from reading a document to its
    score; the runs alternate on this machine. The stock wrappers need `decord`.

    Example: lmms-prune bench-throughput --demo --batch-size auto
    """
    with plainly(*user_errors()):
        if (model is None) != demo:
            fail("bench-throughput: give --model FOLDER, or --demo.")
        if demo and model_args:
            fail(f"bench-throughput --model-args {model_args}: the demo's model has its own; leave it out.")
        if "," in tasks:
            fail(f"bench-throughput --tasks {tasks}: one task is timed; name one.")
        from lmms_prune.bench.clock import clock_name
        from lmms_prune.bench.models import existing_device
        from lmms_prune.bench.ratios import legend, signs
        from lmms_prune.bench.throughput import demo_arguments, demo_benchmarks, measure_throughput
        from lmms_prune.harness.models import as_lmms_eval
        from lmms_prune.harness.tasks import task_configs

        chosen, device = schedules or ["none", "divprune@0:0.11"], str(existing_device(device))
        name, arguments = as_lmms_eval(model, wrapper, model_args)
        arguments = demo_arguments(name) if demo else arguments
        _check_throughput(arguments, chosen, batch_size)
        benchmarks = demo_benchmarks(3 * limit) if demo else nullcontext()
        with benchmarks as folder, Progress("evaluations") as progress:
            measured = measure_throughput(
                name,
                arguments,
                chosen,
                batch_size,
                tasks,
                limit,
                repeats,
                device,
                task_configs(),
                progress.begin,
                folder,
                progress.count,
            )
    if as_json:
        context = {"task": tasks, "device": device, "clock": clock_name(device)}
        typer.echo(json.dumps({**context, "runs": [asdict(throughput) for throughput in measured]}))
        return
    table = Table(
        "model", "batch", "samples a second", "of the stock wrapper's", title=f"{tasks}, {device}, {clock_name(device)}"
    )
    for throughput in measured:
        table.add_row(
            throughput.name,
            throughput.batch_size,
            f"{throughput.per_second:.2f}",
            f"{throughput.relative:.2f}x [{throughput.low:.2f}, {throughput.high:.2f}]{signs(throughput.marks)}",
        )
    table.caption = "\n".join(legend(throughput.marks for throughput in measured))
    Console(markup=False).print(table)


def _check_throughput(model_args: str, schedules: Sequence[str], batch_size: str) -> None:
    """End the command if one of the runs could only fail, before the runs in front of it have taken minutes.

    Raises:
        ArchitectureError, ScheduleError: a schedule cannot run on the checkpoint.
        ArgumentError: the arguments cannot be split.
    """
    from lmms_prune.harness.argument_text import split
    from lmms_prune.models.architectures import of_checkpoint

    if not re.fullmatch("auto|[1-9][0-9]*", batch_size):
        fail(f"--batch-size {batch_size}: write a number of at least 1, or auto.")
    sizes = of_checkpoint(split(model_args).get("pretrained", ""))
    for text in schedules:
        schedule, budget = Schedule.with_budget(text)
        if sizes is not None and budget is None:
            tokens = sizes.tokens_per_image
            schedule.check(sizes.layers, None if tokens is None else [tokens])


def bench_waits(
    schedules: Annotated[
        list[str] | None, typer.Argument(help="Schedules to count. Default: each method alone, and a hybrid.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder or hub name. Default: the demo's.")] = None,
    grid: GridSides = "24x24",
    batch_size: BatchSizes = "1,8",
    as_json: Json = False,
) -> None:
    """Count kernel launches and waits on a pretended GPU.

    The counts are exact on every machine. A wait is one of the host for the device. Numbers are launches/waits of this
    package's own lines, before the first layer, at each stage, after the last layer, and in a late decode step.
    Launches of the model's own layers that a stage runs again have a column of their own.

    Example: lmms-prune bench-waits dart@2:0.44,random@8:0.07 --batch-size 1,8
    """
    # All that can be checked without weights comes first: counting takes minutes.
    shape, batches = sides(grid), numbers("batch-size", batch_size)
    with plainly(*user_errors()):
        from lmms_prune.demo.models import MODELS, weights

        folders = [model] if model else [str(weights(demo)) for demo in MODELS]
        parsed = [Schedule.parse(text) for text in schedules or ()]
        for folder in folders:
            check(parsed, folder, None, shape)
        from lmms_prune.bench.models import fits, given_model, ragged_inputs
        from lmms_prune.bench.waits import HYBRID as SHALLOW
        from lmms_prune.bench.waits import count, examples, row

        texts = schedules or [SHALLOW, *examples(list(METHODS))]
        counts = []
        with Progress("schedules", len(folders) * len(batches) * len(texts)) as progress:
            for folder in folders:
                subject = given_model(folder, None, None, "float32", "cpu")
                rows: list[dict[str, Any]] = []
                for images in batches:
                    progress.say(f"{folder}, batch {images}, {len(texts)} schedules")
                    with fits(f"at batch {images}", "a smaller --batch-size"):
                        inputs = ragged_inputs(subject.model, images, None if subject.fixed else shape, 60)
                        for text in progress.over(texts):
                            work = count(subject.model, inputs, text, questions=["what"] * images)
                            rows.append(row(work, text, images))
                counts.append({"model": subject.title, "rows": rows})
    if as_json:
        typer.echo(json.dumps({"models": counts}))
        return
    for content in counts:
        Console(markup=False).print(_waits_table(content))


def _waits_table(content: Mapping[str, Any]) -> Table:
    """Return the counts of one model as a table."""
    table = Table(title=content["model"])
    for name in ("schedule", "batch", "begin", "stages", "layers run again", "end", "decode step", "largest MB"):
        table.add_column(name, overflow="fold")
    for row in content["rows"]:
        begin, end, step = (f"{row[name]['launches']}/{row[name]['waits']}" for name in ("begin", "end", "step"))
        stages = " ".join(f"{stage['launches']}/{stage['waits']}" for stage in row["stages"])
        size = f"{row['largest_bytes'] / 1e6:.1f}"
        rerun = " ".join(str(stage["rerun"]) for stage in row["stages"])
        table.add_row(row["schedule"], str(row["batch"]), begin, stages, rerun, end, step, size)
    return table


def bench_information(
    model: Model = None,
    arch: Arch = None,
    layers: Layers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    grid: GridSides = "24x24",
    block: Annotated[int, typer.Option(min=1, help="Side of a unit: 1 a visual token, 2 a square of four.")] = 1,
    text_tokens: Annotated[int, typer.Option(min=2, help="Text tokens of the prompt.")] = 60,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of measurements, and of full runs at each layer; medians are reported.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Time measuring information relative to full runs.

    Information is of all visual tokens at all layers, and there is one full run for each of them. The full runs prune
    at their layer, too. Runs of one layer cost the same, so only a few of them are timed.

    Example: lmms-prune bench-information --arch llava-1.5-7b --block 2
    """
    one_model("bench-information", model, arch, layers)
    shape = sides(grid)
    with plainly(*user_errors()):
        from lmms_prune.bench.clock import clock_name
        from lmms_prune.bench.information import time_information
        from lmms_prune.bench.models import existing_device, given_model
        from lmms_prune.bench.ratios import legend, signs

        device = str(existing_device(device))
        ready = given_model(model, arch, layers, dtype, device)
        depth = ready.model.config.get_text_config().num_hidden_layers
        rows = None if ready.fixed else shape
        with Progress("layers", live=False) as progress:
            timing = time_information(ready.model, range(depth), block, rows, text_tokens, repeats, progress.count)
    numbers = {**asdict(timing), "runs_seconds": timing.runs_seconds, "ratio": timing.ratio}
    if as_json:
        typer.echo(
            json.dumps(
                {"model": ready.title, "clock": clock_name(device), "block": block, "repeats": repeats, **numbers}
            )
        )
        return
    Console(highlight=False, markup=False, soft_wrap=True).print(
        f"{ready.title}, {clock_name(device)}\n{timing.units} units at {timing.layers} layers: {timing.seconds:.2f} s together; one full run for "
        f"each, {timing.units * timing.layers} in all: {timing.runs_seconds:.1f} s. "
        f"{timing.ratio:.1f}x [{timing.low:.1f}, {timing.high:.1f}]{signs(timing.marks)}.",
        *legend([timing.marks]),
        sep="\n",
    )
