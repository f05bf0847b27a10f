"""The models to certify: the user's checkpoint, or a small checkpoint with random weights for each family."""

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
from lmms_prune.harness.arguments import ModelArguments, weight_arguments
from lmms_prune.harness.loading import any_config, installed_kernel, load_model, pick_device, refuse_kernel
from lmms_prune.models import family_of
from lmms_prune.models.parts import ModelParts


@contextmanager
def random_checkpoints() -> Iterator[dict[str, str]]:
    """Build checkpoints with random weights in a temporary folder and yield their paths by family.

    They have as few layers as a certificate allows. Their weights are large enough to make attention sharp, so that
    every token matters and a single wrong token is detected.
    """
    with TemporaryDirectory() as root:
        yield {name: str(build(Path(root) / name, layers=FEWEST_LAYERS)) for name, build in BUILDERS.items()}


class Models:
    """A loader of one checkpoint in any dtype and with any attention kernel.

    Only one dtype is loaded at a time. The attention kernel is changed in place.

    Args:
        checkpoint: a folder or hub name.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: called with a message before each load.
        model_args: further arguments about the weights, as for lmms-eval's ``--model_args``: peft=…, load_in_4bit=true.

    Raises:
        ArgumentError: there is no such checkpoint.
        UnsupportedModelError: its family is not supported.
    """

    def __init__(
        self,
        checkpoint: str,
        device: str = "auto",
        progress: Callable[[str], None] = lambda _: None,
        model_args: str = "",
    ):
        self.checkpoint, self.device, self.progress = checkpoint, device, progress
        self.further = weight_arguments(model_args, ("dtype", "device", "attn_implementation"))
        self.family = family_of(any_config(self._arguments("auto"))).model_type
        self.loaded: dict[str, Any] = {}
        self.subjects: dict[tuple[str, str], Subject] = {}

    def get(self, dtype: str, attention: str) -> Subject:
        """Return the model in `dtype` ("auto" is the checkpoint's own) with an attention kernel.

        Raises:
            ArgumentError: the checkpoint cannot be loaded with these options.
            UnsupportedModelError: the kernel or the dtype is not supported, or the model has too few layers.
        """
        if dtype not in self.loaded:
            # Free the previous model first: memory may not hold two.
            self.loaded.clear()
            self.subjects.clear()
            self.progress(f"{self.checkpoint} ({dtype})")
            self.loaded[dtype] = self._load(dtype)
        model = self.loaded[dtype]
        try:
            with installed_kernel(attention):
                model.set_attn_implementation(attention)
            refuse_kernel(model, attention)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"--attention {attention}: {error}") from error
        if (dtype, attention) not in self.subjects:
            self.subjects[dtype, attention] = Subject(model, str(model.dtype).removeprefix("torch."))
        return self.subjects[dtype, attention]

    def _arguments(self, dtype: str) -> ModelArguments:
        arguments = {"pretrained": self.checkpoint, "schedule": "none", "dtype": dtype, "device": self.device}
        return ModelArguments.read({**arguments, **self.further})

    def _load(self, dtype: str) -> Any:
        arguments = self._arguments(dtype)
        model = load_model(arguments, pick_device(arguments, 0, 1))
        layers, loaded_dtype = len(ModelParts.of(model).layers), str(model.dtype).removeprefix("torch.")
        if layers < FEWEST_LAYERS:
            message = f"{self.checkpoint} has {layers} decoder layers; a certificate needs at least {FEWEST_LAYERS}."
            raise UnsupportedModelError(message)
        if loaded_dtype not in LEAST:
            message = f"{self.checkpoint} has the dtype {loaded_dtype}; use --dtype {', '.join(LEAST)}."
            raise UnsupportedModelError(message)
        return model
