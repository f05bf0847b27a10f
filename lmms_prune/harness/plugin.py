"""The entry point of the group ``lmms_eval.models``. It imports nothing heavy, since lmms-eval loads it on every command."""

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
    """Return the class name of a model, by which lmms-eval imports it."""
    return "".join(part.capitalize() for part in model_name.split("_"))


def manifests() -> list[ModelManifest]:
    """Return the manifests of this plugin's models. They have only the chat form, lmms-eval's default, which needs no decord."""
    # Imported here, because lmms_eval.models loads this module during its own import.
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=name, chat_class_path=f"{__name__}.{class_name(name)}") for name in MODEL_NAMES]


def environment_secrets() -> tuple[str, ...]:
    """Return the environment's secrets, which no file of this package may contain."""
    return secret_values(os.environ)


def __getattr__(name: str) -> Any:
    # lmms-eval requests a class only when its model is to run. Only then may an unsupported version, or a library that
    # moved a name, end the command: other models still run, and `lmms-prune doctor --installation` says how to fix it.
    model_names = {class_name(model_name): model_name for model_name in MODEL_NAMES}
    if name not in model_names:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    with plain_errors(UnsupportedVersionError, MovedNameError, scope="environment"):
        refuse_other_versions()
        from lmms_prune.compat.installed import refuse_moved_names

        refuse_moved_names()
        from lmms_prune.harness import models
    # From here on this package writes files, which must not contain the environment's secrets.
    models.PrunedModel.secrets = environment_secrets()
    return models.MODELS[model_names[name]]
