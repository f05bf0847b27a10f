"""Run the demo: real lmms-eval processes over local data, for both of the trained models."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lmms_prune.demo.benchmarks import TASKS, build_mirror

LAYERS = 12  # decoder layers of both models
WEIGHTS = Path(__file__).with_name("weights")
ROWS, QUICK_ROWS = 96, 24  # questions of each benchmark


@dataclass(frozen=True)
class Model:
    """One of the two models: lmms-eval's name for its wrapper, its folder below WEIGHTS, and arguments of its own."""

    wrapper: str
    folder: str
    arguments: str


MODELS = (
    # Pictures that are not square keep their edges, and small ones their size.
    Model("llava_pruned", "tiny-llava", "image_aspect=pad"),
    Model("qwen2_5_vl_pruned", "tiny-qwen2.5-vl", "min_pixels=3136,max_pixels=200704"),
)


@dataclass(frozen=True)
class Row:
    """One schedule of the table, with the budget that solves its "?"."""

    schedule: str
    budget: float | None = None

    def __str__(self) -> str:
        return self.schedule if self.budget is None else f"{self.schedule},budget={self.budget:g}"


# The paper's hybrids act before layers 2 and 20 of 32; here before 1 and 8 of 12.
_HYBRID = "dart@1:?,random@8:{late}"
QUICK = (
    Row("none"),
    Row("random@1:1.0"),
    Row(_HYBRID.format(late=0.1), 0.5),
    Row(_HYBRID.format(late=0.03), 0.25),
    Row("blind@0"),
)
_SINGLE = ("dart@1:?", "divprune@1:?", "fastv@1:?", "random@1:?", "stride@1:?", "pool@1:?")
FULL = (
    Row("none"),
    *(
        Row(text, budget)
        for budget, late in ((0.5, 0.1), (0.25, 0.03))
        for text in (_HYBRID.format(late=late), f"divprune@1:?,random@8:{late}", *_SINGLE)
    ),
    Row("vtw@8"),
    Row("blind@0"),
)


@dataclass(frozen=True)
class Figure:
    """How a benchmark's number is read: metrics are added, and `whole` is the best possible sum."""

    short: str
    metrics: tuple[str, ...]
    whole: float | None = 1.0


# MME is shown as papers print it, as its total. OCRBench divides by 1000 whatever the number of questions.
FIGURES = {
    "mme": Figure("MME", ("mme_perception_score", "mme_cognition_score"), None),
    "scienceqa_img": Figure("SQA", ("exact_match",)),
    "pope": Figure("POPE", ("pope_accuracy",)),
    "textvqa_val": Figure("TVQA", ("exact_match",)),
    "mmbench_en_dev_static": Figure("MMB", ("gpt_eval_score",), 100.0),
    "mmbench_cn_dev_static": Figure("CN", ("gpt_eval_score",), 100.0),
    "gqa": Figure("GQA", ("exact_match",)),
    "infovqa_val": Figure("Info", ("anls",)),
    "docvqa_val": Figure("Doc", ("anls",)),
    "ocrbench": Figure("OCR", ("ocrbench_accuracy",)),
}


class DemoError(RuntimeError):
    """A run that left no results, or a model that is not there; the message says where to look."""


def task_configs() -> Path:
    """The folder of this package's task YAMLs: inside an installed wheel, or beside a checkout's package."""
    package = Path(__file__).parents[1]
    inside = package / "task_configs"
    return inside if inside.is_dir() else package.parent / "task_configs"


def weights(model: Model, root: Path = WEIGHTS) -> Path:
    """The folder of a trained model.

    Raises:
        DemoError: a file of it is missing.
    """
    folder = root / model.folder
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise DemoError(f"the demo's model lacks {folder / name}: install lmms-prune again, or train it anew.")
    return folder


def run_demo(
    folder: Path, rows: Sequence[Row], count: int, tasks: str | None, environment: Mapping[str, str], console: Console
) -> dict[str, Any]:
    """Build the data if it is not there, run both models with every schedule, and return the results.

    Args:
        folder: absolute; data that is there already is used as it is, results of earlier runs stay beside the new.
        rows: the schedules.
        count: questions of each benchmark, even.
        tasks: task names with commas; None for all ten.
        environment: of the child processes.
        console: for progress.

    Returns:
        keys ``mirror`` (the folder to start lmms-eval in), ``command`` (of the last run that went well), ``runs``
        (model, schedule, scores, averages) and ``failures`` (model, schedule, error).

    Raises:
        DemoError: an unknown task, or a missing model.
        OSError: `folder` cannot be written.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else list(TASKS)
    if unknown := [name for name in names if name not in FIGURES]:
        raise DemoError(f"--tasks: '{unknown[0]}' is not in the demo; it has {', '.join(FIGURES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = {model: weights(model) for model in MODELS}
    mirror = folder / f"mirror-{count}"
    if not mirror.exists():
        datasets.disable_progress_bars()
        with console.status("drawing the ten benchmarks"):
            build_mirror(mirror, rows=count)
    jobs = [(model, row) for model in MODELS for row in rows]
    record: dict[str, Any] = {"mirror": str(mirror), "command": "", "runs": [], "failures": []}
    # One thread a process: two small models side by side finish sooner than one after the other with two threads each.
    beside = max(1, min(len(jobs), (os.cpu_count() or 1)))
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(beside) as pool, _progress(console) as progress:
        bar = progress.add_task(f"{len(jobs)} runs of lmms-eval, {len(names)} tasks each", total=len(jobs))

        def one(job: tuple[Model, Row]) -> tuple[list[str], dict[str, Any] | DemoError]:
            model, row = job
            # The harness cannot take a comma in its output path.
            out = folder / f"results-{count}" / model.folder / re.sub(r"[^A-Za-z0-9.@]+", "-", str(row))
            command = _command(model, checkpoints[model], row, names, out)
            try:
                return command, _run(command, mirror, environment, out)
            except DemoError as error:
                return command, error
            finally:
                progress.advance(bar)

        for (model, row), (command, results) in zip(jobs, pool.map(one, jobs), strict=True):
            if isinstance(results, DemoError):
                record["failures"].append({"model": model.wrapper, "schedule": str(row), "error": str(results)})
            else:
                record["runs"].append(_record(model, row, results, names))
                record["command"] = shlex.join(command)
    return record


def tables(record: Mapping[str, Any], tasks: str | None) -> list[Table]:
    """One table a model: a schedule a row, a benchmark a column, and what is left of the unpruned scores."""
    names = [name.strip() for name in tasks.split(",")] if tasks else list(TASKS)
    made = []
    for model in MODELS:
        runs = [run for run in record["runs"] if run["model"] == model.wrapper]
        if not runs:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=model.folder, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("schedule", overflow="fold")
        for name in ("tokens", *(FIGURES[name].short for name in names), "kept"):
            table.add_column(name, justify="right", no_wrap=True)
        whole = next((run for run in runs if run["schedule"] == "none"), None)
        for run in runs:
            scores = [f"{run['scores'][name]:.0f}" for name in names]
            kept = retention(run, whole) if whole else None
            label = "\n".join(run["schedule"].split(","))
            tokens = f"{run['averages']['visual_tokens_per_layer']:.0f}"
            table.add_row(label, tokens, *scores, "" if kept is None else f"{kept:.0f}")
        made.append(table)
    return made


def retention(run: Mapping[str, Any], whole: Mapping[str, Any]) -> float | None:
    """The mean over benchmarks of the share of the unpruned score that is left, in percent; None if none is above 0."""
    shares = [run["scores"][name] / score for name, score in whole["scores"].items() if score > 0]
    return 100 * sum(shares) / len(shares) if shares else None


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _command(model: Model, checkpoint: Path, row: Row, tasks: Sequence[str], out: Path) -> list[str]:
    program = Path(sys.executable).with_name("lmms-eval")
    arguments = f"pretrained={checkpoint},schedule={row},batch_size=8,{model.arguments}"
    options = ["--model", model.wrapper, "--model_args", arguments, "--tasks", ",".join(tasks)]
    return [str(program), *options, "--include_path", str(task_configs()), "--output_path", str(out), "--log_samples"]


def _run(command: list[str], mirror: Path, environment: Mapping[str, str], out: Path) -> dict[str, Any]:
    """The newest results file of one process; lmms-eval exits with 0 even when it fails, so the file is the judge."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.rglob("*_results.json"))
    log = out / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        subprocess.run(command, cwd=mirror, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT, check=False)
    for path in sorted(set(out.rglob("*_results.json")) - before):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "config" in results:
            return results
    said = log.read_text(encoding="utf-8").strip()
    marker = "lmms-prune: error:"
    # Our own errors may take several lines and come last; of any other the last line says most.
    end = said[said.rindex(marker) :] if marker in said else " ".join(said.splitlines()[-1:])
    raise DemoError(f"this run left no results; its log is {log} and ends with:\n{end}")


def _record(model: Model, row: Row, results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    run = results["config"]["batch_sizes"][0]
    scores = {task: score(results, task) for task in tasks}
    said = {"model": model.wrapper, "schedule": str(row), "solved": run["schedule"], "averages": run["averages"]}
    return {**said, "scores": scores}


def score(results: Mapping[str, Any], task: str) -> float:
    """A benchmark's figure: MME's total, and percent of all others."""
    figure = FIGURES[task]
    total = sum(results["results"][task][f"{metric},none"] for metric in figure.metrics)
    if task == "ocrbench":
        return 100 * total * 1000 / results["n-samples"][task]["effective"]
    return total if figure.whole is None else 100 * total / figure.whole
