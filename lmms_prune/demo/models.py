"""The demo's two trained models: where they are, and how lmms-eval is to load them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

LAYERS = 12  # decoder layers of both models
VISUAL_TOKENS = 144  # of a square picture, in both
WEIGHTS = Path(__file__).with_name("weights")
FILES = (  # of each model
    *("model.safetensors", "config.json", "generation_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
_MEND = "install lmms-prune again, or train it anew."


@dataclass(frozen=True)
class Model:
    """One of the two models: lmms-eval's name for its wrapper, its folder below WEIGHTS, and arguments of its own."""

    wrapper: str
    folder: str
    arguments: str


MODELS = (
    # Pictures that are not square keep their edges, and small ones their size.
    Model("llava_pruned", "tiny-llava", "image_aspect=pad"),
    Model("qwen2_5_vl_pruned", "tiny-qwen2.5-vl", "min_pixels=3136,max_pixels=200704"),
)


class DemoError(RuntimeError):
    """A task that the demo does not have, a model or data that are not there, or a folder that will not do."""


def weights(model: Model, root: Path = WEIGHTS) -> Path:
    """The folder of a trained model.

    Raises:
        DemoError: a file of it is missing, or its weights are cut short.
    """
    folder = root / model.folder
    # Without some of them transformers loads all the same, with another end token or another picture size.
    for name in FILES:
        if not (folder / name).is_file():
            raise DemoError(f"the demo's model lacks {folder / name}: {_MEND}")
    # As NumPy's: torch takes seconds to import, and may be what is broken.
    try:
        with safe_open(folder / "model.safetensors", "numpy"):
            pass
    except SafetensorError as error:
        raise DemoError(
            f"the demo's model has damaged weights, {folder / 'model.safetensors'} ({error}): {_MEND}"
        ) from error
    return folder


def model_arguments(model: Model, checkpoint: Path) -> str:
    """What lmms-eval's --model_args says of `model`, apart from a schedule."""
    # bfloat16, which the weights are in, takes a CPU without instructions for it four times as long as float32, and
    # CPUs round it in different ways.
    return f"pretrained={checkpoint},dtype=float32,batch_size=8,{model.arguments}"
