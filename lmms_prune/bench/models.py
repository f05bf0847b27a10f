"""Random-weight models of named architectures, and inputs for any model of the families."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.loading import load_model, pick_device
from lmms_prune.models.families import ModelParts
from lmms_prune.models.sizes import NAMED

_DTYPES = ("auto", "float32", "float16", "bfloat16")
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BEFORE = 35  # text tokens before the image, as in LLaVA-1.5's prompt


class BenchError(ValueError):
    """What was asked for cannot be timed; the message says why."""


@contextmanager
def fits(what: str, mend: str) -> Iterator[None]:
    """Say of memory that does not suffice that it does not hold `what`, and how to `mend` it.

    Raises:
        BenchError: the device, or this machine, has too little.
    """
    try:
        yield
    except RuntimeError as error:
        # On a CPU it has no class of its own.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise BenchError(f"out of memory {what}; use {mend} or another --device.") from error
        raise


def existing_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ArgumentError: this machine has none.
    """
    given = {"pretrained": "none", "schedule": "none", "device": name}
    return pick_device(ModelArguments.read(given, None, {}, ()), 0, 1)


@dataclass(frozen=True)
class Ready:
    """A loaded model; `title` says what, where and in what type, `fixed` whether its images have only one size."""

    model: Any
    title: str
    fixed: bool


def given_model(checkpoint: str | None, arch: str | None, layers: int | None, dtype: str, device: str) -> Ready:
    """A checkpoint, or random weights in the sizes of `arch`.

    Args:
        checkpoint, arch: one of the two.
        layers: decoder layers of the random model; None for all.
        dtype: "auto" is the checkpoint's, and for random weights bfloat16 on a GPU and float32 on a CPU.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        BenchError, ArgumentError, UnsupportedModelError: no such type, device or checkpoint, or it does not fit.
    """
    dtype = _SHORT.get(dtype, dtype)
    if dtype not in _DTYPES:
        raise BenchError(f"--dtype {dtype}: use {', '.join(_DTYPES)}.")
    given = {"pretrained": checkpoint or str(arch), "schedule": "none", "dtype": dtype, "device": device}
    arguments = ModelArguments.read(given, None, {}, ())
    place = pick_device(arguments, 0, 1)
    with fits(f"with the weights of {checkpoint or arch} alone", "a 16-bit --dtype, with --arch fewer --layers,"):
        if checkpoint is not None:
            model = load_model(arguments, place)
        else:
            kind = {"auto": torch.bfloat16 if place.type == "cuda" else torch.float32}
            model = random_model(str(arch), layers, place, kind.get(dtype) or getattr(torch, dtype))
    parts = ModelParts.of(model)
    name = checkpoint or f"{arch}, {len(parts.layers)} decoder layers of random weights"
    where = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    title = f"{name}, {str(model.dtype).removeprefix('torch.')}, {where}"
    return Ready(model, title, parts.family.tokens_per_image(parts.config) is not None)


def random_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of a named architecture with the library's random weights.

    Args:
        name: one of `lmms_prune.models.sizes.NAMED`.
        layers: decoder layers, if fewer than the architecture has are enough.
        device, dtype: where and in what type the weights are made.
    """
    sizes = deepcopy(NAMED[name])
    text, vision = sizes["text_config"], sizes["vision_config"]
    if layers is not None:
        text["num_hidden_layers"] = layers
    if sizes["model_type"] == "llava":
        text["model_type"], vision["model_type"] = "llama", "clip_vision_model"
        config: Any = LlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)
        kind: Any = LlavaForConditionalGeneration
    else:
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        sections = [half // 4, 3 * half // 8, 3 * half // 8]
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        config = Qwen2_5_VLConfig(text_config=text, vision_config={"depth": 32, **vision})
        kind = Qwen2_5_VLForConditionalGeneration
    with torch.device(device):
        return kind._from_config(config, dtype=dtype).eval()


def random_inputs(model: Any, batch: int, grid: tuple[int, int] | None, text_tokens: int) -> dict[str, Tensor]:
    """One random image and random text in each row, as a processor would give them.

    Args:
        model: of either family; its device and type hold for the inputs.
        batch: rows.
        grid: rows and columns of visual tokens of each image; None where the model has only one size.
        text_tokens: of each row, before and after the image.

    Raises:
        BenchError: the model takes images of another size.
    """
    parts = ModelParts.of(model)
    fixed = parts.family.tokens_per_image(parts.config)
    if fixed:
        side = int(fixed**0.5)
        if grid not in (None, (side, side)):
            raise BenchError(f"this model's images have {side} x {side} visual tokens, not {grid[0]} x {grid[1]}.")
        grid = (side, side)
    elif grid is None:
        raise BenchError("images of this model have any size: say their rows and columns of visual tokens.")
    rows, columns = grid
    generator = torch.Generator().manual_seed(0)
    # Ids of specials lie at either end of a vocabulary.
    vocabulary = parts.config.get_text_config().vocab_size
    text = torch.randint(vocabulary // 8, vocabulary // 2, (batch, text_tokens), generator=generator)
    text[text == parts.config.image_token_id] += 1
    before = min(_BEFORE, text_tokens // 2)
    image = torch.full((batch, rows * columns), parts.config.image_token_id)
    ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = parts.config.vision_config
    if parts.family.mrope:
        merge = vision.spatial_merge_size
        wide = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(batch * merge**2 * rows * columns, wide, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, merge * rows, merge * columns]] * batch)
        inputs["mm_token_type_ids"] = (ids == parts.config.image_token_id).int()
    else:
        pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
    weight = parts.decoder.norm.weight
    return {name: x.to(weight.device) for name, x in {**inputs, "pixel_values": pixels.to(weight.dtype)}.items()}
