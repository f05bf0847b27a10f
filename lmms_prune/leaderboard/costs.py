"""Measured cost per document, absolute and relative to the baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, stdev

from lmms_prune.leaderboard.entries import Entry
from lmms_prune.leaderboard.records import Source
from lmms_prune.leaderboard.rows import Cost

# Facts that change the time of an evaluation but not its answers: name in the record, and name for readers.
CIRCUMSTANCES = {
    "batch_size": "batch size",
    "device": "device",
    "machine": "machine",
    "threads": "threads",
    "processes": "processes",
}
MOST_LOAD = 0.10  # largest share of the cores' time that other programs may take if speeds are compared


def cost(entry: Entry, baseline: Entry | None) -> Cost:
    """Return the measured cost per document, and its shares of the baseline's in percent."""
    own = _measured(entry)
    if baseline is None:
        return own
    unpruned = _measured(baseline)
    differing = [] if entry is baseline else list(_unlike(_sources(entry), _sources(baseline)))
    compared = own.samples_per_second is not None and unpruned.samples_per_second is not None

    def share(value: float | None, reference: float | None) -> float | None:
        return None if value is None or not reference else 100 * value / reference

    speed = None if differing else share(own.samples_per_second, unpruned.samples_per_second)
    low, high = (speed, speed) if entry is baseline else _share_interval(speed, own, unpruned)
    return replace(
        own,
        share_tokens=share(own.avg_visual_tokens, own.original_tokens),
        share_kv=share(own.kv_mib, unpruned.kv_mib),
        share_flops=share(own.prefill_tflops, unpruned.prefill_tflops),
        share_speed=speed,
        share_speed_low=low if own.has_speed else None,
        share_speed_high=high if own.has_speed else None,
        no_share_speed="; ".join(reason for _, reason in differing) if compared else "",
        unlike=", ".join(word for word, _ in differing) if compared else "",
    )


def _unlike(own: list[Source], others: list[Source]) -> Iterator[tuple[str, str]]:
    """Yield why two speeds cannot be compared: in a word, and in full."""
    for fact, name in CIRCUMSTANCES.items():
        own_values, other_values = (
            sorted({source.facts.get(fact, "") for source in sources}) for sources in (own, others)
        )
        if "" in (*own_values, *other_values):
            yield f"unknown {name}", f"{name} not recorded"
        elif own_values != other_values or len(own_values) > 1:
            yield f"other {name}", f"{name}: {' and '.join(own_values)}; its baseline: {' and '.join(other_values)}"
    loads = [source.other_load for source in (*own, *others)]
    known = [load for load in loads if load is not None]
    if known and max(known) > MOST_LOAD:
        yield "other load", f"other programs took {max(known):.0%} of the machine (at most {MOST_LOAD:.0%} is compared)"
    elif len(known) < len(loads):
        yield "unknown load", "load by other programs not recorded"


def _sources(entry: Entry) -> list[Source]:
    return [source for run in entry.runs for source in run.sources]


def _measured(entry: Entry) -> Cost:
    sources = _sources(entry)
    seconds = sum(source.seconds for source in sources)
    speed = sum(source.requests for source in sources) / seconds if seconds else None
    low, high = _speed_interval(entry)
    peak, peak_of = _peak(sources)
    device = " and ".join(sorted({source.facts.get("device", "") for source in sources}))
    if (totals := entry.accounting) is None:
        return Cost(
            samples_per_second=speed,
            samples_per_second_low=low,
            samples_per_second_high=high,
            device=device,
            peak_gib=peak,
            peak_of=peak_of,
        )
    costs = totals.costs()
    return Cost(
        avg_visual_tokens=totals.avg_visual_tokens,
        original_tokens=totals.original_visual_tokens,
        kv_mib=costs["kv_mib"],
        prefill_tflops=costs["selection_tflops"] + costs["prefill_tflops"],
        encoder_tflops=costs["encoder_tflops"],
        decode_tflops=costs["decode_tflops"],
        samples_per_second=speed,
        samples_per_second_low=low,
        samples_per_second_high=high,
        device=device,
        peak_gib=peak,
        peak_of=peak_of,
    )


def _peak(sources: list[Source]) -> tuple[float | None, str]:
    """Return the highest peak of memory in GiB and what it is of; None if a run has none, or if they are of different kinds."""
    kinds = {source.peak_memory_of for source in sources}
    peaks = [source.peak_memory for source in sources if source.peak_memory is not None]
    known = len(kinds) == 1 and len(peaks) == len(sources) and bool(peaks)
    return (max(peaks) / 2**30, kinds.pop()) if known else (None, "")


def _speed_interval(entry: Entry) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % t interval of the speed over a row's runs; None if there are fewer than two with a time."""
    from scipy.special import stdtrit  # without the rest of scipy.stats, whose import takes half a second

    totals = [(sum(s.requests for s in run.sources), sum(s.seconds for s in run.sources)) for run in entry.runs]
    speeds = [requests / seconds for requests, seconds in totals if seconds]
    if len(speeds) < 2 or len(speeds) < len(totals):
        return None, None
    reach = float(stdtrit(len(speeds) - 1, 0.975)) * stdev(speeds) / len(speeds) ** 0.5
    return max(0.0, fmean(speeds) - reach), fmean(speeds) + reach


def _share_interval(share: float | None, own: Cost, unpruned: Cost) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of a ratio of two speeds: their relative errors add up as squares."""
    reaches = []
    for cost in (own, unpruned):
        low, high, speed = cost.samples_per_second_low, cost.samples_per_second_high, cost.samples_per_second
        if share is None or low is None or high is None or not speed:
            return None, None
        reaches.append((high - low) / 2 / speed)
    reach = sum(part**2 for part in reaches) ** 0.5
    return max(0.0, share * (1 - reach)), share * (1 + reach)
