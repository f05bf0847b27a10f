"""What the honest runs are, and how tests change copies of their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parents[2] / "lmms_prune/demo/weights"
TASKS = (
    "gqa",
    "docvqa_val",
    "mme",
    "pope",
    "prune_pope",
    "mmbench_en_dev_static",
    "ocrbench",
    "scienceqa",
    "textvqa_val",
)
FEW = ("gqa", "docvqa_val", "pope")
FAMILIES = {
    "llava_pruned": ("tiny-llava", "image_aspect=pad"),
    "qwen2_5_vl_pruned": ("tiny-qwen2.5-vl", "min_pixels=3136,max_pixels=200704"),
}
KEEP = "0.4166667"


@dataclass(frozen=True)
class HonestRun:
    """One evaluation."""

    schedule: str
    family: str = "llava_pruned"
    tasks: tuple[str, ...] = FEW
    seed: int = 0
    journal: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, journal: Path) -> str:
        name, more = FAMILIES[self.family]
        kept = f",journal={journal}" if self.journal else ""
        return f"pretrained={WEIGHTS / name},schedule={self.schedule},seed={self.seed},dtype=float32,batch_size=3,{more}{kept}"


QWEN = "qwen2_5_vl_pruned"
RUNS = {
    "none": HonestRun("none", tasks=TASKS),
    "divprune": HonestRun(f"divprune@2:{KEEP}", tasks=TASKS),
    "random": HonestRun(f"random@2:{KEEP}"),
    "random-1": HonestRun(f"random@2:{KEEP}", seed=1),
    "resumed": HonestRun("dart@2:0.44,random@8:0.1", journal=True),
    "resumed-again": HonestRun("dart@2:0.44,random@8:0.1", journal=True),
    "solved": HonestRun("random@1:?,budget=0.5"),
    "limited": HonestRun("stride@1:0.5,keepfirst@4:20t,vtw@9", options={"limit": 2}),
    "cropping": HonestRun("ivcprune@3:0.5,pool@6:0.2,random@8:0.05"),
    "qwen-none": HonestRun("none", QWEN),
    "qwen": HonestRun("random@1:0.5,stride@4:0.25,keeplast@7:0.1", QWEN, tasks=TASKS, seed=3),
    "qwen-sparse": HonestRun("sparsevlm@3:0.5,mustdrop@6", QWEN),
}


def copied(honest: Path, folder: Path, *names: str) -> Path:
    """Copy honest runs into a new folder of results."""
    for name in names:
        shutil.copytree(honest / name, folder / name)
    return folder


def results_file(run: Path) -> Path:
    """The results file of one run."""
    [path] = [path for path in run.rglob("*_results.json") if path.parent.name != "submissions"]
    return path


def change_samples(run: Path, change: Callable[[dict[str, Any]], None], *tasks: str) -> None:
    """Change each line of a run's samples, or of those of some tasks."""
    for path in run.rglob("*_samples_*.jsonl"):
        if tasks and path.stem.split("_samples_")[1] not in tasks:
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for logged in lines:
            change(logged)
        path.write_text("".join(f"{json.dumps(logged, ensure_ascii=False)}\n" for logged in lines), encoding="utf-8")


def change_results(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the results file of a run."""
    path = results_file(run)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def relabel(run: Path, old: str, new: str, **settings: str) -> None:
    """Give a run another schedule wherever its text is, and other settings; the tokens stay as they are."""
    path = results_file(run)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    change_results(run, lambda content: content["config"]["batch_sizes"][0]["settings"].update(settings))
