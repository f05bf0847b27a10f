"""The lmms-eval models: an unmodified checkpoint behind lmms-eval's chat interface, pruned by a schedule."""

from __future__ import annotations

from typing import Any

from qwen_vl_utils import process_vision_info

from lmms_prune.harness.arguments import ArgumentError, split
from lmms_prune.harness.prompts import pad_to_square
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.models.families import FAMILIES


class LlavaPruned(PrunedModel):
    """LLaVA-1.5 (``--model llava_pruned``). Prompts and pixels are those of lmms-eval's own chat ``llava_hf``."""

    family = FAMILIES["llava"]

    def _inputs(self, messages: list[list[dict[str, Any]]]) -> Any:
        images = [
            part["image"] for chat in messages for message in chat for part in message["content"] if "image" in part
        ]
        if self.arguments.image_aspect == "pad":
            mean = self.processor.image_processor.image_mean
            images = [pad_to_square(image, mean) for image in images]
        return self.processor(images=images or None, text=self._prompts(messages), padding=True, return_tensors="pt")

    def decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


class Qwen25VLPruned(PrunedModel):
    """Qwen2.5-VL (``--model qwen2_5_vl_pruned``). Prompts and pixels are those of lmms-eval's chat ``qwen2_5_vl``."""

    family = FAMILIES["qwen2_5_vl"]

    def _load_processor(self, **options: Any) -> Any:
        size = {"shortest_edge": self.arguments.min_pixels, "longest_edge": self.arguments.max_pixels}
        return super()._load_processor(size=size, **options)

    def _inputs(self, messages: list[list[dict[str, Any]]]) -> Any:
        images, _ = process_vision_info(messages)
        return self.processor(text=self._prompts(messages), images=images, padding=True, return_tensors="pt")

    def decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


MODELS: dict[str, type[PrunedModel]] = {kind.family.model_name: kind for kind in (LlavaPruned, Qwen25VLPruned)}
"""By the name that lmms-eval knows them by."""


def unpruned(model: str, model_args: str) -> PrunedModel:
    """The model that ``lmms-eval --model … --model_args …`` would make, for work that decides itself what is pruned.

    Args:
        model: a name of `MODELS`.
        model_args: as for lmms-eval, without a schedule.

    Raises:
        ArgumentError: an unknown model, a schedule, or what `ModelArguments` does not allow.
    """
    if model not in MODELS:
        raise ArgumentError(f"--model {model} is unknown; use {' or '.join(MODELS)}.")
    for name in ("schedule", "budget", "journal"):
        if name in split(model_args):
            what = "keeps what it has done" if name == "journal" else "decides what is pruned"
            raise ArgumentError(f"--model_args {name}=…: the command itself {what}; leave it out.")
    return MODELS[model].create_from_arg_string(model_args)
