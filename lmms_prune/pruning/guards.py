"""Guards: ways of running a model that do not work on a pruned sequence are refused, with the fix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from lmms_prune.compat.transformers import generation_settings, named_for_generate, watch_cache
from lmms_prune.errors import PruningError
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.calls import FORWARD, GENERATE


class EncodedImages:
    """Notes the arguments about images with which a model's images were encoded, by replacing ``get_image_features``.

    ``generate`` encodes images before the first forward pass, to which it passes on the features alone.

    Args:
        parts: the model's.
        paused: whether a call is not to be noted.
    """

    def __init__(self, parts: ModelParts, paused: Callable[[], bool]):
        self._multimodal, self._noted = parts.multimodal, dict[str, Any]()
        self._previous = vars(parts.multimodal).get("get_image_features")
        encode, names = parts.multimodal.get_image_features, parts.family.image_arguments
        signature = inspect.signature(encode)

        @wraps(encode)
        def noting(*args: Any, **kwargs: Any) -> Any:
            if not paused():
                arguments = signature.bind_partial(*args, **kwargs).arguments
                # On the host, where they are read: nothing else is queued on the device yet.
                self._noted = {name: arguments[name].cpu() for name in names if name in arguments}
            return encode(*args, **kwargs)

        self._multimodal.get_image_features = self._noting = noting

    def take(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a prompt's forward pass, with those that were noted since the last one."""
        noted, self._noted = self._noted, {}
        return {**noted, **{name: value for name, value in inputs.items() if value is not None}} if noted else inputs

    def remove(self) -> None:
        """Restore ``get_image_features``, unless it has been replaced again since."""
        if vars(self._multimodal).get("get_image_features") is not self._noting:
            return
        del self._multimodal.get_image_features
        if self._previous is not None:
            self._multimodal.get_image_features = self._previous


class GenerateGuard:
    """Replaces a model's ``generate`` and refuses what the table refuses, before the model runs.

    Only ``generate`` knows all settings: the hooks see single forward passes.
    """

    def __init__(self, model: Any, image_arguments: Sequence[str] = ()):
        self._model, self._previous = model, vars(model).get("generate")
        generate = model.generate

        @wraps(generate)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            arguments = named_for_generate(model, args, kwargs)
            settings = generation_settings(model, arguments, GENERATE.knows)
            if message := GENERATE.refuses(settings, model.config, image_arguments):
                raise PruningError(message)
            return generate(*args, **kwargs)

        model.generate = self._guarded = guarded

    def remove(self) -> None:
        """Restore the model's ``generate``, unless it has been replaced again since."""
        if vars(self._model).get("generate") is not self._guarded:
            return
        del self._model.generate
        if self._previous is not None:
            self._model.generate = self._previous


def refuse_arguments(arguments: Mapping[str, Any], parts: ModelParts) -> None:
    """Refuse arguments of ``forward`` that pruning does not support; values equal to the configuration's pass."""
    if message := FORWARD.refuses(arguments, parts.config, parts.family.image_arguments):
        raise PruningError(message)


def refuse_inputs(inputs: dict[str, Any]) -> None:
    """Refuse videos, and every mask but a plain padding mask."""
    # generate() may encode videos beforehand and pass on their features.
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
    """Decides which methods of a cache that was filled in a block may run; the cache and its copies call it first.

    Args:
        inside: whether the block still runs: only its hooks know the positions and masks of the kept tokens.
        pruned: whether tokens were dropped; otherwise the cache is like any other once the block has ended.
    """

    inside: bool = True
    pruned: bool = False

    def watch(self, cache: Any) -> None:
        """Make `cache` call this guard before each of its methods.

        Raises:
            PruningError: another kind of cache, which cannot hold layers of different lengths.
        """
        kinds = {type(layer).__name__ for layer in cache.layers}
        if type(cache).__name__ != "DynamicCache" or not kinds <= {"DynamicLayer"}:
            what = f"{type(cache).__name__} of {', '.join(sorted(kinds)) or 'no layers yet'}"
            message = f"the cache {what} preallocates or reorders its tokens; use the default (DynamicCache)."
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
        if self.pruned and not self.inside:
            raise PruningError(
                "this cache was filled inside a prune block, and only the block knows the positions of the kept tokens; "
                "continue inside the block, or start from the whole prompt without this cache."
            )

    def __deepcopy__(self, memo: dict) -> CacheGuard:
        # A copy of a cache belongs to the same block.
        return self


def refuse_growing_prompt(before: Tensor, now: Tensor) -> None:
    """Refuse generation without a cache: it runs the whole text for every token, and would prune it each time."""
    if now.shape[0] == before.shape[0] and now.shape[1] == before.shape[1] + 1 and now[:, :-1].equal(before):
        raise PruningError(
            "generation without a cache would prune again at every token; leave use_cache on. (For "
            "direct forwards of prompts that grow by a token, use one block each.)"
        )
