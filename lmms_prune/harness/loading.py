"""Loading a checkpoint for evaluation: every way in which it can be the wrong one has its own message."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from lmms_prune.families import FAMILIES, Family, UnsupportedModelError, family_of
from lmms_prune.harness.arguments import ArgumentError, ModelArguments


def read_config(arguments: ModelArguments, family: Family) -> Any:
    """The checkpoint's configuration, if the checkpoint is of `family`.

    Raises:
        ArgumentError: no such checkpoint.
        UnsupportedModelError: a checkpoint of another family, or without image input.
    """
    name = arguments.pretrained
    try:
        config = AutoConfig.from_pretrained(
            name, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        message = (
            f"model_args: pretrained={name} is no checkpoint: neither a folder with a config.json nor a reachable "
        )
        raise ArgumentError(f"{message}hub name. ({reason})") from error
    found = family_of(config)
    if found != family:
        message = f"pretrained={name} is of type '{found.model_type}': use --model {found.model_name}, not {family.model_name}."
        raise UnsupportedModelError(message)
    return config


def pick_device(arguments: ModelArguments, process: int, processes: int) -> torch.device:
    """The device of this process: one CUDA device each where there are several processes.

    Raises:
        ArgumentError: there is no such device.
    """
    if arguments.device is None:
        count = torch.cuda.device_count()
        return torch.device("cuda", process % count) if count else torch.device("cpu")
    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        raise ArgumentError(f"device={arguments.device} is no device; use cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ArgumentError(f"device={arguments.device} is not supported; use cpu, cuda or cuda:N.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ArgumentError("device=mps: this machine has no Apple GPU; use cpu.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is None and count:
            device = torch.device("cuda", process % count if processes > 1 else 0)
        if device.index is None or device.index >= count:
            raise ArgumentError(
                f"device={arguments.device}: this machine has {count} CUDA devices; use cpu or another index."
            )
    return device


def load_model(arguments: ModelArguments, device: torch.device) -> Any:
    """The checkpoint's weights, in evaluation mode.

    Raises:
        ArgumentError: weights that do not belong to the configuration, or an attention kernel that is not installed.
    """
    options: dict[str, Any] = {"dtype": arguments.dtype, "device_map": arguments.device_map or str(device)}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            arguments.pretrained,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise ArgumentError(f"model_args: {str(error).strip().splitlines()[0]}") from error
    wrong = [*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])]
    if wrong:
        some = ", ".join(sorted(wrong)[:3])
        message = (
            f"pretrained={arguments.pretrained}: {len(wrong)} weights are missing or of the wrong shape ({some}, …)."
        )
        raise ArgumentError(message)
    return model.eval()


def supported_names() -> list[str]:
    """The --model names of all families."""
    return [family.model_name for family in FAMILIES.values()]
