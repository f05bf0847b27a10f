"""What a schedule will cost on a model, before anything runs; and schedules that fit a budget of cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, isqrt, log10

from lmms_prune.efficiency.cost import Number, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.errors import ScheduleError
from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import Schedule, cannot_be_met

MIB = 2**20
_UNITS: dict[str, dict[str, float]] = {"flops": {"T": 1e12, "G": 1e9}, "kv": {"MiB": MIB, "GiB": 2**30}}


@dataclass(frozen=True)
class Estimate:
    """One prompt with one image.

    Args:
        visual: visual tokens in each decoder layer.
        flops: of the decoder's prefill, with the output matrix at the last position.
        encoder_flops: of the vision encoder and the projector, which no schedule changes; where images differ in size, of
            one that is as near to a square as its tokens allow, which decides where Qwen2.5-VL's windows are cut.
        kv_bytes: of the cache at the prefill's end.
    """

    visual: tuple[int, ...]
    flops: Number
    encoder_flops: int
    kv_bytes: Number


def estimate(model: Architecture, schedule: Schedule, visual_tokens: int, text_tokens: Number) -> Estimate:
    """What `schedule`, every ``?`` solved, costs on a prompt of `text_tokens` and one image of `visual_tokens`.

    Text tokens may be an average, 116.4 for one. What a method itself computes, a guide or a second pass through the
    encoder is not in it.
    """
    visual = schedule.layer_counts(model.layers, [visual_tokens])
    lengths = [n + text_tokens for n in visual]
    encoder = encoder_flops(model.encoder, _grid(visual_tokens))
    return Estimate(tuple(visual), prefill_flops(model, lengths), encoder, sum(kv_bytes(model, lengths)))


def solved(schedule: Schedule, budget: str, model: Architecture, visual_tokens: int, text_tokens: Number) -> Schedule:
    """`schedule` with its ``?`` filled so that it costs at most `budget`.

    Args:
        schedule: with exactly one ``?``.
        budget: ``192t`` or ``0.5`` (average visual tokens a layer), ``flops=30%`` or ``kv=30%`` (of the unpruned
            decoder's prefill), ``flops=2.5T``, ``kv=100MiB``.
        model: whose cost is meant.
        visual_tokens: of the image.
        text_tokens: of the prompt.

    Raises:
        ScheduleError: a budget that is not understood or cannot be met, no ``?`` or several.
    """
    name, found, amount = budget.strip().partition("=")
    if not found:
        return schedule.solve(budget, model.layers, visual_tokens)
    if name not in _UNITS:
        raise ScheduleError(f"budget '{budget}': '{name}' is not known; use flops= or kv=, or tokens: 192t.")

    def cost(filled: Schedule) -> Number:
        said = estimate(model, filled, visual_tokens, text_tokens)
        return said.flops if name == "flops" else said.kv_bytes

    whole = cost(Schedule(()))
    units = {"%": whole / 100, **_UNITS[name]}
    read = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(units)})", amount.strip())
    if read is None:
        example = "flops=30% or flops=2.5T" if name == "flops" else "kv=30% or kv=100MiB"
        raise ScheduleError(f"budget '{budget}' is no amount with a unit; write {example}.")
    unit = read[2]

    limit = float(read[1]) * units[unit]

    def unmet(smallest: Number, largest: Number) -> str:
        before = [n + text_tokens for n in schedule.before_unknown(model.layers, visual_tokens)]
        fixed = prefill_flops(model, before, logits=0) if name == "flops" else sum(kv_bytes(model, before))
        # Rounded inwards, so that what is said to be possible is.
        said = [
            _rounded(amount / units[unit], to) + unit
            for amount, to in ((fixed, round), (smallest, ceil), (largest, floor))
        ]
        return cannot_be_met(budget, len(before) if smallest > limit else 0, "take", *said)

    return schedule.solve_for(cost, limit, model.layers, visual_tokens, unmet)


def _rounded(value: Number, to: Callable[[float], int]) -> str:
    """A number of four digits."""
    step = 10.0 ** (floor(log10(value)) - 3) if value else 1.0
    return f"{to(value / step) * step:.4g}"


def _grid(tokens: int) -> tuple[int, int]:
    """The rows and columns nearest to a square that have `tokens` in all."""
    rows = next(rows for rows in range(isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows
