"""The table of model families, one object per architecture. Free of torch."""

from __future__ import annotations

from typing import Any

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.family import Family
from lmms_prune.models.llava import LLAVA
from lmms_prune.models.llava_next import LLAVA_NEXT
from lmms_prune.models.qwen2_5_vl import QWEN2_5_VL
from lmms_prune.models.qwen2_vl import QWEN2_VL
from lmms_prune.models.qwen3_vl import QWEN3_VL
from lmms_prune.models.unsupported import refuse_variant, why_not

__all__ = ["FAMILIES", "MODEL_NAMES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAVA, LLAVA_NEXT, QWEN2_5_VL, QWEN2_VL, QWEN3_VL)
}
"""By ``config.model_type``."""
MODEL_NAMES: dict[str, Family] = {family.model_name: family for family in FAMILIES.values()}
"""By the name under which lmms-eval finds this package's model."""


def family_of(config: Any) -> Family:
    """The family of a checkpoint's configuration.

    Raises:
        UnsupportedModelError: the family is not supported, or not with such a decoder; names what is supported.
    """
    model_type = getattr(config, "model_type", None)
    known = [f"{family.model_type} (--model {name})" for name, family in MODEL_NAMES.items()]
    if model_type in FAMILIES:
        refuse_variant(config.get_text_config(), known)
        return FAMILIES[model_type]
    reason = "has no image input or" if not hasattr(config, "vision_config") else "is a vision-language model that"
    raise UnsupportedModelError(f"model type '{model_type}' {reason} is not supported{why_not(model_type, known)}")
