"""Samples per second through lmms-eval, compared with its own (stock) wrapper of the same checkpoint."""

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
    """Measured throughput of one model.

    Args:
        name: lmms-eval's name of the model, with its schedule.
        batch_size: the batch size.
        seconds: difference in time between the long and the short run, so start and loading are excluded.
        per_second: samples per second.
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

    Each runs in turn on `samples` and on three times as many documents, `repeats` times. The difference of the medians is
    the time of 2 · `samples` documents, from reading a document to its score, without start, imports and loading.

    Args:
        model: name of our model. The stock wrapper is that of its family, at batch size 1, the only one that LLaVA's
            wrapper supports.
        model_args: arguments of our model, without schedule and batch size. The stock wrapper gets only the checkpoint.
        schedules: schedule texts.
        batch_size: batch size of our model, a number or "auto".
        task: an lmms-eval task with at least 3 · `samples` documents.
        samples: number of documents of the short run.
        repeats: number of runs of each length.
        device: device of both models.
        include: folder of further tasks.
        progress: called with a description of each run.

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
    throughputs = []
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
        throughputs.append(Throughput(label, size, seconds, 2 * samples / seconds))
    return throughputs


def _run(options: Sequence[str], include: Path) -> tuple[float, int]:
    """Run one evaluation; return its seconds, as lmms-eval recorded them, and its number of documents."""
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
