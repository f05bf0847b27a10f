"""Checkpoints in the layout of LLaVA's own repository, which transformers cannot load, and their converted twins. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NEXT = {
    ("llama", 4096): "llava-hf/llava-v1.6-vicuna-7b-hf",
    ("llama", 5120): "llava-hf/llava-v1.6-vicuna-13b-hf",
    ("mistral", 4096): "llava-hf/llava-v1.6-mistral-7b-hf",
    ("llama", 7168): "llava-hf/llava-v1.6-34b-hf",
}
_LLAVA_1_5 = {("llama", 4096): "llava-hf/llava-1.5-7b-hf", ("llama", 5120): "llava-hf/llava-1.5-13b-hf"}
_ONEVISION = {
    ("qwen", 896): "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    ("qwen", 3584): "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}
_TYPES = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen")


def foreign_layout(config: Mapping[str, Any]) -> str | None:
    """Explain that a ``config.json`` is of LLaVA's own repository, and name the checkpoint to give; None for others."""
    architectures, model_type = config.get("architectures") or [], str(config.get("model_type"))
    own = [name for name in map(str, architectures) if name.startswith("Llava") and name.endswith("ForCausalLM")]
    if "vision_config" in config or not (own or model_type in _TYPES or "mm_vision_tower" in config):
        return None
    signs = [f"architectures {own[0]}" if own else f"model_type {model_type}"]
    if tower := config.get("mm_vision_tower"):
        signs.append(f"mm_vision_tower {tower}")
    layout = f"is in the layout of LLaVA's own repository ({', '.join(signs)}), which transformers does not load"
    if twin := _converted(config, "".join([*own, model_type]).lower()):
        return (
            f"{layout}; give the converted checkpoint, pretrained={twin}, or convert a fine-tuned one with "
            "convert_llava_weights_to_hf.py of transformers' repository."
        )
    return f"{layout}; give its conversion, a checkpoint of https://huggingface.co/llava-hf."


def _converted(config: Mapping[str, Any], kind: str) -> str | None:
    """The hub's conversion of a checkpoint; `kind` is its class and type in small letters."""
    language = next((name for name in ("qwen", "mistral", "mpt") if name in kind), "llama")
    tiles = "anyres" in str(config.get("image_aspect_ratio"))
    table = _ONEVISION if language == "qwen" else _NEXT if tiles else _LLAVA_1_5
    return table.get((language, int(config.get("hidden_size") or 0)))
