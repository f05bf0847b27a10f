"""Ways of running a model that a cut sequence does not survive, each refused with what to do instead."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor


class PruningError(RuntimeError):
    """A way of running the model in which the cut tokens, or their positions, would go wrong, or a prefill in which they did."""


def refuse_inputs(inputs: dict[str, Any]) -> None:
    """Only images, and only a plain padding mask."""
    # generate() encodes videos beforehand and hands on their grid alone.
    if any(inputs.get(name) is not None for name in ("pixel_values_videos", "video_grid_thw")):
        raise PruningError("video input is not supported while pruning; give images.")
    mask = inputs.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PruningError("pruning needs a 2-D attention_mask (rows, length), or none; got another form.")


def refuse_cache(cache: Any) -> None:
    """Only a cache whose layers grow on their own can hold layers of different lengths; it may not be reordered either."""
    if cache is None:
        return
    kinds = {type(layer).__name__ for layer in cache.layers}
    if type(cache).__name__ != "DynamicCache" or not kinds <= {"DynamicLayer"}:
        what = f"{type(cache).__name__} of {', '.join(sorted(kinds)) or 'no layers yet'}"
        message = f"the cache {what} preallocates or reorders what is cut; use the default (DynamicCache)."
        raise PruningError(message)
    for name in ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"):
        setattr(cache, name, partial(_refuse, name))


def refuse_growing_prompt(before: Tensor, now: Tensor) -> None:
    """Generation without a cache runs the whole text anew for every token, and would prune it anew each time."""
    if now.shape[0] == before.shape[0] and now.shape[1] == before.shape[1] + 1 and now[:, :-1].equal(before):
        raise PruningError(
            "generation without a cache would prune anew at every token; leave use_cache on. (For "
            "direct forwards of prompts that grow by a token, use one block each.)"
        )


def _refuse(name: str, *args: object, **kwargs: object) -> None:
    message = f"the generation called the cache's {name}: beam search, assisted and contrastive decoding are not "
    raise PruningError(message + "supported while pruning; use num_beams=1 and plain greedy or sampled decoding.")
