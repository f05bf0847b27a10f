"""The entry point of group ``lmms_eval.models``. Imports nothing heavy: lmms-eval loads it on every command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """The models that this plugin adds. Chat form only: it is lmms-eval's default, and needs no decord."""
    # Imported here, since lmms_eval.models loads this module while it is itself being imported.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(model_id="llava_pruned", chat_class_path="lmms_prune.harness.models.LlavaPruned"),
        ModelManifest(model_id="qwen2_5_vl_pruned", chat_class_path="lmms_prune.harness.models.Qwen25VLPruned"),
    ]
