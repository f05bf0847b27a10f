"""What a row costs, measured, and what that is of its baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lmms_prune.leaderboard.entries import Entry
from lmms_prune.leaderboard.records import Source
from lmms_prune.leaderboard.rows import Cost

# What changes the time of an evaluation and none of its answers: by the name in its record.
CIRCUMSTANCES = {
    "batch_size": "batch size",
    "device": "device",
    "machine": "machine",
    "threads": "threads",
    "processes": "processes",
}
MOST_LOAD = 0.10  # of the cores' time that other programs may take where a speed is compared


def cost(entry: Entry, baseline: Entry | None) -> Cost:
    """Measured per document, and as shares of the baseline's."""
    mine = _measured(entry)
    if baseline is None:
        return mine
    whole = _measured(baseline)
    unlike = [] if entry is baseline else list(_unlike(_sources(entry), _sources(baseline)))
    compared = mine.samples_per_second is not None and whole.samples_per_second is not None

    def share(part: float | None, whole: float | None) -> float | None:
        return None if part is None or not whole else 100 * part / whole

    return replace(
        mine,
        share_tokens=share(mine.avg_visual_tokens, mine.original_tokens),
        share_kv=share(mine.kv_mib, whole.kv_mib),
        share_flops=share(mine.prefill_tflops, whole.prefill_tflops),
        share_speed=None if unlike else share(mine.samples_per_second, whole.samples_per_second),
        no_share_speed="; ".join(reason for _, reason in unlike) if compared else "",
        unlike=", ".join(word for word, _ in unlike) if compared else "",
    )


def _unlike(mine: list[Source], others: list[Source]) -> Iterator[tuple[str, str]]:
    """Why two speeds cannot be compared, in a word and in full."""
    for fact, name in CIRCUMSTANCES.items():
        ours, theirs = (sorted({source.facts.get(fact, "") for source in some}) for some in (mine, others))
        if "" in (*ours, *theirs):
            yield f"unknown {name}", f"{name} not recorded"
        elif ours != theirs or len(ours) > 1:
            yield f"other {name}", f"{name}: {' and '.join(ours)}; its baseline: {' and '.join(theirs)}"
    loads = [source.other_load for source in (*mine, *others)]
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
    device = " and ".join(sorted({source.facts.get("device", "") for source in sources}))
    if (totals := entry.accounting) is None:
        return Cost(samples_per_second=speed, device=device)
    costs = totals.costs()
    return Cost(
        avg_visual_tokens=totals.avg_visual_tokens,
        original_tokens=totals.original_visual_tokens,
        kv_mib=costs["kv_mib"],
        prefill_tflops=costs["selection_tflops"] + costs["prefill_tflops"],
        encoder_tflops=costs["encoder_tflops"],
        decode_tflops=costs["decode_tflops"],
        samples_per_second=speed,
        device=device,
    )
