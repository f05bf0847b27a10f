"""What a row costs, measured, and what that is of its baseline."""

from __future__ import annotations

from dataclasses import replace

from lmms_prune.leaderboard.entries import Entry
from lmms_prune.leaderboard.rows import Cost


def cost(entry: Entry, baseline: Entry | None) -> Cost:
    """Measured per document, and as shares of the baseline's."""
    mine = _measured(entry)
    if baseline is None:
        return mine
    its = _measured(baseline)
    same = mine.device == its.device

    def share(part: float | None, whole: float | None) -> float | None:
        return None if part is None or not whole else 100 * part / whole

    return replace(
        mine,
        share_tokens=share(mine.tokens, mine.original_tokens),
        share_kv=share(mine.kv_mib, its.kv_mib),
        share_flops=share(mine.prefill_tflops, its.prefill_tflops),
        share_speed=share(mine.samples_per_second, its.samples_per_second) if same else None,
    )


def _measured(entry: Entry) -> Cost:
    sources = [source for run in entry.runs for source in run.sources]
    seconds = sum(source.seconds for source in sources)
    speed = sum(source.requests for source in sources) / seconds if seconds else None
    device = " and ".join(sorted({source.facts.get("device", "") for source in sources}))
    if (ledger := entry.ledger) is None:
        return Cost(samples_per_second=speed, device=device)
    parts = ("tower", "selection", "prefill", "decode")
    tower, selection, prefill, decode = (ledger.mean(f"{part}_flops") / 1e12 for part in parts)
    kv = ledger.mean("kv_bytes") / 2**20
    return Cost(ledger.tokens, ledger.original_tokens, kv, selection + prefill, tower, decode, speed, device)
