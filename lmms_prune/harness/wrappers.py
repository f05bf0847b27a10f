"""What each of this package's lmms-eval models takes as arguments; needs neither torch nor lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.models.supported import SUPPORTED, Supported


@dataclass(frozen=True)
class Wrapper:
    """One of the lmms-eval models.

    Args:
        family: the checkpoints that it loads.
        defaults: arguments with a default of the model's own.
        refused: arguments that mean nothing for it.
    """

    family: Supported
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def read(self, given: Any, additional: Mapping[str, Any] | None) -> ModelArguments:
        """--model_args, with the harness's own --batch_size and --device in `additional`.

        Raises:
            ArgumentError, ScheduleError: see the message.
        """
        defaults = {"pretrained": self.family.default, **self.defaults}
        return ModelArguments.read(given, additional, defaults, self.refused, self.family.model_name)


_LLAVA, _QWEN = SUPPORTED
WRAPPERS: dict[str, Wrapper] = {
    wrapper.family.model_name: wrapper
    for wrapper in (
        Wrapper(_LLAVA, refused=("min_pixels", "max_pixels")),
        Wrapper(
            _QWEN,
            defaults={"min_pixels": 256 * 28 * 28, "max_pixels": 2048 * 28 * 28},
            refused=("prompt", "image_aspect"),
        ),
    )
}
"""By the name that lmms-eval knows them by."""
