"""Loading a checkpoint for evaluation, with a specific message for every way in which it can be unusable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.adapters import refuse_adapter_as_checkpoint, with_adapter
from lmms_prune.harness.arguments import ArgumentError, CheckpointError, ModelArguments
from lmms_prune.harness.quantisation import loading_options, refuse_stored, refuse_widths
from lmms_prune.models import Family, family_of
from lmms_prune.models.foreign import foreign_layout
from lmms_prune.models.kernels import KERNELS, how_to_get, refusal

# inv_freq is computed at load time, but older files contain it.
_IN_A_LAYER = re.compile(r"\.(layers|blocks|h)\.\d+\.(?!.*inv_freq$)")
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def read_config(arguments: ModelArguments, family: Family) -> Any:
    """Read the checkpoint's configuration; the checkpoint must be of `family`.

    Raises:
        CheckpointError: no such checkpoint.
        UnsupportedModelError: a checkpoint of another family, or without image input.
    """
    config = any_config(arguments)
    actual = family_of(config)
    if actual != family:
        message = (
            f"pretrained={arguments.pretrained} is of type '{actual.model_type}': use --model {actual.model_name}, "
        )
        raise UnsupportedModelError(message + f"not {family.model_name}.")
    return config


def any_config(arguments: ModelArguments) -> Any:
    """Read the checkpoint's configuration, for any family.

    Raises:
        CheckpointError: no such checkpoint.
        UnsupportedModelError: a layout or a stored quantisation that cannot be loaded.
    """
    name = arguments.pretrained
    refuse_adapter_as_checkpoint(arguments)
    try:
        _refuse_layout(arguments)
        return AutoConfig.from_pretrained(
            name, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
        )
    except (ArgumentError, UnsupportedModelError):
        raise
    except (OSError, ValueError, KeyError) as error:
        message = (
            f"model_args: pretrained={name} is no checkpoint: neither a folder with a config.json nor a hub name that "
        )
        raise CheckpointError(f"{message}can be reached. ({str(error).strip().splitlines()[0]})") from error


def _refuse_layout(arguments: ModelArguments) -> None:
    """Refuse a ``config.json`` that transformers misreads or that states a quantisation which is not supported.

    It is read as it is: a LLaVA of the original layout is also of the type "llava", and would get default sizes.
    """
    content, _ = PreTrainedConfig.get_config_dict(arguments.pretrained, revision=arguments.revision)
    if message := foreign_layout(content):
        raise CheckpointError(f"pretrained={arguments.pretrained} {message}")
    refuse_stored(content, arguments)


def pick_device(arguments: ModelArguments, process: int, processes: int) -> torch.device:
    """Return the device of this process; several processes use one CUDA device each.

    Raises:
        ArgumentError: there is no such device.
    """
    spread = arguments.device_map in _SPREAD
    if spread and processes > 1:
        raise ArgumentError(
            f"device_map={arguments.device_map} spreads one model; with {processes} processes each has its own."
        )
    if arguments.device_map and arguments.device and arguments.device_map != arguments.device:
        message = f"device={arguments.device} contradicts device_map={arguments.device_map}; give one of them."
        raise ArgumentError(message)
    if arguments.device_map and not spread:
        return _existing("device_map", arguments.device_map, process if processes > 1 else 0)
    if arguments.device is None:
        count = torch.cuda.device_count()
        return torch.device("cuda", process % count) if count else torch.device("cpu")
    return _existing("device", arguments.device, process if processes > 1 else 0)


def _existing(argument: str, name: str, default: int) -> torch.device:
    """Return the device that `argument` names; a plain "cuda" becomes the CUDA device with index `default`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"{argument}={name} is no device; use cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ArgumentError(f"{argument}={name} is not supported; use cpu, cuda or cuda:N.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ArgumentError(f"{argument}=mps: this machine has no Apple GPU; use cpu.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index if device.index is not None else (default % count if count else 0)
        if index >= count:
            raise ArgumentError(f"{argument}={name}: this machine has {count} CUDA devices; use cpu or another index.")
        return torch.device("cuda", index)
    return device


def load_processor(arguments: ModelArguments, **options: Any) -> Any:
    """Load the checkpoint's processor: tokenizer, image processor and chat template.

    Raises:
        CheckpointError: the checkpoint has none, or a broken one.
    """
    with _unloadable(arguments, "processor or tokenizer files"):
        return AutoProcessor.from_pretrained(
            arguments.pretrained,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            **options,
        )


@contextmanager
def _unloadable(arguments: ModelArguments, what: str) -> Iterator[None]:
    """Turn the libraries' various errors about a broken checkpoint into one message that names it."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except (ImportError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"pretrained={arguments.pretrained}: its {what} cannot be loaded: {reason}") from error


@contextmanager
def shared_weights() -> Iterator[None]:
    """Inside this context equal weights are loaded once; later requests get the model already loaded.

    They stay in memory until the context ends. Every run leaves the shared model unchanged.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


_SHARED: ContextVar[dict[tuple[Any, ...], Any] | None] = ContextVar("shared weights", default=None)


def load_model(arguments: ModelArguments, device: torch.device) -> Any:
    """Load the checkpoint's weights, in evaluation mode.

    Raises:
        CheckpointError: weights are missing, of another shape or left over in a layer.
        UnsupportedModelError: the attention kernel is not installed, or does not compute in this dtype or on this device.
    """
    # `pick_device` has already turned a plain "cuda" into this process's device.
    where = arguments.device_map if arguments.device_map in _SPREAD else str(device)
    shared = _SHARED.get()
    if shared is None:
        return _loaded(arguments, where)
    key = (*arguments.weights(), where)
    if key not in shared:
        shared[key] = _loaded(arguments, where)
    return shared[key]


def _loaded(arguments: ModelArguments, where: str) -> Any:
    options: dict[str, Any] = {"dtype": arguments.dtype, "device_map": where}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    config = any_config(arguments)
    family = family_of(config)
    arguments.refuse_other_families(family)
    options |= loading_options(arguments, config)
    with _unloadable(arguments, "weights"), installed_kernel(arguments.attn_implementation):
        model, info = AutoModelForImageTextToText.from_pretrained(
            arguments.pretrained,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            output_loading_info=True,
            # Wrong shapes then appear in `info`, like missing weights, instead of in a report of many lines.
            ignore_mismatched_sizes=True,
            **options,
        )
    wrong = [*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])]
    if wrong:
        listed = ", ".join(sorted(wrong)[:3])
        message = (
            f"pretrained={arguments.pretrained}: {len(wrong)} weights are missing or of the wrong shape ({listed}, …)."
        )
        raise CheckpointError(message)
    # An unused head may be left over, but a left-over weight of a layer means that answers would be computed without it.
    left_over = [key for key in info["unexpected_keys"] if _IN_A_LAYER.search(key)]
    if left_over:
        raise CheckpointError(
            f"pretrained={arguments.pretrained}: {len(left_over)} weights have no place in the model ({', '.join(sorted(left_over)[:3])}, "
            "…): its config.json describes another model, or adapters were not merged (give an adapter as peft=…)."
        )
    if arguments.attn_implementation:
        refuse_kernel(model, arguments.attn_implementation)
    refuse_widths(model, arguments)
    if arguments.peft is not None:
        model = with_adapter(model, arguments)
    family.prepare_model(model, arguments)
    return model.eval()


@contextmanager
def installed_kernel(kernel: str | None) -> Iterator[None]:
    """Inside this context a model is given the attention kernel `kernel`.

    Raises:
        UnsupportedModelError: the kernel is not installed, or there is no GPU for it; says how to get it.
    """
    try:
        yield
    except (ImportError, ValueError) as error:
        if kernel is None or not KERNELS[kernel].source or "FlashAttention" not in str(error).replace(" ", ""):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{kernel} is not available here: {reason} {how_to_get(kernel)}") from error


def refuse_kernel(model: Any, kernel: str) -> None:
    """Refuse a model in a dtype or on a device in which its attention kernel does not compute.

    Raises:
        UnsupportedModelError: names the kernel, the dtype or device, and the fix.
    """
    if message := refusal(kernel, str(model.dtype).removeprefix("torch."), str(model.device)):
        raise UnsupportedModelError(message)
