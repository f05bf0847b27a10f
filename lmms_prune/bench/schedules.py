"""Measured time of whole generations under schedules, split by cause, beside what the FLOPs promise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lmms_prune.bench.models import fits, random_inputs
from lmms_prune.efficiency.architecture import Architecture, from_config
from lmms_prune.efficiency.cost import decode_flops, prefill_flops, tower_flops
from lmms_prune.families import ModelParts
from lmms_prune.hooks import prune
from lmms_prune.schedule import Schedule
from lmms_prune.trace import Trace

PARTS = ("tower", "selection", "prefill", "decode")
WORTH = 1.1  # a speed-up below which pruning is hardly worth its loss


@dataclass(frozen=True)
class Case:
    """What is generated: `batch` rows of one image and `text_tokens`, each answered with `new_tokens`."""

    batch: int
    text_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Measured:
    """One schedule in one case.

    Args:
        schedule: its text; "none" is the unpruned model.
        case: what was generated.
        seconds: median over the repeats, from the call of ``generate`` to the last token.
        low, high: 95 % bootstrap interval of that median.
        parts: median seconds of the vision tower with its projector, of selecting and cutting, of the rest up to the
            first token, and of all further tokens.
        speedup: the unpruned model's median over this one.
        ideal: the unpruned model's FLOPs over this one's, tower and decode steps included, the selection's not: it is
            no promise of the schedule, but a price.
        realised: the share of the time that the FLOPs promised to save that was saved; None if they promise none.
        selection_flops: matrix products of the selection for the whole batch, as torch counts them.
        visual_tokens: average a layer and row.
        peak_bytes: most memory that was allocated on the GPU; None on a CPU.
    """

    schedule: str
    case: Case
    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    speedup: float
    ideal: float
    realised: float | None
    selection_flops: int
    visual_tokens: float
    peak_bytes: int | None


@dataclass
class _Runs:
    """All repeats of one schedule in one case."""

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None
    flops: int = 0
    selection_flops: int = 0
    visual_tokens: float = 0.0


@torch.inference_mode()
def time_schedules(
    model: Any,
    schedules: Sequence[Schedule],
    cases: Sequence[Case],
    grid: tuple[int, int] | None,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Time generations of `model` under each schedule and unpruned, in the same process, one after the other in turn.

    Args:
        model: loaded, of either family. Every answer has its full length: ends of answers are suppressed.
        schedules: every ``?`` solved; the empty one is measured in any case and comes first.
        cases: what to generate.
        grid: rows and columns of visual tokens of each image; None where the model has only one size.
        repeats: timed runs of each, after one that warms up. The order goes round, so that a drift hits all alike.
        progress: is told which case begins.

    Raises:
        BenchError: as `random_inputs`, or the memory does not hold a case.
        ScheduleError, UnsupportedModelError: as `prune`.
    """
    everything = [Schedule(()), *(one for one in schedules if one.stages)]
    sizes = from_config(model.config.to_dict(), "model")
    clock = _Clock(next(model.parameters()).device)
    measured = []
    for case in cases:
        progress(f"batch {case.batch}, {case.text_tokens} text tokens, {case.new_tokens} new tokens")
        runs = [_Runs() for _ in everything]
        size = f"batch {case.batch}, {case.text_tokens} text and {case.new_tokens} new tokens"
        with fits(f"at {size}", "a smaller --batch, fewer --layers"):
            inputs = random_inputs(model, case.batch, grid, case.text_tokens)
            for schedule, run in zip(everything, runs, strict=True):
                _account(model, schedule, inputs, case, sizes, run)
            for _ in range(repeats):
                for schedule, run in zip(everything, runs, strict=True):
                    _timed(model, schedule, inputs, case, clock, run)
        measured += [_summary(str(s) or "none", case, run, runs[0]) for s, run in zip(everything, runs, strict=True)]
    return measured


def break_even(pruned: Sequence[Measured], whole: Sequence[Measured]) -> float | None:
    """The number of new tokens from which on the speed-up is below `WORTH`.

    Args:
        pruned, whole: of one batch and text length, the same at least two numbers of new tokens.

    Returns:
        0 if the speed-up is below it from the start, infinity if it never falls below; None with less than two numbers.
    """
    if len(pruned) < 2:
        return None

    def line(points: Sequence[Measured]) -> tuple[float, float]:
        slope, start = np.polyfit([p.case.new_tokens for p in points], [p.seconds for p in points], 1)
        return float(slope), float(start)

    (slope, start), (whole_slope, whole_start) = line(pruned), line(whole)
    gain, loss = whole_start - WORTH * start, WORTH * slope - whole_slope
    if gain <= 0:
        return float("inf") if loss < 0 else 0.0
    return gain / loss if loss > 0 else float("inf")


def _summary(name: str, case: Case, run: _Runs, whole: _Runs) -> Measured:
    middle = float(np.median(run.seconds))
    low = high = middle
    if len(run.seconds) > 1:
        drawn = stats.bootstrap((run.seconds,), np.median, method="percentile", rng=np.random.default_rng(0))
        low, high = map(float, drawn.confidence_interval)
    speedup, ideal = float(np.median(whole.seconds)) / middle, whole.flops / run.flops
    realised = (1 - 1 / speedup) / (1 - 1 / ideal) if ideal > 1 else None
    parts = {part: float(np.median([some[part] for some in run.parts])) for part in PARTS}
    return Measured(
        name,
        case,
        middle,
        low,
        high,
        parts,
        speedup,
        ideal,
        realised,
        run.selection_flops,
        run.visual_tokens,
        run.peak,
    )


class _Clock:
    """Marks points in time where the device reaches them, without making the host wait."""

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
        """Seconds; call `wait` before."""
        return second - first if self.device.type != "cuda" else first.elapsed_time(second) / 1000


class _Marks:
    """Where in time a run's parts begin and end."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.tower: list[list[Any]] = []
        self.selection: list[list[Any]] = []
        self.first_token: Any = None
        # A method may run the tower again, or the whole model as its guide: that is time of its own stage.
        self.open_stages = 0

    @contextmanager
    def around(self, model: Any, schedule: Schedule) -> Iterator[Trace]:
        """Hooks around `prune`'s own: a stage's time is what passes between the hook before and the hook after."""
        parts = ModelParts.of(model)
        stages = [parts.layers[stage.layer] for stage in schedule.stages]
        last = parts.tower if parts.family.mrope else parts.multimodal.multi_modal_projector
        handles = [
            parts.tower.register_forward_pre_hook(self._opens(self.tower)),
            last.register_forward_hook(self._closes(self.tower)),
            model.register_forward_hook(self._answered),
            *(layer.register_forward_pre_hook(self._opens(self.selection)) for layer in stages),
        ]
        try:
            with prune(model, schedule) as trace:
                handles += [layer.register_forward_pre_hook(self._closes(self.selection)) for layer in stages]
                yield trace
        finally:
            for handle in handles:
                handle.remove()

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
        """Seconds of each of PARTS, which add up to the whole."""
        between = self.clock.between
        tower = sum(between(*span) for span in self.tower)
        selection = sum(between(*span) for span in self.selection)
        prefill = between(start, self.first_token) - tower - selection
        decode = between(self.first_token, end)
        return {"tower": tower, "selection": selection, "prefill": prefill, "decode": decode}


def _generate(model: Any, inputs: dict[str, Tensor], case: Case) -> None:
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


def _timed(model: Any, schedule: Schedule, inputs: dict[str, Tensor], case: Case, clock: _Clock, run: _Runs) -> None:
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
    model: Any, schedule: Schedule, inputs: dict[str, Tensor], case: Case, sizes: Architecture, run: _Runs
) -> None:
    """Warm up, and count what the run computes."""
    with prune(model, schedule, count_selection=True) as trace:
        _generate(model, inputs, case)
    grids = ModelParts.of(model).grids(inputs, [row.visual_tokens for row in trace.rows])
    run.flops = sum(tower_flops(sizes.tower, grid) for grid in grids)
    for row in trace.rows:
        lengths = [row.text_tokens + visual for visual in row.visual]
        run.flops += int(prefill_flops(sizes, lengths) + decode_flops(sizes, lengths, case.new_tokens - 1))
    run.visual_tokens = trace.avg_visual_tokens
    run.selection_flops = round(sum(row.selection_flops or 0 for row in trace.rows))
