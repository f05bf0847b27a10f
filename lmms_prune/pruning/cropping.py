"""Cropping of the cache after a prefill, for methods that are published so (MustDrop)."""

from __future__ import annotations

from typing import Any

import torch

from lmms_prune.methods.shared.tensors import gather
from lmms_prune.pruning.ragged import pack
from lmms_prune.pruning.segment import Segment
from lmms_prune.schedule import Schedule


def crop_caches(schedule: Schedule, cache: Any, segments: list[Segment | None], present: torch.Tensor) -> None:
    """Let layers that ran before what later stages dropped forget it, too; their segments are replaced.

    Args:
        schedule: whose methods may crop.
        cache: filled by the prefill.
        segments: of each layer; None where the layer saw the unpruned sequence.
        present: which columns of the unpruned sequence (B, L) held a token.
    """
    cropping = [stage.layer for stage in schedule.stages if stage.spec.crops_cache and stage.layer]
    final = segments[max(cropping)] if cropping else None
    if final is None:
        return
    left = torch.zeros_like(present, dtype=torch.int32, device=final.valid.device)
    left = left.scatter_add(1, final.origin.to(left.device), final.valid.int()) > 0
    columns = torch.arange(left.shape[1], device=left.device).expand_as(left)
    present = present.to(left.device)
    for layer in range(min(cropping) - 1, max(cropping)):
        segment = segments[layer]
        if segment is final:
            continue
        origin, valid = (columns, present) if segment is None else (segment.origin, segment.valid)
        packing = pack(valid.to(left.device) & left.gather(1, origin.to(left.device)), final.host_lengths, "left")
        held = cache.layers[layer]
        for name in ("keys", "values"):
            states = getattr(held, name)
            index = packing.index.to(states.device)[:, None, :, None]
            setattr(held, name, states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3])))
        # Positions go on as if nothing had been dropped from this layer.
        lengths = present.sum(1) if segment is None else segment.lengths
        kept_origin = gather(origin, packing.index)
        segments[layer] = Segment(
            packing.valid, packing.padded, None, final.rotary, lengths, kept_origin, final.host_lengths
        )
