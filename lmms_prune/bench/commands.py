"""``lmms-prune bench``, ``bench-methods`` and ``bench-throughput``. Heavy modules are imported only when one of them runs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmms_prune.console import fail, plainly
from lmms_prune.efficiency.architecture import NAMED, architecture
from lmms_prune.methods import METHODS
from lmms_prune.schedule import Schedule, ScheduleError, did_you_mean

HYBRID = "dart@2:0.44,random@20:0.07"
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def bench(
    schedules: Annotated[
        list[str] | None, typer.Argument(help=f"Schedules to time beside the unpruned model. Default: {HYBRID}.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint's folder or hub name.")] = None,
    arch: Annotated[str | None, typer.Option(help=f"Or random weights in the sizes of {', '.join(NAMED)}.")] = None,
    layers: Annotated[int | None, typer.Option(min=2, help="With --arch: fewer decoder layers than it has.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: the checkpoint's.")] = "auto",
    device: Device = "cpu",
    grid: Annotated[str, typer.Option(help="Qwen2.5-VL: rows x columns of an image's visual tokens.")] = "24x24",
    batch: Annotated[str, typer.Option(help="Rows at once; several with commas.")] = "1",
    text_tokens: Annotated[str, typer.Option(help="Text tokens of a prompt; several with commas.")] = "60",
    new_tokens: Annotated[str, typer.Option(help="Tokens of an answer; several with commas.")] = "1,32",
    repeats: Annotated[int, typer.Option(min=2, help="Timed runs of each, after one that warms up.")] = 7,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this .png or .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Time schedules beside the unpruned model, split by cause, and what the FLOPs promise beside what is realised.

    All run in turn in one process with the same attention kernel. Images and texts are random; every answer has its
    full length.
    """
    if (model is None) == (arch is None):
        fail(f"bench: give --model FOLDER or --arch NAME, one of {', '.join(NAMED)}.")
    if arch is not None and arch not in NAMED:
        fail(f"--arch {arch}: unknown.{did_you_mean(arch, list(NAMED))} Use one of {', '.join(NAMED)}.")
    if layers is not None and arch is None:
        fail(f"--layers {layers}: a checkpoint has the layers that it has; leave --layers out, or use --arch.")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        fail(f"--plot {plot}: the name must end with .png or .svg.")
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", grid)
    if sides is None:
        fail(f"--grid {grid}: write rows x columns, such as 24x24.")
    sweep = [
        _numbers(*option) for option in (("batch", batch), ("text-tokens", text_tokens), ("new-tokens", new_tokens))
    ]
    with plainly(*_mendable()):
        wanted = [Schedule.parse(text) for text in schedules or [HYBRID]]
        if arch is not None:  # before its many weights are made
            for one in wanted:
                one.check(layers or architecture(arch).layers)
        from lmms_prune.bench.models import given_model
        from lmms_prune.bench.report import chart, described, tables
        from lmms_prune.bench.schedules import Case, time_schedules

        ready = given_model(model, arch, layers, dtype, device)
        cases = [Case(*numbers) for numbers in product(*sweep)]
        rows = None if ready.fixed else (int(sides[1]), int(sides[2]))
        progress = Console(stderr=True, highlight=False, soft_wrap=True).print
        measured = time_schedules(ready.model, wanted, cases, rows, repeats, progress)
        if plot is not None:
            chart(measured, plot, ready.title)
    if as_json:
        typer.echo(json.dumps({"model": ready.title, "repeats": repeats, **described(measured)}))
        return
    for table in tables(measured, ready.title):
        Console().print(table)


def bench_methods(
    names: Annotated[str | None, typer.Option("--methods", help="Methods with commas; default: all.")] = None,
    family: Annotated[str, typer.Option(help="llava (576 visual tokens) or qwen2_5_vl (2048).")] = "llava",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    keep: Annotated[float, typer.Option(min=0, max=1, help="The ratio of tokens to keep.")] = 0.33,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median counts.")] = 5,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time each method's selection beside one decoder layer of the 7B shape, in the same run, with random weights.

    Takes about 5 GB of memory for LLaVA and 9 GB for Qwen2.5-VL; float32 on a CPU, bfloat16 on a GPU.
    """
    if family not in ("llava", "qwen2_5_vl"):
        fail(f"--family {family}: use llava or qwen2_5_vl.")
    chosen = names.split(",") if names else list(METHODS)
    for name in chosen:
        if name not in METHODS:
            fail(f"--methods {name}: unknown method.{did_you_mean(name, list(METHODS))}")
    import torch

    from lmms_prune.bench.selection import time_selection

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer, timings = time_selection(family, chosen, batch, keep, repeats, torch.device(device), dtype)
    if as_json:
        about = {"family": family, "batch": batch, "layer_seconds": layer}
        typer.echo(json.dumps({**about, "methods": [asdict(timing) for timing in timings]}))
        return
    table = Table(
        "method", "at layer", "ms", "of one layer", "of the prefill", title=f"{family}, batch {batch}, {device}"
    )
    for timing in sorted(timings, key=lambda t: t.seconds):
        parts = (f"{timing.seconds * 1e3:.2f}", f"{timing.of_layer:.2%}", f"{timing.of_prefill:.3%}")
        table.add_row(timing.method, str(timing.layer), *parts)
    Console().print(table)
    Console().print(f"One unpruned decoder layer: {layer * 1e3:.1f} ms.")


def bench_throughput(
    model_args: Annotated[str, typer.Option("--model_args", help="As for lmms-eval: pretrained=FOLDER,….")],
    task: Annotated[str, typer.Option(help="A task of lmms-eval whose answers are short.")] = "pope",
    model: Annotated[str, typer.Option(help="llava_pruned or qwen2_5_vl_pruned.")] = "llava_pruned",
    schedules: Annotated[
        list[str] | None, typer.Option("--schedule", help="Repeatable. Default: none, and an average of a ninth.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Of this package's model: a number, or auto.")] = "16",
    samples: Annotated[int, typer.Option(min=1, help="The time of twice as many is measured.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Of each run; medians count.")] = 1,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Time samples through lmms-eval itself, beside the harness's own wrapper of the same checkpoint at batch size 1.

    From reading a document to its score, in the same minutes on the same machine. The stock wrappers need `decord`.
    """
    with plainly(*_mendable()):
        from lmms_prune.bench.throughput import STOCK, measure_throughput
        from lmms_prune.harness.tasks import task_configs

        if model not in STOCK:
            fail(f"--model {model}: use {' or '.join(STOCK)}.")
        chosen = schedules or ["none", "divprune@0:0.11"]
        for text in chosen:
            Schedule.parse(text)
        found = measure_throughput(
            model,
            model_args,
            chosen,
            batch_size,
            task,
            samples,
            repeats,
            device,
            task_configs(),
            Console(stderr=True, highlight=False, soft_wrap=True).print,
        )
    if as_json:
        typer.echo(json.dumps({"task": task, "device": device, "runs": [asdict(one) for one in found]}))
        return
    table = Table("model", "batch", "samples a second", "of the stock wrapper's", title=f"{task}, {device}")
    for one in found:
        table.add_row(one.name, one.batch_size, f"{one.per_second:.2f}", f"{one.per_second / found[0].per_second:.2f}x")
    Console().print(table)


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers of at least 1 with commas."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        fail(f"--{option} {text}: write whole numbers of at least 1 with commas, such as 1,8.")
    return sorted({int(number) for number in text.split(",")})


def _mendable() -> tuple[type[Exception], ...]:
    from lmms_prune.bench.models import BenchError
    from lmms_prune.families import UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError

    return ArgumentError, BenchError, ScheduleError, UnsupportedModelError
