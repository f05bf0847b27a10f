"""Options that the commands ``bench`` and ``bench-…`` share, with their checks. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.methods.spec import MethodSpec
from lmms_prune.models.architectures import PUBLISHED, of_checkpoint
from lmms_prune.models.sizes import ArchitectureError
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import fail

Model = Annotated[str | None, typer.Option(help="A checkpoint's folder or hub name; or give --arch.")]
Arch = Annotated[str | None, typer.Option(help=f"Random weights in the sizes of {', '.join(PUBLISHED)}.")]
Layers = Annotated[int | None, typer.Option(min=2, help="With --arch: fewer decoder layers than it has.")]
Dtype = Annotated[
    str, typer.Option(help="float32, float16, bfloat16 (or fp32, fp16, bf16), or auto: the checkpoint's.")
]
GridSides = Annotated[
    str,
    typer.Option("--grid", help="Rows x columns of an image's visual tokens, for models whose images differ in size."),
]
BatchSizes = Annotated[str, typer.Option("--batch-size", help="Batch size; several separated by commas.")]


def one_model(command: str, model: str | None, arch: str | None, layers: int | None) -> None:
    """End the command unless the model is named in exactly one known way."""
    if (model is None) == (arch is None):
        fail(f"{command}: give --model FOLDER or --arch NAME, one of {', '.join(PUBLISHED)}.")
    if arch is not None and arch not in PUBLISHED:
        fail(f"--arch {arch}: unknown.{did_you_mean(arch, list(PUBLISHED))}")
    if layers is not None and arch is None:
        fail(f"--layers {layers}: a checkpoint has the layers that it has; leave --layers out, or use --arch.")


def check(schedules: Sequence[Schedule], model: str, layers: int | None, sides: tuple[int, int]) -> None:
    """Check schedules against a model's layers and image tokens, as far as known before it is loaded.

    Raises:
        ArchitectureError, ScheduleError: a schedule cannot run on the model.
    """
    sizes = of_checkpoint(model)
    if sizes is None:
        return
    for schedule in schedules:
        schedule.check(layers or sizes.layers, [sizes.tokens_per_image or sides[0] * sides[1]])


def check_plot_path(plot: Path) -> None:
    """End the command unless a plot can be written there, before anything is measured."""
    if plot.suffix not in (".png", ".svg"):
        fail(f"--plot {plot}: the name must end with .png or .svg.")
    if not plot.absolute().parent.is_dir():
        fail(f"--plot {plot}: there is no folder {plot.parent}; make it first.")


def sides(text: str) -> tuple[int, int]:
    """Parse rows x columns."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        fail(f"--grid {text}: write rows x columns, such as 24x24.")
    return int(match[1]), int(match[2])


def numbers(option: str, text: str) -> list[int]:
    """Parse whole numbers of at least 1, separated by commas."""
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        fail(f"--{option} {text}: write whole numbers of at least 1 with commas, such as 1,8.")
    return sorted({int(number) for number in text.split(",")})


def timeable(spec: MethodSpec) -> bool:
    """Whether a method's selection can be timed by itself: without trained weights, and without an auxiliary model's answer."""
    return spec.ready and "guide" not in spec.reads


def user_errors() -> tuple[type[Exception], ...]:
    """Return the errors that a user can fix."""
    from lmms_prune.bench.models import BenchError
    from lmms_prune.demo.models import DemoError
    from lmms_prune.errors import UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.record.information import InformationError

    return (
        ArchitectureError,
        ArgumentError,
        BenchError,
        DemoError,
        InformationError,
        ScheduleError,
        UnsupportedModelError,
    )
