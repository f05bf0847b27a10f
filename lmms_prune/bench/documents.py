"""Real documents of lmms-eval's tasks as what is timed, with an evaluation's prompts and pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmms_prune.bench.models import SHORT_DTYPES, BenchError, compile_layers, title_of
from lmms_prune.bench.schedules import Prompt, ScheduleTiming, time_documents
from lmms_prune.harness.argument_text import extended, split
from lmms_prune.harness.documents import Document
from lmms_prune.harness.generation import options, own_tokens
from lmms_prune.harness.models import as_lmms_eval, unpruned
from lmms_prune.harness.prompts import question_text
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.options import load_documents, task_names
from lmms_prune.leaderboard.cost_table import TEXTVQA, MeasuredCost
from lmms_prune.leaderboard.published import match_cost
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.leaderboard.results import read_results
from lmms_prune.pruning.hooks import check as refuse_what_the_model_cannot
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class DocumentRequest:
    """What ``bench --tasks`` is to time.

    Args:
        checkpoint, dtype, device, model_args: as for `evaluated_model`.
        tasks, limit, include: the documents, as for ``lmms-eval``.
        results: a folder of finished evaluations, for accuracies; None without one.
        new_tokens: lengths of all answers; None for the unpruned model's own.
    """

    checkpoint: str
    dtype: str
    device: str
    model_args: str
    tasks: str
    limit: int | None
    include: Path | None
    results: Path | None
    new_tokens: Sequence[int] | None


def time_tasks(
    request: DocumentRequest,
    schedules: Sequence[Schedule],
    repeats: int,
    compiled: bool,
    progress: Callable[[str], None],
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, list[ScheduleTiming], list[MeasuredCost]]:
    """Time schedules on a request's documents; returns the model's title, the timings, and the rows of Table 3.

    Raises:
        BenchError, ArgumentError, ScheduleError, UnsupportedModelError: the message says what to change.
    """
    records = read_records(request.results, progress)
    names = task_names(request.tasks)
    wrapper = evaluated_model(request.checkpoint, request.dtype, request.device, request.model_args)
    for schedule in schedules:
        refuse_what_the_model_cannot(wrapper.model, schedule)
    documents = load_documents(names, wrapper.family.model_name, request.limit, request.include)
    if compiled:
        compile_layers(wrapper.model)
    measured: list[ScheduleTiming] = []
    source = f"{len(documents)} documents of {','.join(names)}"
    lengths: Sequence[int | None] = request.new_tokens or [None]
    for length in lengths:
        prompts = document_prompts(wrapper, documents, length)
        measured += time_documents(wrapper.model, schedules, prompts, source, repeats, progress, counted)
    title = title_of(request.checkpoint, wrapper.model)
    first = measured[: 1 + sum(bool(schedule.stages) for schedule in schedules)]
    return title, measured, beside_the_paper(first, request.checkpoint, records)


def evaluated_model(checkpoint: str, dtype: str, device: str, model_args: str) -> PrunedModel:
    """Load a checkpoint as an evaluation does.

    Args:
        checkpoint: its folder or hub name.
        dtype, device: as for `lmms_prune.bench.models.given_model`.
        model_args: further arguments of lmms-eval's ``--model_args``, such as ``prompt=vicuna``.

    Raises:
        BenchError, ArgumentError, UnsupportedModelError: a repeated argument, or no such checkpoint or device.
    """
    own = {"dtype": SHORT_DTYPES.get(dtype, dtype), "device": device}
    if repeated := [name for name in split(model_args) if name in own]:
        raise BenchError(f"--model-args {repeated[0]}=…: `bench` has the option --{repeated[0]} for it; leave it out.")
    return unpruned(*as_lmms_eval(checkpoint, None, extended(model_args, own)))


@torch.inference_mode()
def document_prompts(
    wrapper: PrunedModel,
    documents: Iterable[Document],
    new_tokens: int | None,
) -> list[Prompt]:
    """Make the prompts of some documents.

    Args:
        wrapper: the model.
        documents: the documents; those without an image are left out, since nothing of them can be pruned.
        new_tokens: the length of every answer; None for that of the unpruned model's own answer to each document.

    Raises:
        BenchError: no document has an image.
    """
    prompts = []
    for document in documents:
        if document.images:
            inputs = dict(wrapper.inputs_of(document.messages))
            arguments = wrapper.arguments
            identity = {"seed": arguments.seed, "positions": arguments.positions, "samples": [document.sample]}
            identity |= {"questions": [question_text(wrapper.chat(document.messages))]}
            length = new_tokens or _own_length(wrapper, inputs, document)
            prompts.append(Prompt(inputs, length, identity))
    if not prompts:
        raise BenchError("--tasks: no document of them has an image, so there is nothing to prune.")
    return prompts


def _own_length(wrapper: PrunedModel, inputs: dict[str, Any], document: Document) -> int:
    """Return the number of tokens of the unpruned model's own answer, the end token included."""
    tokenizer = wrapper.processor.tokenizer
    output = wrapper.model.generate(**inputs, **options(document.generation, tokenizer, True))
    return max(1, len(own_tokens(output[0, inputs["input_ids"].shape[1] :].tolist(), tokenizer)))


def beside_the_paper(
    measured: Iterable[ScheduleTiming], model: str, records: Iterable[RunRecord]
) -> list[MeasuredCost]:
    """Return what the schedules of the paper's Table 3 cost here, in the order of `measured`.

    Args:
        measured: the timings.
        model: the checkpoint's name or folder.
        records: finished evaluations; the accuracy of a schedule is its mean score of TextVQA over them.
    """
    scores: dict[str, list[float]] = {}
    for record in records:
        task = next((record.tasks[name] for name in TEXTVQA if name in record.tasks), None)
        if (
            record.schedule is not None
            and match_cost(record.model, record.schedule)
            and task
            and task.score is not None
        ):
            scores.setdefault(record.schedule, []).append(task.score)
    rows = []
    for timing in measured:
        if (printed := match_cost(model, timing.schedule)) is None:
            continue
        known = scores.get(timing.schedule)
        costs = MeasuredCost(
            timing.schedule,
            printed,
            tokens=timing.avg_visual_tokens,
            tflops=timing.prefill_tflops,
            mib=timing.kv_mib,
            cuda_ms=1e3 * (timing.parts["selection"] + timing.parts["prefill"]),
            latency_ms=1e3 * timing.seconds,
            acc=sum(known) / len(known) if known else None,
        )
        rows.append(costs)
    return rows


def read_records(results: Path | None, warn: Callable[[str], None]) -> list[RunRecord]:
    """Read finished evaluations below a folder; none without one.

    Raises:
        BenchError: the folder holds no results.
    """
    if results is None:
        return []
    evaluations = read_results([results])
    if not evaluations.records:
        reason = evaluations.problems[0] if evaluations.problems else f"{results}: no results."
        raise BenchError(f"--results {reason}")
    for problem in evaluations.problems:
        warn(str(problem))
    return evaluations.records
