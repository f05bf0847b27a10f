"""``lmms-prune export``: a schedule as JSON, for serving plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmms_prune.configs.export import as_text, exported
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.models.architectures import DEFAULT, PUBLISHED, architecture
from lmms_prune.models.sizes import ArchitectureError
from lmms_prune.record.files import write
from lmms_prune.schedule import PromptSizes, Schedule
from lmms_prune.terminal.console import fail, plainly

_POSITIONS = ("original", "compact")


def export(
    text: Annotated[
        str, typer.Argument(metavar="SCHEDULE", help="A schedule, or a preset's name; may end with ,budget=….")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint's folder or hub name, a config.json, or a short name: adds cache bytes. Known by name: "
            f"{', '.join(PUBLISHED)}."
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: the model's, or 32.")] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Visual tokens of an image to count for; repeatable. Default: the model's own."),
    ] = None,
    positions: Annotated[str, typer.Option(help="original or compact, as in --model_args.")] = "original",
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """Print a schedule as JSON, for serving programs.

    It has the stages, and the kept tokens and cache bytes of each layer; docs/serving.md says what can be done with them.

    Example: lmms-prune export dart@2:0.44,random@20:0.07 --model llava-1.5-7b
    """
    from lmms_prune import __version__

    if positions not in _POSITIONS:
        fail(f"--positions {positions} is not possible.{did_you_mean(positions, _POSITIONS)}")
    if out is not None and not out.absolute().parent.is_dir():
        fail(f"--out {out}: there is no folder {out.parent}.")
    if out is not None and out.is_dir():
        fail(f"--out {out}: this is a folder; name a file in it.")
    with plainly(ScheduleError, ArchitectureError):
        sizes = None if model is None else architecture(model)
        if sizes is not None and layers is not None and layers != sizes.layers:
            fail(f"--layers {layers}: {model} has {sizes.layers} decoder layers; leave --layers out.")
        if sizes is not None and positions == "compact" and not sizes.family.renumbers:
            fail(f"--positions compact: {model} has M-RoPE, whose height and width it would destroy; use original.")
        counts = list(dict.fromkeys(tokens or [(sizes or DEFAULT).example_tokens]))
        depth = sizes.layers if sizes else layers or DEFAULT.layers
        prompt = PromptSizes(depth, counts[0]) if sizes is None else prompt_sizes(sizes, counts[0])
        schedule = Schedule.parse(text, prompt)
        for count in counts:
            schedule.check(depth, [count])
        if sizes is not None and sizes.family.tiled:
            schedule.check_tiles(sizes.family.title)
    content = as_text(exported(schedule, prompt, counts, positions, sizes, __version__))
    if out is None:
        typer.echo(content, nl=False)
    else:
        write(out, content)
