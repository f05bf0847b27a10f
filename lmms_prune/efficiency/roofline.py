"""Times and memory of a schedule on a GPU by arithmetic: the roofline of its peak FLOP/s and its memory's bandwidth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from lmms_prune.efficiency.cost import Number, decode_flops, kv_bytes, layer_flops, output_flops, peak_bytes
from lmms_prune.models.sizes import Architecture

NEW_TOKENS = 32
"""Tokens of an answer in estimates of memory, if no other number is given."""
FILLED = 0.9
"""Share of a card's memory that the largest batch may fill; the rest is the driver's, the allocator's and the libraries'."""
_NVIDIA = "https://www.nvidia.com/content/dam/en-zz/Solutions"


@dataclass(frozen=True)
class Gpu:
    """A card, as its maker's data sheet has it.

    Args:
        name: as ``--gpu`` takes it. title: as it is printed.
        flops: peak FLOP/s of 16-bit matrix products that add in 32 bits, without sparsity.
        bandwidth: bytes/s of its memory.
        memory: bytes.
        pattern: matches the name that CUDA gives the card.
        source: the data sheet.
    """

    name: str
    title: str
    flops: float
    bandwidth: float
    memory: float
    pattern: str
    source: str

    def is_named(self, device: str) -> bool:
        """Tell whether a device name, such as "NVIDIA H100 80GB HBM3", is this card's."""
        return re.search(self.pattern, device) is not None


# Data sheets print tensor-core figures with sparsity; these are half of them.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", "B200 180 GB", 2250e12, 8.0e12, 180e9, r"\bB200\b", "https://www.nvidia.com/en-us/data-center/hgx/"),
        Gpu("h200", "H200 SXM 141 GB", 989e12, 4.8e12, 141e9, r"\bH200(?!.*NVL)", "https://www.nvidia.com/en-us/data-center/h200/"),
        Gpu("h100", "H100 SXM 80 GB", 989e12, 3.35e12, 80e9, r"\bH100(?!.*(PCIe|NVL))", "https://www.nvidia.com/en-us/data-center/h100/"),
        Gpu("h100-pcie", "H100 PCIe 80 GB", 756e12, 2.0e12, 80e9, r"\bH100 PCIe", "https://www.nvidia.com/en-us/data-center/h100/"),
        Gpu("a100", "A100 SXM 80 GB", 312e12, 2.039e12, 80e9, r"\bA100-SXM4-80GB", f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
        Gpu("a100-40gb", "A100 SXM 40 GB", 312e12, 1.555e12, 40e9, r"\bA100-SXM4-40GB", f"{_NVIDIA}/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
        Gpu("l40s", "L40S 48 GB", 362e12, 864e9, 48e9, r"\bL40S\b", "https://www.nvidia.com/en-us/data-center/l40s/"),
        Gpu("l4", "L4 24 GB", 121e12, 300e9, 24e9, r"\bL4\b", "https://www.nvidia.com/en-us/data-center/l4/"),
        Gpu("a6000", "RTX A6000 48 GB", 154.8e12, 768e9, 48e9, r"\bRTX A6000\b", "https://www.nvidia.com/en-us/design-visualization/rtx-a6000/"),
        Gpu("rtx4090", "GeForce RTX 4090 24 GB", 165.2e12, 1008e9, 24e9, r"\bRTX 4090\b", "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Roofline:
    """The least times and the memory of one batch of equal prompts on a card.

    Args:
        first_token: seconds until the first token: vision encoder, prefill and output matrix.
        encoder: the part of it that the vision encoder takes.
        per_token: seconds of the first decode step.
        peak: bytes: weights, cache, and one decoder layer's activations.
        largest_batch: prompts that fit into `FILLED` of the card's memory; 0 if not even the weights and one do.
    """

    first_token: float
    encoder: float
    per_token: float
    peak: Number
    largest_batch: int


def roofline(
    model: Architecture,
    gpu: Gpu,
    lengths: Sequence[Number],
    cached: Sequence[Number],
    encoder_flops: Number,
    batch: int = 1,
    new_tokens: int = NEW_TOKENS,
) -> Roofline:
    """Return what a card needs at least: each part takes its FLOPs at the peak, or its bytes at the bandwidth if that is longer.

    Args:
        model: sizes of the model.
        gpu: the card.
        lengths: tokens in each decoder layer of one prompt, text included.
        cached: tokens in each layer's cache after the prefill.
        encoder_flops: of the vision encoder, for one prompt.
        batch: prompts at once.
        new_tokens: tokens of an answer, for memory.
    """
    encoder = encoder_seconds(model, gpu, encoder_flops, batch)
    decoder = sum(layer_seconds(model, gpu, length, batch) for length in lengths)
    step = decode_flops(model, [ceil(n) for n in cached], 1) * batch
    read = decoder_bytes(model) + batch * sum(kv_bytes(model, cached))
    weights = weight_bytes(model)
    row = [ceil(n) for n in lengths]
    return Roofline(
        first_token=encoder + decoder + output_seconds(model, gpu, batch),
        encoder=encoder,
        per_token=_longest(gpu, step, read),
        peak=weights + peak_bytes(model, [row] * batch, max(0, new_tokens - 1)),
        largest_batch=max(0, int((FILLED * gpu.memory - weights) // peak_bytes(model, [row], max(0, new_tokens - 1)))),
    )


def layer_seconds(model: Architecture, gpu: Gpu, tokens: Number, batch: int = 1) -> float:
    """Return the least seconds of one decoder layer's prefill."""
    read = _layer_numbers(model) * model.bytes_per_number + batch * sum(kv_bytes(model, [tokens]))
    return _longest(gpu, batch * layer_flops(model, tokens, tokens), read)


def encoder_seconds(model: Architecture, gpu: Gpu, flops: Number, batch: int = 1) -> float:
    """Return the least seconds of the vision encoder and the projector."""
    return _longest(gpu, batch * flops, _encoder_numbers(model) * model.bytes_per_number)


def output_seconds(model: Architecture, gpu: Gpu, batch: int = 1) -> float:
    """Return the least seconds of the output matrix at one position of each prompt."""
    numbers = model.vocabulary * model.hidden
    return _longest(gpu, output_flops(model, batch), numbers * model.bytes_per_number)


def decoder_bytes(model: Architecture) -> int:
    """Return the bytes of the weights that a decode step reads: all layers and the output matrix."""
    return (model.layers * _layer_numbers(model) + model.vocabulary * model.hidden) * model.bytes_per_number


def weight_bytes(model: Architecture) -> int:
    """Return the bytes of all matrices."""
    embeddings = 0 if model.tied else model.vocabulary * model.hidden * model.bytes_per_number
    return decoder_bytes(model) + embeddings + _encoder_numbers(model) * model.bytes_per_number


def _longest(gpu: Gpu, flops: Number, read: Number) -> float:
    return float(max(flops / gpu.flops, read / gpu.bandwidth))


def _layer_numbers(model: Architecture) -> int:
    projections = 2 * (model.heads + model.kv_heads) * model.head_dim
    return model.hidden * (projections + 3 * model.intermediate)


def _encoder_numbers(model: Architecture) -> int:
    encoder = model.encoder
    block = 4 * encoder.hidden**2 + encoder.matrices * encoder.hidden * encoder.intermediate
    projector = sum(wide * out for wide, out in encoder.projector)
    return encoder.layers * block + encoder.patch * encoder.hidden + projector
