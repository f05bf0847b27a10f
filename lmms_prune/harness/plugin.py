"""The entry point of group ``lmms_eval.models``. Imports nothing heavy: lmms-eval loads it on every command."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lmms_prune.compat.names import MovedNameError
from lmms_prune.compat.versions import UnsupportedVersionError, refuse_other_versions
from lmms_prune.harness.arguments import plain_errors
from lmms_prune.models import MODEL_NAMES
from lmms_prune.record.redaction import secret_values

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def class_name(model_name: str) -> str:
    """The class of one of this package's models, as lmms-eval asks for it."""
    return "".join(part.capitalize() for part in model_name.split("_"))


def manifests() -> list[ModelManifest]:
    """The models that this plugin adds. Chat form only: it is lmms-eval's default, and needs no decord."""
    # Imported here, since lmms_eval.models loads this module while it is itself being imported.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=name, chat_class_path=f"{__name__}.{class_name(name)}") for name in MODEL_NAMES]


def __getattr__(name: str) -> Any:
    # The harness asks for a class once its model is to run. Only then may an unsupported version, or a library that has
    # moved a name, end the command: beside one, other models still run, and `lmms-prune doctor --installation` says how to
    # mend it.
    asked = {class_name(model_name): model_name for model_name in MODEL_NAMES}
    if name not in asked:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    with plain_errors(UnsupportedVersionError, MovedNameError, scope="environment"):
        refuse_other_versions()
        from lmms_prune.compat.installed import refuse_moved_names

        refuse_moved_names()
        from lmms_prune.harness import models
    # Here lmms-eval's command becomes ours: what its environment keeps secret, no file of ours may hold.
    models.PrunedModel.secrets = secret_values(os.environ)
    return models.MODELS[asked[name]]
