"""PEFT's adapters: which kinds pruning supports, and the model inside PEFT's wrapper. Imports neither PEFT nor torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lmms_prune.errors import UnsupportedModelError

LAYER_ADAPTERS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR")
"""Kinds (``peft_type``) that change single layers of the model and need nothing from PEFT's own ``forward``."""
# A prompt, a choice of layers or of tokens: all of them happen in PEFT's forward and generate, which pruning never calls.
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "PEFT's own generate() decides at which tokens it starts to act",
    "layer_replication": "it repeats decoder layers, so schedules and sizes no longer hold",
    "target_parameters": "it changes parameters, not layers",
}

FOREIGN = {
    "non_lora_trainables.bin": "was trained with LLaVA's own code: non_lora_trainables.bin holds trained weights that are not part "
    "of the adapter. Merge both into the checkpoint (merge_lora_weights.py of LLaVA's repository), convert it, and give it as "
    "pretrained=…."
}
"""Files beside an adapter that PEFT ignores although they belong to it, and the reason for which it is refused."""


def refuse_adapter(config: Any, name: str) -> None:
    """Refuse an adapter that does more than change single layers.

    Args:
        config: PEFT's configuration of the adapter.
        name: how messages call it.

    Raises:
        UnsupportedModelError: names the kind or option, and what is supported.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in LAYER_ADAPTERS:
        raise UnsupportedModelError(
            f"{name} is an adapter of the kind {kind}, which is not supported; supported: {', '.join(LAYER_ADAPTERS)}."
        )
    for option, reason in _REFUSED_OPTIONS.items():
        if value := getattr(config, option, None):
            raise UnsupportedModelError(f"{name}: {option}={value} is not supported: {reason}.")


def unwrapped(model: Any) -> Any:
    """The model inside a `peft.PeftModel`, with the adapters in its layers; any other object is returned as it is.

    Raises:
        UnsupportedModelError: an adapter that is not supported.
    """
    # A PeftModel cannot exist before someone has imported PEFT, whose import takes seconds.
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    for name, config in model.peft_config.items():
        refuse_adapter(config, f"the adapter '{name}' of the {type(model).__name__}")
    return model.get_base_model()


def renamed(names: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Translate the weight names of an adapter that was trained with another version of transformers.

    Versions differ in the modules around decoder and vision encoder (``model.layers`` became
    ``model.language_model.layers``), not in the modules inside them.

    Args:
        names: names in the adapter's file.
        expected: names that the loaded model has places for.

    Returns:
        each of `names` with its name in the model, or with itself where that is not certain.
    """
    places: dict[str, list[str]] = {}
    for name in expected:
        places.setdefault(_inner(name), []).append(name)
    translated = {}
    for name in names:
        candidates = places.get(_inner(name), [])
        translated[name] = candidates[0] if len(candidates) == 1 else name
    # Two weights for one place: the names say too little.
    return translated if len(set(translated.values())) == len(translated) else {name: name for name in translated}


_AROUND = {"base_model", "model", "language_model", "vision_model"}


def _inner(name: str) -> str:
    """A weight's name without the modules that only hold others."""
    return ".".join(part for part in name.split(".") if part not in _AROUND)
