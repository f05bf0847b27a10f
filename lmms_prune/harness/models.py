"""The lmms-eval models, one per family: an unmodified checkpoint behind lmms-eval's chat interface, with pruning."""

from __future__ import annotations

from lmms_prune.errors import did_you_mean
from lmms_prune.harness.argument_text import ArgumentError, extended, split
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.loading import any_config
from lmms_prune.harness.plugin import class_name
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.models import MODEL_NAMES, family_of

MODELS: dict[str, type[PrunedModel]] = {
    name: type(class_name(name), (PrunedModel,), {"family": family, "__doc__": family.__doc__, "__module__": __name__})
    for name, family in MODEL_NAMES.items()
}
"""Model classes by lmms-eval's name of the model."""


def as_lmms_eval(checkpoint: str | None, wrapper: str | None, model_args: str) -> tuple[str, str]:
    """Return what lmms-eval's ``--model`` and ``--model_args`` are for a command's ``--model``, ``--wrapper`` and ``--model-args``.

    Args:
        checkpoint: a folder or hub name; None for the wrapper's default checkpoint.
        wrapper: a name of `MODELS`; None for the one that loads the checkpoint.
        model_args: further arguments, without a checkpoint and without a schedule.

    Raises:
        ArgumentError: an unknown wrapper, one that does not load the checkpoint, or an argument that is an option of its own.
        UnsupportedModelError: the checkpoint's family is not supported.
    """
    if wrapper is not None and wrapper not in MODELS:
        raise ArgumentError(f"--wrapper {wrapper} is unknown.{did_you_mean(wrapper, list(MODELS))}")
    if checkpoint in MODELS:
        raise ArgumentError(
            f"--model {checkpoint}: this is lmms-eval's name of a model; write --wrapper {checkpoint}, and the checkpoint's "
            "folder or hub name as --model."
        )
    refuse_own(model_args)
    if "pretrained" in split(model_args):
        raise ArgumentError("--model-args pretrained=…: the command has the option --model for it; leave it out.")
    if checkpoint is None:
        return wrapper or next(iter(MODELS)), model_args
    arguments = extended(model_args, {"pretrained": checkpoint})
    family = family_of(any_config(ModelArguments.read(arguments)))
    if wrapper not in (None, family.model_name):
        raise ArgumentError(
            f"--wrapper {wrapper}: {checkpoint} is a {family.title}, which {family.model_name} loads; leave --wrapper out."
        )
    return family.model_name, arguments


def unpruned(model: str, model_args: str) -> PrunedModel:
    """Make the model of ``lmms-eval --model … --model_args …``, for commands that decide themselves what is pruned.

    Args:
        model: a name of `MODELS`.
        model_args: as for lmms-eval, without a schedule.

    Raises:
        ArgumentError: a schedule, or what `ModelArguments` does not allow.
    """
    refuse_own(model_args)
    return MODELS[model].create_from_arg_string(model_args)


def refuse_own(model_args: str) -> None:
    """Refuse arguments that a command which decides itself what is pruned sets.

    Raises:
        ArgumentError: a schedule, budget or journal among `model_args`.
    """
    for name in ("schedule", "budget", "journal"):
        if name in split(model_args):
            what = "keeps what it has done" if name == "journal" else "decides what is pruned"
            raise ArgumentError(f"--model-args {name}=…: the command itself {what}; leave it out.")
