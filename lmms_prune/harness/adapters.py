"""Loading a PEFT adapter (LoRA) into a checkpoint, with a specific message for every way in which the two do not fit."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from os.path import isdir
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError
from transformers.utils import cached_file

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.arguments import CheckpointError, ModelArguments
from lmms_prune.models.adapters import FOREIGN, refuse_adapter, renamed

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_files(name: str) -> dict[str, Path]:
    """Return an adapter's files by name: its configuration, then its weights.

    Args:
        name: a folder or a hub name.

    Raises:
        CheckpointError: there is no such adapter, or a file of it is missing; says which.
    """
    config = _file(name, CONFIG)
    if config is None:
        hint = ""
        if _file(name, "config.json"):
            hint = " It is a whole checkpoint: give it as pretrained=…, without peft."
        raise CheckpointError(
            f"model_args: peft={name} is no adapter: neither a folder with an {CONFIG} nor a hub name that can be reached.{hint}"
        )
    for file, reason in FOREIGN.items():
        if _file(name, file):
            raise CheckpointError(f"model_args: peft={name} {reason}")
    for weights in _WEIGHTS:
        if path := _file(name, weights):
            return {CONFIG: config, weights: path}
    raise CheckpointError(f"model_args: peft={name} holds no weights: there is no {' nor '.join(_WEIGHTS)}.")


def adapter_digest(name: str) -> str:
    """Return a digest of an adapter's configuration and weights; raises as `adapter_files`."""
    digest = hashlib.sha256()
    for file, path in adapter_files(name).items():
        digest.update(f"{file}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()[:16]


def refuse_adapter_as_checkpoint(arguments: ModelArguments) -> None:
    """Refuse ``pretrained`` if it names an adapter: transformers would load the base that the adapter names, unrecorded.

    Raises:
        CheckpointError: says how to give both.
    """
    name = arguments.pretrained
    config = _file(name, CONFIG, arguments.revision)
    if config is None:
        return
    base = _base(config) or "BASE"
    raise CheckpointError(
        f"model_args: pretrained={name} holds an adapter ({CONFIG}); give its base and the adapter: pretrained={base},peft={name}."
    )


def with_adapter(model: Any, arguments: ModelArguments) -> Any:
    """Put the adapter of ``peft=…`` into the layers of `model`, unmerged, as it was trained.

    Returns:
        the same model.

    Raises:
        CheckpointError: adapter and checkpoint do not fit; names both, and the first weights that have no counterpart.
        UnsupportedModelError: a kind of adapter that is not supported.
    """
    files = adapter_files(str(arguments.peft))
    # PEFT takes seconds to import.
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    _refuse_offloaded(model, arguments)
    base, folder = _base(files[CONFIG]), str(files[CONFIG].parent)
    pair = f"peft={arguments.peft} (trained on {base or 'a base that it does not name'})"
    pair += f" does not fit pretrained={arguments.pretrained}: "
    try:
        config = PeftConfig.from_pretrained(folder)
        refuse_adapter(config, f"peft={arguments.peft}")
        if wrong := _other_class(config, model):
            raise CheckpointError(pair + wrong)
        with warnings.catch_warnings():
            # PEFT asks the model for an attribute that newer versions of transformers have renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = PeftModel(model, config)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        weights = load_peft_weights(folder, device="cpu")
        names = renamed(weights, expected)
        state = {names[name]: weight for name, weight in weights.items()}
        result: Any = set_peft_model_state_dict(adapted, state)
    except (CheckpointError, UnsupportedModelError):
        raise
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        # torch names the first weight of another shape in the second line.
        raise CheckpointError(pair + " ".join(lines[:2])) from error
    if wrong := _without_counterpart([name for name in expected if name not in state], result.unexpected_keys):
        raise CheckpointError(pair + wrong)
    if base and Path(base).name.lower() != Path(arguments.pretrained).name.lower():
        logger.warning(
            "peft={} was trained on {}, and pretrained={} has another name. If it is another checkpoint, the answers are of neither.",
            *(arguments.peft, base, arguments.pretrained),
        )
    return adapted.get_base_model()


def _refuse_offloaded(model: Any, arguments: ModelArguments) -> None:
    """Refuse layers that accelerate keeps in another memory: it would not fetch the adapter's weights with theirs."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 and devices & {"cpu", "disk"}:
        raise UnsupportedModelError(
            f"peft={arguments.peft} with device_map={arguments.device_map}, which keeps layers on {' and '.join(sorted(devices))}: "
            "an adapter needs a model that fits on the GPUs; merge it into the checkpoint, or use load_in_4bit=true."
        )


def _file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a file of a folder or of a hub repository; None if there is none, or it cannot be reached."""
    if isdir(name):
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        path_in_cache = cached_file(name, file, revision=revision)
    except (OSError, ValueError):  # a name that the hub does not allow is a ValueError
        return None
    return None if path_in_cache is None else Path(path_in_cache)


def _base(config: Path) -> str | None:
    """Return the name of the checkpoint that an adapter was trained on, if its configuration holds one."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"model_args: {config} cannot be read: {error}.") from error


def _other_class(config: Any, model: Any) -> str:
    """Tell that the adapter was trained on a model of another class than `model`; "" if not, or if that is not known."""
    trained = (config.auto_mapping or {}).get("base_model_class")
    own = type(model).__name__
    return "" if trained in (None, own) else f"the adapter is of a {trained}, the checkpoint a {own}."


def _without_counterpart(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Tell how many adapter weights have no counterpart; "" if all have one."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} weights that the model has places for are not in the file ({missing[0]}, …)")
    if unexpected:
        parts.append(f"{len(unexpected)} weights in the file have no place in the model ({unexpected[0]}, …)")
    return "; ".join(parts) + "." if parts else ""
