"""How often pruning makes the host wait for the device, and how many kernels it launches: counted on a pretended GPU.

Exact, and the same on every machine: what is counted are operations, not seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """

    lines: Mapping[str, int] = field(default_factory=dict)
    waits: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """Kernel launches."""
        return sum(self.lines.values())

    @property
    def waited(self) -> int:
        """How often the host would have waited."""
        return sum(self.waits.values())

    def __add__(self, other: Work) -> Work:
        return Work(Counter(self.lines) + Counter(other.lines), Counter(self.waits) + Counter(other.waits))


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
    gpu, parts = PretendedGpu(builds), ModelParts.of(model)
    stages = {stage.layer for stage in Schedule.parse(schedule).stages}
    # The number of the decode step, and how many of our hooks are running: a stage may run the model as its own guide.
    step, depth = [0], [0]

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            depth[0] += 1
            if depth[0] == 1:
                gpu.phase = f"step {step[0]} of ours" if step[0] else name

        return hook

    def leave(*_: Any) -> None:
        depth[0] -= 1
        if not depth[0]:
            gpu.phase = f"step {step[0]}" if step[0] else "library"

    def next_step(*_: Any) -> None:
        if not depth[0]:
            step[0] += 1
            gpu.phase = f"step {step[0]}"

    def before(number: int) -> str:
        return f"{'stage' if number in stages else 'layer'} {number}"

    def outer() -> Iterator[Any]:
        """Hooks that run before those of `prune`."""
        yield model.register_forward_hook(next_step)
        yield parts.multimodal.register_forward_pre_hook(enter("begin"))
        yield parts.decoder.register_forward_pre_hook(enter("begin"))
        for number, layer in enumerate(parts.layers):
            yield layer.register_forward_pre_hook(enter(before(number)))
        yield parts.decoder.register_forward_hook(enter("end"))

    def inner() -> Iterator[Any]:
        """Hooks that run after those of `prune`."""
        for module in (parts.multimodal, parts.decoder, *parts.layers):
            yield module.register_forward_pre_hook(leave)
        yield parts.decoder.register_forward_hook(leave)

    with gpu.placed(model, devices), gpu.running(), torch.no_grad(), hooked(outer()):
        placed = {name: PretendedTensor(x, GPU) for name, x in inputs.items()}
        with prune(model, schedule, **options) as trace, hooked(inner()):
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
    nothing, own = Work(), {phase: _own(gpu, phase) for phase in {*gpu.launches, *gpu.waits}}
    steps = [own.get(f"step {number} of ours", nothing) for number in range(1, new_tokens)]
    others = [own.get(f"layer {number}", nothing) for number in range(len(parts.layers)) if number not in stages]
    return Counted(
        own.get("library", nothing),
        own.get("begin", nothing),
        {number: own.get(f"stage {number}", nothing) for number in sorted(stages)},
        sum(others, nothing),
        own.get("end", nothing),
        Work(steps[-1].lines, max((step.waits for step in steps), key=lambda waits: sum(waits.values()))),
        gpu.launches[f"step {new_tokens - 1}"],
        max((gpu.largest[f"stage {number}"] for number in stages), default=0),
        sequences,
        logits,
        trace,
    )


def _own(gpu: PretendedGpu, phase: str) -> Work:
    """What lines of this package did in a phase."""
    lines = {line: count for line, count in gpu.lines[phase].items() if line.startswith(OWN)}
    return Work(lines, {key: count for key, count in gpu.waits[phase].items() if key[1].startswith(OWN)})


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
    """One line of the table, by name: launches and waits of each phase."""
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
        "stages": [{"launches": work.launches, "waits": work.waited} for work in stages],
        **{name: {"launches": work.launches, "waits": work.waited} for name, work in phases.items()},
        "largest_bytes": counted.largest,
        "wait_lines": {f"{reason}, {line}": n for (reason, line), n in counted.prefill.waits.items()},
    }
