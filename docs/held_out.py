"""How far the demo's models are on held-out pictures: the figures of docs/demo.md, made by one command.

    python docs/held_out.py           # about five minutes on two cores

Questions are asked as in training, of which MME's, ScienceQA's, … wording is a part, and an answer counts if greedy
decoding gives it to the letter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from lmms_prune.demo.models import MODELS, weights
from lmms_prune.demo.training.families import started_family
from lmms_prune.demo.training.loop import Trainer, TrainingStage

PICTURES, EACH = 8, 8  # a batch: pictures, and questions about each


def held_out(folder: Path, batches: int) -> pd.Series:
    """Percent of right answers of the model in `folder`, by sort of question."""
    stage = TrainingStage("questions", 1, PICTURES, EACH, 0.0)
    # Nothing is trained, so nothing is written to the trainer's folder.
    trainer = Trainer(started_family(folder), Path("unused"), [stage], seed=77, device=torch.device("cpu"))
    shares = trainer.held_out(stage, batches)
    # What reads dense labels off the vision encoder is not part of the model.
    return 100 * pd.Series(
        {sort: share for sort, share in shares.items() if not sort.startswith("patch")}, name=folder.name
    )


def main(
    batches: Annotated[int, typer.Option(min=1, help=f"Of {PICTURES * EACH} questions each.")] = 60,
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders of models; default: the demo's two.")] = None,
) -> None:
    """Print percent of right answers, by sort of question."""
    shares = [held_out(folder, batches) for folder in folders or map(weights, MODELS)]
    typer.echo(pd.concat(shares, axis=1).sort_index().round(0).to_string())


if __name__ == "__main__":
    typer.run(main)
