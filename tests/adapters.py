"""Adapters for tiny checkpoints, as PEFT's training saves them."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

WEIGHTS = "adapter_model.safetensors"


def adapted(model: Any, config: Any = None, spread: float = 0.1) -> PeftModel:
    """A copy of `model` in PEFT's wrapper, with adapter weights that change its answers; by default LoRA in every Linear layer."""
    config = config or LoraConfig(r=2, target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapper = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapper.named_parameters():
        if any(part in name for part in ("lora_", "ia3_", "hada_", "lokr_", "modules_to_save")):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter) * spread
            # Factors around one scale; all others are added.
            parameter.data = parameter.data + noise if "magnitude" in name or "ia3_" in name else noise
    return wrapper.eval()


def save_adapter(checkpoint: Path, folder: Path, config: Any = None, spread: float = 0.1) -> Path:
    """The folder of an adapter for the checkpoint in `checkpoint`."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    adapted(model, config, spread).save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_merged(checkpoint: Path, adapter: Path, folder: Path) -> Path:
    """The whole checkpoint with the adapter merged into its weights, by PEFT alone."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    shutil.copytree(checkpoint, folder)
    merged.save_pretrained(folder)
    return folder


def rename(adapter: Path, folder: Path, change: Callable[[str], str]) -> Path:
    """A copy of the adapter whose weights have other names."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / WEIGHTS)
    save_file({change(name): weight for name, weight in weights.items()}, folder / WEIGHTS)
    return folder
