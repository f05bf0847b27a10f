"""A user's own samples as an lmms-eval task, so that ``calibrate`` measures and evaluates them as it does benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from lmms_prune.calibration.data import Sample, SearchError, read_samples
from lmms_prune.information.layer_sweep import Evaluation, Report, run_all, slug
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.samples import answer_text
from lmms_prune.record.files import read_text, write
from lmms_prune.record.information import InformationError

NEW_TOKENS = 32
"""Most tokens of an answer to a sample of one's own."""
_FUNCTIONS = "lmms_prune.harness.own_data"


class _Function(str):
    """A function that a task's YAML names."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def read_own(file: Path, images: Path | None, count: int | None) -> tuple[list[Sample], int]:
    """Read samples of which half choose the schedule and half verify it.

    Args:
        file, images: as for `read_samples`.
        count: samples to choose on, of which as many more are read; None for half of the file, at most 64.

    Returns:
        the samples, and how many choose.

    Raises:
        SearchError: a mistake in the file, too few samples, or answers to some of them only.
    """
    samples = read_samples(file, images)
    half = len(samples) // 2
    chosen = min(half, 64) if count is None else count
    if half < max(2, chosen):
        needed = 2 * max(2, chosen)
        hint = f" Use --limit {half} or less." if half >= 2 else ""
        raise SearchError(
            f"--data {file} holds {len(samples)} samples, {needed} are needed: half to choose on and half to verify.{hint}"
        )
    used = samples[: 2 * chosen]
    without = [sample for sample in used if not sample.answers]
    if without and len(without) < len(used):
        raise SearchError(
            f"{without[0].origin}: has no 'answers', though other samples have; give answers to all, or to none: then the "
            "unpruned model's answers are the right ones."
        )
    return used, chosen


def write_task(folder: Path, file: Path, samples: Sequence[Sample]) -> str:
    """Write the task of some samples, which have answers or will get them.

    Args:
        folder: for the task's YAML and its data.
        file: the user's file, after which the task is named.
        samples: its samples.

    Returns:
        the task's name.
    """
    stem = re.sub(r"[^A-Za-z0-9]+", "_", file.stem).strip("_").lower() or "samples"
    name, state = f"own_data_{stem}", "answered" if samples[0].answers else "asked"
    lines = [
        {"image": str(sample.image.absolute()), "question": sample.question, "answers": list(sample.answers) or [""]}
        for sample in samples
    ]
    data = folder.absolute() / f"{name}_{state}.jsonl"
    write(data, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": _Function(f"{_FUNCTIONS}.image"),
        "doc_to_text": _Function(f"{_FUNCTIONS}.question"),
        "doc_to_target": _Function(f"{_FUNCTIONS}.answers"),
        "generation_kwargs": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "do_sample": False},
        "process_results": _Function(f"{_FUNCTIONS}.scores"),
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write(folder / f"{name}.yaml", yaml.dump(task, Dumper=_Dumper, sort_keys=False))
    return name


def answered(evaluation: Evaluation, samples: Sequence[Sample], out: Path, launch: str, report: Report) -> list[Sample]:
    """Return the samples with the unpruned model's answers as the right ones.

    Args:
        evaluation: the model, and the task of the samples.
        samples: without answers.
        out: folder of the run; a complete one is reused.
        launch, report: as for `run_all`.

    Raises:
        InformationError: the evaluation failed, or gave no answer to a sample.
    """
    run_all(evaluation, ["none"], out, launch, report)
    [task] = evaluation.tasks
    folder = out / "runs" / slug("none")
    files = [record.tasks[task].samples for record in read_results([folder]).records if task in record.tasks]
    lines = [json.loads(line) for path in files if path is not None for line in read_text(path).splitlines()]
    by_number = {int(line["doc_id"]): answer_text(line) for line in lines}
    missing = [number for number in range(len(samples)) if not by_number.get(number)]
    if missing:
        raise InformationError(
            f"{samples[missing[0]].origin}: the unpruned model's answer is empty, so no pruned one can agree with it; leave the "
            "sample out, or give answers."
        )
    return [replace(sample, answers=(by_number[number],)) for number, sample in enumerate(samples)]


def digest(file: Path) -> str:
    """Return a digest of the user's file, for the record."""
    return sha256(file.read_bytes()).hexdigest()
