"""Many generations in one process: ``python tests/soak/soak.py --count 5000``; prints memory, hooks and speed.

Schedules, batch shapes, families and seeds change with every generation. Speed is that of the same case in the first and
in the last third of the run, in seconds of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import torch

sys.path.append(str(Path(__file__).parents[1]))

from built import Built, Checkpoint
from tiny import Family, load, noise

from lmms_prune import prune

LAYERS = 4
SCHEDULES = [
    "none",
    "random@0:0.3",
    "dart@1:0.44,random@3:0.07",
    "divprune@0:0.5,fastv@2:0.25,vtw@3",
    "pool@0:0.5",
    "tome@2:0.4",
    "visionzip@0:0.5,random@2:0.2",
    "sparsevlm@1:0.5,random@3:0.1",
    "fastervlm@0:0.6,pdrop@2:0.3",
    "hiprune@0:20t",
]
WARM_UP = 0.1
MEMORY, SPEED = 0.05, 0.05


@dataclass(frozen=True)
class Soaked:
    """What a run showed.

    Args:
        count: generations.
        memory: resident bytes, after every fiftieth generation since the warm-up.
        hooks_left: generations after which a hook stood on the model.
        slower: the last third's seconds over the first third's, median over the cases.
    """

    count: int
    memory: tuple[int, ...]
    hooks_left: int
    slower: float

    @property
    def growth(self) -> float:
        """The largest distance from the memory at the end of the warm-up, as a share of it."""
        return max(abs(value / self.memory[0] - 1) for value in self.memory)

    def __str__(self) -> str:
        low, high = min(self.memory) / 2**20, max(self.memory) / 2**20
        return (
            f"{self.count:,} generations: memory {self.memory[0] / 2**20:.0f} MiB after the warm-up, then {low:.0f} to "
            f"{high:.0f} ({self.growth:.1%} at most), hooks left after {self.hooks_left}, the last third took "
            f"{self.slower:.3f} of the first third's time"
        )


def batches(family: Family) -> list[dict[str, torch.Tensor]]:
    """One row; three rows of different lengths, one without an image; two images in a row."""
    said = ["What colour is it?", "yes or no", "Which one is the larger of the two, A or B?"]
    small, wide = noise(1, 56, 56), noise(2, 112, 56)
    shapes = [([said[0]], [[small]]), (said, [[small], [], [wide]]), (said[:2], [[small, wide], [wide]])]
    return [family.inputs(questions, images) for questions, images in shapes]


def soak(families: Sequence[Family], count: int, seed: int = 0) -> Soaked:
    """Generate `count` times; each case comes as often as every other, in a random order."""
    cases = list(product(range(len(families)), SCHEDULES, range(3)))
    prepared = [batches(family) for family in families]
    draw, process, memory, hooks_left = Random(seed), psutil.Process(), [], 0
    order: list[tuple[int, str, int]] = []
    took: dict[tuple[int, str, int], list[float]] = {case: [] for case in cases}
    # The library puts hooks of its own on a LLaVA's tower when it first runs.
    for family, shapes in zip(families, prepared, strict=True):
        family.model.generate(**shapes[0], do_sample=False, max_new_tokens=3)
    before = [_hooks(family.model) for family in families]
    for step in range(count):
        if not order:
            order = draw.sample(cases, len(cases))
        case = order.pop()
        place, schedule, shape = case
        model, compact = families[place].model, families[place].name == "llava" and step % 2
        start = time.process_time()
        with prune(model, schedule, seed=step, positions="compact" if compact else "original"):
            model.generate(**prepared[place][shape], do_sample=False, max_new_tokens=3, min_new_tokens=3)
        took[case].append(time.process_time() - start)
        hooks_left += _hooks(model) != before[place]
        if step >= WARM_UP * count and step % max(1, min(50, count // 20)) == 0:
            memory.append(process.memory_info().rss)
    return Soaked(count, tuple(memory), hooks_left, median(map(_slower, took.values())))


def _slower(times: list[float]) -> float:
    times = times[int(WARM_UP * len(times)) :]
    third = max(1, len(times) // 3)
    return median(times[-third:]) / median(times[:third])


def _hooks(model: torch.nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def families(checkpoint: Checkpoint) -> list[Family]:
    """A tiny model of each family."""
    names = {"llava": "llava", "qwen": "qwen2_5_vl"}
    return [load(name, checkpoint(family, layers=LAYERS), torch.float32, "sdpa") for name, family in names.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises SystemExit(1) if memory or speed is off by more than 5 %, or a hook was left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        found = soak(families(Built(Path(folder)).checkpoint), options.count)
    print(found)
    if found.growth > MEMORY or found.hooks_left or found.slower > 1 + SPEED:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
