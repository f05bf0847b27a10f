"""How often pruning makes the host wait for the device, and how many kernels it launches: counted on a pretended GPU.

Exact, and the same on every machine: what is counted are operations, not seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lmms_prune.bench.pretended import GPU, OWN, PretendedGpu, PretendedTensor, on_cpu
from lmms_prune.methods import METHODS
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.trace import Trace
from lmms_prune.schedule import Schedule

HYBRID = "dart@2:0.44,random@8:0.07"
"""The paper's hybrid, at layers that the demo's models have."""


@dataclass(frozen=True)
class Work:
    """What this package did in one phase.

    Args:
        lines: kernel launches by line of code.
        waits: how often the host would have waited, by (reason, line of code).
        rerun: kernel launches of the model's own layers that these lines run again.
    """

    lines: Mapping[str, int] = field(default_factory=dict)
    waits: Mapping[tuple[str, str], int] = field(default_factory=dict)
    rerun: int = 0

    @property
    def launches(self) -> int:
        """Kernel launches of this package's own lines."""
        return sum(self.lines.values())

    @property
    def waited(self) -> int:
        """How often the host would have waited."""
        return sum(self.waits.values())

    def __add__(self, other: Work) -> Work:
        lines, waits = Counter(self.lines) + Counter(other.lines), Counter(self.waits) + Counter(other.waits)
        return Work(lines, waits, self.rerun + other.rerun)


@dataclass(frozen=True)
class Counted:
    """One counted generation.

    Args:
        encoder: in and around the vision encoder.
        begin: before the first decoder layer.
        stages: at each stage, by its layer.
        other: at all layers without a stage.
        end: after the last layer.
        step: a late decode step, with the most waits that any step has.
        layers: launches of one decode step in the whole model, the library's own included.
        largest: bytes of the largest tensor that a stage made.
        sequences: the generated tokens.
        logits: of each generated token.
        trace: of the pruning.
    """

    encoder: Work
    begin: Work
    stages: Mapping[int, Work]
    other: Work
    end: Work
    step: Work
    layers: int
    largest: int
    sequences: Tensor
    logits: Tensor
    trace: Trace

    @property
    def prefill(self) -> Work:
        """Everything up to the first token."""
        return sum(self.stages.values(), self.encoder + self.begin + self.other + self.end)


def count(
    model: Any,
    inputs: Mapping[str, Tensor],
    schedule: str | Schedule,
    new_tokens: int = 5,
    devices: Mapping[str, torch.device] | None = None,
    builds: bool = True,
    **options: Any,
) -> Counted:
    """Generate on a pretended GPU under a schedule and count what the package adds.

    Args:
        model: on the CPU; it lies there again afterwards.
        inputs: of ``model.generate``.
        schedule: the schedule.
        new_tokens: of the answer, at least 2. The second decode step and later ones are alike.
        devices: as for `PretendedGpu.placed`.
        builds: as for `PretendedGpu`.
        options: further arguments of `prune`.
    """
    gpu = PretendedGpu(builds)
    phases = _Phases(gpu, model, {stage.layer for stage in Schedule.parse(schedule).stages})
    with gpu.placed(model, devices), gpu.running(), torch.no_grad(), hooked(phases.outer()):
        placed = {name: PretendedTensor(x, GPU) for name, x in inputs.items()}
        with prune(model, schedule, **options) as trace, hooked(phases.inner()):
            answer = model.generate(
                **placed,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        sequences, logits = on_cpu(answer.sequences), torch.stack(list(on_cpu(answer.logits)))
        gpu.phase = "after"
        for row in trace.rows:
            row.masks = on_cpu(row.masks)
    return phases.counted(new_tokens, sequences, logits, trace)


class _Phases:
    """Hooks around those of `prune` that tell a pretended GPU which phase it is in, and what it counted in each.

    Args:
        gpu: the pretended GPU.
        model: the model.
        stages: layers at which the schedule acts.
    """

    def __init__(self, gpu: PretendedGpu, model: Any, stages: Collection[int]) -> None:
        self.gpu, self.model, self.stages = gpu, model, stages
        self.parts = ModelParts.of(model)
        self.step = 0  # of decoding; 0 is the prefill
        self.depth = 0  # hooks of ours that are running: a stage may run the model as its own guide

    def outer(self) -> Iterator[Any]:
        """Yield hooks that run before those of `prune`; register them before it."""
        yield self.model.register_forward_hook(self._next_step)
        yield self.parts.multimodal.register_forward_pre_hook(self._enter("begin"))
        yield self.parts.decoder.register_forward_pre_hook(self._enter("begin"))
        for number, layer in enumerate(self.parts.layers):
            name = f"{'stage' if number in self.stages else 'layer'} {number}"
            yield layer.register_forward_pre_hook(self._enter(name))
        yield self.parts.decoder.register_forward_hook(self._enter("end"))

    def inner(self) -> Iterator[Any]:
        """Yield hooks that run after those of `prune`; register them in its block."""
        for module in (self.parts.multimodal, self.parts.decoder, *self.parts.layers):
            yield module.register_forward_pre_hook(self._leave)
        yield self.parts.decoder.register_forward_hook(self._leave)

    def _enter(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.depth += 1
            if self.depth == 1:
                self.gpu.phase = f"step {self.step} of ours" if self.step else name

        return hook

    def _leave(self, *_: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self.gpu.phase = f"step {self.step}" if self.step else "library"

    def _next_step(self, *_: Any) -> None:
        if not self.depth:
            self.step += 1
            self.gpu.phase = f"step {self.step}"

    def counted(self, new_tokens: int, sequences: Tensor, logits: Tensor, trace: Trace) -> Counted:
        """Return what was counted; the other values are those of `Counted`."""
        gpu, nothing = self.gpu, Work()
        own = {phase: _own(gpu, phase) for phase in {*gpu.launches, *gpu.waits}}
        steps = [own.get(f"step {number} of ours", nothing) for number in range(1, new_tokens)]
        others = [own.get(f"layer {number}", nothing) for number in range(len(self.parts.layers))]
        return Counted(
            encoder=own.get("library", nothing),
            begin=own.get("begin", nothing),
            stages={number: own.get(f"stage {number}", nothing) for number in sorted(self.stages)},
            other=sum(others, nothing),
            end=own.get("end", nothing),
            step=replace(steps[-1], waits=max((step.waits for step in steps), key=lambda waits: sum(waits.values()))),
            layers=gpu.launches[f"step {new_tokens - 1}"],
            largest=max((gpu.largest[f"stage {number}"] for number in self.stages), default=0),
            sequences=sequences,
            logits=logits,
            trace=trace,
        )


def _own(gpu: PretendedGpu, phase: str) -> Work:
    """What lines of this package did in a phase."""
    lines = {line: count for line, count in gpu.lines[phase].items() if line.startswith(OWN)}
    waits = {key: count for key, count in gpu.waits[phase].items() if key[1].startswith(OWN)}
    # In the phases of the library its layers run for the first time.
    is_ours = phase.startswith(("begin", "stage", "layer", "end")) or phase.endswith("of ours")
    return Work(lines, waits, gpu.launches[phase] - sum(lines.values()) if is_ours else 0)


def examples(methods: Sequence[str]) -> list[str]:
    """A schedule of one stage for each method that needs no trained weights, at layer 1 or where it can act."""
    schedules = []
    for spec in (METHODS[name] for name in methods):
        if spec.ready:
            layer = min(max(spec.lowest_layer, 1), 1 if spec.highest_layer is None else spec.highest_layer)
            options = Schedule.parse(spec.example).stages[0].options
            written = "".join(f";{name}={value}" for name, value in dict(options).items())
            schedules.append(f"{spec.name}@{layer}{'' if spec.drops_all else ':0.3'}{written}")
    return schedules


def row(counted: Counted, schedule: str, batch: int) -> dict[str, Any]:
    """One line of the table, by name: launches and waits of each phase; of stages also those of the layers run again."""
    stages = list(counted.stages.values())
    phases = {
        "begin": counted.encoder + counted.begin,
        "end": counted.end,
        "prefill": counted.prefill,
        "step": counted.step,
    }
    return {
        "schedule": schedule,
        "batch": batch,
        "stages": [{"launches": work.launches, "rerun": work.rerun, "waits": work.waited} for work in stages],
        **{name: {"launches": work.launches, "waits": work.waited} for name, work in phases.items()},
        "largest_bytes": counted.largest,
        "wait_lines": {f"{reason}, {line}": n for (reason, line), n in counted.prefill.waits.items()},
    }
