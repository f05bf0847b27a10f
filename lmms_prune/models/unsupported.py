"""What is refused of models, by name and before any weight is loaded: other architectures and variants. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from lmms_prune.errors import UnsupportedModelError

_EXPERTS = "a mixture of experts, of which only the dense models are supported"
_LINEAR = "three of four of its layers are linear attention, whose recurrent state has no keys to remove"
_SLIDING = "most of its layers attend in sliding windows, where a dropped token changes which tokens are in reach"
_FEW = "an image has few visual tokens, of which little can be pruned"
_VIDEO = "it is made for video; only images are supported"
REASONS: dict[str, str] = {
    "qwen2_5_omni": "it takes audio and video, and its language model is one of several",
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_omni_moe": _EXPERTS,
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "gemma3": _SLIDING,
    "gemma3n": _SLIDING,
    "gemma4": _SLIDING,
    "gemma4_unified": _SLIDING,
    "paligemma": "its image tokens see each other in both directions, and its layers may attend in sliding windows",
    "smolvlm": _FEW,
    "idefics3": _FEW,
    "llava_next_video": _VIDEO,
    "video_llava": _VIDEO,
}
"""Why a model type is not supported, for those that people ask for."""


def why_not(model_type: Any, supported: Iterable[str]) -> str:
    """What is to be said of a model type that is no family's: the reason, if one is known, and what is supported."""
    reason = REASONS.get(model_type) if isinstance(model_type, str) else None
    return f"{f' ({reason})' if reason else ''}. Supported: {', '.join(supported)}."


def refuse_stated_variant(text: Mapping[str, Any], supported: Iterable[str]) -> None:
    """The same as `refuse_variant` for a decoder's part of a ``config.json`` as it is written; raises as that does."""
    # A window that is stated is used by Mistral, by Qwen only if it is switched on.
    slides = text.get("use_sliding_window", text.get("model_type") == "mistral")
    refuse_variant(SimpleNamespace(**{**text, "sliding_window": slides and text.get("sliding_window")}), supported)


def refuse_variant(text: Any, supported: Iterable[str]) -> None:
    """Refuse a decoder of a supported family that is built in another way.

    Args:
        text: the decoder's configuration.
        supported: the families, for the message.

    Raises:
        UnsupportedModelError: layers that do not attend to all tokens before (sliding windows), or experts.
    """
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if others := sorted(kinds - {"full_attention"}):
        raise UnsupportedModelError(
            f"decoders with sliding windows, or any layers but full attention, are not supported (layer types: "
            f"{', '.join(others)}). Supported, with full attention: {', '.join(supported)}."
        )
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(text, name, None):
            raise UnsupportedModelError(
                f"decoders with a mixture of experts are not supported ({name} is {getattr(text, name)}). Supported, dense: "
                f"{', '.join(supported)}."
            )
