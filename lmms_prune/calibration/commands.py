"""``lmms-prune calibrate …``: one command a search. Heavy modules are imported only by the commands that run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from lmms_prune.terminal.console import plainly
from lmms_prune.terminal.options import Json, Model, ModelArgs


class _Hybrid(TyperGroup):
    """Options without a command are those of ``hybrid``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("--") and args[0] != "--help":
            args = ["hybrid", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Hybrid,
    no_args_is_help=True,
    add_completion=False,
    help="Find a schedule for a model: the best hybrid at a budget, or what a method's paper found for its own models.",
)

Data = Annotated[
    Path,
    typer.Option(help="JSONL or JSON file of samples: image and question, or image and conversations."),
]
Images = Annotated[
    Path | None, typer.Option(help="Folder to which the images' paths are relative. Default: the data file's.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first samples.")]


@app.command()
def fitprune(
    model: Model,
    data: Data,
    reduction: Annotated[float, typer.Option(help="Percent of the visual tokens' FLOPs to save.")],
    model_args: ModelArgs = "",
    images: Images = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Find FitPrune's deletions: the most tokens that each layer can lose without changing its attention much."""
    with _plainly():
        from lmms_prune.calibration.fitprune import search_fitprune

        ready = _Ready.of(model, model_args, data, images, limit)
        found = search_fitprune(ready.model, ready.prompts(), reduction=reduction / 100, report=_report)
    if as_json:
        said = {
            "schedule": str(found.schedule),
            "alpha": found.alpha,
            "reduction": found.reduction,
            "schedule_reduction": found.schedule_reduction,
            "deletions": found.deletions,
            "samples": len(ready.samples),
        }
        typer.echo(json.dumps(said))
        return
    table = Table("layer", "deleted inside it", title=f"FitPrune, alpha {found.alpha:.4f}")
    for layer, count in enumerate(found.deletions):
        if count:
            table.add_row(str(layer), f"{count:g}")
    Console().print(table)
    typer.echo(
        f"Saves {found.reduction:.1%} of the visual tokens' FLOPs on {len(ready.samples)} samples, as the search counts;\n"
        f"rounded down, and deleted before the next layer, {found.schedule_reduction:.1%}:\n{found.schedule}"
    )


@app.command()
def vflowopt(
    model: Model,
    data: Data,
    budget: Annotated[str, typer.Option(help="Average visual tokens per layer, as a ratio: 0.25.")],
    model_args: ModelArgs = "",
    images: Images = None,
    layers: Annotated[str, typer.Option(help="Decoder layers at which tokens are dropped.")] = "9,18",
    trials: Annotated[int, typer.Option(min=1, help="Schedules to try, the first 27 of them at random.")] = 327,
    seed: Annotated[int, typer.Option(min=0, help="Decides all draws.")] = 42,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Tune VFlowOpt's options and keeps to a budget (needs optuna, of the extra 'calibrate')."""
    with _plainly():
        from lmms_prune.calibration.vflowopt import search_vflowopt

        where = _layers(layers)
        ready = _Ready.of(model, model_args, data, images, limit)
        found = search_vflowopt(
            ready.model, ready.prompts(), budget=budget, layers=where, trials=trials, seed=seed, report=_report
        )
    if as_json:
        said = {
            "schedule": str(found.schedule),
            "similarity": found.similarity,
            "random_similarity": found.start,
            "trials": trials,
            "samples": len(ready.samples),
        }
        typer.echo(json.dumps(said))
        return
    typer.echo(
        f"Mean cosine of the last state on {len(ready.samples)} samples: {found.similarity:.6f} "
        f"(the random start's best: {found.start:.6f})\n{found.schedule}"
    )


@app.command()
def vtw(
    model: Model,
    data: Data,
    model_args: ModelArgs = "",
    images: Images = None,
    eta: Annotated[float, typer.Option(help="Divergence, in nats, that is small enough.")] = 0.003,
    lowest: Annotated[int, typer.Option(min=0, help="The first layer to try.")] = 5,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Find the first layer at which VTW's withdrawal of the image leaves the next token as it was."""
    with _plainly():
        from lmms_prune.calibration.vtw import search_vtw

        ready = _Ready.of(model, model_args, data, images, limit)
        found = search_vtw(ready.model, ready.prompts(), eta=eta, lowest=lowest, report=_report)
    if as_json:
        said = {
            "schedule": None if found.schedule is None else str(found.schedule),
            "divergences": {str(layer): value for layer, value in found.divergences.items()},
            "samples": len(ready.samples),
        }
        typer.echo(json.dumps(said))
    else:
        table = Table("layer", "mean KL(pruned || unpruned)", title=f"VTW, {len(ready.samples)} samples")
        for layer, value in found.divergences.items():
            table.add_row(str(layer), f"{value:.6g}")
        Console().print(table)
        typer.echo(f"The first layer at or below {eta:g}: {found.schedule}" if found.schedule else "")
    if found.schedule is None:
        typer.echo(f"lmms-prune: no layer's divergence is at or below --eta {eta:g}.", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Ready:
    """A loaded model with the samples to search on."""

    wrapper: Any
    samples: list[Any]

    @classmethod
    def of(cls, model: str, model_args: str, data: Path, images: Path | None, limit: int | None) -> _Ready:
        """Read the samples first: what is wrong with them is known before the weights are loaded."""
        from lmms_prune.calibration.data import read_samples
        from lmms_prune.harness.models import unpruned

        samples = read_samples(data, images, limit)
        return cls(unpruned(model, model_args), samples)

    @property
    def model(self) -> Any:
        """The checkpoint itself."""
        return self.wrapper.model

    def prompts(self) -> list[Any]:
        """The model's inputs of each sample."""
        return [self.wrapper.inputs(sample.picture(), sample.question) for sample in self.samples]


def _layers(text: str) -> list[int]:
    from lmms_prune.calibration.data import CalibrationError

    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError as error:
        raise CalibrationError(f"--layers {text} must be whole numbers with commas: 9,18.") from error


_report: Callable[[str], None] = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print


@contextmanager
def _plainly() -> Iterator[None]:
    """What a user can put right ends the command with exit code 2 and one message."""
    from lmms_prune.calibration.data import CalibrationError
    from lmms_prune.errors import PruningError, ScheduleError, UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError

    with plainly(ArgumentError, CalibrationError, PruningError, ScheduleError, UnsupportedModelError):
        yield
