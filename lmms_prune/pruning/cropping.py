"""Cropping of earlier layers' caches after a prefill, for methods published with it (MustDrop, IVC-Prune)."""

from __future__ import annotations

from typing import Any

import torch

from lmms_prune.methods.shared.tensors import gather
from lmms_prune.pruning.ragged import pack
from lmms_prune.pruning.segment import Segment
from lmms_prune.schedule import Schedule


def crop_caches(schedule: Schedule, cache: Any, segments: list[Segment | None], present: torch.Tensor) -> None:
    """Remove tokens that later stages dropped from the caches of the layers before them, and replace their segments.

    Args:
        schedule: the schedule; only methods with `crops_cache` crop.
        cache: filled by the prefill.
        segments: one per layer; None where the layer saw the unpruned sequence.
        present: which columns of the unpruned sequence (B, L) held a token.
    """
    layers = schedule.cropped
    final = segments[layers.stop] if layers else None
    if final is None:
        return
    # The original columns that the last cropping stage has kept.
    kept = torch.zeros_like(present, dtype=torch.int32, device=final.valid.device)
    kept = kept.scatter_add(1, final.origin.to(kept.device), final.valid.int()) > 0
    columns = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    present = present.to(kept.device)
    # Layers that saw the same tokens are cropped alike.
    alike: dict[int, tuple[torch.Tensor, Segment]] = {}
    for layer in layers:
        segment = segments[layer]
        if segment is final:
            continue
        if id(segment) not in alike:
            origin, valid = (columns, present) if segment is None else (segment.origin, segment.valid)
            packing = pack(valid.to(kept.device) & kept.gather(1, origin.to(kept.device)), final.host_lengths, "left")
            # Decode positions continue as if nothing had been dropped from this layer.
            lengths = present.sum(1) if segment is None else segment.lengths
            kept_origin = gather(origin, packing.index)
            alike[id(segment)] = (
                packing.index,
                Segment(packing.valid, packing.padded, None, final.rotary, lengths, kept_origin, final.host_lengths),
            )
        index, segments[layer] = alike[id(segment)]
        cache_layer = cache.layers[layer]
        for name in ("keys", "values"):
            states = getattr(cache_layer, name)
            here = index.to(states.device)[:, None, :, None]
            setattr(cache_layer, name, states.gather(2, here.expand(-1, states.shape[1], -1, states.shape[3])))
