"""The sizes of a checkpoint, read from its ``config.json`` or known by name. Free of torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models import FAMILIES
from lmms_prune.models.foreign import foreign_layout
from lmms_prune.models.sizes import Architecture, ArchitectureError
from lmms_prune.models.unsupported import refuse_stated_variant, why_not

PUBLISHED: dict[str, Mapping[str, Any]] = {
    name: config for family in FAMILIES.values() for name, config in family.published.items()
}
"""The parts of published checkpoints' configurations that decide sizes, by short names."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def architecture(model: str) -> Architecture:
    """The sizes of a named architecture, of a known checkpoint on the hub, of a ``config.json``, or of a checkpoint's folder.

    Raises:
        ArchitectureError: no such name or file, no JSON, or a family that is not supported.
    """
    if model in PUBLISHED:
        return from_config(PUBLISHED[model], model)
    if _HUB_NAME.fullmatch(model) and not os.path.exists(model) and (named := published_in(model)):
        return from_config(PUBLISHED[named], model)
    path = Path(model) / "config.json" if os.path.isdir(model) else Path(model)
    if os.path.isdir(model) and not path.is_file():
        raise ArchitectureError(f"the folder {model} holds no config.json, so it is no checkpoint.")
    if not os.path.isfile(path):  # unlike Path's own methods, these return False for names that are too long
        raise ArchitectureError(
            f"unknown architecture '{model}'; use {', '.join(PUBLISHED)} (or such a checkpoint's name on the hub), a "
            "config.json or a checkpoint's folder."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArchitectureError(f"{path} is no JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ArchitectureError(f"{path} holds a {type(config).__name__}; a configuration is an object.")
    return from_config(config, str(model))


def of_checkpoint(pretrained: str) -> Architecture | None:
    """The sizes of a checkpoint without a download: from a local folder, or by an architecture's name within its name.

    Returns:
        None if only the hub could tell.

    Raises:
        ArchitectureError: a folder without a ``config.json``, or of another family.
    """
    if os.path.isdir(pretrained):
        return architecture(pretrained)
    named = published_in(pretrained)
    return None if named is None else architecture(named)


def published_in(checkpoint: str) -> str | None:
    """The known architecture whose name is in a checkpoint's name; None if there is none."""
    return next((name for name in PUBLISHED if name in checkpoint.lower()), None)


def from_config(config: Mapping[str, Any], name: str) -> Architecture:
    """The sizes that a configuration states, with the library's defaults for those that it omits.

    Raises:
        ArchitectureError: the configuration is of another family or layout, states an invalid size, or a decoder or vision
            encoder that is built in another way.
    """
    if message := foreign_layout(config):
        raise ArchitectureError(f"{name} {message}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ArchitectureError(f"{name}: model_type {kind!r} is not supported{why_not(kind, map(repr, FAMILIES))}")
    sizes, text = FAMILIES[kind].architecture(config, name), config.get("text_config") or config
    try:
        refuse_stated_variant(text, FAMILIES)
    except UnsupportedModelError as error:
        raise ArchitectureError(f"{name}: {error}") from None
    return replace(sizes, tied=any(part.get("tie_word_embeddings") is True for part in (config, text)))


DEFAULT = architecture(next(iter(PUBLISHED)))
"""The architecture used if no model is named: LLaVA-1.5-7B, on which most methods were published."""
