"""Ways of running a model that a cut sequence does not survive, each refused with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from lmms_prune.compat.transformers import generation_settings, named_for_generate, watch_cache
from lmms_prune.errors import PruningError
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.calls import FORWARD, GENERATE


class GenerateGuard:
    """Stands in the place of a model's ``generate`` and refuses what the table does, before anything runs.

    Only there is it known by which settings the model will be called: the hooks see one forward after the other.
    """

    def __init__(self, model: Any, image_arguments: Sequence[str] = ()):
        self._model, self._before = model, vars(model).get("generate")
        generate = model.generate

        @wraps(generate)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            arguments = named_for_generate(model, args, kwargs)
            settings = generation_settings(model, arguments, GENERATE.knows)
            if wrong := GENERATE.refuses(settings, model.config, image_arguments):
                raise PruningError(wrong)
            return generate(*args, **kwargs)

        model.generate = self._guarded = guarded

    def remove(self) -> None:
        """Put the model's own back, unless another has taken the place since."""
        if vars(self._model).get("generate") is not self._guarded:
            return
        del self._model.generate
        if self._before is not None:
            self._model.generate = self._before


def refuse_arguments(arguments: Mapping[str, Any], parts: ModelParts) -> None:
    """Only arguments that pruning knows of; the configuration says which values hold anyway."""
    if wrong := FORWARD.refuses(arguments, parts.config, parts.family.image_arguments):
        raise PruningError(wrong)


def refuse_inputs(inputs: dict[str, Any]) -> None:
    """Only images, and only a plain padding mask."""
    # generate() may encode videos beforehand and hand on their features.
    if (inputs.get("mm_encoder_outputs") or {}).get("video") is not None:
        raise PruningError("video input is not supported while pruning; give images.")
    mask = inputs.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise PruningError("pruning needs a 2-D attention_mask (rows, length), or none; got another form.")


_REORDERS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")


@dataclass
class CacheGuard:
    """What may be done with a cache that was filled in a block; the cache, and its copies, ask before each method.

    Args:
        inside: whether the block still runs: only its hooks know the positions and masks of what is left.
        cut: whether something was dropped; else the cache is like any other once the block is over.
    """

    inside: bool = True
    cut: bool = False

    def watch(self, cache: Any) -> None:
        """Let `cache` ask.

        Raises:
            PruningError: only a cache whose layers grow on their own can hold layers of different lengths.
        """
        kinds = {type(layer).__name__ for layer in cache.layers}
        if type(cache).__name__ != "DynamicCache" or not kinds <= {"DynamicLayer"}:
            what = f"{type(cache).__name__} of {', '.join(sorted(kinds)) or 'no layers yet'}"
            message = f"the cache {what} preallocates or reorders what is cut; use the default (DynamicCache)."
            raise PruningError(message)
        watch_cache(cache, ("update", *_REORDERS), self)

    def __call__(self, method: str) -> None:
        if self.inside and method in _REORDERS:
            message = (
                f"the generation called the cache's {method}: beam search, assisted and contrastive decoding are not "
            )
            raise PruningError(
                message + "supported while pruning; use num_beams=1 and plain greedy or sampled decoding."
            )
        if self.cut and not self.inside:
            raise PruningError(
                "this cache was filled inside a prune block, and only the block knows the positions of the tokens that "
                "are left; go on inside the block, or start from the whole prompt without this cache."
            )

    def __deepcopy__(self, memo: dict) -> CacheGuard:
        # A copy of a cache is in the same block.
        return self


def refuse_growing_prompt(before: Tensor, now: Tensor) -> None:
    """Generation without a cache runs the whole text anew for every token, and would prune it anew each time."""
    if now.shape[0] == before.shape[0] and now.shape[1] == before.shape[1] + 1 and now[:, :-1].equal(before):
        raise PruningError(
            "generation without a cache would prune anew at every token; leave use_cache on. (For "
            "direct forwards of prompts that grow by a token, use one block each.)"
        )
