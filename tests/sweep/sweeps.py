"""Configurations for sweeps, and stand-ins for the evaluating processes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from forking import Forking

from lmms_prune.harness.failures import Failure, Scope
from lmms_prune.sweep.jobs import Job

SCHEDULES = {"hybrid": "dart@1:0.44,random@8:0.1", "unpruned": "none"}
TASKS = ("pope", "ocrbench")
TINY = Path(__file__).parents[2] / "lmms_prune/demo/weights/tiny-llava"


def config(folder: Path, name: str, schedule: str, tasks: str = "pope,ocrbench", **arguments: object) -> Path:
    """A ``--config`` file for the demo's LLaVA."""
    fixed = {"dtype": "float32", "image_aspect": "pad", "batch_size": 4}
    model_args = {"pretrained": TINY, "schedule": schedule, **fixed, **arguments}
    lines = ["model: llava_pruned", "model_args:", *(f"  {key}: {value}" for key, value in model_args.items())]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join([*lines, f"tasks: {tasks}", ""]), encoding="utf-8")
    return path


def leave_results(job: Job, score: float = 0.5, documents: int = 3, stamp: str = "20260101_000000") -> None:
    """Write the files that lmms-eval writes for one task."""
    folder = job.partial / "some__model"
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {job.task: {"alias": job.task, "exact_match,none": score, "exact_match_stderr,none": "N/A"}},
        "configs": {job.task: {"task": job.task}},
        "higher_is_better": {job.task: {"exact_match": True}},
        "n-samples": {job.task: {"original": 9, "effective": documents}},
        "config": {
            "model_args": f"journal={job.journal}",
            "resolved_cli_args": {
                "model_args": f"journal={job.journal}",
                "output_path": str(job.partial),
                "hf_hub_log_args": f",output_path={job.partial}",
            },
        },
    }
    (folder / f"{stamp}_results.json").write_text(json.dumps(results), encoding="utf-8")
    lines = [json.dumps({"doc_id": i, "filtered_resps": "yes"}) + "\n" for i in range(documents)]
    (folder / f"{stamp}_samples_{job.task}.jsonl").write_text("".join(lines), encoding="utf-8")
    # A file that the task itself writes: named like a results file, but not one.
    (job.partial / "submissions").mkdir(exist_ok=True)
    (job.partial / "submissions" / "some_results.json").write_text("{}", encoding="utf-8")
    (job.partial / "log.txt").write_text("fine\n", encoding="utf-8")


class Processes:
    """Stands in for the evaluating processes: writes results, and fails for the jobs that `fails` selects."""

    def __init__(self) -> None:
        self.started = 0
        self.evaluated: list[tuple[str, str]] = []
        self.fails: Callable[[Job], bool] = lambda job: False
        self.scope: Scope = "run"

    def __call__(self, launch: str, secrets: Collection[str]) -> _Process:
        self.started += 1
        return _Process(self)


class _Process:
    def __init__(self, processes: Processes) -> None:
        self.processes, self.open = processes, True

    def evaluate(self, job: Job) -> Failure | None:
        assert self.open
        assert list(job.partial.iterdir()) == []
        self.processes.evaluated.append((job.name, job.task))
        if self.processes.fails(job):
            (job.partial / "log.txt").write_text("ValueError: no\n", encoding="utf-8")
            return Failure("ValueError: no (exit code 1)", False, self.processes.scope)
        leave_results(job)
        return None

    def close(self, *, at_once: bool = False) -> None:
        self.open = False


# Environment variables of the processes of a `Place`; lmms-eval prints the first one.
SECRETS = {"HF_TOKEN": "hf_SECRET", "SOME_PASSWORD": 'correct "horse" battery'}


@dataclass
class Place:
    """The folder in which commands are started, and their environment."""

    mirror: Path
    configs: Path
    environment: dict[str, str]
    forking: Forking

    def start(self, *options: str | Path) -> subprocess.Popen[str]:
        """A sweep as an ordinary process."""
        command = [Path(sys.executable).with_name("lmms-prune"), "sweep", *map(str, options)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.mirror, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        process = self.start(*options)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def fork(self, program: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
        """A command as a forked process."""
        command = self.forking.program(program, *options)
        return subprocess.run(
            command, cwd=self.mirror, env=self.environment, capture_output=True, text=True, check=False
        )

    def sweep(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        """A sweep that forks, as a forked process."""
        return self.fork("lmms-prune", "sweep", *options, "--launch", shlex.join(self.forking.prefix))


def holding_a_secret(folder: Path) -> list[Path]:
    """The files below a folder that hold a secret in clear."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS.values())
    ]
