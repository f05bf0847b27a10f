"""Samples per second through lmms-eval, compared with its own (stock) wrapper of the same checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lmms_prune.bench.models import BenchError
from lmms_prune.bench.ratios import ratio
from lmms_prune.demo.benchmarks import build_mirror
from lmms_prune.demo.models import MODELS, DemoError, weights
from lmms_prune.harness.argument_text import extended, split
from lmms_prune.harness.timed import CPU_SECONDS
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
        per_second: samples per second; of CPU time of all threads on a CPU.
        relative: samples per second, relative to the stock wrapper's.
        low, high: 95 % bootstrap interval of `relative`.
        marks: of `relative`, if it is no result; see `lmms_prune.bench.ratios`.
    """

    name: str
    batch_size: str
    seconds: float
    per_second: float
    relative: float
    low: float
    high: float
    marks: tuple[str, ...]


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
    folder: Path | None = None,
    counted: Callable[[int, int], None] = lambda done, total: None,
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
        folder: the folder in which lmms-eval runs; it finds benchmarks there. None for the present one.
        counted: called with the number of documents that were evaluated, and of all.

    Raises:
        BenchError: a run left no results, the task has fewer documents, or the longer run took no longer than the
            short one.
    """
    checkpoint = split(model_args)["pretrained"]
    jobs = [(STOCK[model], f"pretrained={checkpoint},device_map={device}", "1")]
    jobs += [(model, extended(model_args, {"device": device, "schedule": text}), batch_size) for text in schedules]
    times: list[dict[int, list[float]]] = [{samples: [], 3 * samples: []} for _ in jobs]
    ended, total = 0, repeats * len(jobs) * 4 * samples
    for _ in range(repeats):
        for (name, arguments, size), seconds_of in zip(jobs, times, strict=True):
            options = ["--model", name, "--model_args", arguments, "--batch_size", size, "--device", device]
            for count, taken in seconds_of.items():
                progress(f"{name}, {arguments}: {count} samples")
                seconds, answered = _run([*options, "--tasks", task, "--limit", str(count)], include, folder)
                if answered < count:
                    raise BenchError(
                        f"--limit {samples}: {task} has {answered} documents, and three times as many as --limit are "
                        f"needed; use --limit {answered // 3} or less."
                    )
                taken.append(seconds)
                ended += count
                counted(ended, total)
    return [_summary(job, job_times, times[0], samples) for job, job_times in zip(jobs, times, strict=True)]


def _summary(
    job: tuple[str, str, str], own: dict[int, list[float]], stock: dict[int, list[float]], samples: int
) -> Throughput:
    """Compare one job's times with the stock wrapper's; each has the repeats of the short and of the long runs."""
    name, arguments, size = job
    seconds = median(own[3 * samples]) - median(own[samples])
    if seconds <= 0:
        raise BenchError(f"--limit {samples}: too few documents to time {name}; give more, or more --repeats.")
    relative = ratio(_times_as_fast, *stock.values(), *own.values())
    # The stock wrapper is its own baseline: its ratio is 1 by definition.
    marks = () if own is stock else relative.marks
    label = name if name in STOCK.values() else f"{name}, {arguments.split('schedule=')[1]}"
    return Throughput(label, size, seconds, 2 * samples / seconds, relative.value, relative.low, relative.high, marks)


def _times_as_fast(stock_short: Any, stock_long: Any, short: Any, long: Any, axis: int) -> Any:
    stock = np.median(stock_long, axis) - np.median(stock_short, axis)
    own = np.median(long, axis) - np.median(short, axis)
    # Where noise hides the samples, the ratio becomes huge, and its interval wide.
    return stock / np.maximum(own, 1e-9)


def _run(options: Sequence[str], include: Path, folder: Path | None) -> tuple[float, int]:
    """Run one evaluation; return its seconds and its number of documents.

    On a GPU these are the seconds that lmms-eval recorded; on a CPU, the CPU time that it used after its imports.
    """
    with tempfile.TemporaryDirectory() as results:
        command = [
            sys.executable,
            "-m",
            "lmms_prune.harness.timed",
            *options,
            "--include_path",
            str(include),
            "--output_path",
            results,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        for path in results_files(Path(results), lambda error: None):
            if (content := read_results_file(path)) is not None:
                documents = sum(count["effective"] for count in content["n-samples"].values())
                on_cpu = options[options.index("--device") + 1] == "cpu"
                _, _, cpu_seconds = done.stdout.rpartition(CPU_SECONDS)
                return float(cpu_seconds if on_cpu else content["total_evaluation_time_seconds"]), documents
    raise BenchError(
        f"this run left no results:\n  {' '.join(command)}\nIt ends with:\n{(done.stdout + done.stderr).strip()[-1500:]}"
    )


def demo_arguments(wrapper: str) -> str:
    """Return the model arguments of the demo's checkpoint for one of lmms-eval's models.

    Raises:
        DemoError: the demo has no such model, or a file of its checkpoint is missing or truncated.
    """
    model = next((model for model in MODELS if model.family.model_name == wrapper), None)
    if model is None:
        known = " or ".join(model.family.model_name for model in MODELS)
        raise DemoError(f"--demo --wrapper {wrapper}: the demo has a checkpoint of {known} only; use --model.")
    return f"pretrained={weights(model)},{model.arguments}"


@contextmanager
def demo_benchmarks(rows: int) -> Iterator[Path]:
    """Yield a temporary folder in which lmms-eval finds the demo's benchmarks, each with `rows` documents or more."""
    with tempfile.TemporaryDirectory() as root:
        yield build_mirror(Path(root) / "mirror", rows=max(4, rows + rows % 2))
