"""The demo's two trained checkpoints: their folders, and the arguments with which lmms-eval loads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lmms_prune.models import Family
from lmms_prune.models.architectures import architecture
from lmms_prune.models.llava import LLAVA
from lmms_prune.models.qwen2_5_vl import QWEN2_5_VL
from lmms_prune.models.sizes import Architecture

WEIGHTS = Path(__file__).with_name("weights")
FILES = (  # that each model's folder must have
    *("model.safetensors", "config.json", "generation_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
_FIX = "install lmms-prune again, or train it anew."


@dataclass(frozen=True)
class DemoCheckpoint:
    """One of the two trained checkpoints.

    Args:
        family: its model family.
        folder: its folder below WEIGHTS.
        arguments: its model arguments.
    """

    family: Family
    folder: str
    arguments: str


MODELS = (
    # Padding keeps the edges of pictures that are not square; min_pixels keeps the size of small ones.
    DemoCheckpoint(LLAVA, "tiny-llava", "image_aspect=pad"),
    DemoCheckpoint(QWEN2_5_VL, "tiny-qwen2.5-vl", "min_pixels=3136,max_pixels=200704"),
)


class DemoError(RuntimeError):
    """The demo lacks a task, a model or data, or cannot use a folder."""


def weights(model: DemoCheckpoint, root: Path = WEIGHTS) -> Path:
    """The folder of a trained model.

    Raises:
        DemoError: a file is missing, or the weights are truncated.
    """
    folder = root / model.folder
    # transformers also loads without some of these files, but with a wrong end token or picture size.
    for name in FILES:
        if not (folder / name).is_file():
            raise DemoError(f"the demo's model lacks {folder / name}: {_FIX}")
    # Opened with NumPy: torch takes seconds to import, and a broken torch must not hide the message.
    try:
        with safe_open(folder / "model.safetensors", "numpy"):
            pass
    except SafetensorError as error:
        raise DemoError(
            f"the demo's model has damaged weights, {folder / 'model.safetensors'} ({error}): {_FIX}"
        ) from error
    return folder


def sizes() -> Architecture:
    """The sizes of the first checkpoint; both have the same depth, and as many tokens for a square picture.

    Raises:
        DemoError: as `weights`.
    """
    return architecture(str(weights(MODELS[0])))


def model_arguments(model: DemoCheckpoint, checkpoint: Path) -> str:
    """The value of lmms-eval's --model_args for `model`, without a schedule."""
    # The weights are stored in bfloat16. On a CPU without bfloat16 instructions it is four times slower than float32, and
    # CPUs differ in how they round it.
    return f"pretrained={checkpoint},dtype=float32,batch_size=8,{model.arguments}"
