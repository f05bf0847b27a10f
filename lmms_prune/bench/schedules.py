"""Measured time of whole generations under schedules, split by part, compared with the FLOPs' prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lmms_prune.bench.models import fits, random_inputs
from lmms_prune.efficiency.cost import decode_flops, encoder_flops, prefill_flops
from lmms_prune.models.architectures import from_config
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.sizes import Architecture
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule

PARTS = ("encoder", "selection", "prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """A generation to time: `batch` rows of one image and `text_tokens`, each answered with `new_tokens`."""

    batch: int
    text_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class ScheduleTiming:
    """Measured time of one schedule on one workload.

    Args:
        schedule: its text; "none" is the unpruned model, with no hooks but those that mark times.
        case: the workload.
        seconds: median over the repeats, from calling ``generate`` to the last token.
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


@dataclass
class _Runs:
    """All repeats of one schedule on one workload."""

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None
    flops: int = 0
    selection_flops: int = 0
    avg_visual_tokens: float = 0.0


@torch.inference_mode()
def time_schedules(
    model: Any,
    schedules: Sequence[Schedule],
    cases: Sequence[Workload],
    grid: tuple[int, int] | None,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ScheduleTiming]:
    """Time generations of `model`, unpruned and under each schedule, in turn and in one process.

    Args:
        model: a loaded, supported model. The end token is suppressed, so every answer has its full length.
        schedules: with every ``?`` solved. The empty schedule is always measured, and comes first.
        cases: the workloads.
        grid: rows and columns of visual tokens of each image; None if the model has a fixed size.
        repeats: timed runs of each after one warm-up. Schedules alternate, so that a drift affects all alike.
        progress: called with each workload's description as it begins.

    Raises:
        BenchError: as `random_inputs`, or a workload does not fit the memory.
        ScheduleError, UnsupportedModelError: as `prune`.
    """
    all_schedules = [Schedule(()), *(schedule for schedule in schedules if schedule.stages)]
    sizes = from_config(model.config.to_dict(), "model")
    clock = _Clock(next(model.parameters()).device)
    measured = []
    for case in cases:
        progress(f"batch {case.batch}, {case.text_tokens} text tokens, {case.new_tokens} new tokens")
        runs = [_Runs() for _ in all_schedules]
        size = f"batch {case.batch}, {case.text_tokens} text and {case.new_tokens} new tokens"
        with fits(f"at {size}", "a smaller --batch, fewer --layers"):
            inputs = random_inputs(model, case.batch, grid, case.text_tokens)
            for schedule, run in zip(all_schedules, runs, strict=True):
                _account(model, schedule, inputs, case, sizes, run)
            for _ in range(repeats):
                for schedule, run in zip(all_schedules, runs, strict=True):
                    _timed(model, schedule, inputs, case, clock, run)
        measured += [_summary(str(s) or "none", case, run, runs[0]) for s, run in zip(all_schedules, runs, strict=True)]
    return measured


def _summary(name: str, case: Workload, run: _Runs, unpruned_run: _Runs) -> ScheduleTiming:
    low, high = _interval([run.seconds], lambda own, axis: np.median(own, axis))
    slowest, fastest = _interval(
        [unpruned_run.seconds, run.seconds],
        lambda unpruned, own, axis: np.median(unpruned, axis) / np.median(own, axis),
    )
    seconds, ideal = float(np.median(run.seconds)), unpruned_run.flops / run.flops
    realised = float(np.median(unpruned_run.seconds)) / seconds
    return ScheduleTiming(
        schedule=name,
        case=case,
        seconds=seconds,
        low=low,
        high=high,
        parts={part: float(np.median([some[part] for some in run.parts])) for part in PARTS},
        ideal_speedup=ideal,
        realised_speedup=realised,
        realised_low=slowest,
        realised_high=fastest,
        realised_fraction=realised / ideal,
        selection_flops=run.selection_flops,
        avg_visual_tokens=run.avg_visual_tokens,
        peak_bytes=run.peak,
    )


def _interval(repeats: Sequence[Sequence[float]], statistic: Callable[..., Any]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic of one or more series, whose repeats are drawn together."""
    if len(repeats[0]) == 1:
        value = float(statistic(*map(np.array, repeats), axis=-1))
        return value, value
    rng = np.random.default_rng(0)
    drawn = stats.bootstrap(repeats, statistic, paired=True, method="percentile", rng=rng)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


class _Clock:
    """Records when the device reaches a point, without making the host wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two marks; call `wait` first."""
        return second - first if self.device.type != "cuda" else first.elapsed_time(second) / 1000


class _Marks:
    """The times at which a run's parts begin and end."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.encoder: list[list[Any]] = []
        self.selection: list[list[Any]] = []
        self.first_token: Any = None
        # A method may run the encoder again, or the whole model as its guide: that time belongs to its stage.
        self.open_stages = 0

    @contextmanager
    def around(self, model: Any, schedule: Schedule) -> Iterator[None]:
        """Hook the model outside `prune`'s own hooks: a stage's time passes between a hook before and one after them."""
        parts = ModelParts.of(model)
        stages = [parts.layers[stage.layer] for stage in schedule.stages]
        last = parts.family.last_of_vision(parts.multimodal)
        handles = [
            parts.encoder.register_forward_pre_hook(self._opens(self.encoder)),
            last.register_forward_hook(self._closes(self.encoder)),
            model.register_forward_hook(self._answered),
            *(layer.register_forward_pre_hook(self._opens(self.selection)) for layer in stages),
        ]
        # The baseline is the unhooked model; `prune` with an empty schedule would still hook it for the trace.
        closing = (layer.register_forward_pre_hook(self._closes(self.selection)) for layer in stages)
        with hooked(handles), prune(model, schedule) if stages else nullcontext(), hooked(closing):
            yield

    def _opens(self, spans: list[list[Any]]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.first_token is None and not self.open_stages:
                spans.append([self.clock.mark()])
            self.open_stages += spans is self.selection

        return hook

    def _closes(self, spans: list[list[Any]]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.open_stages -= spans is self.selection
            if self.first_token is None and not self.open_stages:
                spans[-1].append(self.clock.mark())

        return hook

    def _answered(self, *_: Any) -> None:
        if self.first_token is None and not self.open_stages:
            self.first_token = self.clock.mark()

    def parts(self, start: Any, end: Any) -> dict[str, float]:
        """Return the seconds of each of PARTS; they add up to the whole."""
        between = self.clock.between
        encoder = sum(between(*span) for span in self.encoder)
        selection = sum(between(*span) for span in self.selection)
        prefill = between(start, self.first_token) - encoder - selection
        decode = between(self.first_token, end)
        return {"encoder": encoder, "selection": selection, "prefill": prefill, "decode": decode}


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
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], case: Workload, clock: _Clock, run: _Runs
) -> None:
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(clock.device)
    marks = _Marks(clock)
    with marks.around(model, schedule):
        clock.wait()
        began, start = time.perf_counter(), clock.mark()
        _generate(model, inputs, case)
        end = clock.mark()
        clock.wait()
        run.seconds.append(time.perf_counter() - began)
    run.parts.append(marks.parts(start, end))
    if clock.device.type == "cuda":
        run.peak = max(run.peak or 0, torch.cuda.max_memory_allocated(clock.device))


def _account(
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], case: Workload, sizes: Architecture, run: _Runs
) -> None:
    """Run once to warm up, and record the FLOPs and tokens of the run."""
    with prune(model, schedule, count_selection=True) as trace:
        _generate(model, inputs, case)
    grids = ModelParts.of(model).grids(inputs, [row.visual_tokens for row in trace.rows])
    run.flops = sum(encoder_flops(sizes.encoder, grid) for grid in grids)
    for row in trace.rows:
        lengths = [row.text_tokens + visual for visual in row.visual]
        run.flops += int(prefill_flops(sizes, lengths) + decode_flops(sizes, lengths, case.new_tokens - 1))
    run.avg_visual_tokens = trace.avg_visual_tokens
    run.selection_flops = round(sum(row.selection_flops or 0 for row in trace.rows))
