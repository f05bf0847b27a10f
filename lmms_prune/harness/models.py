"""The lmms-eval models, one per family: an unmodified checkpoint behind lmms-eval's chat interface, with pruning."""

from __future__ import annotations

from lmms_prune.harness.argument_text import ArgumentError, split
from lmms_prune.harness.plugin import class_name
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.models import MODEL_NAMES

MODELS: dict[str, type[PrunedModel]] = {
    name: type(class_name(name), (PrunedModel,), {"family": family, "__doc__": family.__doc__, "__module__": __name__})
    for name, family in MODEL_NAMES.items()
}
"""Model classes by lmms-eval's name of the model."""


def unpruned(model: str, model_args: str) -> PrunedModel:
    """Make the model of ``lmms-eval --model … --model_args …``, for commands that decide themselves what is pruned.

    Args:
        model: a name of `MODELS`.
        model_args: as for lmms-eval, without a schedule.

    Raises:
        ArgumentError: an unknown model, a schedule, or what `ModelArguments` does not allow.
    """
    if model not in MODELS:
        raise ArgumentError(f"--model {model} is unknown; use {' or '.join(MODELS)}.")
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
            raise ArgumentError(f"--model_args {name}=…: the command itself {what}; leave it out.")
