"""Result folders as lmms-eval and this plugin write them, with answers that a test decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmms_prune.record.accounting import PARTS
from lmms_prune.record.bitmaps import encode

LAYERS = 4
ORIGINAL = 100
VERSIONS = {"lmms-prune": "0.1.0", "lmms-eval": "0.7.3", "torch": "2.15.0", "transformers": "5.23.0"}
FACTS = {"device": "cpu (x86_64)", "attention": "sdpa", "dtype": "float16", "code": "0123456789ab", **VERSIONS}
FACTS |= {"machine": "AMD EPYC, 8 cores", "threads": "4", "processes": "1"}
OPTIONS = {"A": "a cat", "B": "a dog", "C": "nan", "D": None}


def sample(task: str, number: int, value: float) -> dict[str, Any]:
    """What a task logs of one document that scored `value`."""
    task = task.removeprefix("prune_")  # our variants log what the originals log
    if task == "pope":
        truth = "no" if number % 2 else "yes"
        said = truth if value else {"yes": "no", "no": "yes"}[truth]
        item = {"question_id": str(number), "score": float(value), "prediction": said, "ground_truth": truth}
        names = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")
        return {"target": truth, "filtered_resps": said, **{name: item for name in names}}
    if task == "mme":
        category = "existence" if number < 4 else "code_reasoning"
        metric = "mme_perception_score" if number < 4 else "mme_cognition_score"
        item = {"question_id": f"{number // 2}.png", "category": category, "score": float(value)}
        return {"target": "Yes", "filtered_resps": "yes" if value else "no", metric: item}
    if task.startswith("mmbench"):
        # The second half are the turned copies of the first.
        index = number // 2 + 1_000_000 * (number % 2)
        said = "B" if value else "A"
        item = {"index": index, "question": f"q{index}", "answer": "B", "prediction": said, **OPTIONS}
        return {"target": "B", "filtered_resps": said, "gpt_eval_score": item, "submission": item}
    if task == "ocrbench":
        item = {
            "question_type": "Digit String Recognition",
            "score": int(value),
            "prediction": "x",
            "ground_truth": ["x"],
        }
        return {"target": "['x']", "filtered_resps": "x" if value else "y", "ocrbench_accuracy": item}
    metric = {"infovqa_val": "anls", "docvqa_val": "anls"}.get(task, "exact_match")
    return {"target": f"t{number}", "filtered_resps": f"t{number}" if value == 1 else f"{value}", metric: value}


def numbers(task: str, values: Sequence[float]) -> dict[str, Any]:
    """What the harness makes of these documents' scores."""
    task = task.removeprefix("prune_")  # our variants log what the originals log
    mean = sum(values) / len(values)
    if task == "pope":
        rows = [sample(task, i, value)["pope_accuracy"] for i, value in enumerate(values)]
        true = sum(row["prediction"] == row["ground_truth"] == "yes" for row in rows)
        wrong = sum(row["prediction"] != row["ground_truth"] for row in rows)
        return {"pope_accuracy,none": mean, "pope_f1_score,none": 2 * true / (2 * true + wrong) if true else 0}
    if task == "mme":
        scores = [50 * (a + b) + 100 * (a + b == 2) for a, b in zip(values[::2], values[1::2], strict=True)]
        first, second = scores[:2], scores[2:]
        said = {"mme_perception_score,none": sum(first) / len(first), "mme_cognition_score,none": 0}
        return said | ({"mme_cognition_score,none": sum(second) / len(second)} if second else {})
    if task.startswith("mmbench"):
        circles = [min(pair) for pair in zip(values[::2], values[1::2], strict=True)]
        return {"gpt_eval_score,none": 100 * sum(circles) / len(circles), "submission,none": None}
    if task == "ocrbench":
        return {"ocrbench_accuracy,none": sum(values) / 1000}
    return {("anls" if task in ("infovqa_val", "docvqa_val") else "exact_match") + ",none": mean}


def write_run(
    folder: Path,
    tasks: Mapping[str, Sequence[float]],
    schedule: str = "none",
    *,
    tokens: float = 0.0,
    model: str = "/models/tiny-llava",
    seed: int = 0,
    date: str = "20260101_000000",
    settings: Mapping[str, str] | None = None,
    facts: Mapping[str, str | None] | None = None,
    documents: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    other_load: float | None = 0.01,
    peak: tuple[int, str] | None = None,
    unpruned: int = 0,
    ours: bool = True,
    samples: bool = True,
    **scores: float,
) -> Path:
    """Write one run as lmms-eval does, and return its results file.

    Args:
        folder: the output folder.
        tasks: the score of each document of each task.
        schedule: as executed; an average of `tokens` of ORIGINAL visual tokens, all where it is "none".
        model, seed, settings: all that can change an answer.
        date: of the files' names.
        facts: changes of the recorded circumstances; None takes one away.
        documents: that each task has; default: those that were answered.
        limit: of --limit.
        batch_size: asked for; at most 32 where it is "auto".
        other_load: of other programs while it ran; None for a record that does not say.
        peak: bytes of memory, and of what.
        unpruned: samples that lost no token.
        ours: with this plugin's record and token counts.
        samples: logged.
        scores: other numbers than the samples give, by task, in the harness's scale (a single metric).
    """
    kept = float(ORIGINAL) if schedule == "none" else tokens
    said_settings = {
        "pretrained": model,
        "schedule": schedule,
        "positions": "original",
        "seed": str(seed),
        "revision": "main",
    }
    said_settings |= {"prompt": "hf", "image_aspect": "crop", **(settings or {})}
    recorded = {name: value for name, value in {**FACTS, **(facts or {})}.items() if value is not None}
    per_task = {
        task: {
            "samples": len(values),
            "with_image": len(values),
            "original_visual_tokens": float(ORIGINAL),
            "avg_visual_tokens": kept,
            "layer_visual_tokens": [2.0 * kept - ORIGINAL if kept > 50 else 0.0] + [kept] * (LAYERS - 1),
            "kv_mib": kept / 100,
            **{f"{part}_tflops": kept / 1000 for part in PARTS},
        }
        for task, values in tasks.items()
    }
    run = {
        "batch_size": batch_size,
        "largest_batch": 32 if batch_size == "auto" else batch_size,
        "schedule": schedule,
        "unpruned_samples": unpruned,
        "settings": said_settings,
    }
    run |= {} if other_load is None else {"other_load": other_load}
    run |= {} if peak is None else {"peak_memory": peak[0], "peak_memory_of": peak[1]}
    arguments = f"pretrained={model},schedule={schedule},seed={seed}" if ours else f"pretrained={model}"
    wrapper = "llava_pruned" if ours else "llava_hf"
    said = {
        "results": {task: {"alias": task, **numbers(task, values)} for task, values in tasks.items()},
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: {"task": task, "doc_to_text": f"<function f at 0x{id(folder):x}>"} for task in tasks},
        "n-samples": {task: {"effective": len(v), "original": documents or len(v)} for task, v in tasks.items()},
        "config": {
            "model": wrapper,
            "model_args": arguments,
            "batch_sizes": [{**run, **recorded, "tasks": per_task, "averages": {}}] if ours else [],
            "limit": limit,
            "gen_kwargs": "",
            "resolved_cli_args": {"model_args": arguments, "tasks": ",".join(tasks), "output_path": str(folder)},
        },
        "date": date,
        "throughput": {"total_elapsed_time": 2.0, "avg_latency": 0.5, "total_gen_tokens": 10},
        "model_name": model,
    }
    for task, value in scores.items():
        metric = next(name for name in said["results"][task] if name.endswith(",none"))
        said["results"][task][metric] = value
    place = folder / "models__x"
    place.mkdir(parents=True, exist_ok=True)
    for task, values in tasks.items():
        if samples:
            lines = [line(task, i, value, kept if ours else None) for i, value in enumerate(values)]
            # The order of several processes is not that of the documents.
            (place / f"{date}_samples_{task}.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    path = place / f"{date}_results.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    return path


def line(task: str, number: int, value: float, kept: float | None) -> str:
    """One line of a samples file; without our token accounting where `kept` is None."""
    counts: dict[str, Any] = {"input_tokens": 130, "output_tokens": 2}
    if kept is not None:
        counts |= {"visual_tokens": ORIGINAL, "avg_visual_tokens": kept, "kept_visual_tokens": [int(kept)]}
        mask = np.arange(ORIGINAL).reshape(10, 10) < kept
        counts |= {"visual_grids": [[10, 10]], "token_bitmaps": [[encode(mask)]] if kept < ORIGINAL else []}
        counts |= {"kv_bytes": int(kept * 2**20 / 100)}
        counts |= {f"{part}_flops": kept * 1e9 for part in PARTS}
    said = {"doc_id": number, "input": f"{task} {number}?", "token_counts": [counts], **sample(task, number, value)}
    return json.dumps(said) + "\n"
