"""The sizes of a model that decide what it costs, read from its ``config.json`` or known by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tower:
    """A vision tower and what projects its tokens.

    Args:
        kind: "clip" or "qwen2_5_vl".
        layers, hidden, heads, intermediate: of its blocks.
        patch: numbers (channels x pixels x frames) that one patch is made from.
        matrices: of a block's MLP: 2, or 3 where it is gated.
        full: blocks that attend over the whole image; the others attend in windows. CLIP: all.
        window: side of a window in visual tokens; 0 without windows.
        merge: side of the square of patches that become one visual token.
        projector: input and output widths of the matrices after the tower, for each visual token.
        image_tokens: visual tokens of every image; 0 where it depends on the image's size.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch: int
    matrices: int
    full: tuple[int, ...]
    window: int
    merge: int
    projector: tuple[tuple[int, int], ...]
    image_tokens: int


@dataclass(frozen=True)
class Architecture:
    """A decoder with its vision tower; `bytes_per_number` holds for the cache: 4 in float32, 2 in 16-bit."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tower: Tower
    bytes_per_number: int = 2


class ArchitectureError(ValueError):
    """No such architecture, or a configuration of another family."""


# What the library fills in where a config.json leaves it out (the hub's LLaVA-1.5 does).
_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_QWEN = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
_QWEN_TOWER = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
NAMED: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "model_type": "llava",
        "text_config": {"vocab_size": 32064},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "llava-1.5-13b": {
        "model_type": "llava",
        "text_config": {
            "vocab_size": 32064,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
    },
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
    },
}


def architecture(model: str) -> Architecture:
    """The sizes of a named architecture, of a ``config.json``, or of a checkpoint's folder.

    Raises:
        ArchitectureError: no such name or file, no JSON, or a family that is not supported.
    """
    if model in NAMED:
        return from_config(NAMED[model], model)
    path = Path(model) / "config.json" if os.path.isdir(model) else Path(model)
    if os.path.isdir(model) and not path.is_file():
        raise ArchitectureError(f"the folder {model} holds no config.json, so it is no checkpoint's.")
    if not os.path.isfile(path):  # as isdir, it also answers for what is too long to be a name
        raise ArchitectureError(
            f"unknown architecture '{model}'; use {', '.join(NAMED)}, a config.json or a checkpoint's folder."
        )
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArchitectureError(f"{path} is no JSON: {error}.") from None
    if not isinstance(said, dict):
        raise ArchitectureError(f"{path} holds a {type(said).__name__}; a configuration is an object.")
    return from_config(said, str(model))


def of_checkpoint(pretrained: str) -> Architecture | None:
    """The sizes of a checkpoint as far as no download tells: of a local folder, or by an architecture's name in its own.

    Returns:
        None where only the hub would know.

    Raises:
        ArchitectureError: a folder without a ``config.json``, or of another family.
    """
    if os.path.isdir(pretrained):
        return architecture(pretrained)
    named = next((name for name in NAMED if name in pretrained.lower()), None)
    return None if named is None else architecture(named)


def from_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The sizes that a configuration states, with the library's defaults for what it leaves out.

    Raises:
        ArchitectureError: the configuration is of another family, or states a size that is none.
    """
    kind = config.get("model_type")
    if kind == "llava":
        return _llava(config, name)
    if kind == "qwen2_5_vl":
        return _qwen(config, name)
    raise ArchitectureError(f"{name}: model_type is {kind!r}; FLOPs are known for 'llava' and 'qwen2_5_vl'.")


_OPTIONAL = ("num_key_value_heads", "head_dim")  # others decide where these are null or absent
_BEYOND, _MANY_LAYERS = 10**7, 10**4


def _sizes(defaults: Mapping[str, Any], stated: Any, where: str) -> dict[str, Any]:
    """What is stated, and the defaults of what is not.

    Raises:
        ArchitectureError: names what is no size.
    """
    if not isinstance(stated, Mapping):
        raise ArchitectureError(f"{where} is {stated!r}; it must be an object with the model's sizes.")
    sizes = {**defaults, **stated}
    for name in dict.fromkeys((*defaults, *_OPTIONAL)):
        value = sizes.get(name)
        listed = name == "fullatt_block_indexes"
        parts = value if listed and isinstance(value, (list, tuple)) else [value]
        high = _MANY_LAYERS if name in ("num_hidden_layers", "depth") else _BEYOND
        fine = all(type(one) is int and (0 if listed else 1) <= one < high for one in parts)
        if not fine and not (name in _OPTIONAL and value is None):
            kind = "a list of whole numbers" if listed else "a whole number from 1"
            raise ArchitectureError(f"{where}.{name} is {value!r}; it must be {kind}.")
    return sizes


def _llava(config: Mapping[str, Any], name: str) -> Architecture:
    text = _sizes(_LLAMA, config.get("text_config", {}), f"{name}: text_config")
    vision = _sizes(_CLIP, config.get("vision_config", {}), f"{name}: vision_config")
    hidden = text["hidden_size"]
    tower = Tower(
        kind="clip",
        layers=vision["num_hidden_layers"],
        hidden=vision["hidden_size"],
        heads=vision["num_attention_heads"],
        intermediate=vision["intermediate_size"],
        patch=3 * vision["patch_size"] ** 2,
        matrices=2,
        full=tuple(range(vision["num_hidden_layers"])),
        window=0,
        merge=1,
        projector=((vision["hidden_size"], hidden), (hidden, hidden)),
        image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    return _decoder(text, name, tower, _bytes(config))


def _qwen(config: Mapping[str, Any], name: str) -> Architecture:
    # Older checkpoints keep the decoder's sizes beside the vision_config, newer ones in a text_config.
    stated = config.get("text_config") or {key: config[key] for key in _QWEN if key in config}
    text = _sizes(_QWEN, stated, f"{name}: text_config")
    vision = _sizes(_QWEN_TOWER, config.get("vision_config", {}), f"{name}: vision_config")
    merged = vision["hidden_size"] * vision["spatial_merge_size"] ** 2
    tower = Tower(
        kind="qwen2_5_vl",
        layers=vision["depth"],
        hidden=vision["hidden_size"],
        heads=vision["num_heads"],
        intermediate=vision["intermediate_size"],
        patch=3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
        matrices=3,
        full=tuple(vision["fullatt_block_indexes"]),
        window=vision["window_size"] // vision["patch_size"] // vision["spatial_merge_size"],
        merge=vision["spatial_merge_size"],
        projector=((merged, merged), (merged, vision["out_hidden_size"])),
        image_tokens=0,
    )
    return _decoder(text, name, tower, _bytes(config))


def _bytes(config: Mapping[str, Any]) -> int:
    """Of a number in the type that the checkpoint is loaded in, where nobody asks for another; older ones call it torch_dtype."""
    return 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2


def _decoder(text: Mapping[str, Any], name: str, tower: Tower, bytes_per_number: int) -> Architecture:
    heads = text["num_attention_heads"]
    return Architecture(
        name=name,
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tower=tower,
        bytes_per_number=bytes_per_number,
    )
