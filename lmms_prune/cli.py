"""``lmms-prune …``: the command line. Heavy modules are imported only by the commands that need them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lmms_prune import __version__
from lmms_prune.bench.commands import bench, bench_information, bench_methods, bench_throughput
from lmms_prune.calibration.commands import app as calibrate
from lmms_prune.certificate.commands import doctor
from lmms_prune.configs.commands import check_files, list_tasks, write_configs
from lmms_prune.console import fail
from lmms_prune.information.commands import horizon, information, show
from lmms_prune.information.hybrid import calibrate as calibrate_schedule
from lmms_prune.leaderboard.commands import gate, leaderboard
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.schedule import Schedule, ScheduleError, did_you_mean
from lmms_prune.sweep.commands import sweep

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
calibrate.command("hybrid")(calibrate_schedule)
app.add_typer(calibrate, name="calibrate")
app.command()(doctor)
app.command()(bench)
app.command("bench-methods")(bench_methods)
app.command("bench-information")(bench_information)
app.command("bench-throughput")(bench_throughput)
app.command()(information)
app.command()(horizon)
app.command()(show)
app.command()(leaderboard)
app.command()(gate)
app.command("check")(check_files)
app.command("configs")(write_configs)
app.command("tasks")(list_tasks)
app.command()(sweep)
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
    model: Annotated[
        str | None, typer.Option(help="Shows the cost too: llava-1.5-7b, qwen2.5-vl-7b, a config.json or a folder.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: the model's, or 32.")] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Visual tokens of one image; default: LLaVA's own, Qwen2.5-VL 1280, or 576."),
    ] = None,
    text_tokens: Annotated[
        float, typer.Option(min=0, max=10**7, help="Text tokens of the prompt; may be an average.")
    ] = 64.0,
    budget: Annotated[
        str | None, typer.Option(help="Solves the one '?': 192t or 0.5; with --model flops=30%, kv=100MiB too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a schedule, solve its '?', and show what each stage keeps, the average over the layers, and the cost."""
    from lmms_prune.efficiency.architecture import ArchitectureError, architecture
    from lmms_prune.efficiency.estimate import MIB, estimate, solved

    try:
        sizes = None if model is None else architecture(model)
        if sizes is not None and layers is not None and layers != sizes.layers:
            fail(f"--layers {layers}: {model} has {sizes.layers} decoder layers; leave --layers out.")
        depth = sizes.layers if sizes else layers or 32
        tokens = visual_tokens or (576 if sizes is None else sizes.tower.image_tokens or 1280)
        read = Schedule.parse(text)
        if budget is not None and sizes is not None:
            read = solved(read, budget, sizes, tokens, text_tokens)
        elif budget is not None and "=" in budget:
            fail(f"--budget {budget}: a budget of cost needs a model, e.g. --model llava-1.5-7b.")
        elif budget is not None:
            read = read.solve(budget, depth, tokens)
        read.check(depth, [tokens])
    except (ScheduleError, ArchitectureError) as error:
        fail(str(error))
    kept = [sum(images) for images in read.plan([tokens])]
    average = float(read.average(depth, [tokens]))
    cost: dict[str, Any] = {}
    if sizes is not None:
        said, whole = (estimate(sizes, one, tokens, text_tokens) for one in (read, Schedule(())))
        cost = {"model": sizes.name, "visual_tokens": tokens, "text_tokens": text_tokens}
        cost |= {"tflops": said.flops / 1e12, "share_flops": said.flops / whole.flops}
        cost |= {"kv_mib": said.kv_bytes / MIB, "share_kv": said.kv_bytes / whole.kv_bytes}
        cost |= {"tower_tflops": said.tower_flops / 1e12, "layer_visual_tokens": list(said.visual)}
    if as_json:
        stages = [
            {"method": s.method, "layer": s.layer, "kept_tokens": n, "at_most": s.at_most, "options": dict(s.options)}
            for s, n in zip(read.stages, kept, strict=True)
        ]
        about = {"schedule": str(read), "stages": stages, "avg_visual_tokens": average, "at_most": read.at_most}
        typer.echo(json.dumps({**about, **cost}))
        return
    table = Table("stage", "method", "at the input of layer", "kept tokens", "of the original", title=str(read))
    for number, (stage, count) in enumerate(zip(read.stages, kept, strict=True), 1):
        most = "≤ " if stage.at_most else ""
        share = f"{most}{count / tokens:.1%}"
        table.add_row(str(number), stage.method, str(stage.layer), f"{most}{count}", share)
    console = Console()
    console.print(table if read.stages else "The empty schedule prunes nothing.")
    most = "at most " if read.at_most else ""
    console.print(
        f"Average over {depth} layers: {most}{average:.2f} of {tokens} visual tokens ({average / tokens:.1%})."
    )
    if sizes is not None:
        console.print("\n".join(_curve(read.layer_counts(depth, [tokens]), tokens, console.width)), highlight=False)
        console.print(
            f"{sizes.name}, {text_tokens:g} text tokens: prefill of the decoder {most}{_flops(cost['tflops'])} "
            f"({cost['share_flops']:.1%} of the unpruned), cache {most}{cost['kv_mib']:.1f} MiB ({cost['share_kv']:.1%}); "
            f"before it the vision tower, {_flops(cost['tower_tflops'])}."
        )


def _flops(tera: float) -> str:
    return f"{tera:.2f} TFLOPs" if tera >= 0.1 else f"{tera * 1000:.2f} GFLOPs"


def _curve(counts: Sequence[int], whole: int, width: int, height: int = 6) -> list[str]:
    """Visual tokens over the layers as lines of text: two characters a layer, or as many as the width has room for."""
    blocks, room = " ▁▂▃▄▅▆▇█", max(8, width - 7)
    wide = 2 if 2 * len(counts) <= room else 1
    step = -(-wide * len(counts) // room)  # layers of one column
    lines = []
    for row in reversed(range(height)):
        eighths = [min(8, max(0, round(8 * (count / whole * height - row)))) for count in counts[::step]]
        scale = f"{whole * (row + 1) / height:6.0f} " if row in (0, height - 1) else " " * 7
        lines.append(scale + "".join(blocks[n] * wide for n in eighths))
    return [*lines, " " * 7 + "".join(f"{layer:<8}" for layer in range(0, len(counts), 8 // wide * step)).rstrip()]


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.")] = None, as_json: Json = False
) -> None:
    """List every method: its class, where it can act, how it counts, and what it reads; or all about one."""
    if as_json:
        typer.echo(json.dumps({"methods": [_described(spec) for spec in METHODS.values()]}))
        return
    if name is not None and name not in METHODS:
        fail(f"methods {name}: unknown method.{did_you_mean(name, list(METHODS))}")
    if name is not None:
        _show_one(METHODS[name])
        return
    table = Table(box=box.SIMPLE_HEAD)
    # What a narrow terminal cannot hold is in each method's own view, and in the JSON.
    more = ("families", "training-free", "arXiv") if Console().width >= 140 else ()
    for column in ("method", "class", "layers", "keeps", "reads", *more):
        table.add_column(column, no_wrap=column in ("method", "layers", "arXiv"), overflow="fold")
    for spec in METHODS.values():
        layers = spec.layers_text.replace("1 and deeper", "≥ 1")
        row = (spec.name, _class(spec), layers, spec.count_text, ", ".join(spec.reads) or "nothing")
        wide = (", ".join(spec.families), "no" if spec.trained else "yes", spec.paper.rsplit("/", 1)[1])
        table.add_row(*row, *(wide if more else ()))
    Console().print(table)
    Console().print("lmms-prune methods NAME shows one with its options, its example and its paper.")


def _class(spec: MethodSpec) -> str:
    return spec.kind + (", rewrites" if spec.rewrites and spec.kind != "merging" else "")


def _show_one(spec: MethodSpec) -> None:
    """All that the table knows of a method, a line each."""
    lines = {
        "class": _class(spec) + (", needs trained weights" if spec.trained else ", training-free"),
        "reads": spec.reads_text,
        "layers": spec.layers_text,
        "keeps": spec.count_text,
        "families": " and ".join(spec.families),
        "example": spec.example,
        "paper": spec.paper,
    }
    for option in spec.options:
        lines[f";{option.name}="] = f"{option.help} (default {_shown(option.default) or 'none'}; {option.allowed})"
    typer.echo("\n".join([spec.name, *(f"  {name:<14} {text}" for name, text in lines.items())]))


def _described(spec: MethodSpec) -> dict[str, Any]:
    """One method for ``--json``."""
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
        "families": list(spec.families),
        "example": spec.example,
        "options": [{"name": o.name, "default": o.default, "allowed": o.allowed, "help": o.help} for o in spec.options],
    }


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where data and results go.")] = Path("lmms-prune-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer schedules and questions: about two minutes.")] = False,
    schedules: Annotated[
        list[str] | None,
        typer.Option("--schedule", help="A schedule to run; repeatable. Default: hybrids, single methods, controls."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Task names with commas; default: all ten benchmarks.")] = None,
    as_json: Json = False,
) -> None:
    """Run two small trained models through lmms-eval on ten small benchmarks: no network, no GPU.

    The models have 12 decoder layers, so a schedule's layers go up to 11. The full form takes about ten minutes on two
    cores.
    """
    from lmms_prune.demo.run import FULL, LAYERS, QUICK, QUICK_ROWS, ROWS, DemoError, Row, run_demo, tables

    console = Console(stderr=as_json)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.absolute() / "huggingface")}
    try:
        for text in schedules or []:
            Schedule.parse(text).check(LAYERS)
        rows = tuple(map(Row, schedules)) if schedules else QUICK if quick else FULL
        record = run_demo(folder.absolute(), rows, QUICK_ROWS if quick else ROWS, tasks, offline, console)
    except (ScheduleError, DemoError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"--folder {folder}: {error.strerror or error}")
    if as_json:
        typer.echo(json.dumps(record))
    else:
        for table in tables(record, tasks):
            console.print(table)
        if record["runs"]:
            console.print(_AFTERWARDS, highlight=False)
            console.print(
                f"  cd {record['mirror']}\n  {record['command']}\n", soft_wrap=True, highlight=False, markup=False
            )
            console.print(f"On the real LLaVA-1.5:\n\n  {_FRONT_DOOR}\n", soft_wrap=True, highlight=False)
    for failure in record["failures"]:
        typer.echo(f"lmms-prune: {failure['model']}, schedule {failure['schedule']}: {failure['error']}", err=True)
    if record["failures"]:
        raise typer.Exit(1)


_AFTERWARDS = """tokens: visual tokens, average over the decoder's layers. MME: total of 1600; POPE: F1 score; all but MME in percent.
kept: the mean share of the unpruned scores that is left, in percent.

One of these runs, as you would type it:
"""
_FRONT_DOOR = "lmms-eval --model llava_pruned --model_args schedule=dart@2:0.44,random@20:0.07 --tasks textvqa_val"
