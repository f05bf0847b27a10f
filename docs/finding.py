"""The finding of arXiv 2512.07580 on the demo's two models: the figures of docs/finding.md, made by one command.

    python docs/finding.py            # hours on two cores; interrupted, it goes on
    python docs/finding.py --redraw   # a minute: the plots from the tables that are stored here; of means, without bands

Calls `lmms-prune reproduce` for the figures, with single tokens as units of information (once on five benchmarks with
methods, once on the other five for their horizons), and `lmms-prune calibrate` for a schedule that follows from them,
compared with the paper's own at the same budget. Tables and pictures are copied to docs/finding/MODEL.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from lmms_prune.demo.models import MODELS, DemoCheckpoint, weights

OUT = Path(__file__).with_name("finding")
PROGRAM = str(Path(sys.executable).with_name("lmms-prune"))
TASKS = "pope,gqa,textvqa_val,infovqa_val,docvqa_val"
OTHERS = "mme,scienceqa_img,mmbench_en_dev_static,mmbench_cn_dev_static,ocrbench"
METHODS, KEEPS = "random,dart,fastv,divprune", "0.1,0.25"
# The paper's kinds of schedule at this depth: its hybrid, one method alone, VTW's rule and the control.
COMPARED = (
    "dart@1:?,random@8:0.05",
    "divprune@0:?,random@8:0.05",
    "dart@1:?",
    "divprune@0:?",
    "fastv@2:?",
    "random@0:?",
)
# The pictures that docs/finding.md shows; of all others the tables are enough.
SHOWN = {
    "tiny-llava": (
        "heatmap-pope-test-0",
        "horizon-pope",
        "horizon-textvqa_val",
        "horizons",
        "kept-pope",
        "layers",
        "methods-pope",
        "methods-textvqa_val",
    ),
    "tiny-qwen2.5-vl": ("horizons", "layers", "methods-docvqa_val", "methods-pope"),
}
FIGURES = ("fig1", "fig5", "fig6", "fig7", "fig9", "fig10", "fig11", "fig12")


def reproduce(items: tuple[str, ...], out: Path, tasks: str, limit: int) -> None:
    """Make the items' figures on some benchmarks."""
    words = ["reproduce", *items, "--models", "demo", "--out", str(out), "--tasks", tasks, "--limit", str(limit)]
    subprocess.run([PROGRAM, *words, "--methods", METHODS, "--keeps", KEEPS, "--block", "1"], check=True)


def calibrate(model: DemoCheckpoint, work: Path, tasks: str, limit: int, budget: str) -> dict:
    """Find a hybrid, on as many documents again, and return what the command says."""
    mirror = next(work.glob("calibration/mirror-*"), None)
    if mirror is None:
        from lmms_prune.demo.benchmarks import mirror_in

        (work / "calibration").mkdir(parents=True, exist_ok=True)
        mirror = mirror_in(work / "calibration", 2 * limit)
    arguments = f"device=cpu,dtype=float32,batch_size=8,{model.arguments}"
    words = ["--model", str(weights(model)), "--model-args", arguments, "--tasks", tasks, "--json"]
    words += ["--limit", str(limit), "--block", "2", "--methods", "dart,divprune", "--budget", budget]
    words += [part for text in COMPARED for part in ("--compare", text)]
    words += ["--out", str(work / "calibration" / model.folder)]
    # What `calibrate` keeps for schedule=auto is not the user's: hence another HOME.
    own = [f"HOME={work}", f"HF_HOME={work / 'huggingface'}", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1"]
    command = ["env", *own, PROGRAM, "calibrate", *words]
    done = subprocess.run(command, cwd=mirror, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def copy(model: DemoCheckpoint, figures: Path, others: Path, calibration: dict) -> None:
    """Copy a model's tables and pictures to docs/finding; where they were made says nothing to a reader."""
    made = OUT / model.folder
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    steps = figures / "steps"
    outputs = {
        "horizon": json.loads((steps / f"{model.folder}-horizon" / "output.json").read_text(encoding="utf-8")),
        "horizon-others": json.loads(
            (others / "steps" / f"{model.folder}-horizon" / "output.json").read_text(encoding="utf-8")
        ),
        "information": json.loads((steps / f"{model.folder}-information" / "output.json").read_text(encoding="utf-8")),
        "calibrate": calibration,
    }
    for name, output in outputs.items():
        shown = {key: value for key, value in output.items() if key not in ("out", "yaml", "kept")}
        (made / f"{name}.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    for folder in (others / model.folder, figures / model.folder):
        for path in (*folder.glob("horizon/*.csv"), *folder.glob("information/*.csv")):
            shutil.copy(path, made / path.name)
    for path in (figures / model.folder / "oracle").glob("methods-*.csv"):
        shutil.copy(path, made / f"oracle-{path.name}")
    # The command's table has a line for each sample; here their means do.
    kept = pd.read_csv(made / "kept.csv").groupby(["task", "keep", "layer", "method"])[["kept", "information"]]
    kept.mean().round(4).to_csv(made / "kept.csv")
    for path in (figures / model.folder / "information" / "heatmaps").glob("*.png"):
        shutil.copy(path, made / f"heatmap-{path.name}")
    draw_stored(made)


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
    horizons = []
    for name in ("horizon", "horizon-others"):
        for entry in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["tasks"]:
            curves = pd.read_csv(folder / f"horizon-{entry['task']}.csv")
            horizon = Horizon(**{"measured": entry["units"], **entry}, layers=curves)
            horizons.append(horizon)
            title = f"{folder.name}, {plots.task_title(horizon.task)}: {horizon.units} scored units"
            drawn += plots.draw_horizon(horizon, title, folder / f"horizon-{horizon.task}")
            if (table := folder / f"methods-{horizon.task}.csv").exists():
                full = float(curves.full.iloc[0])
                drawn += plots.draw_methods(pd.read_csv(table), full, title, folder / f"methods-{horizon.task}")
    title = f"{folder.name}: score without visual tokens, and horizons"
    drawn += plots.draw_horizons(horizons, title, folder / "horizons")
    for path in (*drawn, *folder.glob("heatmap-*.png")):
        if path.suffix == ".svg" or path.stem not in SHOWN[folder.name]:
            path.unlink(missing_ok=True)


def main(
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("build/finding"),
    limit: Annotated[int, typer.Option(min=2, help="Questions of each benchmark, an even number.")] = 48,
    budget: Annotated[str, typer.Option(help="Of the schedules that are compared.")] = "0.25",
    tasks: Annotated[str, typer.Option(help="Benchmarks.")] = TASKS,
    others: Annotated[str, typer.Option(help="Benchmarks of which only the removal of all is measured.")] = OTHERS,
    redraw: Annotated[bool, typer.Option("--redraw", help="Measure nothing: draw the stored tables again.")] = False,
) -> None:
    """Make all figures."""
    if redraw:
        for model in MODELS:
            draw_stored(OUT / model.folder)
        return
    work = work.absolute()
    reproduce(FIGURES, work / "figures", tasks, limit)
    reproduce(("fig9",), work / "others", others, limit)
    for model in MODELS:
        copy(model, work / "figures", work / "others", calibrate(model, work, tasks, limit, budget))


if __name__ == "__main__":
    typer.run(main)
