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
from lmms_prune.demo.training.families import TrainingFamily, new_family, started_family, take_encoder
from lmms_prune.demo.training.loop import Trainer, TrainingStage
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
    # Real models give columns the slowest rotary frequencies. At this size these cannot tell neighbours apart, so here
    # time, rows and columns take frequencies in turn.
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
    folder: Annotated[
        Path, typer.Argument(help="Folder for the state, the log and finally the model; an existing training resumes.")
    ],
    encoder_steps: Annotated[int, typer.Option(min=0, help="Steps that train only the vision encoder.")] = 5000,
    open_steps: Annotated[int, typer.Option(min=0, help="Steps on questions whose answer is one word.")] = 4000,
    compare_steps: Annotated[int, typer.Option(min=0, help="Steps on questions that need a comparison.")] = 1500,
    steps: Annotated[int, typer.Option(min=0, help="Steps on questions of all kinds.")] = 4000,
    pictures: Annotated[
        int, typer.Option(min=1, help="Pictures per step; twice as many in the vision encoder's steps.")
    ] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Questions per picture.")] = 8,
    rate: Annotated[float, typer.Option(min=1e-9, help="Highest learning rate.")] = 1e-3,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Stop after so many minutes; the same command resumes.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that draw pictures. Default: one per core with a GPU, else none."),
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A model's folder to take the trained vision encoder from."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A model's folder to start from, instead of from scratch."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, pictures and questions.")] = 0,
) -> None:
    """Train one of the demo's models: the same arguments give the same model on the same machine.

    Ctrl-C stops it after the current step; the same command resumes there.
    """
    if family not in SIZES:
        raise typer.BadParameter(f"family '{family}' is unknown; use one of {', '.join(SIZES)}")
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # Sums in varying order would give a different model each time. CUDA's matrix products also need an environment
        # variable for this (docs/demo.md); torch warns if it is missing.
        torch.use_deterministic_algorithms(True, warn_only=True)
    if workers is None:
        workers = (os.cpu_count() or 1) if device.type == "cuda" else 0
    with plainly(OSError, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        trained = started_family(start) if start else new_family(family, SIZES[family], _texts(seed), seed)
        if (held := trained.family.model_type) != family:
            raise typer.BadParameter(f"family '{family}' is asked for, but --start {start} holds a {held}")
        if encoder:
            take_encoder(trained, encoder)
    stages = [
        TrainingStage("tower", encoder_steps, 2 * pictures, 0, 1.5 * rate),
        # Without attention supervision, a decoder needs many times as many steps before it attends to the picture at all.
        TrainingStage("open", open_steps, pictures, questions + 2, 0.5 * rate, 2.5 * rate, attention=1.0),
        TrainingStage(
            "compare", compare_steps, pictures, questions, 0.0, 1.5 * rate, dense=0.5, attention=0.3, stated=0.3
        ),
        TrainingStage(
            "questions", steps, pictures, questions, 0.3 * rate, 1.5 * rate, dense=0.5, attention=0.05, stated=0.5
        ),
    ]
    origin = f"{family} from {start or 'scratch'}" + (f" with the tower of {encoder}" if encoder else "")
    with plainly(ValueError):
        trainer = Trainer(trained, folder, stages, seed, device, origin)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: trainer.stop())
    if not trainer.run(minutes, workers):
        typer.echo(f"stopped in stage {trainer.stage + 1} at step {trainer.step}; the same command resumes")
        raise typer.Exit(130 if trainer.stopping else 0)
    if not (model := folder / "model").exists():
        export(trained, model)
    typer.echo(str(model))


def _texts(seed: int) -> list[str]:
    """The tokenizer's training texts: prompts and answers about training pictures."""
    rng = random.Random(f"{seed}/texts")
    prompted = [ask(rng, some_content(rng, "train"), "train") for _ in range(6000)]
    templates = ["system You are a helpful assistant.", "user assistant"] * 6000
    return [text for question in prompted for text in (question.prompt, question.answer)] + templates


def export(family: TrainingFamily, folder: Path) -> None:
    """Write the model, in bfloat16, with its processor to `folder`, which must be new."""
    tokenizer = family.tokenizer
    model = family.model.to("cpu", torch.bfloat16).eval()
    begin = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=family.end_tokens(), pad_token_id=tokenizer.pad_token_id
    )
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        family.processor.save_pretrained(partial)
        for path in partial.iterdir():  # the library writes weights with read permission only for the owner
            path.chmod(0o644)


if __name__ == "__main__":
    typer.run(main)
