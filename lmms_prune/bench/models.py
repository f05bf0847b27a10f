"""Models of named architectures with random weights, and random inputs for any supported model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText

from lmms_prune.harness.arguments import ModelArguments, weight_arguments
from lmms_prune.harness.loading import load_model, pick_device
from lmms_prune.models import FAMILIES
from lmms_prune.models.architectures import PUBLISHED
from lmms_prune.models.family import Family
from lmms_prune.models.parts import ModelParts

_DTYPES = ("auto", "float32", "float16", "bfloat16")
SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BEFORE = 35  # text tokens before the image, as in LLaVA-1.5's prompt


class BenchError(ValueError):
    """A request that cannot be timed; the message says why."""


@contextmanager
def fits(what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the situation `what` and a `remedy`.

    Raises:
        BenchError: the device or this machine has too little memory.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has no error class for running out of CPU memory.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise BenchError(f"out of memory {what}; use {remedy} or another --device.") from error
        raise


def existing_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ArgumentError: this machine has no such device.
    """
    arguments = {"pretrained": "none", "schedule": "none", "device": name}
    return pick_device(ModelArguments.read(arguments), 0, 1)


@dataclass(frozen=True)
class BenchModel:
    """A loaded model; `title` names it, its dtype and its device, `fixed` tells whether its images have one size."""

    model: Any
    title: str
    fixed: bool


def given_model(
    checkpoint: str | None, arch: str | None, layers: int | None, dtype: str, device: str, model_args: str = ""
) -> BenchModel:
    """Load a checkpoint, or make random weights in the sizes of `arch`.

    Args:
        checkpoint, arch: exactly one of the two.
        layers: decoder layers of the random model; None for all.
        dtype: "auto" is the checkpoint's dtype; for random weights, bfloat16 on a GPU and float32 on a CPU.
        device: "cpu", "cuda" or "cuda:N".
        model_args: further arguments about the checkpoint's weights, as for lmms-eval's ``--model_args``; of random weights
            only the family's own (``unpad``).

    Raises:
        BenchError, ArgumentError, UnsupportedModelError: no such dtype, device or checkpoint, or the weights do not fit.
    """
    dtype = SHORT_DTYPES.get(dtype, dtype)
    if dtype not in _DTYPES:
        raise BenchError(f"--dtype {dtype}: use {', '.join(_DTYPES)}.")
    values = {"pretrained": checkpoint or str(arch), "schedule": "none", "dtype": dtype, "device": device}
    further = weight_arguments(model_args, ("dtype", "device"))
    arguments = ModelArguments.read({**values, **further})
    if arch is not None:
        _refuse_checkpoint_arguments(FAMILIES[PUBLISHED[arch]["model_type"]], arguments, further)
    torch_device = pick_device(arguments, 0, 1)
    with fits(f"with the weights of {checkpoint or arch} alone", "a 16-bit --dtype, with --arch fewer --layers,"):
        if checkpoint is not None:
            model = load_model(arguments, torch_device)
        else:
            auto = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
            model = random_model(str(arch), layers, torch_device, auto if dtype == "auto" else getattr(torch, dtype))
            ModelParts.of(model).family.prepare_model(model, arguments)
    parts = ModelParts.of(model)
    source = checkpoint or f"{arch}, {len(parts.layers)} decoder layers of random weights"
    name = ", ".join(filter(None, (source, model_args)))
    return BenchModel(model, title_of(name, model), parts.tokens_per_image is not None)


def _refuse_checkpoint_arguments(family: Family, arguments: ModelArguments, names: Iterable[str]) -> None:
    """Refuse arguments (`names` of them) that mean nothing for random weights of a family.

    Raises:
        ArgumentError: an argument of another family.
        BenchError: an argument about a checkpoint.
    """
    arguments.refuse_other_families(family)
    if about_checkpoint := [name for name in names if name not in family.arguments]:
        message = (
            f"bench --model-args {about_checkpoint[0]}=…: it is about a checkpoint; give --model, or leave it out."
        )
        raise BenchError(message)


def title_of(name: str, model: Any) -> str:
    """Return a title for reports: the model's name, its dtype and its device."""
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {str(model.dtype).removeprefix('torch.')}, {where}"


def compile_layers(model: Any) -> None:
    """Compile the norms and MLPs of all decoder layers by ``torch.compile``, in place.

    They see one token after another, whatever was pruned, so one compiled code serves every length. Attention stays as
    it is: the cache grows in each step, and differently in each layer, so no fixed sequence of kernels could be replayed.
    A layer that cannot be compiled as a whole is an error, not a silent return to the uncompiled code.
    """
    for layer in ModelParts.of(model).layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            module.compile(dynamic=True, fullgraph=True)


def random_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model of a named architecture with transformers' random initial weights.

    Args:
        name: one of `lmms_prune.models.architectures.PUBLISHED`.
        layers: number of decoder layers; None for all.
        device, dtype: device and dtype of the weights.
    """
    config = FAMILIES[PUBLISHED[name]["model_type"]].random_config(name, layers)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def random_inputs(model: Any, batch: int, grid: tuple[int, int] | None, text_tokens: int) -> dict[str, Tensor]:
    """Make inputs of one random image and random text per row, in a processor's format.

    Args:
        model: a supported model; the inputs get its device and dtype.
        batch: rows.
        grid: rows and columns of visual tokens of each image; None if the model has a fixed size. In tiles, an image of so
            many patches has more tokens.
        text_tokens: text tokens of each row, before and after the image together.

    Raises:
        BenchError: the model takes images of another size.
    """
    parts = ModelParts.of(model)
    fixed_grid = parts.family.only_grid(parts.config)
    if fixed_grid and grid not in (None, fixed_grid):
        raise BenchError(
            f"this model's images have {fixed_grid[0]} x {fixed_grid[1]} visual tokens, not {grid[0]} x {grid[1]}."
        )
    grid = fixed_grid or grid
    if grid is None:
        raise BenchError("images of this model have any size: say their rows and columns of visual tokens.")
    generator = torch.Generator().manual_seed(0)
    # Special tokens have ids at either end of the vocabulary; text is drawn between.
    vocabulary = parts.config.get_text_config().vocab_size
    text = torch.randint(vocabulary // 8, vocabulary // 2, (batch, text_tokens), generator=generator)
    text[text == parts.config.image_token_id] += 1
    before = min(_BEFORE, text_tokens // 2)
    weight = parts.decoder.norm.weight

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    images = [parts.family.image_inputs(parts.config, grid, noise) for _ in range(batch)]
    tokens = parts.tokens_per_image or parts.image_sizes(images[0])[0]
    image = torch.full((batch, tokens), parts.config.image_token_id)
    ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **parts.family.extra_inputs(parts.config, ids)}
    inputs |= parts.family.joined(images, weight.dtype)
    return {name: x.to(weight.device) for name, x in inputs.items()}


def ragged_inputs(model: Any, batch: int, grid: tuple[int, int] | None, text_tokens: int) -> dict[str, Tensor]:
    """Make inputs as `random_inputs`, left-padded: no two of eight rows have texts of one length, nor images of one size if they may differ.

    Args:
        model, grid, text_tokens: as for `random_inputs`; the first row's.
        batch: rows.
    """
    grids = [grid and (max(1, grid[0] - row % 3), max(1, grid[1] - 2 * (row % 2))) for row in range(batch)]
    rows = [random_inputs(model, 1, grids[row], max(2, text_tokens - 3 * (row % 8))) for row in range(batch)]
    longest = max(row["input_ids"].shape[1] for row in rows)

    per_token = [name for name, x in rows[0].items() if x.shape == rows[0]["input_ids"].shape]
    inputs = {
        name: torch.cat([pad(row[name], (longest - row[name].shape[1], 0)) for row in rows]) for name in per_token
    }
    images = [{name: x for name, x in row.items() if name not in per_token} for row in rows]
    return inputs | ModelParts.of(model).family.joined(images, model.dtype)
