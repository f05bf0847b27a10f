"""Run the demo: real lmms-eval processes over local data, for both model families."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.table import Table

from lmms_prune.demo.benchmarks import TASKS, build_mirror
from lmms_prune.demo.checkpoints import build_llava, build_qwen2_5_vl

LAYERS = 8  # decoder layers of both checkpoints
SCHEDULES = ("none", "dart@2:0.44,random@5:0.07")
_BUILD: dict[str, Callable[..., Path]] = {"llava_pruned": build_llava, "qwen2_5_vl_pruned": build_qwen2_5_vl}
# The figure of each benchmark: metrics are added, and MME's two are its total as papers print it.
FIGURES: dict[str, tuple[str, ...]] = {
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "scienceqa_img": ("exact_match",),
    "pope": ("pope_accuracy",),
    "textvqa_val": ("exact_match",),
    "mmbench_en_dev_static": ("gpt_eval_score",),
    "mmbench_cn_dev_static": ("gpt_eval_score",),
    "gqa": ("exact_match",),
    "infovqa_val": ("anls",),
    "docvqa_val": ("anls",),
    "ocrbench": ("ocrbench_accuracy",),
}


class DemoError(RuntimeError):
    """A run that left no results; the message says where its log is."""


def task_configs() -> Path:
    """The folder of this package's task YAMLs: inside an installed wheel, or beside a checkout's package."""
    package = Path(__file__).parents[1]
    inside = package / "task_configs"
    return inside if inside.is_dir() else package.parent / "task_configs"


def run_demo(
    folder: Path,
    schedules: Sequence[str] | None,
    tasks: str | None,
    environment: Mapping[str, str],
    console: Console,
) -> tuple[Table, dict[str, Any]]:
    """Build what is missing in `folder`, run every model with every schedule, and tabulate the results.

    Args:
        folder: absolute; checkpoints and data that are there already are used as they are.
        schedules: schedule texts; None for `SCHEDULES`.
        tasks: task names with commas; None for all ten.
        environment: of the child processes.
        console: for progress.

    Returns:
        the table, and its content with keys ``mirror``, ``command`` and ``runs``.

    Raises:
        DemoError: an unknown task, or a run that left no results.
        OSError: `folder` cannot be written.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else list(TASKS)
    if unknown := [name for name in names if name not in FIGURES]:
        raise DemoError(f"--tasks: '{unknown[0]}' is not in the demo; it has {', '.join(FIGURES)}.")
    mirror = folder / "mirror"
    if not mirror.exists():
        build_mirror(mirror)
    runs: list[dict[str, Any]] = []
    command: list[str] = []
    for model, build in _BUILD.items():
        checkpoint = folder / "checkpoints" / model
        if not checkpoint.exists():
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            build(checkpoint, layers=LAYERS)
        for text in schedules or SCHEDULES:
            # The harness cannot take a comma in its output path.
            out = folder / "results" / model / re.sub(r"[^A-Za-z0-9.@]+", "-", text)
            command = _command(model, checkpoint, text, names, out)
            with console.status(f"{model}, schedule {text}: {len(names)} tasks"):
                results = _run(command, mirror, environment, out)
            runs.append(_record(model, results, names))
            console.print(f"[green]done[/green] {model}, schedule {text}", highlight=False)
    record = {"mirror": str(mirror), "command": shlex.join(command), "runs": runs}
    return _table(runs, names), record


def _command(model: str, checkpoint: Path, schedule: str, tasks: Sequence[str], out: Path) -> list[str]:
    program = Path(sys.executable).with_name("lmms-eval")
    # Small images keep the Qwen demo quick; its default scales every image up to 256 visual tokens.
    pixels = ",max_pixels=50176,min_pixels=3136" if model.startswith("qwen") else ""
    arguments = f"pretrained={checkpoint},schedule={schedule},batch_size=8{pixels}"
    options = ["--model", model, "--model_args", arguments, "--tasks", ",".join(tasks)]
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


def _record(model: str, results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    scores = {task: sum(results["results"][task][f"{metric},none"] for metric in FIGURES[task]) for task in tasks}
    run = results["config"]["batch_sizes"][0]
    return {"model": model, "schedule": run["schedule"], **run["averages"], "scores": scores}


def _table(runs: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Table:
    table = Table(title="Random weights: the scores show that all of it runs, not what a schedule costs.")
    table.add_column("benchmark", no_wrap=True)
    for run in runs:
        lines = [run["model"].removesuffix("_pruned"), *run["schedule"].split(",")]
        table.add_column("\n".join(lines), justify="right", no_wrap=True)
    for name, key in (("visual tokens", "original_visual_tokens"), ("… per layer", "visual_tokens_per_layer")):
        table.add_row(name, *(f"{run[key]:.1f}" for run in runs), end_section=key != "original_visual_tokens")
    for task in tasks:
        table.add_row(task, *(f"{run['scores'][task]:.3g}" for run in runs))
    return table
