"""The finding of arXiv 2512.07580 on the demo's two models: the figures of docs/finding.md, made by one command.

    python docs/finding.py            # about 75 minutes on two cores; interrupted, it goes on
    python docs/finding.py --redraw   # a minute: the plots from the tables that are stored here; of means, without bands

Draws mini benchmarks and calls, for each model, `lmms-prune horizon` (information of every visual token at every layer,
the score without any from each layer on, and the score of methods that act alone at one layer), `lmms-prune information`
(heat maps, and how much information methods keep) and `lmms-prune calibrate` (a schedule from all this, compared with the
paper's own at the same budget); of the other benchmarks `horizon` without methods. Tables and pictures land in
docs/finding/MODEL.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from lmms_prune.demo.benchmarks import build_mirror
from lmms_prune.demo.models import MODELS, DemoCheckpoint, model_arguments, weights

OUT = Path(__file__).with_name("finding")
TASKS = "pope,gqa,textvqa_val,infovqa_val,docvqa_val"
OTHERS = "mme,scienceqa_img,mmbench_en_dev_static,mmbench_cn_dev_static,ocrbench"
# The paper's kinds of schedule at this depth: its hybrid, one method alone, VTW's rule and the control.
COMPARED = (
    "dart@1:?,random@8:0.05",
    "divprune@0:?,random@8:0.05",
    "dart@1:?",
    "divprune@0:?",
    "fastv@2:?",
    "random@0:?",
)


def commands(
    model: DemoCheckpoint, out: Path, tasks: str, others: str, limit: int, budget: str
) -> Iterator[tuple[str, list[str]]]:
    """What is run for a model, one after the other, each with a name."""
    arguments = f"device=cpu,{model_arguments(model, weights(model))}"
    program = str(Path(sys.executable).with_name("lmms-prune"))

    def start(command: str, tasks: str) -> list[str]:
        return [
            program,
            command,
            "--model",
            model.family.model_name,
            "--model_args",
            arguments,
            "--tasks",
            tasks,
            "--json",
        ]

    every = ["--limit", str(limit), "--block", "1"]
    alone = ["--methods", "random,dart,fastv,divprune,information", "--keeps", "0.1,0.25"]
    yield "horizon", [*start("horizon", tasks), *alone, *every, "--out", str(out)]
    if others:
        yield "horizon-others", [*start("horizon", others), *every, "--out", str(out / "others")]
    seen = ["--methods", "random,dart,fastv,divprune", "--limit", str(max(1, limit // 2)), "--pictures", "1"]
    yield "information", [*start("information", tasks), *seen, "--block", "1", "--out", str(out / "information")]
    compared = [part for text in COMPARED for part in ("--compare", text)]
    fixed = ["--limit", str(limit), "--block", "2", "--methods", "dart,divprune", "--budget", budget]
    yield "calibrate", [*start("calibrate", tasks), *fixed, *compared, "--out", str(out / "calibration")]


def draw_stored(folder: Path) -> None:
    """Draw the plots of a model again from its stored tables; heat maps need the measurements and stay as they are."""
    from lmms_prune.information import plots
    from lmms_prune.information.horizon import Horizon

    drawn = []
    layers, kept = (pd.read_csv(folder / f"{name}.csv") for name in ("layers", "kept"))
    measured = json.loads((folder / "information.json").read_text(encoding="utf-8"))["samples"]
    title = f"{folder.name}: information of visual tokens ({measured} documents)"
    drawn += plots.draw_layers(layers, title, folder / "layers")
    for task, lines in kept.groupby("task", sort=False):
        count = layers[layers.task == task].samples.iloc[0]
        title = f"{folder.name}, {plots.task_title(str(task))}: mean of {count} documents"
        drawn += plots.draw_kept(lines, title, folder / f"kept-{task}")
    for name in ("horizon", "horizon-others"):
        for entry in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["tasks"]:
            curves = pd.read_csv(folder / f"horizon-{entry['task']}.csv")
            horizon = Horizon(**{"measured": entry["units"], **entry}, layers=curves)
            title = f"{folder.name}, {plots.task_title(horizon.task)}: {horizon.units} scored units"
            drawn += plots.draw_horizon(horizon, title, folder / f"horizon-{horizon.task}")
            if (table := folder / f"methods-{horizon.task}.csv").exists():
                full = float(curves.full.iloc[0])
                drawn += plots.draw_methods(pd.read_csv(table), full, title, folder / f"methods-{horizon.task}")
    for path in drawn:
        if path.suffix == ".svg":  # the pages show the PNG files
            path.unlink()


def main(
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("build/finding"),
    limit: Annotated[int, typer.Option(min=2, help="Questions of each benchmark, an even number.")] = 48,
    budget: Annotated[str, typer.Option(help="Of the schedules that are compared.")] = "0.25",
    tasks: Annotated[str, typer.Option(help="Benchmarks.")] = TASKS,
    others: Annotated[str, typer.Option(help="Benchmarks of which only the removal of all is measured.")] = OTHERS,
    redraw: Annotated[bool, typer.Option("--redraw", help="Measure nothing: draw the stored tables again.")] = False,
) -> None:
    """Make all figures, one process for each model."""
    if redraw:
        for model in MODELS:
            draw_stored(OUT / model.folder)
        return
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    mirror = work / f"mirror-{2 * limit}"
    if not mirror.exists():
        build_mirror(mirror, rows=2 * limit)
    environment = {**os.environ, "HF_HOME": str(work / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HOME"] = str(work)  # what `calibrate` keeps for schedule=auto is not the user's

    def measure(model: DemoCheckpoint) -> int:
        out, made = work / model.folder, OUT / model.folder
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        for name, command in commands(model, out, tasks, others, limit, budget):
            done = subprocess.run(command, cwd=mirror, env=environment, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return done.returncode
            said = json.loads(done.stdout.strip().splitlines()[-1])
            # Where it was made says nothing to a reader.
            said = {key: value for key, value in said.items() if key not in ("out", "yaml", "kept")}
            (made / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        for folder in (out, out / "others", out / "information"):
            for path in (*folder.glob("*.csv"), *folder.glob("*.png")):
                shutil.copy(path, made)
        # The command's table has a line for each sample; here their means do.
        kept = pd.read_csv(made / "kept.csv").groupby(["task", "keep", "layer", "method"])[["kept", "information"]]
        kept.mean().round(4).to_csv(made / "kept.csv")
        for path in (out / "information" / "heatmaps").glob("*.png"):
            shutil.copy(path, made / f"heatmap-{path.name}")
        return 0

    with ThreadPoolExecutor(len(MODELS)) as pool:
        codes = list(pool.map(measure, MODELS))
    raise typer.Exit(max(codes))


if __name__ == "__main__":
    typer.run(main)
