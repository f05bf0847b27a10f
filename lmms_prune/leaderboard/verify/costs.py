"""KV bytes and FLOPs against the tokens in each layer, by the model's sizes or by what all samples imply of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import isdir

import numpy as np
from jaxtyping import Float

from lmms_prune.efficiency.cost import decode_flops, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.leaderboard.verify.evidence import RecordedSample, RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt, NotRecordedError, close, doubts_of
from lmms_prune.models.architectures import of_checkpoint
from lmms_prune.models.sizes import Architecture, ArchitectureError
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import Schedule

TOLERANCE = 1e-6
"""Relative difference of FLOPs that rounding may cause."""


def costs_follow(task: RecordedTask) -> list[Doubt]:
    """Compute each sample's KV bytes and FLOPs from the tokens in each layer, by the sizes of the run's checkpoint."""
    try:
        sizes = known_sizes(task.report)
        schedule = task.schedule
    except NotRecordedError as error:
        return [Doubt(str(error), contradicted=False)]

    model = _Model(sizes)
    return doubts_of(task.samples, lambda sample: sample.name, lambda sample: _contradiction(sample, schedule, model))


def known_sizes(report: RunReport | None) -> Architecture:
    """Return the sizes of a run's checkpoint; raises `NotRecordedError` if only the checkpoint itself could tell."""
    if report is None:
        raise NotRecordedError("not a run of this plugin")
    pretrained = report.settings["pretrained"]
    try:
        sizes = of_checkpoint(pretrained)
    except ArchitectureError as error:
        raise NotRecordedError(f"the sizes of {pretrained} are not known ({error})") from error
    if sizes is None or (not isdir(pretrained) and pretrained != sizes.family.checkpoint):
        raise NotRecordedError(f"the sizes of {pretrained} are not known here; its rows are compared with each other")
    return sizes.in_dtype(report.provenance.dtype or report.settings.get("dtype", "auto"))


class _Model:
    """What a model of known sizes takes for a prompt; many samples have prompts of one length."""

    def __init__(self, sizes: Architecture) -> None:
        self.sizes = sizes
        self._flops: dict[tuple[tuple[int, ...], int], tuple[float, float]] = {}

    def flops(self, lengths: tuple[int, ...], steps: int) -> tuple[float, float]:
        """Return the FLOPs of the prefill, and of so many decode steps after it."""
        if (lengths, steps) not in self._flops:
            prefill, decode = prefill_flops(self.sizes, lengths), decode_flops(self.sizes, lengths, steps)
            self._flops[lengths, steps] = float(prefill), float(decode)
        return self._flops[lengths, steps]


def _contradiction(sample: RecordedSample, schedule: Schedule, model: _Model) -> str:
    counted, sizes = sample.counted, model.sizes
    lengths = sequence_lengths(counted)
    if len(lengths) != sizes.layers:
        return f"{len(lengths)} layers, but {sizes.name} has {sizes.layers}"
    if counted.layer_kv_bytes:
        expected = [int(size) for size in kv_bytes(sizes, cached_lengths(counted, schedule))]
        if reason := _wrong_bytes(list(counted.layer_kv_bytes), expected):
            return reason
    elif counted.kv_bytes:
        raise NotRecordedError("no KV bytes by layer")
    prefill, decode = model.flops(tuple(lengths), max(0, counted.output_tokens - 1))
    derived = {"prefill": prefill, "decode": decode}
    if encoded_whole(counted):
        derived["encoder"] = float(sum(encoder_flops(sizes.encoder, grid) for grid in counted.visual_grids))
    for part, flops in derived.items():
        recorded = getattr(counted, f"{part}_flops")
        if not close(recorded, flops, TOLERANCE):
            return f"{part}_flops is {recorded}, but its tokens take {flops:.0f}"
    return ""


def encoded_whole(counted: TokenAccounting) -> bool:
    """Tell whether the grids hold all patches that were encoded: unpadding leaves out some of an image in tiles."""
    return not counted.grid_boxes or sum(a * b for a, b in counted.visual_grids) == counted.visual_tokens


def _wrong_bytes(recorded: list[int], expected: list[int]) -> str:
    for layer, (size, least) in enumerate(zip(recorded, expected, strict=True)):
        # More bytes than the row's own tokens take are no advantage: a batch whose rows have one padded length gives them.
        if size < least:
            return f"layer {layer} has {size} KV bytes, but its tokens take {least}"
    return ""


def sequence_lengths(counted: TokenAccounting) -> list[int]:
    """Return the tokens of the sample in each layer; raises `NotRecordedError` if they are not recorded."""
    if not counted.layer_visual_tokens or not counted.text_tokens:
        raise NotRecordedError("no visual tokens by layer, or no text tokens")
    return [counted.text_tokens + visual for visual in counted.layer_visual_tokens]


def cached_lengths(counted: TokenAccounting, schedule: Schedule) -> list[int]:
    """Return the tokens in the cache of each layer after the prompt: of cropped layers, those of the layer that crops."""
    lengths, cropped = sequence_lengths(counted), schedule.cropped
    if not len(cropped) or cropped.stop >= len(lengths):
        return lengths
    return [lengths[cropped.stop] if layer in cropped else length for layer, length in enumerate(lengths)]


@dataclass
class Implied:
    """What the samples of one run imply of its model's sizes, for a model whose sizes are not known.

    FLOPs are a linear function of three numbers that only the model decides: those of one token in one layer, of one pair
    of tokens, and of the output matrix.

    Args:
        bytes_per_token: KV bytes of one token in one layer, as recorded.
        encoder: FLOPs of the vision encoder by the images' grids.
        features, flops: of some samples: what the three numbers are multiplied by, and the FLOPs.
    """

    bytes_per_token: set[float] = field(default_factory=set)
    encoder: dict[tuple[tuple[int, int], ...], int] = field(default_factory=dict)
    features: list[tuple[float, float, float]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def add(self, samples: Iterable[RecordedSample], schedule: Schedule) -> None:
        """Add the samples of a task; those whose record does not suffice are left out."""
        for sample in samples:
            counted = sample.accounting
            if counted is None or not counted.layer_visual_tokens or not counted.text_tokens:
                continue
            lengths = sequence_lengths(counted)
            cached = cached_lengths(counted, schedule)
            if len(counted.layer_kv_bytes) == len(cached):
                self.bytes_per_token.add(min(map(_ratio, counted.layer_kv_bytes, cached)))
            if encoded_whole(counted):
                self.encoder.setdefault(counted.visual_grids, counted.encoder_flops)
            if len(self.flops) < _MOST:
                self._add_flops(counted, lengths)

    def _add_flops(self, counted: TokenAccounting, lengths: Sequence[int]) -> None:
        tokens, pairs = sum(lengths), sum(n * n for n in lengths)
        self.features.append((float(tokens), float(pairs), 1.0))
        self.flops.append(float(counted.prefill_flops))
        steps = max(0, counted.output_tokens - 1)
        if steps:
            seen = sum(n * steps + steps * (steps + 1) // 2 for n in lengths)
            self.features.append((float(steps * len(lengths)), float(seen), float(steps)))
            self.flops.append(float(counted.decode_flops))

    def fitted(self) -> tuple[Float[np.ndarray, " 3"], int]:
        """Return the three numbers that fit best, and how many of them the samples decide."""
        features, flops = np.array(self.features), np.array(self.flops)
        scale = np.maximum(np.abs(features).max(axis=0), 1.0)
        # Each equation counts alike, whatever its FLOPs.
        weights = 1 / np.maximum(flops, 1.0)
        numbers, _, rank, _ = np.linalg.lstsq(features / scale * weights[:, None], flops * weights, rcond=1e-9)
        return numbers / scale, int(rank)

    def misfit(self, numbers: Float[np.ndarray, " 3"]) -> float:
        """Return the largest relative difference between recorded FLOPs and those of the numbers."""
        flops = np.array(self.flops)
        return float((np.abs(np.array(self.features) @ numbers - flops) / np.maximum(flops, 1.0)).max())


_MOST = 4000  # equations of a run; more of them decide nothing that these do not


def _ratio(size: int, tokens: int) -> float:
    return size / tokens if tokens else float("inf")


def unlike_sizes(runs: Mapping[str, Implied]) -> dict[str, str]:
    """Return the runs of one model whose bytes and FLOPs imply another model than most runs do, each with the reason.

    Args:
        runs: what the samples of each run imply.
    """
    reasons: dict[str, str] = {}
    counted = {name: implied for name, implied in runs.items() if implied.flops}
    fits = {name: implied.fitted() for name, implied in counted.items()}
    for name, (numbers, _) in fits.items():
        if (misfit := counted[name].misfit(numbers)) > TOLERANCE:
            reasons[name] = f"no model has these FLOPs at these tokens (they differ by {misfit:.2g} of them)"
    consistent = {name: fit for name, fit in fits.items() if name not in reasons}
    most = max((rank for _, rank in consistent.values()), default=0)
    references = {name: numbers for name, (numbers, rank) in consistent.items() if rank == most}
    agreeing = {
        name: [other for other in consistent if counted[other].misfit(numbers) <= TOLERANCE]
        for name, numbers in references.items()
    }
    if agreeing:
        reference = max(agreeing, key=lambda name: len(agreeing[name]))
        for name in consistent:
            if name not in agreeing[reference]:
                reasons[name] = f"its FLOPs are those of another model than those of {reference}"
    sizes = {name: frozenset(implied.bytes_per_token) for name, implied in counted.items() if implied.bytes_per_token}
    usual = max(sizes.values(), key=list(sizes.values()).count, default=frozenset())
    for name, size in sizes.items():
        if min(size) < min(usual):
            reasons.setdefault(
                name, f"{min(size):g} KV bytes for a token in a layer; other runs of the model have {min(usual):g}"
            )
    reasons |= {name: reason for name, reason in _unlike_encoders(counted).items() if name not in reasons}
    return reasons


def _unlike_encoders(runs: Mapping[str, Implied]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    first: dict[tuple[tuple[int, int], ...], tuple[str, int]] = {}
    for name, implied in runs.items():
        for grids, flops in implied.encoder.items():
            other, expected = first.setdefault(grids, (name, flops))
            if not close(flops, expected, TOLERANCE):
                reasons[name] = f"the encoder's FLOPs of images {list(grids)} are {flops}, but {expected} in {other}"
    return reasons
