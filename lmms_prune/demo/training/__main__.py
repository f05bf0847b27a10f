"""The command line of the training: ``python -m lmms_prune.demo.training llava build/llava``."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GenerationConfig

from lmms_prune.demo.checkpoints import Sizes
from lmms_prune.demo.folders import new_folder
from lmms_prune.demo.training.data import ask, some_content
from lmms_prune.demo.training.families import Family, new_family, started_family, take_tower
from lmms_prune.demo.training.loop import Stage, Trainer
from lmms_prune.terminal.console import plainly

SIZES = {
    "llava": Sizes(
        layers=12,
        hidden=128,
        heads=4,
        kv_heads=4,
        intermediate=256,
        vision_layers=5,
        vision_hidden=128,
        vision_intermediate=256,
        image_size=168,
        tied=True,
    ),
    # Real models give columns the slowest rotary frequencies, too slow to tell neighbours apart at this size: here
    # time, rows and columns take turns.
    "qwen2_5_vl": Sizes(
        layers=12,
        hidden=128,
        heads=4,
        kv_heads=2,
        intermediate=256,
        vision_layers=4,
        vision_hidden=96,
        vision_intermediate=192,
        rope_theta=1000.0,
        mrope_section=(2, *[1] * 14),
        tied=True,
    ),
}


def main(
    family: Annotated[str, typer.Argument(help="llava or qwen2_5_vl.")],
    folder: Annotated[Path, typer.Argument(help="For the state, the log and at last the model; goes on if it exists.")],
    tower_steps: Annotated[int, typer.Option(min=0, help="Steps of the tower alone.")] = 5000,
    open_steps: Annotated[int, typer.Option(min=0, help="Steps on questions whose answer is a word.")] = 4000,
    compare_steps: Annotated[int, typer.Option(min=0, help="Steps on questions that compare.")] = 1500,
    steps: Annotated[int, typer.Option(min=0, help="Steps on questions of all kinds.")] = 4000,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures a step; twice as many for the tower.")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Questions a picture.")] = 8,
    rate: Annotated[float, typer.Option(min=1e-9, help="Highest learning rate.")] = 1e-3,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after this long; the same command goes on.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that draw pictures; default: with a GPU one for each core, else none."),
    ] = None,
    tower: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A model's folder to take the trained tower from.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A model's folder to start from, instead of from scratch."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides weights, pictures and questions.")] = 0,
) -> None:
    """Train one of the demo's models: the same arguments give the same model on the same machine.

    Ctrl-C stops it after the step that it is at; the same command goes on there.
    """
    if family not in SIZES:
        raise typer.BadParameter(f"family '{family}' is unknown; use one of {', '.join(SIZES)}")
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # Sums in any order would make another model each time. CUDA's matrix products also want it said in the
        # environment (docs/demo.md), and torch warns where it is not.
        torch.use_deterministic_algorithms(True, warn_only=True)
    if workers is None:
        workers = (os.cpu_count() or 1) if device.type == "cuda" else 0
    with plainly(OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        made = started_family(start) if start else new_family(family, SIZES[family], _texts(seed), seed)
        if made.name != family:
            raise typer.BadParameter(f"family '{family}' is asked for, but --start {start} holds a {made.name}")
        if tower:
            take_tower(made, tower)
    stages = [
        Stage("tower", tower_steps, 2 * pictures, 0, 1.5 * rate),
        # Without being told where to look, a decoder takes many times as long to look at all.
        Stage("open", open_steps, pictures, questions + 2, 0.5 * rate, 2.5 * rate, gaze=1.0),
        Stage("compare", compare_steps, pictures, questions, 0.0, 1.5 * rate, dense=0.5, gaze=0.3, stated=0.3),
        Stage("questions", steps, pictures, questions, 0.3 * rate, 1.5 * rate, dense=0.5, gaze=0.05, stated=0.5),
    ]
    origin = f"{family} from {start or 'scratch'}" + (f" with the tower of {tower}" if tower else "")
    with plainly(ValueError):
        trainer = Trainer(made, folder, stages, seed, device, origin)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: trainer.stop())
    if not trainer.run(minutes, workers):
        typer.echo(f"stopped in stage {trainer.stage + 1} at step {trainer.step}; the same command goes on")
        raise typer.Exit(130 if trainer.stopping else 0)
    if not (model := folder / "model").exists():
        export(made, model)
    typer.echo(str(model))


def _texts(seed: int) -> list[str]:
    """What the tokenizer learns from: prompts and answers of training pictures."""
    rng = random.Random(f"{seed}/texts")
    prompted = [ask(rng, some_content(rng, "train"), "train") for _ in range(6000)]
    templates = ["system You are a helpful assistant.", "user assistant"] * 6000
    return [text for one in prompted for text in (one.prompt, one.answer)] + templates


def export(family: Family, folder: Path) -> None:
    """Write the model, in bfloat16, with its processor to `folder`, which must be new."""
    tokenizer = family.tokenizer
    model = family.model.to("cpu", torch.bfloat16).eval()
    ends = [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * family.mrope
    begin = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        family.processor.save_pretrained(partial)
        for path in partial.iterdir():  # the library writes weights that only their owner may read
            path.chmod(0o644)


if __name__ == "__main__":
    typer.run(main)
