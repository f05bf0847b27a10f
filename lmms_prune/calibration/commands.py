"""``lmms-prune calibrate …``: one command for each search. Heavy modules are imported only by the command that runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lmms_prune.terminal.console import plainly
from lmms_prune.terminal.help import Command, Group
from lmms_prune.terminal.options import Json, Model, ModelArgs, Wrapper
from lmms_prune.terminal.progress import Progress


class _HybridByDefault(Group):
    """A group of commands in which options without a command belong to ``hybrid``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("--") and args[0] != "--help":
            args = ["hybrid", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_HybridByDefault,
    no_args_is_help=True,
    add_completion=False,
    help="""Find a schedule that loses little at a budget.

    It is the best hybrid, or that of the search of a method's paper. Options without a command are those of hybrid.

    Example: lmms-prune calibrate --tasks textvqa_val --budget 192t
    """,
)

Data = Annotated[
    Path,
    typer.Option(help="JSONL or JSON file of samples, each with an image and a question or conversations."),
]
Images = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to. Default: the data file's folder.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first samples.")]


@app.command(cls=Command)
def fitprune(
    data: Data,
    reduction: Annotated[float, typer.Option(help="Share of the visual tokens' FLOPs to save, in percent.")],
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    images: Images = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Find FitPrune's schedule.

    The search finds how many tokens each layer can drop without changing its attention much.

    Example: lmms-prune calibrate fitprune --data samples.jsonl --reduction 60
    """
    with _user_errors():
        from lmms_prune.calibration.fitprune import search_fitprune

        search = _SearchInputs.of((model, wrapper, model_args), data, images, limit)
        with Progress("prompts") as progress:
            result = search_fitprune(
                search.model,
                search.prompts(),
                reduction=reduction / 100,
                report=progress.say,
                counted=progress.count,
            )
    if as_json:
        fields = {
            "schedule": str(result.schedule),
            "alpha": result.alpha,
            "reduction": result.reduction,
            "schedule_reduction": result.schedule_reduction,
            "deletions": result.deletions,
            "samples": len(search.samples),
        }
        typer.echo(json.dumps(fields))
        return
    table = Table("layer", "deleted inside it", title=f"FitPrune, alpha {result.alpha:.4f}")
    for layer, count in enumerate(result.deletions):
        if count:
            table.add_row(str(layer), f"{count:g}")
    Console().print(table)
    typer.echo(
        f"Saves {result.reduction:.1%} of the visual tokens' FLOPs on {len(search.samples)} samples, as the search counts;\n"
        f"rounded down, and deleted before the next layer, {result.schedule_reduction:.1%}:\n{result.schedule}"
    )


@app.command(cls=Command)
def vflowopt(
    data: Data,
    budget: Annotated[str, typer.Option(help="Average visual tokens per layer, as a ratio: 0.25.")],
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    images: Images = None,
    layers: Annotated[str, typer.Option(help="Decoder layers at which tokens are dropped.")] = "9,18",
    trials: Annotated[int, typer.Option(min=1, help="Number of schedules to try; the first 27 are random.")] = 327,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random draws.")] = 42,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Tune VFlowOpt's options and keeps for a budget.

    It needs optuna: the extra 'calibrate'.

    Example: lmms-prune calibrate vflowopt --data samples.jsonl --budget 0.25
    """
    with _user_errors():
        from lmms_prune.calibration.vflowopt import search_vflowopt

        layer_numbers = _layers(layers)
        search = _SearchInputs.of((model, wrapper, model_args), data, images, limit)
        with Progress("schedules") as progress:
            result = search_vflowopt(
                search.model,
                search.prompts(),
                budget=budget,
                layers=layer_numbers,
                trials=trials,
                seed=seed,
                report=progress.say,
                counted=progress.count,
            )
    if as_json:
        fields = {
            "schedule": str(result.schedule),
            "similarity": result.similarity,
            "random_similarity": result.start,
            "trials": trials,
            "samples": len(search.samples),
        }
        typer.echo(json.dumps(fields))
        return
    typer.echo(
        f"Mean cosine of the last state on {len(search.samples)} samples: {result.similarity:.6f} "
        f"(the random start's best: {result.start:.6f})\n{result.schedule}"
    )


@app.command(cls=Command)
def vtw(
    data: Data,
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    images: Images = None,
    eta: Annotated[float, typer.Option(help="Largest accepted divergence, in nats.")] = 0.003,
    lowest: Annotated[int, typer.Option(min=0, help="The first layer to try.")] = 5,
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Find the layer of VTW, which drops the whole image.

    It is the first layer at which that hardly changes the next token.

    Example: lmms-prune calibrate vtw --data samples.jsonl --eta 0.003
    """
    with _user_errors():
        from lmms_prune.calibration.vtw import search_vtw

        search = _SearchInputs.of((model, wrapper, model_args), data, images, limit)
        with Progress("prompts") as progress:
            result = search_vtw(
                search.model,
                search.prompts(),
                eta=eta,
                lowest=lowest,
                report=progress.say,
                counted=progress.count,
            )
    if as_json:
        fields = {
            "schedule": None if result.schedule is None else str(result.schedule),
            "divergences": {str(layer): value for layer, value in result.divergences.items()},
            "samples": len(search.samples),
        }
        typer.echo(json.dumps(fields))
    else:
        table = Table("layer", "mean KL(pruned || unpruned)", title=f"VTW, {len(search.samples)} samples")
        for layer, value in result.divergences.items():
            table.add_row(str(layer), f"{value:.6g}")
        Console().print(table)
        typer.echo(f"The first layer at or below {eta:g}: {result.schedule}" if result.schedule else "")
    if result.schedule is None:
        typer.echo(f"lmms-prune: no layer's divergence is at or below --eta {eta:g}.", err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class _SearchInputs:
    """A loaded model, and the samples to search on."""

    wrapper: Any
    samples: list[Any]

    @classmethod
    def of(
        cls, model: tuple[str | None, str | None, str], data: Path, images: Path | None, limit: int | None
    ) -> _SearchInputs:
        """Read the samples, then load the model: mistakes in the samples must be reported before the slow part.

        Args:
            model: the values of ``--model``, ``--wrapper`` and ``--model-args``.
            data, images, limit: those of the options of these names.
        """
        from lmms_prune.calibration.data import read_samples
        from lmms_prune.harness.models import as_lmms_eval, unpruned

        samples = read_samples(data, images, limit)
        return cls(unpruned(*as_lmms_eval(*model)), samples)

    @property
    def model(self) -> Any:
        """The loaded checkpoint, without its wrapper."""
        return self.wrapper.model

    def prompts(self) -> list[Any]:
        """The model's inputs of each sample."""
        return [self.wrapper.inputs(sample.picture(), sample.question) for sample in self.samples]


def _layers(text: str) -> list[int]:
    """The numbers in ``--layers``."""
    from lmms_prune.calibration.data import SearchError

    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError as error:
        raise SearchError(f"--layers {text} must be whole numbers with commas: 9,18.") from error


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one message and exit code 2."""
    from lmms_prune.calibration.data import SearchError
    from lmms_prune.errors import PruningError, ScheduleError, UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError

    with plainly(ArgumentError, SearchError, PruningError, ScheduleError, UnsupportedModelError):
        yield
