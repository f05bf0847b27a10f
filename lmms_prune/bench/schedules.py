"""Measured time of whole generations under schedules, split by part, compared with the FLOPs' prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmms_prune.bench.clock import Clock
from lmms_prune.bench.models import fits, random_inputs
from lmms_prune.bench.ratios import interval, of_medians, ratio
from lmms_prune.bench.spans import PARTS, Marks
from lmms_prune.efficiency.cost import decode_flops, encoder_flops, kv_bytes, peak_bytes, prefill_flops
from lmms_prune.models.architectures import from_config
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.sizes import Architecture
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class Workload:
    """A generation to time: `batch` rows of one image and `text_tokens`, each answered with `new_tokens`.

    `source` names real documents, one after another; the numbers of tokens are then their rounded averages.
    """

    batch: int
    text_tokens: int
    new_tokens: int
    source: str = ""

    def __str__(self) -> str:
        sizes = f"{self.text_tokens} text tokens, {self.new_tokens} new tokens"
        return f"{self.source}, one at a time: on average {sizes}" if self.source else f"batch {self.batch}, {sizes}"


@dataclass(frozen=True)
class ScheduleTiming:
    """Measured time of one schedule on one workload.

    Args:
        schedule: its text; "none" is the unpruned model, with no hooks but those that mark times.
        case: the workload.
        seconds: median over the repeats, from calling ``generate`` to the last token; CPU time of all threads on a CPU.
        low, high: 95 % bootstrap interval of that median.
        parts: median seconds by part: the vision encoder with its projector ("encoder"), selecting and dropping
            ("selection"), the rest up to the first token ("prefill"), and all further tokens ("decode").
        ideal_speedup: the unpruned model's FLOPs over this one's, including encoder and decode steps. The selection's
            FLOPs are excluded: they are an overhead, not part of what the schedule promises.
        realised_speedup: the unpruned model's median over this one's.
        realised_low, realised_high: 95 % bootstrap interval of that ratio; repeats of both are drawn in pairs.
        realised_fraction: realised over ideal speed-up; for a keep-all schedule it shows the overhead of the hooks.
        selection_flops: FLOPs of the selection's matrix products for the whole batch, as torch counts them.
        avg_visual_tokens: visual tokens, averaged over layers and rows.
        peak_bytes: peak allocated GPU memory; None on a CPU.
        predicted_peak_bytes: the same by arithmetic: weights, cache and one decoder layer's activations.
        marks: of the speed-up, if it is no result; see `lmms_prune.bench.ratios`.
        prefill_tflops, kv_mib: the decoder's prefill without the selection, and the cache after it, per row.
    """

    schedule: str
    case: Workload
    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    ideal_speedup: float
    realised_speedup: float
    realised_low: float
    realised_high: float
    realised_fraction: float
    selection_flops: int
    avg_visual_tokens: float
    peak_bytes: int | None
    predicted_peak_bytes: int
    marks: tuple[str, ...] = ()
    prefill_tflops: float = 0.0
    kv_mib: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A real document to time.

    Args:
        inputs: the model's inputs, one row.
        new_tokens: the length of the answer.
        options: further arguments of `prune` for this document.
    """

    inputs: dict[str, Tensor]
    new_tokens: int
    options: Mapping[str, Any]


@dataclass
class _Runs:
    """All repeats of one schedule on one workload."""

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None
    predicted_peak: int = 0
    flops: int = 0
    selection_flops: int = 0
    avg_visual_tokens: float = 0.0
    prefill_flops: float = 0.0
    kv_bytes: float = 0.0

    @classmethod
    def over(cls, runs: Sequence[_Runs]) -> _Runs:
        """Return the mean over documents, repeat by repeat; peaks are the highest."""
        peaks = [run.peak for run in runs if run.peak is not None]
        parts = zip(*(run.parts for run in runs), strict=True)
        return cls(
            seconds=[fmean(repeat) for repeat in zip(*(run.seconds for run in runs), strict=True)],
            parts=[{part: fmean(spans[part] for spans in repeat) for part in PARTS} for repeat in parts],
            peak=max(peaks, default=None),
            predicted_peak=max(run.predicted_peak for run in runs),
            flops=sum(run.flops for run in runs),  # only ratios of it are reported
            selection_flops=round(fmean(run.selection_flops for run in runs)),
            avg_visual_tokens=fmean(run.avg_visual_tokens for run in runs),
            prefill_flops=fmean(run.prefill_flops for run in runs),
            kv_bytes=fmean(run.kv_bytes for run in runs),
        )


@torch.inference_mode()
def time_schedules(
    model: Any,
    schedules: Sequence[Schedule],
    cases: Sequence[Workload],
    grid: tuple[int, int] | None,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> list[ScheduleTiming]:
    """Time generations of `model`, unpruned and under each schedule, in turn and in one process.

    Args:
        model: a loaded, supported model. The end token is suppressed, so every answer has its full length.
        schedules: with every ``?`` solved. The empty schedule is always measured, and comes first.
        cases: the workloads.
        grid: rows and columns of visual tokens of each image; None if the model has a fixed size.
        repeats: timed runs of each after one warm-up. Schedules alternate, so that a drift affects all alike.
        progress: called with each workload's description as it begins.
        counted: called with the number of generations that have ended, and of all.

    Raises:
        BenchError: as `random_inputs`, or a workload does not fit the memory.
        ScheduleError, UnsupportedModelError: as `prune`.
    """
    all_schedules, sizes = _with_unpruned(schedules), _sizes(model)
    clock = Clock(next(model.parameters()).device)
    ended, total = count(1), len(cases) * len(all_schedules) * (repeats + 1)
    measured = []
    for case in cases:
        progress(str(case))
        runs = [_Runs() for _ in all_schedules]
        size = f"batch {case.batch}, {case.text_tokens} text and {case.new_tokens} new tokens"
        with fits(f"at {size}", "a smaller --batch-size, fewer --layers"):
            inputs = random_inputs(model, case.batch, grid, case.text_tokens)
            for schedule, run in zip(all_schedules, runs, strict=True):
                _account(model, schedule, inputs, case, sizes, run)
                counted(next(ended), total)
            for _ in range(repeats):
                for schedule, run in zip(all_schedules, runs, strict=True):
                    _timed(model, schedule, inputs, case, clock, run)
                    counted(next(ended), total)
        measured += [_summary(str(s) or "none", case, run, runs[0]) for s, run in zip(all_schedules, runs, strict=True)]
    return measured


@torch.inference_mode()
def time_documents(
    model: Any,
    schedules: Sequence[Schedule],
    prompts: Sequence[Prompt],
    source: str,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> list[ScheduleTiming]:
    """Time the answers to real documents, one at a time, unpruned and under each schedule; figures are means over them.

    Args:
        model, schedules, repeats, progress, counted: as for `time_schedules`.
        prompts: the documents.
        source: what they are, for reports.

    Raises:
        BenchError, ScheduleError, UnsupportedModelError: as `time_schedules`.
    """
    all_schedules, sizes = _with_unpruned(schedules), _sizes(model)
    clock = Clock(next(model.parameters()).device)
    ended, total = count(1), len(prompts) * len(all_schedules) * (repeats + 1)
    runs: list[list[_Runs]] = [[] for _ in all_schedules]
    texts = []
    for number, prompt in enumerate(prompts, 1):
        progress(f"document {number} of {len(prompts)}")
        case = Workload(1, 0, prompt.new_tokens)
        with fits(f"at document {number} of {source}", "fewer pixels"):
            for schedule, of_schedule in zip(all_schedules, runs, strict=True):
                of_schedule.append(_Runs())
                texts.append(_account(model, schedule, prompt.inputs, case, sizes, of_schedule[-1], prompt.options))
                counted(next(ended), total)
            for _ in range(repeats):
                for schedule, of_schedule in zip(all_schedules, runs, strict=True):
                    _timed(model, schedule, prompt.inputs, case, clock, of_schedule[-1], prompt.options)
                    counted(next(ended), total)
    case = Workload(1, round(fmean(texts)), round(fmean(prompt.new_tokens for prompt in prompts)), source)
    means = [_Runs.over(of_schedule) for of_schedule in runs]
    return [_summary(str(s) or "none", case, run, means[0]) for s, run in zip(all_schedules, means, strict=True)]


def _with_unpruned(schedules: Sequence[Schedule]) -> list[Schedule]:
    return [Schedule(()), *(schedule for schedule in schedules if schedule.stages)]


def _sizes(model: Any) -> Architecture:
    return from_config(model.config.to_dict(), "model").in_dtype(str(model.dtype).removeprefix("torch."))


def _summary(name: str, case: Workload, run: _Runs, unpruned_run: _Runs) -> ScheduleTiming:
    low, high = interval(lambda own, axis: np.median(own, axis), run.seconds)
    ideal = unpruned_run.flops / run.flops
    realised = ratio(of_medians, unpruned_run.seconds, run.seconds, ideal=ideal)
    return ScheduleTiming(
        schedule=name,
        case=case,
        seconds=float(np.median(run.seconds)),
        low=low,
        high=high,
        parts={part: float(np.median([repeat[part] for repeat in run.parts])) for part in PARTS},
        ideal_speedup=ideal,
        realised_speedup=realised.value,
        realised_low=realised.low,
        realised_high=realised.high,
        realised_fraction=realised.value / ideal,
        selection_flops=run.selection_flops,
        avg_visual_tokens=run.avg_visual_tokens,
        peak_bytes=run.peak,
        predicted_peak_bytes=run.predicted_peak,
        # The unpruned model is its own baseline: its ratio is 1 by definition.
        marks=() if run is unpruned_run else realised.marks,
        prefill_tflops=run.prefill_flops / 1e12,
        kv_mib=run.kv_bytes / 2**20,
    )


def _generate(model: Any, inputs: dict[str, Tensor], case: Workload) -> None:
    model.generate(
        **inputs,
        max_new_tokens=case.new_tokens,
        min_new_tokens=case.new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )


def _timed(
    model: Any,
    schedule: Schedule,
    inputs: dict[str, Tensor],
    case: Workload,
    clock: Clock,
    run: _Runs,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(clock.device)
    marks = Marks(clock)
    with marks.around(model, schedule, **options):
        began, start = clock.now(), clock.mark()
        _generate(model, inputs, case)
        end = clock.mark()
        run.seconds.append(clock.now() - began)
    run.parts.append(marks.parts(start, end))
    if clock.device.type == "cuda":
        run.peak = max(run.peak or 0, torch.cuda.max_memory_allocated(clock.device))


def _account(
    model: Any,
    schedule: Schedule,
    inputs: dict[str, Tensor],
    case: Workload,
    sizes: Architecture,
    run: _Runs,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> float:
    """Run once to warm up, record the FLOPs and tokens of the run, and return the rows' average of text tokens."""
    with prune(model, schedule, count_selection=True, **options) as trace:
        _generate(model, inputs, case)
    parts = ModelParts.of(model)
    grids = parts.grids(inputs, [row.visual_tokens for row in trace.rows])
    grids += [(mosaic.encoded * mosaic.side, mosaic.side) for mosaic in parts.mosaics(inputs)]
    run.flops = sum(encoder_flops(sizes.encoder, grid) for grid in grids)
    lengths_by_row = []
    for row in trace.rows:
        lengths = [row.text_tokens + visual for visual in row.visual]
        prefill = prefill_flops(sizes, lengths)
        run.flops += int(prefill + decode_flops(sizes, lengths, case.new_tokens - 1))
        run.prefill_flops += prefill / len(trace.rows)
        run.kv_bytes += sum(kv_bytes(sizes, row.cached)) / len(trace.rows)
        lengths_by_row.append(lengths)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    run.predicted_peak = weights + int(peak_bytes(sizes, lengths_by_row, case.new_tokens - 1))
    run.avg_visual_tokens = trace.avg_visual_tokens
    run.selection_flops = round(sum(row.selection_flops or 0 for row in trace.rows))
    return fmean(row.text_tokens for row in trace.rows)
