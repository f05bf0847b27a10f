"""Samples a second through lmms-eval itself, beside the harness's own wrapper of the same checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from lmms_prune.bench.models import BenchError
from lmms_prune.harness.arguments import split
from lmms_prune.models import MODEL_NAMES
from lmms_prune.record.results import read_results_file, results_files

STOCK = {name: family.stock_model for name, family in MODEL_NAMES.items()}


@dataclass(frozen=True)
class Throughput:
    """How fast one model answered.

    Args:
        name: lmms-eval's model, with its schedule.
        batch_size: of its batches.
        seconds: for as many samples as lie between the two runs, loading and scoring of the first ones left out.
        per_second: samples.
    """

    name: str
    batch_size: str
    seconds: float
    per_second: float


def measure_throughput(
    model: str,
    model_args: str,
    schedules: Sequence[str],
    batch_size: str,
    task: str,
    samples: int,
    repeats: int,
    device: str,
    include: Path,
    progress: Callable[[str], None],
) -> list[Throughput]:
    """Time a task's samples through ``lmms-eval`` processes: the stock wrapper first, then ours with each schedule.

    Each is run on `samples` and on three times as many documents in turn, `repeats` times; the difference of the medians
    is the time of 2 `samples`, from reading a document to its score, without start, imports and loading.

    Args:
        model: ours; the stock wrapper is the one of its family, at batch size 1, the only one that LLaVA's takes.
        model_args: for ours, without schedule and batch size. The stock wrapper gets the checkpoint alone.
        schedules: texts.
        batch_size: of ours, a number or "auto".
        task: of lmms-eval, with enough documents.
        samples: see above.
        repeats: see above.
        device: for both.
        include: folder of further tasks.
        progress: is told what runs.

    Raises:
        BenchError: a run left no results, the task has fewer documents, or the longer run took no longer than the
            short one.
    """
    checkpoint = split(model_args).get("pretrained")
    if checkpoint is None:
        raise BenchError("--model_args: name the checkpoint, pretrained=FOLDER; both wrappers load it.")
    ours = [part for part in (model_args, f"device={device}") if part]
    jobs = [(STOCK[model], f"pretrained={checkpoint},device_map={device}", "1")]
    jobs += [(model, ",".join([*ours, f"schedule={text}"]), batch_size) for text in schedules]
    made = []
    for name, arguments, size in jobs:
        options = ["--model", name, "--model_args", arguments, "--batch_size", size, "--device", device]
        times: dict[int, list[float]] = {samples: [], 3 * samples: []}
        for _ in range(repeats):
            for count, taken in times.items():
                progress(f"{name}, {arguments}: {count} samples")
                seconds, answered = _run([*options, "--tasks", task, "--limit", str(count)], include)
                if answered < count:
                    raise BenchError(
                        f"--samples {samples}: {task} has {answered} documents, and three times as many as --samples are "
                        f"needed; use --samples {answered // 3} or less."
                    )
                taken.append(seconds)
        seconds = median(times[3 * samples]) - median(times[samples])
        if seconds <= 0:
            raise BenchError(f"--samples {samples} are too few to time {name}; give more, or more --repeats.")
        label = name if name in STOCK.values() else f"{name}, {arguments.split('schedule=')[1]}"
        made.append(Throughput(label, size, seconds, 2 * samples / seconds))
    return made


def _run(options: Sequence[str], include: Path) -> tuple[float, int]:
    """What the harness says that one evaluation took, and how many documents it had."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(sys.executable).with_name("lmms-eval")
        command = [str(program), *options, "--include_path", str(include), "--output_path", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for path in results_files(Path(folder), lambda error: None):
            if (content := read_results_file(path)) is not None:
                documents = sum(count["effective"] for count in content["n-samples"].values())
                return float(content["total_evaluation_time_seconds"]), documents
    raise BenchError(
        f"this run left no results:\n  {' '.join(command)}\nIt ends with:\n{(done.stdout + done.stderr).strip()[-1500:]}"
    )
