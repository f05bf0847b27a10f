"""What the batch size alone changes: the figures of docs/reliability.md, made by one command.

    python docs/batch_sizes.py        # about ten minutes on two cores

A 16-bit type rounds a row's sums in another order in a batch of another size, and where two tokens are nearly as good
rounding decides which of them is kept. The demo's LLaVA answers the same questions at two batch sizes, in each type.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pandas as pd
import typer

from lmms_prune.demo.benchmarks import build_mirror
from lmms_prune.demo.models import MODELS, weights
from lmms_prune.leaderboard.samples import sample_accounting

SCHEDULES = ("none", "dart@1:0.44,random@8:0.07")
TASK = "pope"


def samples(schedule: str, dtype: str, batch_size: int, mirror: Path, out: Path) -> list[dict[str, Any]]:
    """The samples of one evaluation, in the order of the documents."""
    model = MODELS[0]
    arguments = f"pretrained={weights(model)},dtype={dtype},{model.arguments},schedule={schedule}"
    command = [
        str(Path(sys.executable).with_name("lmms-eval")),
        "--model",
        model.family.model_name,
        "--model_args",
        arguments,
    ]
    command += ["--tasks", TASK, "--batch_size", str(batch_size), "--output_path", str(out), "--log_samples"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(mirror.parent / "huggingface")}
    subprocess.run(command, cwd=mirror, env=offline, capture_output=True, check=True)
    [file] = out.rglob(f"*_samples_{TASK}.jsonl")
    return sorted(map(json.loads, file.read_text("utf-8").splitlines()), key=lambda row: row["doc_id"])


def kept_tokens(row: dict[str, Any]) -> Any:
    """The tokens that each stage kept of a sample's images."""
    accounting = sample_accounting(row)
    assert accounting is not None, "a run of ours"
    return accounting.token_bitmaps


def main(
    questions: Annotated[int, typer.Option(min=2, help="Of POPE; an even number.")] = 96,
    sizes: Annotated[tuple[int, int], typer.Option(min=1, help="The two batch sizes.")] = (1, 16),
) -> None:
    """Print how many answers and how many sets of kept tokens differ between two batch sizes."""
    rows = []
    with TemporaryDirectory() as folder:
        mirror = build_mirror(Path(folder) / "mirror", rows=questions)
        for dtype in ("float32", "bfloat16"):
            for schedule in SCHEDULES:
                name = f"{dtype}-{SCHEDULES.index(schedule)}"
                small, large = (samples(schedule, dtype, n, mirror, Path(folder) / f"{name}-{n}") for n in sizes)
                pairs = list(zip(small, large, strict=True))
                answers = sum(a["filtered_resps"] != b["filtered_resps"] for a, b in pairs)
                kept = sum(kept_tokens(a) != kept_tokens(b) for a, b in pairs)
                rows.append((dtype, schedule, len(pairs), answers, kept))
    columns = ["type", "schedule", "questions", "answers that differ", "kept sets that differ"]
    typer.echo(pd.DataFrame(rows, columns=columns).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
