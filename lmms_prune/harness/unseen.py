"""Options of an evaluation that lmms-eval works into texts of which a chat model is shown nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_prune.harness.arguments import ArgumentError

_NO_EXAMPLES = "lmms-eval shows no examples to chat models, which are given a document's own messages; leave it out"
UNSEEN = {
    "num_fewshot": _NO_EXAMPLES,
    "fewshot_as_multiturn": _NO_EXAMPLES,
    "system_instruction": "lmms-eval does not show it to chat models; use --model_args system_prompt=…",
    "apply_chat_template": "the checkpoint's chat template is applied anyway; leave it out",
}
"""Why each is refused where it is set: the results would say that it was in force."""


def refuse_unseen(options: Mapping[str, Any]) -> None:
    """Refuse what would change nothing, and still be written into the results.

    Args:
        options: of the evaluation, by lmms-eval's names; others are passed by.

    Raises:
        ArgumentError: names the first that is set.
    """
    for name, why in UNSEEN.items():
        if value := options.get(name):
            raise ArgumentError(f"--{name}{'' if value is True else f' {value}'}: {why}.")
