"""The supported model families, known before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Supported:
    """One model architecture.

    Args:
        model_type: the checkpoint's ``config.model_type``.
        model_name: the name under which lmms-eval finds it.
        default: the checkpoint that is loaded when none is named.
        mrope: whether positions have three channels, which renumbering would destroy.
    """

    model_type: str
    model_name: str
    default: str
    mrope: bool


SUPPORTED: tuple[Supported, ...] = (
    Supported("llava", "llava_pruned", "llava-hf/llava-1.5-7b-hf", mrope=False),
    Supported("qwen2_5_vl", "qwen2_5_vl_pruned", "Qwen/Qwen2.5-VL-7B-Instruct", mrope=True),
)
