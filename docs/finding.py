"""The finding of arXiv 2512.07580 on the demo's models: what pruning at each layer costs, method by method.

    python docs/finding.py measure tiny-llava        # minutes to hours; interrupted, it goes on
    python docs/finding.py plot

`measure` lets each method drop 90 % or 75 % of the visual tokens at each decoder layer, and all of them (``vtw``), on
every mini benchmark, and appends a line a benchmark to ``docs/finding/MODEL.csv``. `plot` draws what is there.
"""

from __future__ import annotations

import csv
import os
import tempfile
from pathlib import Path
from typing import Annotated

import lmms_eval.tasks
import pandas
import torch
import typer
from lmms_eval.evaluator import simple_evaluate

from lmms_prune.demo.benchmarks import TASKS, build_mirror
from lmms_prune.demo.run import FIGURES, LAYERS, MODELS, score, task_configs, weights

METHODS = ("random", "fastv", "dart", "divprune")
KEEPS = (0.1, 0.25)
LOWEST = {"fastv": 1, "dart": 1}
FOLDERS = ("mme", "scienceqa", "pope", "textvqa", "mmbench", "gqa", "infovqa", "docvqa", "ocrbench")
OUT = Path(__file__).with_name("finding")
app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command()
def measure(
    model: Annotated[str, typer.Argument(help=" or ".join(model.folder for model in MODELS))],
    rows: Annotated[int, typer.Option(help="Questions of each benchmark.")] = 48,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure what is not yet in the model's CSV."""
    chosen = next((one for one in MODELS if one.folder == model), None)
    if chosen is None:
        raise typer.BadParameter(f"model '{model}' is unknown; use {' or '.join(one.folder for one in MODELS)}")
    torch.set_num_threads(threads)
    OUT.mkdir(exist_ok=True)
    path = (OUT / f"{model}.csv").absolute()
    done = set(pandas.read_csv(path)["schedule"]) if path.exists() else set()
    schedules = ["none", *(f"vtw@{layer}" for layer in range(LAYERS))]
    for keep in KEEPS:
        for method in METHODS:
            schedules += [f"{method}@{layer}:{keep}" for layer in range(LOWEST.get(method, 0), LAYERS)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.chdir(build_mirror(Path(folder) / "mirror", rows=rows))
        for schedule in schedules:
            if schedule in done:
                continue
            scores = _scores(chosen.wrapper, f"pretrained={weights(chosen)},{chosen.arguments},schedule={schedule}")
            with path.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                if stream.tell() == 0:
                    writer.writerow(("schedule", "task", "score", "rows"))
                writer.writerows((schedule, task, round(value, 3), rows) for task, value in scores.items())
            typer.echo(f"{model} {schedule} {sum(scores.values()):.1f}")


def _scores(wrapper: str, arguments: str) -> dict[str, float]:
    below = Path(lmms_eval.tasks.__file__).parent
    # A manager of its own for each run: OCRBench's scorer keeps a counter as long as it is loaded.
    manager = lmms_eval.tasks.TaskManager(
        "ERROR", [str(task_configs()), *(str(below / name) for name in FOLDERS)], include_defaults=False
    )
    results = simple_evaluate(
        model=wrapper,
        model_args=f"{arguments},batch_size=8",
        tasks=list(TASKS),
        task_manager=manager,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return {task: score(results, task) for task in TASKS}


@app.command()
def plot() -> None:
    """Draw one picture a model: a panel a benchmark, accuracy over the layer at which is pruned."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    for path in sorted(OUT.glob("*.csv")):
        read = pandas.read_csv(path)
        whole = read[read["schedule"] == "none"].set_index("task")["score"]
        parts = read["schedule"].str.extract(r"(?P<method>\w+)@(?P<layer>\d+)(?::(?P<keep>[\d.]+))?")
        read = read.join(parts).dropna(subset=["layer"]).astype({"layer": int})
        for keep in map(str, KEEPS):
            figure, axes = pyplot.subplots(2, 5, figsize=(17, 6.4), sharex=True)
            for panel, task in zip(axes.flat, TASKS, strict=True):
                here = read[read["task"] == task]
                panel.axhline(whole[task], color="0.6", linewidth=1, label="unpruned")
                gone = here[here["method"] == "vtw"].sort_values("layer")
                panel.plot(gone["layer"], gone["score"], "k:", label="all removed")
                for method in METHODS:
                    line = here[(here["method"] == method) & (here["keep"] == keep)].sort_values("layer")
                    panel.plot(line["layer"], line["score"], marker="o", markersize=3, label=method)
                panel.set_title(FIGURES[task].short)
                panel.set_ylim(bottom=0)
            for panel in axes[-1]:
                panel.set_xlabel("pruned at the input of layer")
            axes[0, 0].legend(fontsize=7)
            figure.suptitle(f"{path.stem}: {1 - float(keep):.0%} of the visual tokens pruned at one layer")
            figure.tight_layout()
            figure.savefig(OUT / f"{path.stem}-{keep}.png", dpi=80)
            pyplot.close(figure)


if __name__ == "__main__":
    app()
