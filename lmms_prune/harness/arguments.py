"""The arguments of --model_args, from a text (pairs or JSON), a YAML mapping or a dict."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from lmms_prune.compat.lmms_eval import under_the_command
from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.harness.argument_text import ArgumentError, split
from lmms_prune.harness.calibrations import StoredCalibrationError, calibration_file, kept_schedule
from lmms_prune.harness.failures import NOTES, OURS, Scope
from lmms_prune.models import Family
from lmms_prune.models.kernels import KERNELS
from lmms_prune.schedule import Schedule

_OF_ONE_FAMILY = ("unpad",)  # arguments that only families have which name them
WEIGHTS = (
    *("pretrained", "revision", "dtype", "device", "device_map", "attn_implementation", "trust_remote_code"),
    *("peft", "load_in_4bit", "load_in_8bit", *_OF_ONE_FAMILY),
)
"""Arguments that decide which weights are loaded, how, and how the loaded model is changed."""
_RECORDED_WHERE_SET = ("peft", "load_in_4bit", "load_in_8bit", *_OF_ONE_FAMILY)


class CheckpointError(ArgumentError):
    """A checkpoint that cannot be used with any other arguments either."""


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of --model_args. Every field that can change an answer is part of the run's identity.

    Args:
        pretrained: a checkpoint's folder or hub name.
        schedule: the pruning schedule, parsed from a text, a preset or a list of stages; "auto" is the one that
            ``lmms-prune calibrate`` found for the checkpoint at the budget. Default: no pruning.
        budget: the budget that the schedule's one ``?`` is solved for; see `lmms_prune.schedule.budgets`: 192t, 0.5, flops=40%, kv=100MiB.
        positions: "original" position ids, or "compact" (renumbered after every stage; LLaVA only).
        seed: seed of every random draw.
        batch_size: number of rows generated together; "auto" adapts it to the GPU's memory.
        revision, dtype, device, device_map, attn_implementation, trust_remote_code, use_cache: as in transformers.
            dtype "auto" is the checkpoint's dtype; device "auto", the default, is CUDA if there is one, else the CPU.
        peft: a PEFT adapter (LoRA) of the checkpoint: a folder or hub name.
        load_in_4bit, load_in_8bit: quantise the weights while loading, with bitsandbytes.
        prompt: LLaVA only: "hf" is the checkpoint's chat template, "vicuna" is LLaVA-1.5's own evaluation prompt.
        image_aspect: LLaVA only: "crop" is the checkpoint's image processor, "pad" pads to a square first, as in
            LLaVA-1.5's own evaluation.
        unpad: LLaVA-NeXT only: whether what the tiles hold beyond the image is cut off and rows end with newline tokens, as
            in the library; false keeps all patches of all tiles, without newline tokens, as papers do that count 2,880.
        min_pixels, max_pixels: Qwen only: bounds of the pixels to which an image is resized.
        system_prompt: a system message, or a file that contains one.
        chat_template: a Jinja template, or a file that contains one, instead of the checkpoint's.
        journal: a folder to which every finished batch is written immediately, so that the same run, started again,
            continues from there. Not part of the identity.
    """

    pretrained: str
    schedule: Schedule = Schedule()
    budget: str | None = None
    positions: str = "original"
    seed: int = 0
    batch_size: int | str = 1
    revision: str = "main"
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    use_cache: bool = True
    peft: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    prompt: str = "hf"
    image_aspect: str = "crop"
    unpad: bool | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    system_prompt: str | None = None
    chat_template: str | None = None
    journal: str | None = None

    @classmethod
    def read(
        cls,
        model_args: Any,
        additional: Mapping[str, Any] | None = None,
        family: Family | None = None,
    ) -> ModelArguments:
        """Read --model_args and the harness's own --batch_size and --device.

        Args:
            model_args: the text or mapping after --model_args.
            additional: lmms-eval's own options; --model_args overrides its default batch size (the int 1).
            family: the family whose defaults hold and whose inapplicable arguments are refused; None if only weights are
                loaded.

        Raises:
            ArgumentError, ScheduleError: see the message.
        """
        if model_args and not isinstance(model_args, (str, Mapping)):
            raise ArgumentError(f"model_args: {model_args!r} is neither a text nor a mapping.")
        values = split(model_args) if isinstance(model_args, str) else dict(model_args or {})
        refused = () if family is None else (*family.refused, *(set(_OF_ONE_FAMILY) - set(family.arguments)))
        known = [field.name for field in fields(cls) if field.name not in refused]
        for name in values:
            if name not in known:
                hint = " It is for another model family." if name in refused else did_you_mean(str(name), known)
                raise ArgumentError(f"model_args: unknown argument '{name}'.{hint}")
        for name in ("batch_size", "device"):
            outer = (additional or {}).get(name)
            if outer is None or (name == "batch_size" and outer == 1 and not isinstance(outer, str)):
                continue
            if name in values and str(values[name]) != str(outer):
                message = f"model_args: {name}={values[name]} contradicts --{name} {outer}; say it once."
                raise ArgumentError(message)
            values[name] = outer
        is_auto = str(values.get("schedule", "")).strip() == "auto"
        if is_auto:
            del values["schedule"]
        read = {name: _read(name, value) for name, value in values.items() if value is not None}
        defaults = {} if family is None else {"pretrained": family.checkpoint, **family.defaults}
        arguments = cls(**{**defaults, **read})
        if is_auto:
            arguments = replace(arguments, schedule=_kept_schedule(arguments), budget=None)
        low, high = arguments.min_pixels, arguments.max_pixels
        if low and high and low > high:
            raise ArgumentError(f"model_args: min_pixels={low} is more than max_pixels={high}; set both.")
        if arguments.load_in_4bit and arguments.load_in_8bit:
            raise ArgumentError(
                "model_args: load_in_4bit=true and load_in_8bit=true exclude each other; give one of them."
            )
        return arguments

    def refuse_combinations(self, family: Family) -> None:
        """Refuse arguments that contradict each other.

        Args:
            family: the model's family.

        Raises:
            ArgumentError: names them and the fix.
        """
        if self.schedule.stages and not self.use_cache:
            raise ArgumentError("use_cache=false prunes anew at every generated token; leave it out with a schedule.")
        if self.positions == "compact" and not family.renumbers:
            message = "positions=compact would destroy the height and width channels of M-RoPE; use positions=original."
            raise ArgumentError(message)
        if self.chat_template is not None and self.prompt == "vicuna":
            raise ArgumentError("prompt=vicuna and chat_template both say how to prompt; give one of them.")

    def refuse_other_families(self, family: Family) -> None:
        """Refuse an argument of another family, where the family was not known when the arguments were read.

        Args:
            family: the checkpoint's.

        Raises:
            ArgumentError: names it and the family.
        """
        for name in set(_OF_ONE_FAMILY) - set(family.arguments):
            if (value := getattr(self, name)) is not None:
                message = (
                    f"model_args: {name}={value} is for another model family; {self.pretrained} is a {family.title}."
                )
                raise ArgumentError(message)

    @property
    def quantisation(self) -> str | None:
        """The argument that quantises the weights while they are loaded; None if they stay as they are."""
        return next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(self, name)), None)

    def weights(self) -> tuple[str, ...]:
        """Return the values that decide which weights are loaded, and how, as texts."""
        return tuple(str(getattr(self, name)) for name in WEIGHTS)

    def settings(self) -> dict[str, str]:
        """Return all values that can change an answer, as texts by name; equal settings give equal answers."""
        excluded = ("budget", "journal", *(field.name for field in fields(self) if self._unset(field)))
        return {field.name: str(getattr(self, field.name)) for field in fields(self) if field.name not in excluded}

    def _unset(self, field: Field[Any]) -> bool:
        """Whether an argument that older records do not know is not in use: they stay comparable with this run's."""
        return field.name in _RECORDED_WHERE_SET and getattr(self, field.name) == field.default


def weight_arguments(model_args: str, options: Sequence[str] = ()) -> dict[str, str]:
    """Read the --model-args of a command that runs no task: only what decides which weights are loaded has a meaning there.

    Args:
        model_args: the text.
        options: arguments that are options of the command.

    Raises:
        ArgumentError: another argument, or one of `options`.
    """
    values = split(model_args)
    known = [name for name in WEIGHTS if name not in ("pretrained", *options)]
    for name in values:
        if name in ("pretrained", *options):
            option = "model" if name == "pretrained" else "attention" if name == "attn_implementation" else name
            raise ArgumentError(f"--model-args {name}=…: the command has the option --{option} for it; leave it out.")
        if name not in known:
            raise ArgumentError(f"--model-args {name}=…: without a task, only {', '.join(known)} have an effect.")
    return values


@contextmanager
def plain_errors(*errors: type[Exception], scope: Scope = "run") -> Iterator[None]:
    """End the lmms-eval command with an error's message and a nonzero exit code; outside the command, raise the error.

    lmms-eval prints a stack trace for every exception and exits with 0, so that CI takes a failed run for a good one.
    A user's mistake is reported by its message alone, with code 2; any other error with its stack trace and code 1.

    Args:
        errors: further error types that are reported by their message alone.
        scope: which runs share a failure here; a `CheckpointError` is always shared by all runs of the checkpoint.
    """
    try:
        yield
    except Exception as error:
        if not under_the_command():
            raise
        plain = isinstance(error, (ArgumentError, ScheduleError, *errors))
        if not plain:
            traceback.print_exc()
        message = str(error) if plain else f"{type(error).__name__}: {error}"
        note = NOTES.get("checkpoint" if isinstance(error, CheckpointError) else scope)
        print(*filter(None, (note, f"{OURS} {message}")), sep="\n", file=sys.stderr, flush=True)
        raise SystemExit(2 if plain else 1) from None


_CHOICES = {
    "positions": ("original", "compact"),
    "prompt": ("hf", "vicuna"),
    "image_aspect": ("crop", "pad"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "attn_implementation": tuple(KERNELS),
}
_DEVICE_MAP = re.compile(r"auto|balanced|balanced_low_0|sequential|cpu|mps|cuda(:[0-9]+)?")
_LOWEST = {"seed": 0, "batch_size": 1, "min_pixels": 1, "max_pixels": 1}
_FLAGS = ("trust_remote_code", "use_cache", "load_in_4bit", "load_in_8bit", "unpad")


def _read(name: str, value: Any) -> Any:
    """Convert the value of one argument to its type."""
    if name == "schedule":
        return Schedule.parse(value)
    text = str(value).strip()
    if name in _CHOICES:
        if text not in _CHOICES[name]:
            raise ArgumentError(f"model_args: {name}={text} is not possible.{did_you_mean(text, _CHOICES[name])}")
        return text
    if (name, text) == ("batch_size", "auto"):
        return text
    if (name, text) == ("device", "auto"):
        return None
    if name in _LOWEST:
        # Longer numbers do not fit a generator's seed, and Python refuses to parse thousands of digits.
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < _LOWEST[name]:
            also = " or auto" if name == "batch_size" else ""
            raise ArgumentError(f"model_args: {name}={text} must be a whole number of at least {_LOWEST[name]}{also}.")
        return int(text)
    if name == "device_map" and not _DEVICE_MAP.fullmatch(text):
        raise ArgumentError(
            f"model_args: device_map={text} is not possible; use auto, balanced, sequential or a device."
        )
    if name in _FLAGS:
        if text.lower() not in ("true", "false"):
            raise ArgumentError(f"model_args: {name}={text} must be true or false.")
        return text.lower() == "true"
    if not text:
        raise ArgumentError(f"model_args: {name} is empty.")
    return text


def _kept_schedule(arguments: ModelArguments) -> Schedule:
    """Return the calibrated schedule that ``schedule=auto`` stands for."""
    if arguments.budget is None:
        raise ArgumentError("model_args: schedule=auto needs a budget: schedule=auto,budget=192t or budget=0.5.")
    path = calibration_file(arguments.pretrained, arguments.budget, adapter=arguments.peft)
    try:
        text = kept_schedule(path)
    except StoredCalibrationError as error:
        raise ArgumentError(f"model_args: schedule=auto: {error}") from None
    if text is None:
        checkpoint = arguments.pretrained + (f" --model-args peft={arguments.peft}" if arguments.peft else "")
        raise ArgumentError(
            f"model_args: schedule=auto: {arguments.pretrained} was not yet calibrated at budget {arguments.budget} (there "
            f"is no {path}). Do it with:\n  lmms-prune calibrate --model {checkpoint} --tasks mme,textvqa_val "
            f"--budget {arguments.budget}"
        )
    return Schedule.parse(text)
