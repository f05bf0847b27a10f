"""``lmms-prune schedule``: shows what a schedule keeps and costs, without running a model or importing torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmms_prune.configs.gpu_estimate import (
    MeasuredTimesError,
    Prompts,
    estimated,
    kept_measurements,
    lines,
    measured,
)
from lmms_prune.efficiency.estimate import TEXT_TOKENS, estimate, prompt_sizes
from lmms_prune.efficiency.roofline import GPUS, NEW_TOKENS, Gpu
from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.models.architectures import DEFAULT, PUBLISHED, architecture
from lmms_prune.models.sizes import Architecture, ArchitectureError
from lmms_prune.schedule import PromptSizes, Schedule
from lmms_prune.schedule.budgets import MIB
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Json


def schedule(
    text: Annotated[str, typer.Argument(help="A schedule such as 'dart@2:0.44,random@20:0.07', or a preset's name.")],
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Shows the cost too: {', '.join(PUBLISHED)}, such a checkpoint's hub name, a config.json or a folder."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: the model's, or 32.")] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Visual tokens of one image; default: the model's own or its example's, or {DEFAULT.example_tokens}.",
        ),
    ] = None,
    text_tokens: Annotated[
        float, typer.Option(min=0, max=10**7, help="Text tokens of the prompt; may be an average.")
    ] = float(TEXT_TOKENS),
    budget: Annotated[
        str | None,
        typer.Option(help="Solves the one '?': 192t or 0.5; with --model flops=30%, kv=100MiB, ttft@h100=60% too."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help=f"With --model: estimates times and memory on a card, without running: {', '.join(GPUS)}."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="With --gpu: prompts at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=1, help="With --gpu: tokens of an answer, for memory.")] = NEW_TOKENS,
    bench: Annotated[
        Path | None,
        typer.Option(
            help="With --gpu: output of `bench … --json` or `bench --suite`; measured times beside the estimate."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a schedule, and show what it keeps and costs.

    A '?' is solved from --budget. Shown are what each stage keeps, the average over the layers and, with --model, the cost.

    Example: lmms-prune schedule dart@2:0.44,random@20:0.07 --model llava-1.5-7b
    """
    card = _gpu(gpu, model, bench)
    with plainly(ScheduleError, ArchitectureError, MeasuredTimesError):
        sizes = None if model is None else architecture(model)
        if sizes is not None and layers is not None and layers != sizes.layers:
            fail(f"--layers {layers}: {model} has {sizes.layers} decoder layers; leave --layers out.")
        depth = sizes.layers if sizes else layers or DEFAULT.layers
        tokens = visual_tokens or (sizes or DEFAULT).example_tokens
        prompt = PromptSizes(depth, tokens) if sizes is None else prompt_sizes(sizes, tokens, text_tokens)
        parsed = Schedule.parse(text, prompt)
        parsed = parsed if budget is None else parsed.solve(budget, prompt)
        parsed.check(depth, [tokens])
        if sizes is not None and sizes.family.tiled:
            parsed.check_tiles(sizes.family.title)
        cost = {} if sizes is None else _cost(sizes, parsed, tokens, text_tokens)
        if sizes is not None and card is not None:
            prompts = Prompts(tokens, text_tokens, batch_size, new_tokens)
            cost["estimate"] = estimated(sizes, parsed, card, prompts)
            cost["measured"] = measured(kept_measurements(), bench, sizes, parsed, card)
    if as_json:
        typer.echo(json.dumps({**_kept(parsed, prompt, tokens), **cost}))
        return
    _show(parsed, prompt, tokens, cost)


def _gpu(name: str | None, model: str | None, bench: Path | None) -> Gpu | None:
    """The card that --gpu names, or fail."""
    if name is None:
        if bench is not None:
            fail(f"--bench {bench}: the measured times stand beside an estimate; name the card: --gpu h100.")
        return None
    if name.lower() not in GPUS:
        fail(f"--gpu {name}: unknown.{did_you_mean(name.lower(), list(GPUS))} Use one of {', '.join(GPUS)}.")
    if model is None:
        fail(f"--gpu {name}: an estimate needs the model's sizes; name it: --model {next(iter(PUBLISHED))}.")
    return GPUS[name.lower()]


def _kept(parsed: Schedule, prompt: PromptSizes, tokens: int) -> dict[str, Any]:
    """The kept tokens of each stage and on average, for ``--json``."""
    kept = [sum(images) for images in parsed.plan([tokens], prompt.tiles(tokens))]
    stages = [
        {"method": s.method, "layer": s.layer, "kept_tokens": n, "at_most": s.at_most, "options": dict(s.options)}
        for s, n in zip(parsed.stages, kept, strict=True)
    ]
    average = float(parsed.avg_visual_tokens(prompt.layers, [tokens], prompt.tiles(tokens)))
    return {"schedule": str(parsed), "stages": stages, "avg_visual_tokens": average, "at_most": parsed.at_most}


def _cost(sizes: Architecture, parsed: Schedule, tokens: int, text_tokens: float) -> dict[str, Any]:
    """The cost, absolute and relative to the unpruned model, for ``--json``."""
    pruned, unpruned = (estimate(sizes, s, tokens, text_tokens) for s in (parsed, Schedule(())))
    return {
        "model": sizes.name,
        "visual_tokens": tokens,
        "text_tokens": text_tokens,
        "tflops": pruned.flops / 1e12,
        "share_flops": pruned.flops / unpruned.flops,
        "kv_mib": pruned.kv_bytes / MIB,
        "share_kv": pruned.kv_bytes / unpruned.kv_bytes,
        "encoder_tflops": pruned.encoder_flops / 1e12,
        "total_tflops": pruned.total_flops / 1e12,
        "share_total": pruned.total_flops / unpruned.total_flops,
        "best_speedup": unpruned.total_flops / pruned.total_flops,
        "layer_visual_tokens": list(pruned.visual),
    }


def _show(parsed: Schedule, prompt: PromptSizes, tokens: int, cost: dict[str, Any]) -> None:
    """Print the stages, the average over the layers and, if it is known, the cost."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "method", "at the input of layer", "kept tokens", "of the original", title=str(parsed))
    tiles = prompt.tiles(tokens)
    kept = parsed.plan([tokens], tiles)
    for number, (stage, images) in enumerate(zip(parsed.stages, kept, strict=True), 1):
        count, bound = sum(images), "≤ " if stage.at_most else ""
        share = f"{bound}{count / tokens:.1%}"
        table.add_row(str(number), stage.method, str(stage.layer), f"{bound}{count}", share)
    console = Console(markup=False)  # a folder's name may look like markup: [b]
    console.print(table if parsed.stages else "The empty schedule prunes nothing.")
    average = float(parsed.avg_visual_tokens(prompt.layers, [tokens], tiles))
    bound = "at most " if parsed.at_most else ""
    console.print(
        f"Average over {prompt.layers} layers: {bound}{average:.2f} of {tokens} visual tokens ({average / tokens:.1%})."
    )
    if cost:
        console.print("\n".join(_curve(cost["layer_visual_tokens"], tokens, console.width)), highlight=False)
        console.print(
            f"{cost['model']}, {cost['text_tokens']:g} text tokens: prefill of the decoder {bound}"
            f"{_flops(cost['tflops'])} ({cost['share_flops']:.1%} of the unpruned), cache {bound}{cost['kv_mib']:.1f} MiB "
            f"({cost['share_kv']:.1%}); before it the vision encoder, {_flops(cost['encoder_tflops'])}."
        )
        least = "at least " if parsed.at_most else ""
        console.print(
            f"Until the first token, encoder included: {bound}{_flops(cost['total_tflops'])} ({cost['share_total']:.1%}), so "
            f"{least}{cost['best_speedup']:.2f}x as fast by FLOPs."
        )
    if "estimate" in cost:
        for line in lines(cost["estimate"], GPUS[cost["estimate"]["gpu"]]):
            console.print(line)
        for line in cost["measured"]:
            console.print(f"Measured: {line}.")


def _flops(tera: float) -> str:
    return f"{tera:.2f} TFLOPs" if tera >= 0.1 else f"{tera * 1000:.2f} GFLOPs"


def _curve(counts: Sequence[int], total: int, width: int, height: int = 6) -> list[str]:
    """A chart of visual tokens over the layers, as lines of text.

    A layer is two characters wide, or one if the width is too small for two. If even that is too wide, only every n-th
    layer is drawn.
    """
    blocks, room = " ▁▂▃▄▅▆▇█", max(8, width - 7)
    characters = 2 if 2 * len(counts) <= room else 1
    step = -(-characters * len(counts) // room)  # layers per column
    lines = []
    for row in reversed(range(height)):
        eighths = [min(8, max(0, round(8 * (count / total * height - row)))) for count in counts[::step]]
        scale = f"{total * (row + 1) / height:6.0f} " if row in (0, height - 1) else " " * 7
        lines.append(scale + "".join(blocks[n] * characters for n in eighths))
    return [
        *lines,
        " " * 7 + "".join(f"{layer:<8}" for layer in range(0, len(counts), 8 // characters * step)).rstrip(),
    ]
