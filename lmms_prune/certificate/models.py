"""The models that are certified: a checkpoint of the user's, or small ones of each family with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmms_prune.certificate.case import LEAST, Subject
from lmms_prune.certificate.cells import FEWEST_LAYERS
from lmms_prune.demo.checkpoints import BUILDERS
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.loading import any_config, load_model, pick_device
from lmms_prune.models import family_of
from lmms_prune.models.parts import ModelParts


@contextmanager
def random_checkpoints() -> Iterator[dict[str, str]]:
    """Folders of random-weight checkpoints by family, with as few layers as the places need.

    Their weights are large enough that attention is sharp and every token counts, so that a wrong one shows.
    """
    with TemporaryDirectory() as root:
        yield {name: str(build(Path(root) / name, layers=FEWEST_LAYERS)) for name, build in BUILDERS.items()}


class Models:
    """Loads a checkpoint in each type that is asked for, and changes its attention kernel in place.

    Args:
        checkpoint: a folder or hub name.
        device: "cpu", "cuda" or "cuda:N"; None is CUDA if there is one.
        progress: is told what is loaded.

    Raises:
        ArgumentError, UnsupportedModelError: there is no such checkpoint, or its family is not supported.
    """

    def __init__(self, checkpoint: str, device: str | None = None, progress: Callable[[str], None] = lambda _: None):
        self.checkpoint, self.device, self.progress = checkpoint, device, progress
        self.family = family_of(any_config(self._arguments("auto"))).model_type
        self.loaded: dict[str, Any] = {}
        self.subjects: dict[tuple[str, str], Subject] = {}

    def get(self, dtype: str, attention: str) -> Subject:
        """The model in `dtype` ("auto" is the checkpoint's own) with an attention kernel.

        Raises:
            ArgumentError, UnsupportedModelError: it cannot be loaded so, or has too few layers.
        """
        if dtype not in self.loaded:
            # One at a time: the next one needs the memory.
            self.loaded.clear()
            self.subjects.clear()
            self.progress(f"loading {self.checkpoint} ({dtype})")
            self.loaded[dtype] = self._load(dtype)
        model = self.loaded[dtype]
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModelError(f"--attention {attention} cannot be had here: {reason}") from error
        if (dtype, attention) not in self.subjects:
            self.subjects[dtype, attention] = Subject(model, str(model.dtype).removeprefix("torch."))
        return self.subjects[dtype, attention]

    def _arguments(self, dtype: str) -> ModelArguments:
        given = {"pretrained": self.checkpoint, "schedule": "none", "dtype": dtype}
        return ModelArguments.read({**given, **({"device": self.device} if self.device else {})})

    def _load(self, dtype: str) -> Any:
        arguments = self._arguments(dtype)
        model = load_model(arguments, pick_device(arguments, 0, 1))
        layers, kind = len(ModelParts.of(model).layers), str(model.dtype).removeprefix("torch.")
        if layers < FEWEST_LAYERS:
            message = f"{self.checkpoint} has {layers} decoder layers; a certificate needs at least {FEWEST_LAYERS}."
            raise UnsupportedModelError(message)
        if kind not in LEAST:
            raise UnsupportedModelError(f"{self.checkpoint} is in {kind}; use --dtype {', '.join(LEAST)}.")
        return model
