"""Quantised weights: quantised while they are loaded (bitsandbytes), or stored so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.arguments import ArgumentError, ModelArguments

LIBRARY = "bitsandbytes"
"""Quantises weights while they are loaded; also the only method whose stored checkpoints were tested."""


def refuse_stored(config: Mapping[str, Any], arguments: ModelArguments) -> None:
    """Refuse a checkpoint whose ``config.json`` states a quantisation that is not supported, or that the arguments repeat.

    Args:
        config: the content of ``config.json``.
        arguments: the run's.

    Raises:
        ArgumentError: load_in_4bit or load_in_8bit on top of a stored quantisation.
        UnsupportedModelError: names the method of quantisation, and what is supported.
    """
    stored = config.get("quantization_config")
    if not stored:
        return
    if not isinstance(stored, Mapping):
        raise UnsupportedModelError(
            f"pretrained={arguments.pretrained}: quantization_config in config.json is {stored!r}, not an object with a "
            "quant_method; the file is damaged."
        )
    # The first versions of bitsandbytes' configuration did not name their method.
    older = LIBRARY if stored.get("load_in_4bit") or stored.get("load_in_8bit") else "an unnamed method"
    method = str(stored.get("quant_method") or older)
    if asked := arguments.quantisation:
        raise ArgumentError(
            f"model_args: {asked}=true: pretrained={arguments.pretrained} is quantised already ({method}); leave {asked} out, "
            "or give the checkpoint before quantisation."
        )
    if method != LIBRARY:
        raise UnsupportedModelError(
            f"pretrained={arguments.pretrained} is stored quantised by {method}, which is not supported; supported are "
            "checkpoints in 16 or 32 bits, these with load_in_4bit=true or load_in_8bit=true, and those that bitsandbytes stored."
        )
    _need_library(f"pretrained={arguments.pretrained} is stored quantised and")


def loading_options(arguments: ModelArguments, config: Any) -> dict[str, Any]:
    """Return transformers' options that quantise the weights while they are loaded; empty without load_in_4bit or load_in_8bit.

    Four bits are NF4, as QLoRA trains with; products are computed in the run's dtype. Vision encoder and projector are
    quantised too, the output matrix is not: transformers' default.

    Args:
        arguments: the run's.
        config: the checkpoint's configuration, whose dtype holds for dtype=auto.

    Raises:
        ArgumentError: bitsandbytes is not installed.
    """
    asked = arguments.quantisation
    if asked is None:
        return {}
    _need_library(f"{asked}=true")
    from transformers import BitsAndBytesConfig

    if asked == "load_in_8bit":
        # One line for every product of every layer, in all dtypes but float16.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    dtype = arguments.dtype if arguments.dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    }


def refuse_widths(model: Any, arguments: ModelArguments) -> None:
    """Refuse four-bit layers that bitsandbytes' fast code for CPUs (AVX-512 with bfloat16) cannot run, before any document.

    Raises:
        ArgumentError: names the first layer and the ways out.
    """
    for name, layer in model.named_modules():
        fast = getattr(layer, "support_avx512bf16_for_cpu", False) and layer.weight.device.type == "cpu"
        if fast and layer.in_features % layer.weight.quant_state.blocksize:
            raise ArgumentError(
                f"pretrained={arguments.pretrained} in four bits on this CPU: bitsandbytes needs inputs of a multiple of "
                f"{layer.weight.quant_state.blocksize} numbers, and {name} has {layer.in_features}; use load_in_8bit=true or a GPU."
            )


def _no_cast(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def _need_library(what: str) -> None:
    if find_spec(LIBRARY) is None:
        raise ArgumentError(
            f"model_args: {what} needs {LIBRARY}, which is not installed: pip install 'lmms-prune[quantised]'."
        )
