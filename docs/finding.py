"""The finding of arXiv 2512.07580 on the demo's two models: the figures of docs/finding.md, made by one command.

    python docs/finding.py            # about an hour on two cores; interrupted, it goes on

Draws the ten mini benchmarks, and calls `lmms-prune horizon` for each model: information of every visual token at every
layer, the score without any visual token from each layer on, and the score of methods that act alone at one layer. Tables
(CSV) and pictures (PNG) land in docs/finding/MODEL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from lmms_prune.demo.benchmarks import TASKS, build_mirror
from lmms_prune.demo.run import MODELS, Model, weights

OUT = Path(__file__).with_name("finding")


def main(
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("build/finding"),
    limit: Annotated[int, typer.Option(min=2, help="Questions of each benchmark, an even number.")] = 24,
    methods: Annotated[str, typer.Option(help="Methods that act alone at each layer.")] = "random,dart,fastv",
    keeps: Annotated[str, typer.Option(help="What they keep.")] = "0.25",
    tasks: Annotated[str, typer.Option(help="Benchmarks.")] = ",".join(TASKS),
) -> None:
    """Make all figures, one process for each model."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    mirror = work / f"mirror-{limit}"
    if not mirror.exists():
        build_mirror(mirror, rows=limit)
    environment = {**os.environ, "HF_HOME": str(work / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def measure(model: Model) -> int:
        out = work / model.folder
        arguments = f"pretrained={weights(model)},{model.arguments},batch_size=8"
        command = [str(Path(sys.executable).with_name("lmms-prune")), "horizon", "--model", model.wrapper]
        command += ["--model_args", arguments, "--tasks", tasks, "--limit", str(limit), "--block", "1"]
        command += ["--methods", methods, "--keeps", keeps, "--out", str(out)]
        code = subprocess.run(command, cwd=mirror, env=environment, check=False).returncode
        made = OUT / model.folder
        made.mkdir(parents=True, exist_ok=True)
        for path in (*out.glob("*.csv"), *out.glob("*.png"), *out.glob("*.json")):
            shutil.copy(path, made)
        return code

    with ThreadPoolExecutor(len(MODELS)) as pool:
        codes = list(pool.map(measure, MODELS))
    raise typer.Exit(max(codes))


if __name__ == "__main__":
    typer.run(main)
